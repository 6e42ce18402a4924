r"""Item neighbours: ItemKNN, and the same on histories that fade.

    w_ij = <x_i, x_j> / (|x_i| |x_j| + shrink + 1e-6),  w_ii = 0,  of each j the k largest w_ij kept
    ItemKNN             s_uj = sum_{i in H_u} w_ij
    ItemKNN by recency  s_uj = sum_{i in H_u} exp(-rank_ui / tau) w_ij

x_i is the column of an item's training interactions. The formula is that of RecBole's ``ItemKNN`` (Aiolli, RecSys 2013); reading
the newest items most is the usual adaptation to next items (Ludewig and Jannach, UMUAI 2018). k, the shrink and tau are chosen on
validation.
"""

from collections.abc import Sequence

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from recbole_llm.bridge.experiments.baselines.solved import (
    DECAYS,
    Solved,
    refuse_many,
    sparse_scorer,
    weighted_histories,
)
from recbole_llm.bridge.experiments.leave_one_out import LeaveOneOut
from recbole_llm.fitting.ease import weighted_gram
from recbole_llm.scoring.rows import Rows

NEIGHBOURS = (5, 10, 20, 50, 100, 200)
SHRINKS = (0.0, 10.0, 30.0)
_ROWS = 1024  # of the Gram matrix that are ranked at once


def item_knn(rows: LeaveOneOut) -> Solved:
    """Rank by the cosine of interaction columns.

    Holds one ``[N, N]`` float32 matrix.

    Raises:
        RefusedRowError: if the data set has more than ``MAX_ITEMS`` items.
    """
    return _best("ItemKNN", rows, (None,))


def item_knn_by_recency(rows: LeaveOneOut) -> Solved:
    """Rank by the cosine of interaction columns, the newest items of a history counting most.

    Holds one ``[N, N]`` float32 matrix.

    Raises:
        RefusedRowError: if the data set has more than ``MAX_ITEMS`` items.
    """
    return _best("ItemKNN by recency", rows, DECAYS)


def _best(name: str, rows: LeaveOneOut, decays: Sequence[float | None]) -> Solved:
    n = rows.data.n_items
    refuse_many(name, n)
    train = {decay: weighted_histories(rows.data.history, n, decay) for decay in decays}
    gram = weighted_gram(_plain(rows), torch.ones(len(rows.data.history.sizes)), n)
    best: tuple[float, str, float | None, sparse.csr_matrix] | None = None
    for shrink in SHRINKS:
        values, ids = _neighbours(gram, max(NEIGHBOURS), shrink)
        for k in NEIGHBOURS:
            weights = _matrix(values[:, :k], ids[:, :k])
            for decay in decays:
                found = rows.validation.value(sparse_scorer(train[decay], weights), n, rows.padding)
                if best is None or found > best[0]:
                    told = "" if decay is None else f", decay {decay:g}"
                    best = found, f"{k} neighbours, shrink {shrink:g}{told}", decay, weights
    assert best is not None
    valid, setting, decay, weights = best
    return Solved(setting, valid, sparse_scorer(weighted_histories(rows.later, n, decay), weights))


def _plain(rows: LeaveOneOut) -> Rows:
    return Rows(rows.data.history.offsets, rows.data.history.ids)


def _neighbours(gram: Tensor, k: int, shrink: float) -> tuple[Tensor, Tensor]:
    """Find the ``k`` largest w_ij of every item j, ``[N, k]`` each, the largest first."""
    norm = gram.diagonal().sqrt()
    values, ids = [], []
    for start in range(0, len(gram), _ROWS):
        block = gram[start : start + _ROWS] / (norm[start : start + _ROWS, None] * norm + (shrink + 1e-6))
        at = torch.arange(len(block))
        block[at, start + at] = 0.0
        found = block.topk(min(k, len(gram)), dim=1)
        values.append(found.values)
        ids.append(found.indices)
    return torch.cat(values), torch.cat(ids)


def _matrix(values: Tensor, ids: Tensor) -> sparse.csr_matrix:
    """Write the neighbours as a sparse matrix, row i and column j."""
    n, k = values.shape
    column = np.repeat(np.arange(n), k)
    weights = sparse.csr_matrix((values.numpy().ravel(), (ids.numpy().ravel(), column)), shape=(n, n))
    weights.eliminate_zeros()
    return weights
