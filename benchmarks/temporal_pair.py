"""Next-item quality of this code against an earlier version of it, paired on the same users, by several trainings.

    git worktree add BEFORE COMMIT
    python benchmarks/temporal_pair.py BEFORE --dataset amazon-office --data_path FOLDER --seeds 3

Both versions train LLMTwoTower with their defaults through their own ``benchmarks/temporal.py``, each training in a process of
its own: leave one out by time, items of the history without a place, histories at test hold the validation item. The figure of a
user is the mean over the seeds; the interval is a paired bootstrap over users. A run that was stopped goes on with the trainings
in ``--work``.
"""

import argparse
import json
import os
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import numpy as np
from timing import machine

from recbole_llm.bridge.experiments.significance import paired_bootstrap

# runs in the tree whose benchmarks/ is the working directory, which temporal.py puts first on the path
TRAINING = """
import argparse, json, resource, sys
import temporal
dataset, data_path, work, seed, file = sys.argv[1:]
arguments = argparse.Namespace(
    dataset=dataset, data_path=data_path or None, work=work, seconds=float("inf"), stopping_step=10)
report = temporal.train("LLMTwoTower", arguments, {"seed": int(seed)})
used = resource.getrusage(resource.RUSAGE_SELF)
report["cpu_seconds"], report["peak_mib"] = round(used.ru_utime + used.ru_stime, 1), round(used.ru_maxrss / 1024)
json.dump(report, open(file, "w"))
"""


def training(tree: Path, name: str, seed: int, arguments: argparse.Namespace) -> dict[str, Any]:
    """Train one version with one seed, or read what an earlier run of this program found."""
    work = Path(arguments.work).resolve() / arguments.dataset
    work.mkdir(parents=True, exist_ok=True)
    file = work / f"{name}-{seed}.json"
    if not file.is_file():
        data_path = str(Path(arguments.data_path).resolve()) if arguments.data_path else ""
        unfinished = file.with_suffix(".unfinished")
        command = [sys.executable, "-c", TRAINING, arguments.dataset, data_path, str(work), str(seed), str(unfinished)]
        path = os.pathsep.join(map(str, (tree / "benchmarks", tree, tree / "kernels")))
        subprocess.run(command, cwd=work, env=os.environ | {"PYTHONPATH": path}, check=True)
        unfinished.replace(file)
    report = json.loads(file.read_text(encoding="utf-8"))
    print(f"{name}, seed {seed}: NDCG@10 {report['masked']['ndcg@10']:.4f}, {report['cpu_seconds']} s", flush=True)
    return report


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("before", type=Path, help="folder with the earlier version's files")
    parser.add_argument("--dataset", "-d", default="ml-100k")
    parser.add_argument("--data_path", default=None, help="folder of the dataset; ml-100k needs none")
    parser.add_argument("--seeds", type=int, default=3, help="trainings of each version; the first seed is 2020")
    parser.add_argument("--work", default="temporal_pair", help="trainings, so that a stopped run goes on")
    parser.add_argument("--output", default=None, help="JSON; default benchmarks/results/temporal_pair-<dataset>.json")
    arguments = parser.parse_args()
    trees = {"before": arguments.before.resolve(), "now": ROOT}
    seeds = [2020 + number for number in range(arguments.seeds)]
    trainings: dict[str, list[dict[str, Any]]] = {name: [] for name in trees}
    for seed in seeds:
        for name, tree in trees.items():
            trainings[name].append(training(tree, name, seed, arguments))
    users = {name: np.mean([report["masked"]["users"] for report in found], 0) for name, found in trainings.items()}
    difference = paired_bootstrap(users["now"], users["before"])
    versions = {
        name: {
            "ndcg@10": float(users[name].mean()),
            "seeds": [
                {
                    "seed": seed,
                    "valid": report["valid"],
                    **{key: report["masked"][key] for key in ("ndcg@10", "recall@10")},
                    **{key: report[key] for key in ("cpu_seconds", "peak_mib", "commit")},
                }
                for seed, report in zip(seeds, found, strict=True)
            ],
        }
        for name, found in trainings.items()
    }
    result = {
        "benchmark": "temporal_pair",
        "dataset": arguments.dataset,
        "protocol": "order TO, leave one out, items of the history without a place; defaults; mean over seeds, paired",
        "users": len(users["now"]),
        **versions,
        "difference": vars(difference),
        "machine": machine("cpu"),
    }
    output = Path(arguments.output or ROOT / f"benchmarks/results/temporal_pair-{arguments.dataset}.json")
    output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"difference {difference.mean:+.4f} [{difference.low:+.4f}, {difference.high:+.4f}], p {difference.p:.3f}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
