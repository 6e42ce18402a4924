"""The closed form without an items x items matrix: what it loses where both forms can be had, and what it costs where only it can.

    python benchmarks/svd_form.py --dataset ml-1m-text --data_path FOLDER --made 20000,200000

The real dataset is fitted in both forms with the defaults. The made catalogues (clustered tastes, popularity like 1/rank, texts
that carry the cluster) are for seconds and peak memory. Pieces are kept in ``--work``; the summary is one JSON file.
"""

import argparse
import json
import resource
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch
from timing import logged, machine

from recbole_llm.fitting.closed_form import fit_closed_form
from recbole_llm.fitting.validation import Validation
from recbole_llm.scoring.rows import Rows, rows_from_pairs

CLUSTERS = 200


def made(n_items: int, seed: int = 0) -> tuple[Rows, Rows, torch.Tensor]:
    """Training and validation histories and text vectors of a made catalogue; 15 to 50 interactions an item."""
    n_users, per_user = (20_000, 50) if n_items <= 50_000 else (n_items // 2, 30)
    generator = torch.Generator().manual_seed(seed)
    cluster = torch.randint(CLUSTERS, (n_items,), generator=generator)
    popularity = 1 / (torch.randperm(n_items, generator=generator) + 20.0)
    tastes = torch.randint(CLUSTERS, (n_users, 3), generator=generator)
    users, items = [], []
    for c in range(CLUSTERS):
        members = torch.nonzero(cluster == c).squeeze(1)
        fans = torch.nonzero((tastes == c).any(1)).squeeze(1)
        if len(members) and len(fans):
            count = len(fans) * (per_user // 4)
            users.append(fans.repeat_interleave(per_user // 4))
            items.append(members[torch.multinomial(popularity[members], count, True, generator=generator)])
    users.append(torch.arange(n_users).repeat_interleave(per_user // 4))
    items.append(torch.multinomial(popularity, n_users * (per_user // 4), True, generator=generator))
    key = torch.unique(torch.cat(users) * n_items + torch.cat(items))
    user, item = key // n_items, key % n_items
    late = torch.rand(len(user), generator=generator) < 0.1
    center = torch.randn(CLUSTERS, 64, generator=generator)
    texts = center[cluster] + torch.randn(n_items, 64, generator=generator)
    return (
        rows_from_pairs(user[~late], item[~late], n_users),
        rows_from_pairs(user[late], item[late], n_users),
        texts,
    )


def cost(n_items: int) -> dict[str, Any]:
    """Seconds and peak memory of a made catalogue; in a process that has done nothing else."""
    train, valid, texts = made(n_items)
    before, began = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss, time.perf_counter()
    cpu = time.process_time()
    content = {"text": (texts, torch.ones(n_items, dtype=torch.bool))}
    with logged("recbole_llm.fitting") as told:
        form = fit_closed_form(train, n_items, content, Validation(train, valid, train), max_dense_items=1_000)
    return {
        "items": n_items,
        "users": len(train.offsets) - 1,
        "interactions": len(train.ids),
        "rank": form.dim,
        "valid": form.value,
        "seconds": round(time.perf_counter() - began, 1),
        "cpu_seconds": round(time.process_time() - cpu, 1),
        "seconds_of_settings": [round(trial.seconds, 1) for trial in form.trials],
        "peak_mib": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024,
        "mib_before": before // 1024,
        "log": told,
    }


FORMS: dict[str, dict[str, Any]] = {"dense": {}, "svd": {"max_dense_items": 1_000}}


def quality(dataset: str, data_path: str | None, form: str) -> dict[str, Any]:
    """Quality and cost of one of ``FORMS`` on a dataset."""
    from splits import load, ours

    split = load(dataset, data_path)
    began, cpu = time.perf_counter(), time.process_time()
    fitted = ours(split, **FORMS[form])
    seconds, cpu_seconds = time.perf_counter() - began, time.process_time() - cpu
    return {
        "dataset": dataset,
        "items": split.n_items - 1,
        "setting": str(fitted.setting),
        "rank": fitted.dim,
        "form": fitted.form,
        "valid": fitted.value,
        "test": float(split.per_user(fitted).mean()),
        "seconds": round(seconds, 1),
        "cpu_seconds": round(cpu_seconds, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", "-d", default="ml-1m-text")
    parser.add_argument("--data_path", default=None, help="folder of the dataset")
    parser.add_argument("--made", default="20000,200000", help="items of the made catalogues")
    parser.add_argument("--minutes", type=float, default=None, help="begin nothing further after so long; exit code 3")
    parser.add_argument("--work", default="svd")
    parser.add_argument("--piece", default=None, help=argparse.SUPPRESS)
    parser.add_argument("--output", default=None, help="JSON; default benchmarks/results/svd_form.json")
    arguments = parser.parse_args()
    if arguments.piece:
        name, _, form = arguments.piece.partition(":")
        print(json.dumps(quality(name, arguments.data_path, form) if form else cost(int(name))))
        return 0
    work, began = Path(arguments.work), time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    pieces = []
    for piece in [*(f"{arguments.dataset}:{form}" for form in FORMS), *filter(None, arguments.made.split(","))]:
        kept = work / f"{piece.replace(':', '-')}.json"
        if not kept.is_file():
            if arguments.minutes is not None and time.monotonic() - began > 60 * arguments.minutes:
                print("out of time: run the same command again to go on")
                return 3
            command = [sys.executable, __file__, "--piece", piece]
            command += ["--data_path", arguments.data_path] if arguments.data_path else []
            done = subprocess.run(command, capture_output=True, text=True, check=True)
            kept.write_text(done.stdout.splitlines()[-1])
        pieces.append(json.loads(kept.read_text()))
        print({k: v for k, v in pieces[-1].items() if k != "log"}, flush=True)
    by_form = dict(zip(FORMS, pieces, strict=False))
    result = {
        "benchmark": "svd_form",
        "quality": by_form | {"loss": 1 - by_form["svd"]["test"] / by_form["dense"]["test"]},
        "made": pieces[len(FORMS) :],
        "machine": machine("cpu"),
    }
    path = Path(arguments.output or ROOT / "benchmarks" / "results" / "svd_form.json")
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
