"""What columns as kernels add to texts: for items that nobody has touched, and for the others.

    python benchmarks/item_columns.py --dataset ml-100k
    python benchmarks/item_columns.py --dataset amazon-office --data_path FOLDER

The columns are those that ``item_columns: auto`` takes. *cold*: of each draw a fifth of the items loses its interactions and is
ranked by content among itself, against all of its interactions. Draw 0 chooses ridge and shares, three others are measured.
*warm*: a random split, 80/10/10 of each user; the closed form chooses its constants on validation, text alone and with the
columns. Variants are compared user by user. Texts hold the same columns already, as words.
"""

import argparse
import json
import sys
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch
from pictures import COLD_USERS, DRAWS, NDCG, choose, paired, pairs
from timing import machine
from torch import Tensor

import recbole_llm  # noqa: F401  # before RecBole: its repairs
from recbole_llm.fitting.closed_form import fit_closed_form
from recbole_llm.fitting.cold_start import placement
from recbole_llm.fitting.cold_start.hidden_draws import HiddenDraw
from recbole_llm.fitting.cold_start.kernel_ridge import share_candidates
from recbole_llm.fitting.validation import Validation, user_metric
from recbole_llm.fitting.warm_items import ContentTables
from recbole_llm.scoring.rows import Rows, union


def load(dataset: str, data_path: str | None) -> Any:
    """The dataset with texts and columns."""
    sys.argv = sys.argv[:1]
    from recbole.config import Config
    from recbole.utils import init_seed

    from recbole_llm.bridge.dataset import LLMTwoTowerDataset

    values: dict[str, Any] = {"item_columns": "auto", "show_progress": False, "state": "ERROR"}
    values["load_col"] = {"inter": ["user_id", "item_id"]}
    config = Config("LLMTwoTower", dataset, config_dict=values | ({"data_path": data_path} if data_path else {}))
    init_seed(config["seed"], True)
    return LLMTwoTowerDataset(config)


def cold(splits: Sequence[Rows], content: ContentTables) -> dict[str, Any]:
    """Hidden items among themselves, by text and by text and columns."""
    placement.MAX_USERS = COLD_USERS
    history = union(union(splits[0], splits[1]), splits[2])
    n_items = len(content["text"][1])
    everything = torch.ones(n_items, dtype=torch.bool)
    draws = [HiddenDraw(history, n_items, everything, 1000 + seed, "full") for seed in range(DRAWS + 1)]
    found: dict[str, Any] = {"hidden_items": len(draws[0].hidden.ids)}
    values: dict[str, list[Tensor]] = {}
    for name, modalities in {"text": ("text",), "both": tuple(content)}.items():
        some = {modality: content[modality] for modality in modalities}
        mu, shares = choose(draws[0], some, share_candidates(modalities))
        values[name] = [draw.values(some, NDCG, mu, shares) for draw in draws[1:]]
        by_draw = [round(float(value.mean()), 4) for value in values[name]]
        found[name] = {"ndcg@10": round(sum(by_draw) / DRAWS, 4), "by_draw": by_draw, "mu": mu, "shares": dict(shares)}
    found["both_against_text"] = paired(torch.cat(values["both"]), torch.cat(values["text"]))
    found["gain"] = round(found["both"]["ndcg@10"] / found["text"]["ndcg@10"] - 1, 4)
    found["draws_with_a_gain"] = sum(
        float(a.mean()) > float(b.mean()) for a, b in zip(values["both"], values["text"], strict=True)
    )
    return found


def warm(splits: Sequence[Rows], content: ContentTables) -> dict[str, Any]:
    """Items with interactions: the closed form with text, and with text and columns."""
    train, valid, test = splits
    n_items = len(content["text"][1])
    validation = Validation(train, valid, train, NDCG)
    seen, users = union(train, valid), torch.nonzero(test.sizes).squeeze(1)
    found: dict[str, Any] = {}
    values = {}
    for name, modalities in {"text": ("text",), "both": tuple(content)}.items():
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
    found["both_against_text"] = paired(values["both"], values["text"])
    return found


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", "-d", default="ml-100k")
    parser.add_argument("--data_path", default=None, help="folder of the dataset; ml-100k needs none")
    parser.add_argument("--output", type=Path, default=None)
    options = parser.parse_args()
    output = options.output or ROOT / "benchmarks" / "results" / f"item-columns-{options.dataset}.json"
    dataset = load(options.dataset, options.data_path)
    tables = dataset.item_features
    content = {name: (table.vectors, table.present) for name, table in tables.items()}
    splits = [pairs(split) for split in dataset.build()]
    result: dict[str, Any] = {
        "benchmark": "item-columns",
        "dataset": options.dataset,
        "machine": machine("cpu"),
        "columns": {
            name: {"dim": t.dim, "items": int(t.present.sum())} for name, t in tables.items() if name != "text"
        },
    }
    for name, measure in (("warm", warm), ("cold", cold)):
        result[name] = measure(splits, content)
        output.write_text(json.dumps(result, indent=2) + "\n", encoding="utf-8")
    print(json.dumps(result, indent=2))


if __name__ == "__main__":
    main()
