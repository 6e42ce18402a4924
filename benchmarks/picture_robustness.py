"""What missing, wrong and placeholder pictures, and missing texts, cost a model with texts and pictures.

    python benchmarks/efficientnet_onnx.py lite0.onnx
    python benchmarks/picture_robustness.py --data_path FOLDER --encoder onnx:lite0.onnx

FOLDER holds ml-1m-posters, as for ``pictures.py``. Texts or pictures are missing for 0 to 90% of the items that have them, a tenth
of the items has another item's picture or text, a tenth has a grey placeholder. One placeholder for so many items is found by its
bytes and masked when files are encoded; a point of its own shows what it would cost unmasked.

*cold*: a fifth of the items loses its interactions and is ranked by content among itself, as in ``pictures.py``: for every point,
draw 0 chooses ridge and shares anew, and two other draws are measured. *warm*: the closed form on a random split, 80/10/10 of each
user, its constants chosen on validation anew. Both with texts and pictures, and with texts alone. Intervals are of the
bootstrap over users. What is done is kept in ``--work``, so that a stopped run goes on.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch
from pictures import DATASET, NDCG, VALIDATION_USERS, choose, load, pairs
from timing import machine
from torch import Tensor

from recbole_llm.bridge.experiments.significance import paired_bootstrap
from recbole_llm.content.encoders.images import load_image_encoder
from recbole_llm.fitting.closed_form import fit_closed_form
from recbole_llm.fitting.cold_start import placement
from recbole_llm.fitting.cold_start.hidden_draws import HiddenDraw
from recbole_llm.fitting.cold_start.kernel_ridge import share_candidates
from recbole_llm.fitting.validation import Validation, user_metric
from recbole_llm.fitting.warm_items import ContentTables
from recbole_llm.scoring.rows import Rows, union

MISSING = (0.3, 0.5, 0.7, 0.9)
SHARE = 0.1  # of the items whose content is another's, or a placeholder
DRAWS = 2
USERS = 1_000  # by whom hidden items are ranked
GREY = (185, 278)  # pixels of the placeholder
VARIANTS = {"text": ("text",), "both": ("text", "image")}

Content = dict[str, tuple[Tensor, Tensor]]


def some_of(present: Tensor, share: float) -> Tensor:
    """A share of the items that have the content, drawn at random."""
    items = torch.nonzero(present).squeeze(1)
    return items[torch.randperm(len(items), generator=torch.Generator().manual_seed(7))[: round(share * len(items))]]


def missing(content: ContentTables, modality: str, share: float) -> Content:
    """A share of the items lacks a modality."""
    vectors, present = content[modality]
    kept = present.clone()
    kept[some_of(present, share)] = False
    return dict(content) | {modality: (torch.where(kept[:, None], vectors, 0.0), kept)}


def wrong(content: ContentTables, modality: str) -> Content:
    """A tenth of the items has another one's."""
    vectors, present = content[modality]
    some, changed = some_of(present, SHARE), vectors.clone()
    changed[some] = vectors[some.roll(1)]
    return dict(content) | {modality: (changed, present)}


def placeholders(content: ContentTables, grey: Tensor) -> Content:
    """A tenth of the items has one grey picture."""
    vectors, present = content["image"]
    changed = vectors.clone()
    changed[some_of(present, SHARE)] = grey
    return dict(content) | {"image": (changed, present)}


def points(content: ContentTables, grey: Tensor) -> dict[str, Callable[[], Content]]:
    """Name -> the disturbed content."""
    found: dict[str, Callable[[], Content]] = {"complete": lambda: dict(content)}
    for modality, name in (("text", "texts"), ("image", "pictures")):
        for share in MISSING:
            found[f"{name} missing {share:.0%}"] = lambda m=modality, s=share: missing(content, m, s)  # type: ignore[misc]
    found["wrong pictures 10%"] = lambda: wrong(content, "image")
    found["wrong texts 10%"] = lambda: wrong(content, "text")
    found["placeholder pictures 10%, masked as by default"] = lambda: missing(content, "image", SHARE)
    found["placeholder pictures 10%, not masked"] = lambda: placeholders(content, grey)
    return found


def grey_picture(encoder: str, mean: Tensor) -> Tensor:
    """The vector of a grey picture, less the mean that those of the items lost."""
    from PIL import Image

    loaded = load_image_encoder(encoder)
    with torch.inference_mode():
        vector: Tensor = loaded.encode(loaded.prepare([Image.new("RGB", GREY, (128, 128, 128))]))[0].float()
    return vector.clone() - mean


def cold(draws: Sequence[HiddenDraw], content: ContentTables) -> tuple[Tensor, str]:
    """Each user's NDCG of hidden items, and what was chosen."""
    mu, shares = choose(draws[0], content, share_candidates(tuple(content)))
    told = ", ".join(f"{name} {share:g}" for name, share in shares.items())
    return torch.cat([draw.values(content, NDCG, mu, shares) for draw in draws[1:]]), f"ridge {mu:g} {told}".strip()


def warm(splits: Sequence[Rows], content: ContentTables) -> tuple[Tensor, str]:
    """Each user's NDCG of the test split, and what was chosen."""
    train, valid, test = splits
    n_items, users = len(next(iter(content.values()))[1]), torch.nonzero(test.sizes).squeeze(1)
    validation = Validation(train, valid, train, NDCG, VALIDATION_USERS)
    form = fit_closed_form(train, n_items, content, validation, dim="full")
    scorer, seen = form.block().scorer(train.select(users)), union(train, valid).select(users)
    values = user_metric(scorer, test.select(users), seen, n_items, NDCG, excluded=~form.warm)
    return values, str(form.setting)


def measure(draws: Sequence[HiddenDraw], splits: Sequence[Rows], content: ContentTables, without: bool) -> Any:
    """Values and choices by variant and kind of items; those of texts alone only where ``without``."""
    found = {}
    for name, modalities in VARIANTS.items():
        if name == "both" or without:
            some = {modality: content[modality] for modality in modalities}
            found[name] = {"cold": cold(draws, some), "warm": warm(splits, some)}
    return found


def record(name: str, found: dict[str, Any], complete: dict[str, Any]) -> dict[str, Any]:
    """A point: means with intervals, the difference that pictures make, and what is lost of the complete data."""
    row: dict[str, Any] = {"point": name}
    for kind in ("cold", "warm"):
        both, text = found["both"][kind], found["text"][kind]
        whole = complete["both"][kind][0]
        zero = torch.zeros_like(both[0])
        for what, ours, theirs in (
            ("ndcg@10", both[0], zero),
            ("texts alone", text[0], zero),
            ("both less texts alone", both[0], text[0]),
            ("less complete", both[0], whole),
        ):
            d = paired_bootstrap(ours.double().numpy(), theirs.double().numpy())
            row[f"{kind} {what}"] = round(d.mean, 4)
            row[f"{kind} {what}: interval"] = [round(d.low, 4), round(d.high, 4)]
        row[f"{kind} setting"] = both[1]
    return row


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="holds ml-1m-posters")
    parser.add_argument("--encoder", required=True, help="of pictures, such as onnx:lite0.onnx")
    parser.add_argument("--store", default="", help="feature store (default: the user's)")
    parser.add_argument("--minutes", type=float, default=None, help="begin nothing further after so long; exit code 3")
    parser.add_argument("--work", type=Path, default=Path("picture_robustness"))
    parser.add_argument(
        "--output", type=Path, default=ROOT / "benchmarks" / "results" / f"picture_robustness-{DATASET}.json"
    )
    options = parser.parse_args()
    options.work.mkdir(parents=True, exist_ok=True)
    began = time.monotonic()
    dataset, _ = load(options.data_path, options.encoder, options.store)
    content = {name: (table.vectors, table.present) for name, table in dataset.item_features.items()}
    raw = dataset.picture_vectors()
    grey = grey_picture(options.encoder, raw.vectors[raw.present].mean(0))
    splits = [pairs(split) for split in dataset.build()]
    placement.MAX_USERS = USERS
    history, n_items = union(union(splits[0], splits[1]), splits[2]), len(content["text"][1])
    everything = torch.ones(n_items, dtype=torch.bool)
    draws = [HiddenDraw(history, n_items, everything, 1000 + seed, "full") for seed in range(DRAWS + 1)]
    done: dict[str, Any] = {}
    for at, (name, disturb) in enumerate(points(content, grey).items()):
        kept = options.work / f"{at}.pt"
        if not kept.is_file():
            if options.minutes is not None and time.monotonic() - began > 60 * options.minutes:
                print("out of time: run the same command again to go on", flush=True)
                return 3
            torch.save(measure(draws, splits, disturb(), name == "complete" or "texts" in name), kept)
        done[name] = {"text": done["complete"]["text"] if at else None} | torch.load(kept, weights_only=True)
        print(json.dumps(record(name, done[name], done["complete"])), flush=True)
    result = {
        "benchmark": "picture_robustness",
        "dataset": DATASET,
        "metric": "ndcg@10, of hidden items among themselves (cold) and of the test split by the closed form (warm)",
        "items_with_a_text": int(content["text"][1].sum()),
        "items_with_a_picture": int(content["image"][1].sum()),
        "points": [record(name, found, done["complete"]) for name, found in done.items()],
        "machine": machine("cpu"),
    }
    options.output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {options.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
