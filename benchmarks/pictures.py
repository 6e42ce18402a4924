"""What pictures add to texts: for items that nobody has touched, for the others, and where texts are missing.

    python benchmarks/efficientnet_onnx.py lite0.onnx
    python benchmarks/pictures.py --data_path FOLDER --encoder onnx:lite0.onnx --part encode,cold,warm

FOLDER holds ml-1m-posters, ml-1m-text with posters, which are under copyright and no part of this project. Every choice is made on
data that no figure comes from, and variants are compared user by user.

*encode*: processor seconds on one thread, and of a second run. *cold*: of each draw a fifth of the items loses its
interactions and is ranked by content among itself, against all of its interactions. Draw 0 chooses ridge and shares of the
modalities. The others are measured, with all texts, and where half or seven tenths of the items have none. *warm*: a random
split, 80/10/10 of each user; the closed form chooses its constants on validation, text alone and with pictures.
"""

import argparse
import json
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch
from timing import machine
from torch import Tensor

import recbole_llm  # noqa: F401  # before RecBole: its repairs
from recbole_llm.fitting.closed_form import fit_closed_form
from recbole_llm.fitting.cold_start import placement
from recbole_llm.fitting.cold_start.hidden_draws import HiddenDraw
from recbole_llm.fitting.cold_start.kernel_ridge import share_candidates
from recbole_llm.fitting.cold_start.placement import MUS
from recbole_llm.fitting.validation import TopKMetric, Validation, user_metric
from recbole_llm.fitting.warm_items import ContentTables
from recbole_llm.scoring.rows import Rows, rows_from_pairs, union

NDCG = TopKMetric("ndcg", 10)
DRAWS, MISSING = 3, (0.5, 0.7)
VALIDATION_USERS = 2_000  # by whom the closed form's constants are chosen
COLD_USERS = 2_000  # by whom hidden items are ranked
DATASET = "ml-1m-posters"


def load(data_path: str, encoder: str, store: str) -> tuple[Any, dict[str, float]]:
    """The dataset with its vectors, and the processor seconds that pictures took."""
    sys.argv = sys.argv[:1]
    from recbole.config import Config
    from recbole.utils import init_seed

    from recbole_llm.bridge.dataset import LLMTwoTowerDataset

    values = {
        "data_path": data_path,
        "item_modalities": {"image": {"encoder": encoder, "column": "image"}},
        "feature_cache_dir": store,
        "show_progress": False,
        "state": "ERROR",
        "load_col": {"inter": ["user_id", "item_id"]},
    }
    config = Config(model="LLMTwoTower", dataset=DATASET, config_dict=values)
    init_seed(config["seed"], True)
    dataset = LLMTwoTowerDataset(config)
    began = time.process_time()
    _ = dataset.item_vectors(("image",))
    seconds = {"image_cpu_seconds": round(time.process_time() - began, 1)}
    return dataset, seconds


def pairs(split: Any) -> Rows:
    inter = split.inter_feat
    return rows_from_pairs(inter["user_id"].long(), inter["item_id"].long(), split.user_num)


def paired(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Mean difference of two metrics of the same users, and its standard error."""
    difference = (ours - theirs).double()
    return {
        "difference": round(float(difference.mean()), 5),
        "standard_error": round(float(difference.std() / len(difference) ** 0.5), 5),
    }


# ---------------------------------------------------------------- cold items


def without_texts(content: ContentTables, share: float, seed: int) -> dict[str, tuple[Tensor, Tensor]]:
    """The content where a share of the items has no text."""
    vectors, present = content["text"]
    kept = torch.rand(len(present), generator=torch.Generator().manual_seed(99 + seed)) >= share
    return dict(content) | {"text": (vectors, present & kept)}


def cold(splits: Sequence[Rows], content: ContentTables, found: dict[str, Any]) -> Iterator[dict[str, Any]]:
    """Add to the results, one share of missing texts after the other."""
    placement.MAX_USERS = COLD_USERS
    train, valid, test = splits
    history = union(union(train, valid), test)
    n_items = len(content["text"][1])
    everything = torch.ones(n_items, dtype=torch.bool)
    draws = [HiddenDraw(history, n_items, everything, 1000 + seed, "full") for seed in range(DRAWS + 1)]
    found["hidden_items"] = len(draws[0].hidden.ids)
    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(1000, n_items, generator=generator)
    chance = []
    for draw in draws[1:]:
        mask = torch.zeros(n_items, dtype=torch.bool)
        mask[draw.hidden.ids] = True
        users = torch.nonzero(draw.hidden.targets.sizes).squeeze(1)[:1000]
        targets = draw.hidden.targets.select(users)
        values = user_metric(
            lambda rows: noise[rows].clone(), targets, draw.hidden.left.select(users), n_items, NDCG, ~mask
        )
        chance.append(float(values.mean()))
    found["chance"] = round(sum(chance) / DRAWS, 4)
    for share in (0.0, *MISSING):
        name = f"texts_missing_{share:g}"
        if name not in found:
            began = time.process_time()
            found[name] = compare(draws, content, share)
            found[name]["cpu_seconds"] = round(time.process_time() - began, 1)
            yield found


def choose(
    draw: HiddenDraw, content: ContentTables, candidates: Sequence[Mapping[str, float]]
) -> tuple[float, Mapping[str, float]]:
    """Ridge and shares by one draw: the ridge with equal shares, then the shares with that ridge, as the fit does."""
    by_mu = {mu: float(draw.values(content, NDCG, mu, candidates[0]).mean()) for mu in (0.1, *MUS)}
    mu = max(by_mu, key=lambda each: by_mu[each])
    by_shares = [by_mu[mu], *(float(draw.values(content, NDCG, mu, shares).mean()) for shares in candidates[1:])]
    return mu, candidates[by_shares.index(max(by_shares))]


def compare(draws: Sequence[HiddenDraw], content: ContentTables, share: float) -> dict[str, Any]:
    """Text alone, pictures alone and both, with ridge and shares chosen on the first draw."""
    variants = {"text": ("text",), "image": ("image",), "both": ("text", "image")}
    result: dict[str, Any] = {}
    values: dict[str, list[Tensor]] = {}
    given = [without_texts(content, share, seed) if share else content for seed in range(len(draws))]
    for name, modalities in variants.items():
        some = [{modality: each[modality] for modality in modalities} for each in given]
        mu, shares = choose(draws[0], some[0], share_candidates(modalities))
        values[name] = [draw.values(each, NDCG, mu, shares) for draw, each in zip(draws[1:], some[1:], strict=True)]
        by_draw = [round(float(value.mean()), 4) for value in values[name]]
        result[name] = {"ndcg@10": round(sum(by_draw) / DRAWS, 4), "by_draw": by_draw, "mu": mu, "shares": dict(shares)}
    result["both_against_text"] = paired(torch.cat(values["both"]), torch.cat(values["text"]))
    result["gain"] = round(result["both"]["ndcg@10"] / result["text"]["ndcg@10"] - 1, 4)
    result["draws_with_a_gain"] = sum(
        float(a.mean()) > float(b.mean()) for a, b in zip(values["both"], values["text"], strict=True)
    )
    return result


# ---------------------------------------------------------------- items with interactions


def warm(splits: Sequence[Rows], content: ContentTables, work: Path) -> dict[str, Any]:
    train, valid, test = splits
    n_items = len(content["text"][1])
    validation = Validation(train, valid, train, NDCG, VALIDATION_USERS)
    seen = union(train, valid)
    users = torch.nonzero(test.sizes).squeeze(1)
    found: dict[str, Any] = {}
    values = {}
    for name, modalities in {"text": ("text",), "both": ("text", "image")}.items():
        kept = work / f"warm-{name}.pt"
        if kept.is_file():
            found[name], values[name] = torch.load(kept, weights_only=True)
            continue
        began = time.process_time()
        some = {modality: content[modality] for modality in modalities}
        form = fit_closed_form(train, n_items, some, validation, dim="full")
        scorer = form.block().scorer(train.select(users))
        values[name] = user_metric(scorer, test.select(users), seen.select(users), n_items, NDCG, excluded=~form.warm)
        found[name] = {
            "ndcg@10": round(float(values[name].mean()), 4),
            "validation": round(float(form.value or 0.0), 4),
            "setting": str(form.setting),
            "settings_tried": len(form.trials),
            "cpu_seconds": round(time.process_time() - began, 1),
        }
        torch.save((found[name], values[name]), kept)
    found["both_against_text"] = paired(values["both"], values["text"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--data_path", required=True, help="holds ml-1m-posters")
    parser.add_argument("--encoder", required=True, help="of pictures, such as onnx:lite0.onnx")
    parser.add_argument("--store", default="", help="feature store (default: the user's)")
    parser.add_argument("--part", default="encode,cold,warm", help="of encode, cold and warm")
    parser.add_argument(
        "--work", type=Path, default=Path("."), help="keeps what is done, so that a run that was killed goes on"
    )
    parser.add_argument("--output", type=Path, default=ROOT / "benchmarks" / "results" / "pictures-ml-1m-posters.json")
    options = parser.parse_args()
    result: dict[str, Any] = json.loads(options.output.read_text()) if options.output.is_file() else {}
    parts = options.part.split(",")
    dataset, seconds = load(options.data_path, options.encoder, options.store)
    result |= {"dataset": DATASET, "machine": machine("cpu")}

    def keep(name: str, found: dict[str, Any]) -> None:
        result[name] = found
        options.output.write_text(json.dumps(result, indent=2) + "\n")

    if "encode" in parts:
        began = time.process_time()
        image = dataset.item_vectors(("image",))["image"]
        again = round(time.process_time() - began, 1)
        keep("encode", seconds | {"second_run_cpu_seconds": again, "items_with_a_picture": int(image.present.sum())})
    content = {name: (table.vectors, table.present) for name, table in dataset.item_features.items()}
    splits = [pairs(split) for split in dataset.build()]
    if "warm" in parts:
        keep("warm", warm(splits, content, options.work))
    if "cold" in parts:
        for found in cold(splits, content, dict(result.get("cold", {}))):
            keep("cold", found)
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
