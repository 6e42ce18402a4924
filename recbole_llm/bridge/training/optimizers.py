"""The optimizers of a training: RecBole's, fused, and ``learner: rowwise_adagrad``, which visits the rows that a batch names.

The tables of IDs get sparse gradients, and :class:`recbole_llm_kernels.RowwiseAdagrad` takes them. With a million items of 64
numbers, 65,536 of them in a batch, a dense Adam reads and writes the whole table, its gradient and two moments; here it is the
rows that occur, with one number of state each. What has no row for a user or an item (offsets, adapters, the temperature, the
items' bias) keeps its dense gradient. A row that no batch names stays as it is: there is no momentum and no weight decay.
"""

from logging import getLogger
from typing import Any, cast

import torch
from torch import nn

from recbole_llm.bridge import distributed
from recbole_llm_kernels import RowwiseAdagrad

NAME = "rowwise_adagrad"
LOSSES = ("sampled_bce", "pair_bce")


def fused(optimizer: torch.optim.Optimizer) -> torch.optim.Optimizer:
    """Return Adam and AdamW in their fused form, where there is one: the update is a third of a sparse model's step."""
    if type(optimizer) not in (torch.optim.Adam, torch.optim.AdamW):
        return optimizer
    try:
        groups = [{key: group[key] for key in ("params", "lr", "weight_decay")} for group in optimizer.param_groups]
        kind: Any = type(optimizer)
        return cast(torch.optim.Optimizer, kind(groups, fused=True))
    except (RuntimeError, ValueError):  # a dtype or device without it
        return optimizer


def is_rowwise(config: Any) -> bool:
    """Whether the learner is row-wise Adagrad on touched rows."""
    return str(config["learner"]).lower() == NAME


def rowwise_adagrad(config: Any, model: Any) -> RowwiseAdagrad:
    """Make the model's tables of IDs give sparse gradients, and return the optimizer that takes them.

    Args:
        config: RecBole's.
        model: with the towers that are trained.

    Raises:
        ValueError: with settings under which a step has no few rows to visit, or that need dense gradients.
    """
    given = config.external_config_dict
    if model.options.loss_type not in LOSSES:
        raise ValueError(
            f"learner {NAME} visits the rows that a batch names, and under loss_type {model.options.loss_type} it names every "
            f"item; set loss_type to {' or '.join(LOSSES)}, or learner to adamw."
        )
    if config["clip_grad_norm"]:
        raise ValueError(f"learner {NAME} does not go with clip_grad_norm, which reads dense gradients; leave it out.")
    if distributed.active():
        raise ValueError(f"learner {NAME} runs in one process; set learner to adamw, or start one process.")
    if given.get("weight_decay"):
        raise ValueError(
            f"learner {NAME} has no weight_decay, and it is {given['weight_decay']!r}; set it to 0, or learner to adamw."
        )
    if config["weight_decay"]:
        getLogger().info("learner: %s has no weight_decay; the default of adamw is left out.", NAME)
    for table in (model.target_tower.id, model.source_tower.id, model.user_tower.id):
        if isinstance(table, nn.Embedding):
            table.sparse = True
    backend = model.options.kernel_backend
    return RowwiseAdagrad(model.parameters(), lr=float(config["learning_rate"]), backend=backend)
