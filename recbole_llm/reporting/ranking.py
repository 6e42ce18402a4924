"""The best items of each user by a model or a baseline, ranked as RecBole ranks a test.

Shapes: M users with a held-out interaction, K places.
"""

from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor

from recbole_llm.bridge.evaluation.rows import RankedRows
from recbole_llm.bridge.evaluation.streaming import hits, rank_all

K = 10


@dataclass(frozen=True, eq=False)
class Ranking:
    """The best items of each user.

    Attributes:
        items: ``[M, K]`` int64.
        hit: ``[M, K]`` bool, whether the item was held out.
        shown: ``[M, K]`` bool, places that hold an item; False where a user has fewer candidates than places.
    """

    items: Tensor
    hit: Tensor
    shown: Tensor


def some_rows(rows: RankedRows, kept: Tensor) -> RankedRows:
    """Some rows of a loader, ``[m]`` int64 of them in this order."""
    return RankedRows(
        positives=rows.positives.select(kept),
        seen=None if rows.seen is None else rows.seen.select(kept),
        batch=lambda index: rows.batch(kept[index]),
        users=rows.users[kept],
    )


def rank_rows(model: Any, rows: RankedRows, n_items: int, device: torch.device) -> Ranking:
    """The best items of every row by a model, or a baseline, that has ``full_sort_predict``."""
    items = rank_all(model, rows, K, n_items, device)
    shown = items > 0
    if rows.seen is not None:  # a place without a candidate holds a seen item, see rank_all
        shown &= ~hits(items, rows.seen, n_items).bool()
    return Ranking(items, hits(items, rows.positives, n_items).bool() & shown, shown)
