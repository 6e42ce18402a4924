"""Two baselines that every shop knows: bestsellers, and "who bought this also bought" (ItemKNN).

Both are fitted on the training interactions alone, as RecBole's own ``Pop`` and ``ItemKNN`` are, and give a score of every item,
so that they are ranked by the same code as the model. ItemKNN's setting is chosen on the validation split, as ours are.
"""

import copy
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.bridge.evaluation.rows import RankedRows
from recbole_llm.fitting.validation import evenly
from recbole_llm.reporting.ranking import rank_rows, some_rows

NEIGHBOURS, SHRINK = 100, 0.0  # RecBole's defaults (properties/model/ItemKNN.yaml)
CHOICES = {0.0: (100, 20, 50, 200), 10.0: (100, 20, 50, 200)}  # shrink: neighbours; of equal ones the first
CHOICE_USERS = 2_000  # of validation, evenly spaced
CHOICE_ITEMS, CHOICE_PAIRS = 10_000, 200_000_000  # beyond, a choice would take minutes
MAX_ITEMS = 30_000  # ItemKNN compares every pair of items
MAX_PAIRS = 1_000_000_000  # pairs of items in the histories, which it counts
_BLOCK = 2**24  # similarities held at once, 64 MiB of float32


class Bestsellers:
    """Every customer gets the items with most training interactions.

    Args:
        count: ``[N]`` training interactions of each item.
    """

    name = "bestsellers"
    about = "the items with most training interactions"

    def __init__(self, count: Tensor) -> None:
        self._score = count.float()

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores of every item for each row, ``[B * N]`` float32."""
        return self._score.repeat(len(interaction))


class ItemKNN:
    r"""Cosine of the items' interaction columns, the ``neighbours`` most similar of each kept.

        w_ij = <x_i, x_j> / (|x_i| |x_j| + shrink + 1e-6),  w_ii = 0
        score_uj = sum_i x_ui w_ij

    The formula is that of RecBole's ``ItemKNN`` (``model/general_recommender/itemknn.py``; Aiolli, RecSys 2013).

    Args:
        interactions: scipy CSR, ``[U, N]``; how often each user has met each item.
        user_field: name of the users' column in an ``Interaction``.
        neighbours: items kept for each item.
        shrink: added to the denominator.
        reason: why it is this setting.
    """

    name = "ItemKNN"

    def __init__(
        self,
        interactions: Any,
        user_field: str,
        neighbours: int = NEIGHBOURS,
        shrink: float = SHRINK,
        reason: str = "as given",
    ) -> None:
        self._interactions = interactions.astype(np.float32)
        self._user_field = user_field
        self._weights = _similarities(self._interactions, neighbours, shrink)
        self.about = f"cosine of the items' customers, {neighbours} neighbours, shrink {shrink:g} ({reason})"

    def with_fewer(self, neighbours: int) -> "ItemKNN":
        """The same with the first ``neighbours`` of each item's alone."""
        fewer = copy.copy(self)
        fewer._weights = _largest(self._weights, neighbours)
        return fewer

    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Scores of every item for each row, ``[B * N]`` float32."""
        users = interaction[self._user_field].cpu().numpy()
        return torch.from_numpy((self._interactions[users] @ self._weights).toarray()).view(-1)


def _similarities(interactions: Any, neighbours: int, shrink: float) -> Any:
    """Scipy CSC ``[N, N]``; column j holds the items most similar to j."""
    import scipy.sparse as sp

    columns = interactions.tocsc()
    n_items = columns.shape[1]
    norm = np.sqrt(np.asarray(columns.power(2).sum(axis=0)).ravel()).astype(np.float32)
    kept, step = min(neighbours, n_items), max(1, _BLOCK // max(n_items, 1))
    parts = []
    for start in range(0, n_items, step):
        block = (columns.T @ columns[:, start : start + step]).toarray()
        width = block.shape[1]
        own = np.arange(width)
        block[start + own, own] = 0.0
        block /= norm[:, None] * norm[None, start : start + width] + shrink + 1e-6
        if kept < n_items:
            low = np.argpartition(-block, kept - 1, axis=0)[kept:]
            block[low, own] = 0.0
        parts.append(sp.csc_matrix(block))
    return sp.hstack(parts, format="csc")


def _largest(weights: Any, number: int) -> Any:
    """The largest values of each column of a scipy CSC matrix."""
    import scipy.sparse as sp

    column = np.repeat(np.arange(weights.shape[1]), np.diff(weights.indptr))
    order = np.lexsort((-weights.data, column))
    kept = order[np.arange(len(order)) - weights.indptr[column] < number]
    return sp.csc_matrix((weights.data[kept], (weights.indices[kept], column[kept])), shape=weights.shape)


def _chosen(interactions: Any, user_field: str, valid: RankedRows, n_items: int) -> tuple[int, float]:
    """Neighbours and shrink with most hits on validation; of equal ones the first of :data:`CHOICES`."""
    rows = some_rows(valid, evenly(torch.arange(len(valid)), CHOICE_USERS))
    best, most = (NEIGHBOURS, SHRINK), -1
    for shrink, numbers in CHOICES.items():
        widest = ItemKNN(interactions, user_field, max(numbers), shrink)
        for number in numbers:
            found = int(rank_rows(widest.with_fewer(number), rows, n_items, torch.device("cpu")).hit.sum())
            if found > most:
                best, most = (number, shrink), found
    return best


@dataclass(frozen=True)
class Baselines:
    """The baselines of one training split.

    Attributes:
        fitted: those that could be fitted.
        left_out: name -> why it was not.
    """

    fitted: tuple[Any, ...]
    left_out: dict[str, str]


def fit_baselines(training: Any, valid: RankedRows | None = None, without: str = "") -> Baselines:
    """Fit both on a training split, ItemKNN within its budget.

    Args:
        training: RecBole's dataset of the training interactions.
        valid: rows of the validation split, on which ItemKNN's setting is chosen; without them it is RecBole's default.
        without: name of the model that they stand beside; a baseline of this name is that model and is not fitted.
    """
    interactions = training.inter_matrix(form="csr")
    count = torch.from_numpy(np.asarray(interactions.sum(axis=0)).ravel())
    n_items = interactions.shape[1]
    pairs = int((np.diff(interactions.indptr).astype(np.int64) ** 2).sum())
    fitted: list[Any] = [Bestsellers(count)]
    if without == ItemKNN.name:
        return Baselines(tuple(fitted), {})
    if n_items > MAX_ITEMS or pairs > MAX_PAIRS:
        why = (
            f"its budget is {MAX_ITEMS:,} items and {MAX_PAIRS:,} pairs of items in the histories; here are "
            f"{n_items - 1:,} and {pairs:,}"
        )
        return Baselines(tuple(fitted), {ItemKNN.name: why})
    setting, reason = (
        (NEIGHBOURS, SHRINK),
        "RecBole's default, as there is no ranking of a validation split to choose by",
    )
    if valid is not None and (n_items > CHOICE_ITEMS or pairs > CHOICE_PAIRS):
        reason = (
            f"RecBole's default; up to {CHOICE_ITEMS:,} items and {CHOICE_PAIRS:,} pairs in the histories it is chosen"
        )
    elif valid is not None:
        setting = _chosen(interactions, training.uid_field, valid, n_items)
        reason = f"the best of {sum(map(len, CHOICES.values()))} settings on validation"
    fitted.append(ItemKNN(interactions, training.uid_field, *setting, reason))
    return Baselines(tuple(fitted), {})
