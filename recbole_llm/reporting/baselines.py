"""Two baselines that every shop knows: bestsellers, and "who bought this also bought" (ItemKNN).

Both are fitted on the training interactions alone, as RecBole's own ``Pop`` and ``ItemKNN`` are, and give a score of every item,
so that they are ranked by the same code as the model.
"""

from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

NEIGHBOURS, SHRINK = 100, 0.0  # RecBole's defaults (properties/model/ItemKNN.yaml)
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
    """

    name = "ItemKNN"

    def __init__(
        self, interactions: Any, user_field: str, neighbours: int = NEIGHBOURS, shrink: float = SHRINK
    ) -> None:
        self._interactions = interactions.astype(np.float32)
        self._user_field = user_field
        self._weights = _similarities(self._interactions, neighbours, shrink)
        self.about = f"cosine of the items' customers, {neighbours} neighbours, shrink {shrink:g}"

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


@dataclass(frozen=True)
class Baselines:
    """The baselines of one training split.

    Attributes:
        fitted: those that could be fitted.
        left_out: name -> why it was not.
    """

    fitted: tuple[Any, ...]
    left_out: dict[str, str]


def fit_baselines(training: Any, without: str = "") -> Baselines:
    """Fit both on a training split, ItemKNN within its budget.

    Args:
        training: RecBole's dataset of the training interactions.
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
    fitted.append(ItemKNN(interactions, training.uid_field))
    return Baselines(tuple(fitted), {})
