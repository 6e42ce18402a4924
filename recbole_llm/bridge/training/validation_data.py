"""The data that choices are made by, of a validation split."""

from logging import getLogger
from typing import Any

import torch

from recbole_llm.fitting.validation import TopKMetric, Validation
from recbole_llm.scoring.rows import union


def validation_of(config: Any, model: Any, valid_data: Any, train_split: Any = None) -> Validation | None:
    """Make the data that choices are made by; ``None`` without a validation split.

    Args:
        config: RecBole's.
        model: whose histories count.
        valid_data: the validation loader.
        train_split: dataset of the training split, which says what users have seen beside their histories.
    """
    if not valid_data:
        return None
    try:
        metric = TopKMetric.parse(config["valid_metric"])
    except ValueError:
        metric = TopKMetric("ndcg", 10)
        getLogger().info("valid_metric %s is no top-k metric: %s chooses", config["valid_metric"], metric)
    history, device = model.history, config["device"]
    targets = valid_data._dataset.training_rows().to(device)
    disliked = None if train_split is None else train_split.negative_rows()
    seen = history if disliked is None else union(history, disliked.to(device))
    if config["repeatable"]:  # RecBole's key: items of the history have a place too
        seen = seen.keep(torch.zeros_like(seen.ids, dtype=torch.bool))
    return Validation(history=history, targets=targets, seen=seen, metric=metric)
