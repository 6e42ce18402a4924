"""What a run with a large catalogue should know before its towers train."""

from typing import Any

import torch

MANY_ITEMS = 100_000  # on a CPU: where sampled losses become the better choice
SHARED_NEGATIVES = (
    "train_neg_sample_args: {distribution: uniform, sample_num: 1, alpha: 1.0, dynamic: false, shared: 1024}"
)


def advice_of(config: Any, model: Any, device: torch.device) -> str | None:
    """Write a sentence for the log about the loss of a large catalogue on a CPU; ``None`` elsewhere.

    Args:
        config: RecBole's ``Config``.
        model: an ``LLMTwoTower``.
        device: where it trains.
    """
    items, loss = model.n_items - 1, model.options.loss_type
    if device.type != "cpu" or items <= MANY_ITEMS:
        return None
    shared = config["train_neg_sample_args"].get("shared")
    if model.options.trains_on_users:
        return (
            f"{items:,} items on a CPU: {loss} scores every one of them for every user. Much faster per epoch: "
            f"loss_type: sampled_bce with negatives that a batch shares, {SHARED_NEGATIVES}."
        )
    if shared:
        return f"{items:,} items on a CPU: {loss} with {shared:,} negatives that the rows of a batch share"
    return f"{items:,} items on a CPU: {loss}; rows of a batch can share their negatives, {SHARED_NEGATIVES}."
