r"""Linear item-item models, solved at once: EASE, TALE and L3AE.

EASE (Steck, WWW 2019)

    s_ui = sum_{j in H_u} B_ji,   B = argmin |X - XB|^2 + lam |B|^2 under a zero diagonal

TALE (Park et al., WSDM 2025): each item of a history but the first is one row of S, the items before it, and of T, itself.

    S_kj = max(exp(-|t_k - t_j| / tau), c) p_j(t_j)^beta,   T_ki = p_i(t_k)^beta,   beta <= 0
    B = (S'S + lam I)^-1 S'T,   s_ui = sum_{j in H_u} exp(-rank_uj / tau') B_ji

    t: when an item was met,   p_i(t): interactions with i in the time N before t, that at t among them

    Of a history the newest ``MAX_PREFIX`` items before an item count. The authors give times in days; here tau and N are set in
    quantiles and shares of the data's own times, so that any unit will do.

L3AE (Moon et al., CIKM 2025): an EASE of the content, to which that of the interactions is drawn.

    C = argmin |F - FC|^2 + lam_F |C|^2 under a zero diagonal,   F: columns of content, unit length
    B = argmin |X - XB|^2 + lam_X |B|^2 + lam_E |B - C|^2 under a zero diagonal
      = lam_E P C - P diag(mu),   P = (X'X + (lam_X + lam_E) I)^-1,   mu such that diag B = 0

    (F'F + lam_F I)^-1 = (I - U U') / lam_F with as many columns of U as the content has, so that P C needs no product of two
    [N, N] matrices.

Ridges are in units of the mean diagonal of X'X and S'S. Every constant is chosen on validation.
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import numpy as np
import torch
from torch import Tensor

from recbole_llm.bridge.experiments.baselines.solved import (
    DECAYS,
    Solved,
    content_of,
    keep_rising,
    refuse_many,
    steps_read,
)
from recbole_llm.bridge.experiments.leave_one_out import LeaveOneOut
from recbole_llm.fitting.ease import Setting, inverse_in_place, solve, user_weights, weighted_gram
from recbole_llm.fitting.hyperparameters import search_setting
from recbole_llm.fitting.next_item import MAX_PREFIX, Prefixes, gram_of_prefixes, prefixes_of
from recbole_llm.fitting.warm_items import warm_items
from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.score import LinearBlock, Scorer

TALE_QUANTILES = (0.25, 0.5, 0.75)  # of the times between an item and those before it: tau
TALE_FLOORS = (0.1, 0.4, 0.0)
TALE_TRENDS = ((-0.25, 0.05), (-0.25, 0.25), (-0.5, 0.05))  # beta, and N as a share of the time that the data span
RIDGES = (4.0, 16.0, 64.0)  # upwards from the first; downwards ``LOW_RIDGE``
LOW_RIDGE = 1.0
L3AE_SHARES = (0.5, 0.8, 0.2)  # lam_E / (lam_X + lam_E)
L3AE_CONTENT_RIDGES = (10.0, 100.0, 1.0)  # lam_F


def ease(rows: LeaveOneOut) -> Solved:
    """Rank by EASE, its ridge by a line search on validation.

    Holds four ``[N, N]`` float32 matrices.

    Raises:
        RefusedRowError: if the data set has more than ``MAX_ITEMS`` items.
    """
    refuse_many("EASE", rows.data.n_items)
    items = warm_items(rows.data.history, {}, rows.data.n_items)
    gram = weighted_gram(items.train, user_weights(items.train, 0.0), len(items.items))
    best: tuple[float, Setting, LinearBlock] | None = None

    def value(setting: Setting) -> float:
        nonlocal best
        matrix = torch.zeros(rows.data.n_items, rows.data.n_items)
        matrix[items.items[:, None], items.items] = solve(gram, {}, setting).cpu()
        block = LinearBlock("ease", matrix.to(gram.device))
        history = replace(rows.data.history, ranks=None)
        found = rows.validation.value(block.scorer(history), rows.data.n_items, rows.padding)
        if best is None or found > best[0]:
            best = found, setting, block
        return found

    search_setting(value, Setting.of_ease(8.0), {})
    assert best is not None
    scorer = best[2].scorer(replace(rows.later, ranks=None))
    return Solved(f"ridge {best[1].ridge:g} mean diagonals", best[0], scorer)


# ---------------------------------------------------------------- TALE


@dataclass(frozen=True)
class TaleSetting:
    """Constants of TALE, in the notation of the module docstring.

    Attributes:
        tau: by which the weight of an earlier item falls with the time between, in the unit of the times.
        floor: c, the least such weight.
        ridge: lam, in mean diagonals of S'S.
        beta: exponent of the trend; 0 for none.
        window: N, in the unit of the times.
    """

    tau: float
    floor: float = TALE_FLOORS[0]
    ridge: float = RIDGES[0]
    beta: float = 0.0
    window: float = 0.0

    def __str__(self) -> str:
        trend = f"trend exponent {self.beta:g} of {self.window:g} units of time" if self.beta else "no trend"
        return f"time decay {self.tau:g}, floor {self.floor:g}, ridge {self.ridge:g} mean diagonals, {trend}"


def tale_weights(
    prefixes: Prefixes, ids: np.ndarray, times: np.ndarray, setting: TaleSetting
) -> tuple[np.ndarray, np.ndarray]:
    """Compute the entries of S and of T, float32, ``[P]`` and ``[S]`` of the prefixes.

    Args:
        prefixes: of the histories.
        ids: ``[nnz]``, the item of every entry of the histories.
        times: ``[nnz]`` float64, when it was met.
        setting: the constants.
    """
    gap = np.abs(times[prefixes.targets][prefixes.steps] - times[prefixes.sources])
    weight = np.maximum(np.exp(-gap / setting.tau), setting.floor)
    if not setting.beta:
        return weight.astype(np.float32), np.ones(len(prefixes.targets), np.float32)
    trend = trend_counts(ids, times, setting.window) ** setting.beta
    return (weight * trend[prefixes.sources]).astype(np.float32), trend[prefixes.targets].astype(np.float32)


def trend_counts(ids: np.ndarray, times: np.ndarray, window: float) -> np.ndarray:
    """Count the interactions with an entry's item in the ``window`` before it, itself among them, ``[nnz]`` float64."""
    order = np.lexsort((times, ids))
    ids, ordered = ids[order], times[order]
    begins = np.searchsorted(ids, ids, "left")  # where the entries of the item begin
    # one axis for all items, each one's times further from the others' than any window
    axis = ordered - times.min(initial=0.0) + begins * (float(np.ptp(times)) + window + 1.0 if len(times) else 1.0)
    counts = np.empty(len(times))
    counts[order] = np.searchsorted(axis, axis, "right") - np.searchsorted(axis, axis - window, "left")
    return counts


def tale(rows: LeaveOneOut) -> Solved:
    """Rank by TALE, its constants one after the other by validation, about ten solutions.

    Holds four ``[N, N]`` float32 matrices.

    Raises:
        RefusedRowError: if the data set has more than ``MAX_ITEMS`` items.
    """
    refuse_many("TALE", rows.data.n_items)
    history, n = rows.data.history, rows.data.n_items
    ids, times = history.ids.numpy(), rows.times.numpy()
    prefixes = prefixes_of(history, MAX_PREFIX)
    gap = np.abs(times[prefixes.targets][prefixes.steps] - times[prefixes.sources])
    some = rows.validation.subset(n)

    def fit(setting: TaleSetting) -> tuple[float, float, LinearBlock]:
        weights = tale_weights(prefixes, ids, times, setting)
        block = LinearBlock("tale", solve_tale(*gram_of_prefixes(history, n, prefixes, *weights), setting.ridge))
        values = {tau: some.value(replace(block, decay=tau).scorer(some.history), n, rows.padding) for tau in DECAYS}
        decay = max(values, key=lambda tau: values[tau])
        return values[decay], decay, replace(block, decay=decay)

    search = _Search(fit)
    gap = gap[gap > 0] if bool((gap > 0).any()) else np.ones(1)
    search.each([TaleSetting(float(tau)) for tau in dict.fromkeys(np.quantile(gap, TALE_QUANTILES))])
    keep_rising([replace(search.setting, ridge=ridge) for ridge in RIDGES], search)
    if search.setting.ridge == RIDGES[0]:
        search.each([replace(search.setting, ridge=LOW_RIDGE)])
    search.each([replace(search.setting, floor=floor) for floor in TALE_FLOORS[1:]])
    span = float(times.max() - times.min())
    start = search.setting
    search.each([replace(start, beta=beta, window=share * span) for beta, share in TALE_TRENDS])
    _, decay, block = search.best
    valid = rows.validation.value(block.scorer(history), n, rows.padding)
    read = steps_read(history)
    return Solved(f"{search.setting}, decay of histories {decay:g}{read}", valid, block.scorer(rows.later))


def solve_tale(gram: Tensor, follows: Tensor, ridge: float) -> Tensor:
    """Compute B of TALE, ``[n, n]``, from S'S (overwritten) and S'T, the latter sparse; the ridge in mean positive diagonals."""
    gram = gram.T.contiguous()  # symmetric, and columns first as it comes from SciPy
    diagonal = gram.diagonal()
    diagonal.add_(ridge * diagonal[diagonal > 0].mean())
    inverse = inverse_in_place(gram)
    if inverse is None:
        raise ValueError(f"TALE has no solution with a ridge of {ridge:g} mean diagonals; leave it out of --rows.")
    return torch.sparse.mm(follows.T.coalesce(), inverse).T.contiguous()


class _Search:
    """Settings of TALE tried on validation, of which the best is kept."""

    def __init__(self, fit: Callable[[TaleSetting], tuple[float, float, LinearBlock]]) -> None:
        self.fit = fit
        self.tried: dict[TaleSetting, float] = {}
        self.setting: TaleSetting
        self.best: tuple[float, float, LinearBlock]

    def __call__(self, setting: TaleSetting) -> float:
        if setting not in self.tried:
            found = self.fit(setting)
            if not self.tried or found[0] > self.best[0]:
                self.setting, self.best = setting, found
            self.tried[setting] = found[0]
        return self.tried[setting]

    def each(self, settings: list[TaleSetting]) -> None:
        """Try all."""
        for setting in settings:
            self(setting)


# ---------------------------------------------------------------- L3AE


def l3ae(rows: LeaveOneOut) -> Solved:
    """Rank by L3AE: the total ridge with the first share, then lam_F and the share at the best ridge.

    Holds five ``[N, N]`` float32 matrices.

    Raises:
        RefusedRowError: if the data set has more than ``MAX_ITEMS`` items, or no content.
    """
    refuse_many("L3AE", rows.data.n_items)
    content, n = content_of("L3AE", rows)[1:], rows.data.n_items
    history = Rows(rows.data.history.offsets, rows.data.history.ids)
    gram = weighted_gram(history, torch.ones(len(history.sizes)), n)[1:, 1:].contiguous()
    scale = float(gram.diagonal()[gram.diagonal() > 0].mean())
    some = rows.validation.subset(n)
    plain = replace(some.history, ranks=None)
    best: tuple[float, tuple[float, float, float], Tensor] | None = None

    def value(inverse: Tensor, ridge: float, share: float, content_ridge: float) -> float:
        nonlocal best
        matrix = solve_l3ae(inverse, share * ridge * scale, content_factor(content, content_ridge), content_ridge)
        found = some.value(_scorer(matrix, plain), n, rows.padding)
        if best is None or found > best[0]:
            best = found, (ridge, share, content_ridge), matrix
        return found

    def inverse_of(ridge: float) -> Tensor:
        system = gram.clone()
        system.diagonal().add_(ridge * scale)
        inverse = inverse_in_place(system)
        assert inverse is not None, "a Gram matrix plus a ridge of a mean diagonal is positive definite"
        return inverse

    def by_ridge(ridge: float) -> float:
        return value(inverse_of(ridge), ridge, L3AE_SHARES[0], L3AE_CONTENT_RIDGES[0])

    if keep_rising(RIDGES, by_ridge) == RIDGES[0]:
        by_ridge(LOW_RIDGE)
    assert best is not None
    ridge = best[1][0]
    inverse = inverse_of(ridge)
    for content_ridge in L3AE_CONTENT_RIDGES[1:]:
        value(inverse, ridge, L3AE_SHARES[0], content_ridge)
    content_ridge = best[1][2]
    for share in L3AE_SHARES[1:]:
        value(inverse, ridge, share, content_ridge)
    _, (ridge, share, content_ridge), matrix = best
    valid = rows.validation.value(_scorer(matrix, history), n, rows.padding)
    setting = f"ridge {ridge:g} mean diagonals, {share:.0%} of it towards the content, whose ridge is {content_ridge:g}"
    return Solved(setting, valid, _scorer(matrix, replace(rows.later, ranks=None)))


def content_factor(content: Tensor, ridge: float) -> Tensor:
    """Compute U of the module docstring, ``[n, f]`` float32, from content ``[n, f]``."""
    F = content.double()
    inner = F.T @ F
    inner.diagonal().add_(ridge)
    # (F F' + r I)^-1 = (I - F (F'F + r I)^-1 F') / r
    return torch.linalg.solve_triangular(torch.linalg.cholesky(inner), F.T, upper=False).T.float().contiguous()


def solve_l3ae(inverse: Tensor, pull: float, factor: Tensor, content_ridge: float) -> Tensor:
    """Compute B of L3AE, ``[n, n]`` float32 with a zero diagonal.

    Args:
        inverse: P, ``[n, n]``.
        pull: lam_E.
        factor: U, ``[n, f]``, from :func:`content_factor`.
        content_ridge: lam_F.
    """
    own = (1 - factor.double().square().sum(1)) / content_ridge  # diagonal of the content's inverse Q
    # C = I - Q diag(1 / own), off its diagonal; on it both give 0
    product = torch.addmm(inverse, inverse @ factor, factor.T, alpha=-1.0).mul_(-(1 / (content_ridge * own)).float())
    product.add_(inverse)  # P C
    bound = (1 + pull * product.diagonal()) / inverse.diagonal()
    B = product.mul_(pull).sub_(inverse * bound)
    return B.fill_diagonal_(0.0)


def _scorer(matrix: Tensor, histories: Rows) -> Scorer:
    """Score by the items without the padding one; its column is zero."""
    block = LinearBlock("l3ae", matrix)
    shifted = Rows(histories.offsets, histories.ids - 1)

    def scorer(users: Tensor) -> Tensor:
        return torch.nn.functional.pad(block.scores(shifted.select(users)), (1, 0))

    return scorer
