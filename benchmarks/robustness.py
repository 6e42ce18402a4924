"""What bad texts and bad interactions cost: the closed form with texts against EASE tuned on the same data.

    python benchmarks/robustness.py --dataset amazon-office --data_path FOLDER

Texts: missing for 0 to 100% of the items, letters swapped, dropped and doubled, cut to 8 tokens, those of other items.
Interactions: 10 to 30% random ones added to training, one user who has clicked 10,000 times. Validation and test stay as they are,
and every choice of both models is made on validation again. The learned block is left out: it is the same without texts.
Points are kept in ``--work``, so that a stopped run goes on; the summary is one JSON file in benchmarks/results/.
"""

import argparse
import json
import logging
import random
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch
from splits import Split, encoder, load, ours, tuned_ease
from timing import logged, machine

from recbole_llm.bridge.experiments.significance import paired_bootstrap
from recbole_llm.content.features import FeatureStore, encode_texts
from recbole_llm.scoring.rows import rows_from_pairs

MISSING = (0.0, 0.1, 0.3, 0.5, 0.7, 0.9, 1.0)
TYPOS = (0.05, 0.15)  # of the letters
WRONG = (0.1, 0.3)
EXTRA = (0.1, 0.2, 0.3)
CLICKS = 10_000


def without_texts(split: Split, share: float) -> tuple[Split, str]:
    """Texts of a random share of the items are missing."""
    items = torch.nonzero(split.present).squeeze(1)
    gone = items[torch.randperm(len(items), generator=torch.Generator().manual_seed(0))[: round(share * len(items))]]
    present = split.present.clone()
    present[gone] = False
    return replace(split, present=present), f"{len(gone)} of {len(items)} texts missing"


def with_wrong_texts(split: Split, share: float) -> tuple[Split, str]:
    """A random share of the items have one another's texts."""
    items = torch.nonzero(split.present).squeeze(1)
    some = items[torch.randperm(len(items), generator=torch.Generator().manual_seed(0))[: round(share * len(items))]]
    features = split.features.clone()
    features[some] = split.features[some.roll(1)]
    return replace(split, features=features), f"{len(some)} of {len(items)} texts are another item's"


def mistyped(text: str, share: float, rng: random.Random) -> str:
    """Each letter is dropped, doubled, or swapped with the next with the chance ``share``."""
    letters = list(text)
    for at in range(len(letters)):
        if letters[at].isalpha() and rng.random() < share:
            kind = rng.choice(("drop", "double", "swap"))
            if kind == "swap" and at + 1 < len(letters):
                letters[at], letters[at + 1] = letters[at + 1], letters[at]
            else:
                letters[at] = "" if kind == "drop" else letters[at] * 2
    return "".join(letters)


def reencoded(split: Split, texts: list[str | None], store: Path, **options: Any) -> Split:
    """The split with the vectors of other texts, or of another reading of them."""
    table = encode_texts(texts, encoder(**options), FeatureStore(store))
    mean = table.vectors[table.present].mean(0)
    return replace(
        split, features=torch.where(table.present[:, None], table.vectors - mean, 0.0), present=table.present
    )


def with_extra(split: Split, share: float) -> tuple[Split, str]:
    """Random (user, item) pairs join the training interactions."""
    generator = torch.Generator().manual_seed(0)
    count = round(share * len(split.train.ids))
    n_users = len(split.train.offsets) - 1
    active = torch.nonzero(split.train.sizes).squeeze(1)
    users = active[torch.randint(len(active), (count,), generator=generator)]
    items = torch.randint(1, split.n_items, (count,), generator=generator)
    train = rows_from_pairs(
        torch.cat([split.train.row_of_entry(), users]), torch.cat([split.train.ids, items]), n_users
    )
    return replace(split, train=train), f"{len(train.ids) - len(split.train.ids)} random interactions added"


def with_a_crawler(split: Split) -> tuple[Split, str]:
    """One user clicks 10,000 times on random items."""
    generator = torch.Generator().manual_seed(0)
    n_users = len(split.train.offsets) - 1
    user = int(split.train.sizes.argmax())
    items = torch.randint(1, split.n_items, (CLICKS,), generator=generator)
    users = torch.full_like(items, user)
    train = rows_from_pairs(
        torch.cat([split.train.row_of_entry(), users]), torch.cat([split.train.ids, items]), n_users
    )
    own = int(train.sizes[user])
    return replace(split, train=train), f"one user with {CLICKS} clicks on {own} different items of {split.n_items - 1}"


def points(split: Split, store: Path) -> dict[str, Callable[[], tuple[Split, str]]]:
    """Name -> the disturbed split and what was done."""
    rng = random.Random(0)
    found: dict[str, Callable[[], tuple[Split, str]]] = {}
    for share in MISSING:
        found[f"text missing {share:.0%}"] = lambda share=share: without_texts(split, share)
    for share in WRONG:
        found[f"wrong texts {share:.0%}"] = lambda share=share: with_wrong_texts(split, share)
    for share in EXTRA:
        found[f"random interactions {share:.0%}"] = lambda share=share: with_extra(split, share)
    found[f"one user, {CLICKS} clicks"] = lambda: with_a_crawler(split)
    found["texts cut to 8 tokens"] = lambda: (
        reencoded(split, split.texts, store, max_tokens=8),
        "the first 8 tokens of every text are read",
    )
    for share in TYPOS:
        found[f"typos {share:.0%}"] = lambda share=share: (
            reencoded(split, [t and mistyped(t, share, rng) for t in split.texts], store),
            f"about {share:.0%} of the letters dropped, doubled or swapped",
        )
    return found


def measure(split: Split, done: str) -> dict[str, Any]:
    """Both models on one split: test NDCG@10, and the paired difference over users."""
    began = time.perf_counter()
    with logged("recbole_llm.fitting", logging.WARNING) as warnings:
        form = ours(split)
    ease = tuned_ease(split)
    mine, theirs = split.per_user(form).numpy(), split.per_user(ease).numpy()
    return {
        "what": done,
        "ours": float(mine.mean()),
        "ease": float(theirs.mean()),
        "difference": vars(paired_bootstrap(mine, theirs)),
        "setting": str(form.setting),
        "form": form.form,
        "rank": form.dim,
        "ease_ridge": ease.setting.ridge,
        "warnings": warnings,
        "seconds": round(time.perf_counter() - began, 1),
    }


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", "-d", default="amazon-office")
    parser.add_argument("--data_path", default=None, help="folder of the dataset; ml-100k needs none")
    parser.add_argument("--minutes", type=float, default=None, help="begin nothing further after so long; exit code 3")
    parser.add_argument("--work", default="robustness")
    parser.add_argument("--output", default=None, help="JSON; default benchmarks/results/robustness-<dataset>.json")
    arguments = parser.parse_args()
    work, began = Path(arguments.work), time.monotonic()
    work.mkdir(parents=True, exist_ok=True)
    kept = work / f"{arguments.dataset}.json"
    done: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    split = load(arguments.dataset, arguments.data_path)
    for name, disturb in points(split, work / "vectors").items():
        if name not in done:
            if arguments.minutes is not None and time.monotonic() - began > 60 * arguments.minutes:
                print("out of time: run the same command again to go on", flush=True)
                return 3
            done[name] = measure(*disturb())
            kept.write_text(json.dumps(done))
        point = done[name]
        d = point["difference"]
        print(
            f"{name:26} ours {point['ours']:.4f}, EASE {point['ease']:.4f}, "
            f"{d['mean']:+.4f} [{d['low']:+.4f}, {d['high']:+.4f}]; {point['setting']}",
            flush=True,
        )
    result = {
        "benchmark": "robustness",
        "dataset": arguments.dataset,
        "metric": "test ndcg@10 of the closed form and of EASE, both tuned on validation",
        "points": done,
        "machine": machine("cpu"),
    }
    path = Path(arguments.output or ROOT / "benchmarks" / "results" / f"robustness-{arguments.dataset}.json")
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
