"""What missing, wrong and placeholder pictures, and missing texts, cost a model with texts and pictures.

    python benchmarks/robustness_pictures.py --data_path FOLDER --encoder onnx:lite0.onnx

FOLDER holds ml-1m-posters. Hidden items are ranked by content among themselves, as in ``pictures.py``: draw 0 chooses ridge and
shares for every disturbance anew, two others are measured. Beside texts and pictures together stand texts alone under the same
disturbance. Warm items are measured by the closed form, whose constants validation chooses anew, where ``--warm`` names a point.
Points are kept in ``--work``, so that a stopped run goes on.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch
from pictures import DATASET, NDCG, VALIDATION_USERS, choose, load, paired, pairs
from timing import machine
from torch import Tensor

from recbole_llm.content.encoders.images import load_image_encoder
from recbole_llm.fitting.closed_form import fit_closed_form
from recbole_llm.fitting.cold_start import placement
from recbole_llm.fitting.cold_start.hidden_draws import HiddenDraw
from recbole_llm.fitting.cold_start.kernel_ridge import share_candidates
from recbole_llm.fitting.validation import Validation, user_metric
from recbole_llm.fitting.warm_items import ContentTables
from recbole_llm.scoring.rows import union

MISSING = (0.3, 0.5, 0.7, 0.9)
WRONG = PLACEHOLDERS = 0.1
DRAWS = 2
USERS = 1_000  # by whom hidden items are ranked


def some_of(present: Tensor, share: float) -> Tensor:
    """A share of the items that have the content, drawn at random."""
    items = torch.nonzero(present).squeeze(1)
    return items[torch.randperm(len(items), generator=torch.Generator().manual_seed(7))[: round(share * len(items))]]


def without(content: ContentTables, modality: str, share: float) -> dict[str, tuple[Tensor, Tensor]]:
    """The content where a share of the items lacks a modality."""
    vectors, present = content[modality]
    kept = present.clone()
    kept[some_of(present, share)] = False
    return dict(content) | {modality: (vectors, kept)}


def wrong(content: ContentTables, modality: str, share: float) -> dict[str, tuple[Tensor, Tensor]]:
    """The content where a share of the items has one another's."""
    vectors, present = content[modality]
    some, changed = some_of(present, share), vectors.clone()
    changed[some] = vectors[some.roll(1)]
    return dict(content) | {modality: (changed, present)}


def placeholder(content: ContentTables, share: float, vector: Tensor) -> dict[str, tuple[Tensor, Tensor]]:
    """The content where a share of the items has one grey picture, as if it were none of a placeholder's."""
    vectors, present = content["image"]
    changed = vectors.clone()
    changed[some_of(present, share)] = vector
    return dict(content) | {"image": (changed, present)}


def points(content: ContentTables, grey: Tensor) -> dict[str, Callable[[], dict[str, tuple[Tensor, Tensor]]]]:
    """Name -> the disturbed content."""
    found: dict[str, Callable[[], Any]] = {"complete": lambda: dict(content)}
    for modality, name in (("text", "texts"), ("image", "pictures")):
        for share in MISSING:
            found[f"{name} missing {share:.0%}"] = lambda modality=modality, share=share: without(
                content, modality, share
            )
    found["wrong pictures 10%"] = lambda: wrong(content, "image", WRONG)
    found["wrong texts 10%"] = lambda: wrong(content, "text", WRONG)
    found["placeholder for 10%, masked as the reader does"] = lambda: without(content, "image", PLACEHOLDERS)
    found["placeholder for 10%, not masked"] = lambda: placeholder(content, PLACEHOLDERS, grey)
    return found


def grey_picture(encoder: str, mean: Tensor) -> Tensor:
    """The vector of a grey picture, less the mean that the others lost."""
    from PIL import Image

    loaded = load_image_encoder(encoder)
    with torch.inference_mode():
        return loaded.encode(loaded.prepare([Image.new("RGB", (185, 278), (128, 128, 128))]))[0].clone() - mean


def cold(draws: list[HiddenDraw], content: ContentTables, known: dict[str, Any]) -> dict[str, Any]:
    """Texts alone, and texts with pictures; ``known`` keeps values of the same texts."""
    found: dict[str, Any] = {}
    values = {}
    for name, modalities in {"text": ("text",), "both": ("text", "image")}.items():
        some = {modality: content[modality] for modality in modalities}
        mark = (name, int(some["text"][1].sum()), float(some["text"][0].abs().sum()))
        if name == "text" and mark in known:
            found[name], values[name] = known[mark]
            continue
        mu, shares = choose(draws[0], some, share_candidates(modalities))
        values[name] = torch.cat([draw.values(some, NDCG, mu, shares) for draw in draws[1:]])
        found[name] = {"ndcg@10": round(float(values[name].mean()), 4), "mu": mu, "shares": dict(shares)}
        if name == "text":
            known[mark] = found[name], values[name]
    return found | {"both_against_text": paired(values["both"], values["text"])}


def warm(splits: list[Any], content: ContentTables) -> dict[str, Any]:
    """The closed form with texts and pictures."""
    train, valid, test = splits
    n_items, users = len(content["text"][1]), torch.nonzero(test.sizes).squeeze(1)
    validation = Validation(train, valid, train, NDCG, VALIDATION_USERS)
    form = fit_closed_form(train, n_items, content, validation, dim="full")
    scorer = form.block().scorer(train.select(users))
    values = user_metric(
        scorer, test.select(users), union(train, valid).select(users), n_items, NDCG, excluded=~form.warm
    )
    return {"ndcg@10": round(float(values.mean()), 4), "setting": str(form.setting)}


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="holds ml-1m-posters")
    parser.add_argument("--encoder", required=True, help="of pictures, such as onnx:lite0.onnx")
    parser.add_argument("--store", default="", help="feature store (default: the user's)")
    parser.add_argument("--warm", default="", help="points where warm items are measured too, semicolons between them")
    parser.add_argument("--minutes", type=float, default=None, help="begin nothing further after so long; exit code 3")
    parser.add_argument("--work", type=Path, default=Path("robustness"))
    name = f"picture_robustness-{DATASET}.json"
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / name)
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    kept, began = options.work / name, time.monotonic()
    done: dict[str, Any] = json.loads(kept.read_text()) if kept.is_file() else {}
    dataset, _ = load(options.data_path, options.encoder, options.store)
    content = {name: (table.vectors, table.present) for name, table in dataset.item_features.items()}
    raw = dataset.picture_vectors()
    grey = grey_picture(options.encoder, raw.vectors[raw.present].mean(0))
    splits = [pairs(split) for split in dataset.build()]
    placement.MAX_USERS = USERS
    history, n_items = union(union(splits[0], splits[1]), splits[2]), len(content["text"][1])
    everything = torch.ones(n_items, dtype=torch.bool)
    draws = [HiddenDraw(history, n_items, everything, 1000 + seed, "full") for seed in range(DRAWS + 1)]
    known: dict[Any, Any] = {}
    for name, disturb in points(content, grey).items():
        if name not in done:
            if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
                print("out of time: run the same command again to go on", flush=True)
                return 3
            disturbed = disturb()
            done[name] = {"cold": cold(draws, disturbed, known)}
            if name in options.warm.split(";"):
                done[name]["warm"] = warm(splits, disturbed)
            kept.write_text(json.dumps(done))
        print(name, json.dumps(done[name]), flush=True)
    result = {
        "benchmark": "robustness-pictures",
        "dataset": DATASET,
        "metric": "ndcg@10 of hidden items among themselves (cold), of the test split by the closed form (warm)",
        "points": done,
        "machine": machine("cpu"),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
