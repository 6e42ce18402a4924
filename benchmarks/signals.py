"""What weights and dislikes are worth: ratings, age and label 0 of ml-100k, each paired with the model that reads none of them.

    python benchmarks/signals.py

The closed form of LLMTwoTower alone, by which the exponents of weights are chosen (``blocks: closed_form``), is fitted with its
defaults on RecBole's split (8:1:1 by user, at random). Every variant ranks the same test items of the same users; NDCG@10 and
Recall@10 of a user are paired with those of the reference; the interval is a bootstrap's.

1. Weights. The reference counts every rating as 1. Beside it: ratings as ``weight_field`` with the exponents that validation
   chooses, and with one that was given; and a weight that halves every 30 days of age, its exponents chosen.
2. Dislikes. Ratings below 4 are label 0, and nobody's targets. The reference leaves them out of every ranking, as all do, and reads
   nothing else of them. Beside it: as negative evidence with the weight that validation chooses, and with one that was given.

A variant is a part of its own in ``--work``, so that a stopped run goes on; no part is begun after ``--seconds``.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import numpy as np
import torch
from final_fit import METRICS, train
from timing import machine

import recbole_llm  # noqa: F401  # before RecBole: its repairs
from recbole_llm.bridge.experiments.significance import paired_bootstrap
from recbole_llm.fitting.validation import user_metric
from recbole_llm.scoring.rows import union

HALF_LIFE_DAYS = 30
AGED_COPY = "ml-100k-aged"
RATED = {"load_col": {"inter": ["user_id", "item_id", "rating"]}, "weight_field": "rating"}
LIKED = {"load_col": {"inter": ["user_id", "item_id", "rating"]}, "threshold": {"rating": 4}}
AGED = {"load_col": {"inter": ["user_id", "item_id", "weight"]}, "weight_field": "weight"}
# name: the reference it is paired with, and its settings
VARIANTS: dict[str, tuple[str, dict[str, Any]]] = {
    "plain": ("plain", {}),
    "ratings, chosen": ("plain", RATED),
    "ratings, exponent 1": ("plain", RATED | {"weight_exponent": 1.0}),
    f"half-life of {HALF_LIFE_DAYS} days, chosen": ("plain", AGED),
    "liked alone": ("liked alone", LIKED | {"dislike_weight": 0}),
    "dislikes, chosen": ("liked alone", LIKED),
    "dislikes, weight 0.25": ("liked alone", LIKED | {"dislike_weight": 0.25}),
}


def with_ages(folder: Path) -> Path:
    """A copy of ml-100k whose interactions have a weight by their age."""
    import recbole

    source = Path(recbole.__file__).parent / "dataset_example" / "ml-100k"
    target = folder / "data" / AGED_COPY  # under another name: RecBole reads ml-100k from where it ships it
    target.mkdir(parents=True, exist_ok=True)
    header, *lines = (source / "ml-100k.inter").read_text().splitlines()
    at = [name.split(":")[0] for name in header.split("\t")].index("timestamp")
    times = np.array([float(line.split("\t")[at]) for line in lines])
    weights = 0.5 ** ((times.max() - times) / 86_400 / HALF_LIFE_DAYS)
    rows = [f"{line}\t{weight:.6g}" for line, weight in zip(lines, weights, strict=True)]
    (target / f"{AGED_COPY}.inter").write_text("\n".join([f"{header}\tweight:float", *rows]) + "\n")
    for suffix in ("item", "user"):
        (target / f"{AGED_COPY}.{suffix}").write_text((source / f"ml-100k.{suffix}").read_text())
    return target.parent


def part(number: int, settings: dict[str, Any], folder: Path) -> dict[str, Any]:
    """One variant: what it chose, and the metrics of each test user."""
    values: dict[str, Any] = {
        "show_progress": False,
        "state": "ERROR",
        "checkpoint_dir": str(folder / f"saved-{number}"),
        "blocks": "closed_form",
        "metrics": ["NDCG", "Recall"],
        "topk": [10],
    }
    dataset = "ml-100k"
    if settings.get("weight_field") == "weight":
        dataset, values["data_path"] = AGED_COPY, str(with_ages(folder))
    trainer, parts, seconds = train(dataset, values | settings)
    model, split = trainer.model.eval(), parts[0]._dataset
    valid, test = split.later_splits
    targets, seen = test.training_rows(), union(model.history, valid.training_rows())
    if (disliked := split.negative_rows(valid)) is not None:
        seen = union(seen, disliked)
    padding = torch.zeros(model.n_items, dtype=torch.bool)
    padding[0] = True
    closed = model.score.block("closed_form")
    with torch.no_grad():
        scorer = lambda users: model.score.of_users(users, model.history)  # noqa: E731
        found = {
            str(m).lower(): user_metric(scorer, targets, seen, model.n_items, m, padding).tolist() for m in METRICS
        }
    return {
        "signals": model.signals.to_state(),
        "dislikes": 0.0 if closed is None else closed.dislikes,
        "cpu_seconds": round(seconds, 1),
        "users": torch.nonzero(targets.sizes).squeeze(1).tolist(),
        **found,
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--work", default="signals")
    parser.add_argument("--seconds", type=float, default=float("inf"), help="no part is begun later")
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "signals-ml-100k.json"))
    options = parser.parse_args()
    work, began = Path(options.work).absolute(), time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    kept = {name: work / f"{at}.json" for at, name in enumerate(VARIANTS)}
    for number, (name, (_, settings)) in enumerate(VARIANTS.items()):
        if not kept[name].is_file():
            if time.monotonic() - began > options.seconds:
                print("stopped; the same command goes on")
                return 3
            kept[name].write_text(json.dumps(part(number, settings, work)), encoding="utf-8")
    read = {name: json.loads(path.read_text(encoding="utf-8")) for name, path in kept.items()}
    rows = []
    for name, (reference, settings) in VARIANTS.items():
        own, other = read[name], read[reference]
        assert own["users"] == other["users"]
        row: dict[str, Any] = {
            "variant": name,
            "paired with": reference,
            "settings": settings,
            "users": len(own["users"]),
        }
        row |= {key: own[key] for key in ("signals", "dislikes", "cpu_seconds")}
        for metric in (str(m).lower() for m in METRICS):
            row[metric] = {"mean": float(np.mean(own[metric]))}
            if name != reference:
                row[metric]["difference"] = vars(paired_bootstrap(np.array(own[metric]), np.array(other[metric])))
        rows.append(row)
        told = row["ndcg@10"]
        gain = told.get("difference")
        by = "" if gain is None else f" ({gain['mean']:+.4f} [{gain['low']:+.4f}, {gain['high']:+.4f}] to {reference})"
        print(f"{name}: NDCG@10 {told['mean']:.4f}{by}; {own['signals']}, dislikes {own['dislikes']:g}")
    result = {"benchmark": "signals", "dataset": "ml-100k", "variants": rows, "machine": machine("cpu")}
    Path(options.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
