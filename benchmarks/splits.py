"""RecBole's own split of a dataset as plain rows, with texts and vectors of its items, for benchmarks of single parts."""

import sys
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import recbole_llm  # noqa: F401  # before RecBole: its repairs
from recbole_llm.content.encoders.transformer import load_encoder
from recbole_llm.content.text import choose_text_fields, read_atomic_table, texts_of_tokens
from recbole_llm.fitting.closed_form import ClosedForm, fit_closed_form
from recbole_llm.fitting.ease import Setting
from recbole_llm.fitting.hyperparameters import search_setting
from recbole_llm.fitting.validation import TopKMetric, Validation, user_metric
from recbole_llm.scoring.rows import Rows, rows_from_pairs

NDCG = TopKMetric("ndcg", 10)
ENCODER = "sentence-transformers/all-MiniLM-L6-v2"


@dataclass(frozen=True)
class Split:
    """One split.

    Attributes:
        train: histories, one row per user.
        valid: validation targets.
        test: test targets.
        n_items: with padding item 0.
        features: ``[n_items, f]``, text vectors less their mean.
        present: ``[n_items]`` bool.
        texts: of the items; ``None`` where there is none.
    """

    train: Rows
    valid: Rows
    test: Rows
    n_items: int
    features: Tensor
    present: Tensor
    texts: list[str | None]

    @property
    def seen(self) -> Rows:
        """Items without a place at test: training and validation."""
        both = (self.train, self.valid)
        return rows_from_pairs(
            torch.cat([rows.row_of_entry() for rows in both]),
            torch.cat([rows.ids for rows in both]),
            len(self.train.offsets) - 1,
        )

    def validation(self) -> Validation:
        """The validation data that choices are made by."""
        return Validation(self.train, self.valid, self.train, NDCG)

    def per_user(self, form: ClosedForm, metric: TopKMetric = NDCG) -> Tensor:
        """Each test user's metric; cold items get no place."""
        excluded = ~form.warm
        scorer = form.block().scorer(self.train)
        return user_metric(scorer, self.test, self.seen, self.n_items, metric, excluded)


def load(dataset: str, data_path: str | None = None, seed: int = 2020) -> Split:
    """RecBole's default split (random 8:1:1 by user) and the default encoder's vectors, from the cache where they are."""
    sys.argv = sys.argv[:1]
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import init_seed

    values: dict[str, Any] = {"seed": seed, "show_progress": False, "state": "ERROR"}
    config = Config(
        model="LLMTwoTower", dataset=dataset, config_dict=values | ({"data_path": data_path} if data_path else {})
    )
    init_seed(seed, True)
    parts = data_preparation(config, create_dataset(config))
    data = parts[0]._dataset
    table = data.item_features["text"]
    rows = [
        rows_from_pairs(
            part._dataset.inter_feat["user_id"].long(), part._dataset.inter_feat["item_id"].long(), data.user_num
        )
        for part in parts
    ]
    path = Path(data.dataset_path) / f"{data.dataset_name}.item"
    fields = read_atomic_table(path, data.iid_field, separator=config["field_separator"])
    tokens = [None, *map(str, data.field2id_token[data.iid_field][1:])]
    texts, _ = texts_of_tokens(fields, tokens, choose_text_fields(fields, None, None))
    return Split(*rows, data.item_num, table.vectors, table.present, texts)


def encoder(**changes: Any) -> Any:
    """The default encoder, with other options than the default ones where given."""
    return load_encoder(ENCODER, **changes)


def ours(split: Split, **options: Any) -> ClosedForm:
    """The closed form with its defaults, without the learned block."""
    content = {"text": (split.features, split.present)}
    return fit_closed_form(split.train, split.n_items, content, split.validation(), **options)


def tuned_ease(split: Split) -> ClosedForm:
    """EASE, its ridge found on validation by a line search over powers of two, at least three of them."""
    found: dict[float, ClosedForm] = {}

    def value(setting: Setting) -> float:
        form = fit_closed_form(split.train, split.n_items, dim="full", setting=setting)
        found[setting.ridge] = form
        scorer = form.block().scorer(split.train)
        return float(user_metric(scorer, split.valid, split.train, split.n_items, NDCG, ~form.warm).mean())

    best = search_setting(value, Setting.of_ease(4.0), {})
    return replace(found[best.ridge], setting=best)
