r"""Order in a history, where interactions are split by time: how fast items fade, and what comes next.

    closed form with decay    sum_{j in H_u} exp(-rank_uj / tau) B_ji                      rank 0: the newest item
    next-item ridge           C = (Z'Z + R)^-1 Z'Y,   R = lam g diag(diag Z'Z / g)^a       g = mean diag Z'Z

A row of Z is the decayed prefix of a history at one of its items, at most ``MAX_PREFIX`` long, and the row of Y that item: C
predicts the item that follows. Its score is sum_j exp(-rank_uj / tau') C_ji, one more block of the same dot product. tau,
tau', lam and the weight between the two are chosen on validation, "no decay" and "no such block" among the choices. Each is
chosen before the blocks after it are there; :mod:`recbole_llm.fitting.decay_search` chooses tau, tau' and the weights once
more where all are.
"""

from collections.abc import Callable, Sequence
from dataclasses import replace
from logging import getLogger

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from recbole_llm.fitting.blend import choose_blend
from recbole_llm.fitting.factors import factorise
from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.score import LinearBlock, Scorer

DECAYS = (None, 1.0, 2.0, 4.0, 7.0, 10.0, 20.0, 50.0)
NEXT_DECAYS = (3.0, 8.0)  # fitted by
NEXT_RIDGES = (1.0, 4.0, 16.0)
NEXT_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7)
RIDGE_EXPONENT = 0.25
MAX_PREFIX = 40
MAX_STEPS = 400_000  # prefixes; longer data are thinned evenly
MAX_ITEMS = 8_000  # a solve is of the order of the cube

log = getLogger(__name__)


def choose_decay(block: LinearBlock, histories: Rows, value: Callable[[Scorer], float]) -> tuple[float | None, float]:
    """Choose the tau of ``DECAYS`` that is best on validation, the first of equals; returns it with its value.

    Args:
        block: the block whose histories fade.
        histories: of the rows that ``value`` asks for, with ranks.
        value: validation value of a scorer.
    """
    values = {tau: value(replace(block, decay=tau).scorer(histories)) for tau in DECAYS}
    best = max(values, key=lambda tau: values[tau])
    return best, values[best]


def _steps(ranked: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items of all histories oldest first, the row of each, and the place of each in its row."""
    assert ranked.ranks is not None
    row = ranked.row_of_entry().cpu().numpy()
    order = np.lexsort((-ranked.ranks.cpu().numpy(), row))
    items, row = ranked.ids.cpu().numpy()[order], row[order]
    place = np.arange(len(items)) - ranked.offsets.cpu().numpy()[row]
    return items, row, place


def next_item_gram(ranked: Rows, n_items: int, tau: float) -> tuple[Tensor, Tensor]:
    """Compute Z'Z and Z'Y of the module docstring, ``[n_items, n_items]`` float32 each, on the device of ``ranked``.

    Args:
        ranked: training histories, with ranks.
        n_items: size of the catalogue.
        tau: tau'.
    """
    items, _, place = _steps(ranked)
    at = np.nonzero(place)[0]  # every item but the first of its row is a target
    if len(at) > MAX_STEPS:
        at = at[np.linspace(0, len(at) - 1, MAX_STEPS).astype(np.int64)]
    length = np.minimum(place[at], min(MAX_PREFIX, int(np.ceil(5 * tau))))
    step = np.repeat(np.arange(len(at)), length)
    back = np.arange(len(step)) - np.repeat(np.cumsum(length) - length, length)  # 0: the item just before
    shape = (len(at), n_items)
    z = sparse.csr_matrix((np.exp(-back / tau).astype(np.float32), (step, items[at[step] - 1 - back])), shape=shape)
    y = sparse.csr_matrix((np.ones(len(at), np.float32), (np.arange(len(at)), items[at])), shape=shape)
    device = ranked.ids.device
    gram, follows = (torch.from_numpy((z.T @ other).toarray()).to(device) for other in (z, y))
    return gram, follows


def solve_next_item(gram: Tensor, follows: Tensor, ridge: float) -> Tensor:
    """Solve for C of the module docstring, ``[n_items, n_items]``; rows of items that no prefix holds are zero."""
    diagonal = gram.diagonal()
    known = diagonal > 0
    scale = diagonal[known].mean()
    A = gram.clone()
    A.diagonal().add_(
        torch.where(
            known, ridge * scale * (diagonal / scale).clamp(min=1e-6) ** RIDGE_EXPONENT, torch.ones_like(diagonal)
        )
    )
    return torch.cholesky_solve(follows, torch.linalg.cholesky(A))


def next_item_block(train: Rows, n_items: int, tau: float, ridge: float, dim: int | None) -> LinearBlock:
    """The block of given constants, of scale 1.

    Args:
        train: all training histories, with ranks.
        n_items: size of the catalogue.
        tau: tau'.
        ridge: lam.
        dim: rank of the factors; ``None`` for the full matrix.
    """
    gram, follows = next_item_gram(train, n_items, tau)
    return _block(gram, follows, tau, ridge, dim)


def _block(gram: Tensor, follows: Tensor, tau: float, ridge: float, dim: int | None) -> LinearBlock:
    source, target = solve_next_item(gram, follows, ridge), None
    if dim is not None:
        source, target = factorise(source, dim, gram.matmul, free_diagonal=False)
    return LinearBlock("next_item", source, target, decay=tau, constants={"tau": tau, "ridge": ridge})


def fit_next_item(
    train: Rows,
    histories: Rows,
    n_items: int,
    closed: Scorer,
    value: Callable[[Scorer], float],
    dim: int | None,
    columns: Tensor,
    *,
    decays: Sequence[float] = NEXT_DECAYS,
    ridges: Sequence[float] = NEXT_RIDGES,
) -> LinearBlock | None:
    """Fit the next-item block and weigh it against the closed form on validation.

    Args:
        train: all training histories, with ranks.
        histories: of the rows that ``value`` asks for, with ranks.
        n_items: size of the catalogue.
        closed: the closed form's scores of these rows.
        value: validation value of a scorer.
        dim: rank of the factors; ``None`` for the full matrix.
        columns: ``[n_items]`` bool, items whose scores set the scale.
        decays: tau' tried.
        ridges: lam tried, ascending; the search of a tau' ends where the value falls.

    Returns:
        The block, scaled beside a closed form of scale 1; ``None`` where it adds nothing, or the catalogue is too large.
    """
    if n_items > MAX_ITEMS:
        log.info(f"next-item block: left out, {n_items} items are more than {MAX_ITEMS}")
        return None
    rows = torch.arange(len(histories.offsets) - 1, device=histories.ids.device)
    best: LinearBlock | None = None
    best_value = value(closed)
    for tau in decays:
        gram, follows = next_item_gram(train, n_items, tau)
        last = -1.0
        for ridge in ridges:
            block = _block(gram, follows, tau, ridge, dim)
            blend = choose_blend(closed, block.scorer(histories), rows, n_items, value, NEXT_WEIGHTS, columns)
            found = max((trial[1] for trial in blend.trials), default=0.0)
            if blend.weight and blend.scales[0] and found > best_value:
                best, best_value = replace(block, scale=blend.scales[1] / blend.scales[0]), found
                log.info(
                    f"next-item block, decay {tau:g}, ridge {ridge:g}: {found:.4f} with a share of {blend.weight:g}"
                )
            if found <= last:
                break
            last = found
    if best is None:
        log.info("next-item block: left out, it adds nothing on validation")
    return best
