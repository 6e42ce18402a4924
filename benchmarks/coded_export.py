"""Exports in eight bits beside float32: bytes, NDCG@10 on the test part, the ten best they have in common, seconds of a search.

    python benchmarks/coded_export.py --dataset ml-100k          # to benchmarks/results/coded_export-ml-100k.json
    python benchmarks/coded_export.py --checkpoint saved/LLMTwoTower-....pth --output coded.json

A model with the default settings is trained and exported three times: float32, int8, and int8 with the float vectors beside it
(``--rescore``). Every user with test items is asked for the ten best that are neither in training nor in validation. A search of
one query is timed over a made table of ``--items`` vectors, paired, on one thread; "memory" is what that table takes.
"""

import argparse
import json
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

sys.path[:0] = [str(Path(__file__).resolve().parents[1]), str(Path(__file__).resolve().parents[1] / "kernels")]

import numpy as np
import timing

import recbole_llm  # noqa: F401  (before RecBole)
from recbole_llm.checkpoints import load_run, newest_checkpoint
from recbole_llm.export.export_model import export_model
from recbole_llm.export.manifest import EXACT, VECTORS
from recbole_llm.export.quantise import encoded
from recbole_llm.export.reader import load_export
from recbole_llm.retrieval.exact import ExactRetriever, Segment
from recbole_llm.retrieval.recommender import Recommender, Request

K = 10
VARIANTS: dict[str, dict[str, Any]] = {
    "float32": {},
    "int8": {"dtype": "int8"},
    "int8 --rescore": {"dtype": "int8", "rescore": True},
}


def trained(dataset: str, folder: Path) -> Path:
    """Train with the default settings and return the checkpoint."""
    from recbole.quick_start import run_recbole

    run_recbole("LLMTwoTower", dataset, config_dict={"checkpoint_dir": str(folder), "show_progress": False})
    found = newest_checkpoint(folder)
    assert found is not None
    return found


def lists_of(dataset: Any) -> dict[str, list[str]]:
    """Each user's items in a split, by external id."""
    users, items = dataset.inter_feat[dataset.uid_field].tolist(), dataset.inter_feat[dataset.iid_field].tolist()
    found: dict[str, list[str]] = {}
    for user, item in zip(
        dataset.id2token(dataset.uid_field, users), dataset.id2token(dataset.iid_field, items), strict=True
    ):
        found.setdefault(str(user), []).append(str(item))
    return found


def best(recommender: Recommender, valid: dict[str, list[str]], users: list[str]) -> dict[str, list[str]]:
    """The ten best items of every user."""
    found = {}
    for user in users:
        hidden = set(valid.get(user, ()))
        items = recommender.recommend(Request(user=user, k=K + len(hidden))).items
        found[user] = [item.id for item in items if item.id not in hidden][:K]
    return found


def ndcg(found: dict[str, list[str]], test: dict[str, list[str]]) -> float:
    """Mean NDCG@10 over the users."""
    gains = 1 / np.log2(np.arange(K) + 2)
    values = []
    for user, items in found.items():
        wanted = set(test[user])
        hits = np.array([item in wanted for item in items] + [False] * (K - len(items)))
        values.append((hits * gains).sum() / gains[: len(wanted)].sum())
    return float(np.mean(values))


def searches(n_items: int, dim: int, rounds: int = 15) -> list[dict[str, Any]]:
    """Seconds of a search of one query, float32 and int8 in turn, over the same made table."""
    rng = np.random.default_rng(0)
    table, bias = rng.standard_normal((n_items, dim), dtype=np.float32), np.zeros(n_items, np.float32)
    coded = encoded(table, [dim])
    none = np.zeros(0, np.int64)
    retrievers = {
        "float32": ExactRetriever([Segment(0, table, bias)]),
        "int8": ExactRetriever([Segment(0, coded, bias)]),  # type: ignore[arg-type]
    }
    spent: dict[str, list[float]] = {name: [] for name in retrievers}
    shared = []
    for number in range(rounds + 1):
        query, rows = rng.standard_normal((1, dim), dtype=np.float32), {}
        for name, retriever in sorted(retrievers.items(), reverse=bool(number % 2)):
            began = time.perf_counter()
            rows[name] = retriever.search(query, [K], [none], [None])[0].rows
            if number:
                spent[name].append(time.perf_counter() - began)
        shared.append(len(np.intersect1d(*rows.values())) / K)
    size = {"float32": table.nbytes, "int8": coded.codes.nbytes + coded.scale.nbytes}
    return [
        {"table": name, "items": n_items, "dim": dim, "memory_mib": size[name] / 2**20, **timing.summary(times),
         "overlap_of_the_ten_best": float(np.mean(shared)) if name == "int8" else 1.0}
        for name, times in spent.items()
    ]  # fmt: skip


def main(arguments: list[str] | None = None) -> int:
    """Measure and write."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--checkpoint", type=Path, help="of a model that is trained already")
    parser.add_argument("--data-path", help="folder of the dataset's folder, for a checkpoint")
    parser.add_argument("--items", type=int, default=200_000)
    parser.add_argument("--dim", type=int, default=128)
    parser.add_argument("--output", type=Path)
    options = parser.parse_args(arguments)
    output = options.output or timing.ROOT / "benchmarks" / "results" / f"coded_export-{options.dataset}.json"
    with tempfile.TemporaryDirectory() as temporary:
        folder = Path(temporary)
        checkpoint = options.checkpoint or trained(options.dataset, folder / "saved")
        loaded = load_run(checkpoint, **({"data_path": options.data_path} if options.data_path else {}))
        train, valid, test = loaded.splits[:3]
        wanted, hidden = lists_of(test), lists_of(valid)
        users, rows, lists = sorted(wanted), [], {}
        for number, (name, changes) in enumerate(VARIANTS.items()):
            place = folder / f"export-{number}"
            manifest = export_model(loaded.model, train, place, history="train", **changes)
            lists[name] = best(Recommender(load_export(place)), hidden, users)
            same = [
                len(set(a) & set(b)) / K for a, b in zip(lists[name].values(), lists["float32"].values(), strict=True)
            ]
            sizes = {file: manifest.files[file].bytes for file in (VECTORS, EXACT) if file in manifest.files}
            rows.append({"export": name, "vectors_bytes": sizes[VECTORS], "exact_bytes": sizes.get(EXACT, 0),
                         "dim": manifest.dim, "ndcg@10": ndcg(lists[name], wanted),
                         "overlap_of_the_ten_best": float(np.mean(same)),
                         "users_with_the_same_ten": float(np.mean(np.array(same) == 1))})  # fmt: skip
            rows[-1]["share_of_float32"] = rows[-1]["vectors_bytes"] / rows[0]["vectors_bytes"]
            print(rows[-1], flush=True)
    data = {"machine": timing.machine("cpu"), "dataset": options.dataset, "users": len(users), "exports": rows,
            "searches": searches(options.items, options.dim)}  # fmt: skip
    output.write_text(json.dumps(data, indent=1) + "\n")
    print(*data["searches"], sep="\n")
    return 0


if __name__ == "__main__":
    sys.exit(main())
