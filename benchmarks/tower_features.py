"""Whether the towers should read content when the closed form does: ``tower_features`` on and off, by validation.

    python benchmarks/tower_features.py --data_path FOLDER --datasets ml-100k,amazon-office,ml-1m-text,amazon-beauty

Each run trains with the defaults but for that key, in a process of its own. ml-100k needs no folder. amazon-beauty is cut to its
7-core (users and items with at least 7 interactions left), a fifth of its items. Runs in the result file are not repeated.
docs/decisions/tower-features.md says what was decided.
"""

import argparse
import json
import os
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from timing import machine

RESULT = ROOT / "benchmarks" / "results" / "tower_features.json"
CUT = {
    "amazon-beauty": {"user_inter_num_interval": "[7,inf)", "item_inter_num_interval": "[7,inf)"}
}  # 60,276 interactions


def run(dataset: str, data_path: str | None, value: bool, seed: int) -> dict[str, Any]:
    """One training; its validation and test figures."""
    environment = os.environ | {"PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "result.json"
        command = [sys.executable, "-m", "recbole_llm", "run", "-d", dataset, "--output", str(output)]
        command += [f"--tower_features={value}", f"--seed={seed}", "--show_progress=False", "--state=WARNING"]
        command += [f"--checkpoint_dir={folder}"]
        command += [f"--{key}={given}" for key, given in CUT.get(dataset, {}).items()]
        command += [f"--data_path={data_path}"] if data_path and dataset != "ml-100k" else []
        subprocess.run(command, check=True, env=environment, stdout=subprocess.DEVNULL)
        found = json.loads(output.read_text())
    return {
        "dataset": dataset,
        "cut": CUT.get(dataset, {}),
        "tower_features": value,
        "seed": seed,
        "valid": found["best_valid_result"],
        "test": found["test_result"],
        "seconds": round(found["seconds"], 1),
        "versions": found["versions"],
    }


def main() -> None:
    """Run what is missing, and write the result file after every run."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", default="ml-100k,amazon-office,ml-1m-text,amazon-beauty")
    parser.add_argument("--data_path", default=None, help="folder that holds the datasets' folders")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--output", default=str(RESULT))
    arguments = parser.parse_args()
    path = Path(arguments.output)
    runs = json.loads(path.read_text())["runs"] if path.is_file() else []
    done = {(each["dataset"], each["tower_features"], each["seed"]) for each in runs}
    for dataset in arguments.datasets.split(","):
        for seed in range(2020, 2020 + arguments.seeds):
            for value in (False, True):
                if (dataset, value, seed) in done:
                    continue
                runs.append(run(dataset, arguments.data_path, value, seed))
                print(dataset, value, seed, runs[-1]["valid"], runs[-1]["test"], flush=True)
                content = {"benchmark": "tower_features", "machine": machine("cpu"), "runs": runs}
                path.write_text(json.dumps(content, indent=1) + "\n")


if __name__ == "__main__":
    main()
