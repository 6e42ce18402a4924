"""How well swapped texts are found by the disagreement of content and behaviour: AUC, and what stands in a list of ten.

    python benchmarks/disagreement.py --dataset ml-100k
    python benchmarks/disagreement.py --dataset amazon-office --data_path FOLDER

A tenth of the items with enough users have one another's texts, three draws. AUC: the chance that a swapped item agrees less than
one that is not. Nothing is chosen on these figures.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch
from splits import Split, load
from timing import machine
from torch import Tensor

from recbole_llm.fitting.disagreement import LEAST_USERS, Agreement, agreements

SHARE, DRAWS, LISTED = 0.1, 3, 10


def auc(low: Tensor, high: Tensor) -> float:
    """The chance that a value of the first is below one of the second, ties counted half."""
    below = (low[:, None] < high).double().mean() + 0.5 * (low[:, None] == high).double().mean()
    return float(below)


def swapped(split: Split, seed: int) -> tuple[Tensor, Tensor]:
    """Vectors where a tenth of the items that can be told have one another's, and which those are."""
    users = torch.bincount(split.train.ids, minlength=split.n_items)
    items = torch.nonzero(split.present & (users >= LEAST_USERS)).squeeze(1)
    some = items[torch.randperm(len(items), generator=torch.Generator().manual_seed(seed))[: round(SHARE * len(items))]]
    features = split.features.clone()
    features[some] = split.features[some.roll(1)]
    return features, some


def measure(split: Split, seed: int) -> dict[str, Any]:
    """One draw."""
    features, some = swapped(split, seed)
    began = time.process_time()
    found: Agreement = agreements(split.train, {"text": (features, split.present)}, split.n_items)["text"]
    seconds = time.process_time() - began
    wrong = torch.zeros(split.n_items, dtype=torch.bool)
    wrong[some] = True
    known = ~found.values.isnan()
    first = found.suspects(LISTED)
    return {
        "auc": round(auc(found.values[known & wrong], found.values[known & ~wrong]), 4),
        "swapped": int((known & wrong).sum()),
        "items": int(known.sum()),
        "swapped_among_first_ten": sum(bool(wrong[item]) for item in first),
        "below_threshold": {
            "swapped": round(float((found.values < found.threshold)[known & wrong].double().mean()), 3),
            "others": round(float((found.values < found.threshold)[known & ~wrong].double().mean()), 3),
        },
        "median_agreement": round(float(found.values[known & ~wrong].median()), 3),
        "cpu_seconds": round(seconds, 1),
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", "-d", default="ml-100k")
    parser.add_argument("--data_path", default=None, help="folder of the dataset; ml-100k needs none")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    split = load(options.dataset, options.data_path)
    draws = [measure(split, seed) for seed in range(DRAWS)]
    result = {
        "benchmark": "disagreement",
        "dataset": options.dataset,
        "machine": machine("cpu"),
        "auc": round(sum(draw["auc"] for draw in draws) / DRAWS, 4),
        "draws": draws,
    }
    output = options.output or ROOT / "benchmarks" / "results" / f"disagreement-{options.dataset}.json"
    output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
