"""Seconds and memory of recommending for every user: ``recbole-llm recommend`` beside RecBole's ``full_sort_topk``.

    python benchmarks/recommend_speed.py --checkpoint saved/LLMTwoTower-....pth --output benchmarks/results/recommend_speed.json

Every measurement is a process of its own, timed from its start to its end; memory is its largest resident set (VmHWM), pages of
mapped files included. RecBole's function is given the checkpoint, the users and the loader whose history is the training split,
so that both leave out the same items; it returns ids where ours writes a Parquet file with titles and scores. ``--items`` and
``--users`` are the size of a made export for the second part.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

import recbole_llm  # noqa: F401  (before RecBole, in every process)

DIMS = 128  # of the made export: two blocks of 64
HISTORY = 20  # items per user


def recbole_topk(checkpoint: str, k: int, output: str) -> dict[str, float]:
    """RecBole's way, in this process."""
    began = time.perf_counter()
    sys.argv = sys.argv[:1]
    import torch
    from recbole.quick_start import load_data_and_model
    from recbole.utils.case_study import full_sort_topk

    config, model, dataset, _, valid_data, _ = load_data_and_model(checkpoint)
    model.eval()
    loaded = time.perf_counter()
    with torch.no_grad():
        _, ids = full_sort_topk(range(1, dataset.user_num), model, valid_data, k=k, device=config["device"])
    scored = time.perf_counter()
    users = dataset.id2token(dataset.uid_field, list(range(1, dataset.user_num)))
    items = dataset.id2token(dataset.iid_field, ids.cpu())
    Path(output).write_text(json.dumps(dict(zip(map(str, users), items.tolist(), strict=True))))
    return {"load_s": loaded - began, "score_s": scored - loaded}


def our_topk(model: str, k: int, output: str) -> dict[str, float]:
    """The command, in this process."""
    began = time.perf_counter()
    from recbole_llm import cli, recommend
    from recbole_llm.commands import recommend as recommend_command

    opened: list[float] = []
    open_model = recommend.open_model

    def timed(*arguments: Any, **named: Any) -> Any:
        result = open_model(*arguments, **named)
        opened.append(time.perf_counter())
        return result

    recommend_command.open_model = timed
    if cli.main(["recommend", model, "--k", str(k), "--output", output]):
        raise SystemExit("the command failed")
    return {"load_s": opened[0] - began, "score_s": time.perf_counter() - opened[0]}


def make_export(folder: str, n_items: int, n_users: int) -> None:
    """Tables of normal numbers, titles, and a history of ``HISTORY`` items for every user."""
    import numpy as np

    from recbole_llm.export.manifest import Block
    from recbole_llm.export.reader import ItemRecord
    from recbole_llm.export.writer import ExportContents, write_artifact

    rng = np.random.default_rng(0)
    table = lambda: rng.standard_normal((n_items, DIMS), dtype=np.float32)  # noqa: E731
    history = np.sort(rng.integers(0, n_items // HISTORY, (n_users, HISTORY)) * HISTORY + np.arange(HISTORY), axis=1)
    contents = ExportContents(
        item_ids=[f"item-{n}" for n in range(n_items)],
        user_ids=[f"user-{n}" for n in range(n_users)],
        records=[ItemRecord(f"A title of some length for item {n}", None, {}) for n in range(n_items)],
        vector=table(),
        source=table(),
        bias=rng.standard_normal(n_items, dtype=np.float32),
        trained=np.ones(n_items, bool),
        blocks=(Block("closed_form", DIMS // 2, 0.0, 0.7), Block("learned", DIMS // 2, 0.5, 1.3)),
        history_offsets=np.arange(n_users + 1) * HISTORY,
        history_items=history.ravel(),
    )
    write_artifact(folder, contents)


WAYS = {"recbole-llm recommend": our_topk, "RecBole full_sort_topk": recbole_topk}


def run(way: str, model: str, k: int, output: Path) -> dict[str, float]:
    """One measurement in a fresh process."""
    command = [sys.executable, __file__, "--measure", way, "--model", model, "--k", str(k), "--output", str(output)]
    began = time.perf_counter()
    done = subprocess.run(command, capture_output=True, text=True, cwd=output.parent)
    seconds = time.perf_counter() - began
    if done.returncode:
        raise SystemExit(f"{way}: {done.stderr[-2000:]}")
    return {"seconds": seconds} | json.loads(done.stdout.strip().split("\n")[-1])


def median_of(runs: list[dict[str, float]]) -> dict[str, float]:
    return {name: statistics.median(run[name] for run in runs) for name in runs[0]}


def same_lists(ours: Path, theirs: Path) -> dict[str, float]:
    """Share of users with the same items, and the same order, in a Parquet file and RecBole's lists."""
    import pyarrow.parquet as parquet

    lists: dict[str, list[str]] = {}
    table = parquet.read_table(ours, columns=["user", "item"])
    for user, item in zip(table["user"].to_pylist(), table["item"].to_pylist(), strict=True):
        lists.setdefault(user, []).append(item)
    reference = json.loads(theirs.read_text())
    assert lists.keys() == reference.keys()
    return {
        "users": len(lists),
        "same_items": statistics.mean(set(lists[user]) == set(reference[user]) for user in lists),
        "same_order": statistics.mean(lists[user] == reference[user] for user in lists),
    }


def main() -> None:
    """Measure and print; write with --output."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--checkpoint", help="of LLMTwoTower, trained with the default data_path")
    parser.add_argument("--dataset", default="", help="what the checkpoint was trained on, for the report")
    parser.add_argument("--items", type=int, default=500_000)
    parser.add_argument("--users", type=int, default=50_000)
    parser.add_argument("--k", type=int, default=10)
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--output", type=Path)
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    parser.add_argument("--model", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure == "make":
        return make_export(options.model, options.items, options.users)
    if options.measure:
        found = WAYS[options.measure](options.model, options.k, str(options.output))
        status = Path("/proc/self/status").read_text()
        print(json.dumps(found | {"peak_mib": int(status.split("VmHWM:")[1].split()[0]) / 1024}))
        return None

    from timing import machine

    found = {"machine": machine("cpu"), "threads": os.environ.get("OMP_NUM_THREADS", "all"), "k": options.k}
    with tempfile.TemporaryDirectory() as scratch:
        folder = Path(scratch)
        if options.checkpoint:
            checkpoint = str(Path(options.checkpoint).resolve())
            outputs = dict(zip(WAYS, (folder / "recs.parquet", folder / "recs.json"), strict=True))
            runs: dict[str, list[dict[str, float]]] = {way: [] for way in WAYS}
            for _ in range(options.repeats):
                for way in WAYS:
                    runs[way].append(run(way, checkpoint, options.k, outputs[way]))
            found["dataset"] = options.dataset
            found["checkpoint"] = {way: median_of(times) for way, times in runs.items()}
            found["agreement"] = same_lists(*outputs.values())
        if options.items and options.users:
            size = ["--items", str(options.items), "--users", str(options.users)]
            command = [sys.executable, __file__, "--measure", "make", "--model", str(folder / "export"), *size]
            subprocess.run(command, check=True)
            tables = sum(file.stat().st_size for file in (folder / "export").rglob("*"))
            large = run("recbole-llm recommend", str(folder / "export"), options.k, folder / "large.parquet")
            found["made"] = {
                "items": options.items,
                "users": options.users,
                "dims": DIMS,
                "export_mib": tables / 2**20,
                "scores_mib_if_kept": options.items * options.users * 4 / 2**20,
                **large,
            }
    text = json.dumps(found, indent=2)
    print(text)
    if options.output:
        options.output.write_text(text + "\n")


if __name__ == "__main__":
    main()
