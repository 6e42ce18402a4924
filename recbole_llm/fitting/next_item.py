r"""Order in a history, where interactions are split by time: how fast items fade, and what comes next.

    closed form with decay    sum_{j in H_u} exp(-rank_uj / tau) B_ji                      rank 0: the newest item
    next-item ridge           C = (Z'Z + R)^-1 Z'Y,   R = lam g diag(diag Z'Z / g)^a       g = mean diag Z'Z

A row of Z is the decayed prefix of a history at one of its items, at most ``MAX_PREFIX`` long, and the row of Y that item: C
predicts the item that follows. Its score is sum_j exp(-rank_uj / tau') C_ji, one more block of the same dot product. tau,
tau', lam and the weight between the two are chosen on validation, "no decay" and "no such block" among the choices. Each is
chosen before the blocks after it are there; :mod:`recbole_llm.fading` chooses tau, tau' and the weights once more where all are.
Knows neither RecBole nor the kernels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from recbole_llm.factors import factorise
from recbole_llm.selection import LinearScorer, Scorer, choose_blend
from recbole_llm.towers import Rows

DECAYS = (None, 1.0, 2.0, 4.0, 7.0, 10.0, 20.0, 50.0)
NEXT_DECAYS = (3.0, 8.0)  # fitted by; 1 is worse in every setting on ml-100k and amazon-office
NEXT_RIDGES = (1.0, 4.0, 16.0)
NEXT_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7)
RIDGE_EXPONENT = 0.25
MAX_PREFIX = 40
MAX_STEPS = 400_000  # prefixes; longer data are thinned evenly
MAX_ITEMS = 8_000  # a solve is of the order of the cube

Log = Callable[[str], None]


def decayed(ranked: Rows, tau: float | None) -> Rows:
    """Histories whose ``weights`` are ranks (0 the newest) -> weights exp(-rank / tau); none for ``tau`` None."""
    if tau is None or ranked.weights is None:
        return Rows(ranked.offsets, ranked.ids)
    return Rows(ranked.offsets, ranked.ids, torch.exp(-ranked.weights / tau))


@dataclass(frozen=True)
class NextItemBlock:
    """A block of the score beside the closed form's.

    Attributes:
        source: ``[N, d]``.
        target: ``[N, d]``; ``None`` for the identity (d = N).
        decay: tau' of the histories it is given.
        scale: its factor beside a factor of 1 of the closed form's score.
        value: validation value of both together.
    """

    source: Tensor
    target: Tensor | None
    decay: float
    scale: float
    value: float

    def to(self, device: torch.device | str) -> "NextItemBlock":
        """The same on another device."""
        target = None if self.target is None else self.target.to(device)
        return replace(self, source=self.source.to(device), target=target)


def choose_decay(
    ranked: Rows, source: Tensor, target: Tensor | None, value: Callable[[Scorer], float]
) -> tuple[float | None, float]:
    """The tau of ``DECAYS`` that is best on validation, the first of equals, and its value.

    Args:
        ranked: histories of the rows that ``value`` asks for; weights are ranks.
        source: ``[N, d]``.
        target: ``[N, d]`` or ``None`` for the identity.
        value: validation value of a scorer.
    """
    values = {tau: value(LinearScorer(decayed(ranked, tau), source, target)) for tau in DECAYS}
    best = max(values, key=lambda tau: values[tau])
    return best, values[best]


def _steps(ranked: Rows) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Items of all histories oldest first, the row of each, and the place of each in its row."""
    assert ranked.weights is not None
    row = ranked.row_of_entry().cpu().numpy()
    order = np.lexsort((-ranked.weights.cpu().numpy(), row))
    items, row = ranked.ids.cpu().numpy()[order], row[order]
    place = np.arange(len(items)) - ranked.offsets.cpu().numpy()[row]
    return items, row, place


def next_item_gram(ranked: Rows, n_items: int, tau: float) -> tuple[Tensor, Tensor]:
    """Z'Z and Z'Y of the module docstring, ``[n_items, n_items]`` float32 each, on the device of ``ranked``.

    Args:
        ranked: training histories; weights are ranks.
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
    """C of the module docstring, ``[n_items, n_items]``; rows of items that no prefix holds are zero."""
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


def fit_next_item(
    train: Rows,
    ranked: Rows,
    n_items: int,
    closed: Scorer,
    value: Callable[[Scorer], float],
    dim: int | None,
    columns: Tensor,
    say: Log,
    *,
    decays: Sequence[float] = NEXT_DECAYS,
    ridges: Sequence[float] = NEXT_RIDGES,
) -> NextItemBlock | None:
    """Fit the next-item block and weigh it against the closed form on validation.

    Args:
        train: all training histories; weights are ranks.
        ranked: histories of the rows that ``value`` asks for.
        n_items: size of the catalogue.
        closed: the closed form's scores of these rows.
        value: validation value of a scorer.
        dim: rank of the factors; ``None`` for the full matrix.
        columns: ``[n_items]`` bool, items whose scores set the scale.
        say: told the findings.
        decays: tau' tried.
        ridges: lam tried, ascending; the search of a tau' ends where the value falls.

    Returns:
        The block; ``None`` where it adds nothing, or the catalogue is too large for it.
    """
    if n_items > MAX_ITEMS:
        say(f"next-item block: left out, {n_items} items are more than {MAX_ITEMS}")
        return None
    rows = torch.arange(len(ranked.offsets) - 1, device=ranked.ids.device)
    best: NextItemBlock | None = None
    nothing = value(closed)
    for tau in decays:
        gram, follows = next_item_gram(train, n_items, tau)
        last = -1.0
        for ridge in ridges:
            matrix = solve_next_item(gram, follows, ridge)
            history = decayed(ranked, tau)
            source, target = matrix, None
            if dim is not None:
                source, target = factorise(matrix, dim, gram.matmul, free_diagonal=False)
            blend = choose_blend(
                closed, LinearScorer(history, source, target), rows, n_items, value, NEXT_WEIGHTS, columns
            )
            found = max((trial[1] for trial in blend.trials), default=0.0)
            if blend.weight and blend.scales[0] and found > (nothing if best is None else best.value):
                best = NextItemBlock(source, target, tau, blend.scales[1] / blend.scales[0], found)
                say(f"next-item block, decay {tau:g}, ridge {ridge:g}: {found:.4f} with a share of {blend.weight:g}")
            if found <= last:
                break
            last = found
    if best is None:
        say("next-item block: left out, it adds nothing on validation")
    return best
