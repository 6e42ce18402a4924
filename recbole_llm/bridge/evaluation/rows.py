"""Read from a full-ranking loader of RecBole which rows it asks for.

Shapes: M rows (users, or interactions of a sequential model).
"""

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import torch
from torch import Tensor

from recbole_llm.scoring.rows import Rows, rows_from_pairs


@dataclass(frozen=True)
class RankedRows:
    """What a full-ranking loader asks for.

    Attributes:
        positives: M rows of relevant items.
        seen: M rows of items that get no place; ``None`` for none.
        batch: rows ``[B]`` int64 -> the ``Interaction`` that ``full_sort_predict`` is given for them.
        users: ``[M]`` int64, the user of each row.
    """

    positives: Rows
    seen: Rows | None
    batch: Callable[[Tensor], Any]
    users: Tensor

    def __len__(self) -> int:
        return len(self.users)


_rows_of_loader: "WeakKeyDictionary[Any, RankedRows]" = WeakKeyDictionary()


def ranked_rows(loader: Any) -> RankedRows:
    """Collect the rows of a ``FullSortEvalDataLoader``, once for each loader."""
    if loader not in _rows_of_loader:
        _rows_of_loader[loader] = _sequential_rows(loader) if loader.is_sequential else _user_rows(loader)
    return _rows_of_loader[loader]


def _user_rows(loader: Any) -> RankedRows:
    # an entry of the dictionary that held its loader would keep both for ever
    users, features = loader.uid_list, loader.user_df

    def collect(items_of_user: Any) -> Rows:
        items = [items_of_user[user] for user in users.tolist()]
        row = torch.repeat_interleave(torch.arange(len(items)), torch.tensor([len(own) for own in items]))
        return rows_from_pairs(row, torch.cat(items), len(items))

    return RankedRows(
        positives=collect(loader.uid2positive_item),
        seen=collect(loader.uid2history_item),
        batch=lambda rows: features[rows],
        users=users,
    )


def _sequential_rows(loader: Any) -> RankedRows:
    """One row per interaction, whose item is the only positive; nothing is masked, as in stock."""
    inter, collate = loader._dataset.inter_feat, type(loader).collate_fn
    items = inter[loader.iid_field].long()
    parts = _SequentialParts(loader)
    return RankedRows(
        positives=Rows(torch.arange(len(items) + 1), items),
        seen=None,
        batch=lambda rows: collate(parts, rows.numpy())[0],
        users=inter[loader.uid_field].long(),
    )


class _SequentialParts:
    """What ``FullSortEvalDataLoader.collate_fn`` reads of a loader of a sequential model."""

    is_sequential = True

    def __init__(self, loader: Any) -> None:
        self._dataset, self.transform, self.iid_field = loader._dataset, loader.transform, loader.iid_field
