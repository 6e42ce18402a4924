r"""From a score to a probability: Platt's two parameters, a monotone map after them, and the error that is left.

    P = sigmoid(a s + c),   a, c = argmin - sum_p [ y_p log P_p + (1 - y_p) log(1 - P_p) ]

(Platt, 1999). The problem is convex in two unknowns, so Newton's method with step halving solves it in a few passes over the
data, none of which is kept. This is the score's scale, and one dot product still gives it. Two things are wrong with it as a
probability where people look, at the top of a list, and :func:`fit_probability` mends them:

- the logit is no straight line in the score, and the millions of pairs at the bottom draw it;
- an item that a user has not touched in training can turn up in validation or later, not in both. Where the next interactions are
  as many as validation's and drawn alike, either has the probability q, and once validation is known too,
  P = q / (1 - q) of what it does not hold. So q = P / (1 + P) is what validation's labels are fitted to; q is below 1/2.
"""

import itertools
import math
from collections.abc import Callable, Iterable
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_llm.fitting.blend import deviation_of
from recbole_llm.scoring.probability import ProbabilityMap

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Called once per pass; gives (score ``[P]`` floating point, label ``[P]`` bool) in the same order every time."""

SizedBatches = Callable[[], Iterable[tuple[Tensor, Tensor, Tensor]]]
"""The same with the log of the length of the user's history, ``[P]``, between score and label."""

MAX_PASSES = 30
TOLERANCE = 1e-8  # of the mean loss, in nats


def fit_platt(batches: Batches) -> tuple[float, float]:
    """Find slope a > 0 and offset c that make sigmoid(a s + c) a probability of the label.

    Args:
        batches: the data, in pieces.

    Returns:
        (a, c); the identity (1, 0) where the labels are all alike, and (1, c) where the scores are, or where the best slope is
        not positive, since a calibration must not turn a ranking around.
    """
    count, positives, total, squares = 0, 0, 0.0, 0.0
    for score, label in batches():
        count, positives = count + len(score), positives + int(label.sum())
        total, squares = total + float(score.double().sum()), squares + float(score.double().square().sum())
    if positives in (0, count):
        return 1.0, 0.0
    # in standardised scores Newton starts well wherever the scores lie
    mean = total / count
    deviation = deviation_of(mean, squares / count)
    if not deviation:  # no slope can be told
        return 1.0, _offset_alone(batches, positives)
    share = positives / count
    theta = torch.tensor([0.0, math.log(share / (1 - share))], dtype=torch.float64)

    def newton(theta: Tensor) -> tuple[float, Tensor, Tensor]:
        loss, gradient, hessian = 0.0, torch.zeros(2, dtype=torch.float64), torch.zeros(2, 2, dtype=torch.float64)
        for score, label in batches():
            x = (score.double() - mean) / deviation
            logit = theta[0].to(x.device) * x + theta[1].to(x.device)
            probability = torch.sigmoid(logit)
            loss += float(torch.where(label, F.softplus(-logit), F.softplus(logit)).sum())
            slope, curve = probability - label.double(), probability * (1 - probability)
            gradient += torch.stack([(slope * x).sum(), slope.sum()]).cpu()
            mixed = (curve * x).sum()
            hessian += torch.stack([(curve * x * x).sum(), mixed, mixed, curve.sum()]).view(2, 2).cpu()
        return loss / count, gradient / count, hessian / count

    loss, gradient, hessian = newton(theta)
    for _ in range(MAX_PASSES):
        step = torch.linalg.solve(hessian + 1e-12 * torch.eye(2, dtype=torch.float64), gradient)
        size, (further, *derivatives) = 1.0, newton(theta - step)
        while further > loss and size > 1e-3:
            size /= 2
            further, *derivatives = newton(theta - size * step)
        if further > loss:
            break
        improvement, theta, loss = loss - further, theta - size * step, further
        gradient, hessian = derivatives
        if improvement < TOLERANCE:
            break
    slope = float(theta[0]) / deviation
    if slope <= 0:
        return 1.0, _offset_alone(batches, positives)
    return slope, float(theta[1]) - slope * mean


def _offset_alone(batches: Batches, positives: int) -> float:
    """The c with sum sigmoid(s + c) = number of positives, by bisection."""
    low, high = -1e4, 1e4
    for _ in range(60):
        middle = (low + high) / 2
        expected = sum(float(torch.sigmoid(score.double() + middle).sum()) for score, _ in batches())
        low, high = (middle, high) if expected < positives else (low, middle)
    return (low + high) / 2


EXPONENTS = (0.0, 0.25, 0.5)  # of the history's length
MAX_KNOTS = 4
POSITIVES_PER_KNOT = 100
SCORE_STEP, SCORE_RANGE = 1 / 64, 32.0  # of the cells in which pairs are counted
LENGTH_STEP, LENGTH_CELLS = 0.1, 160  # of log n


@dataclass(frozen=True)
class _Cells:
    """Pairs of nearly one score and one history length, C groups of them, all float64 on the CPU.

    Attributes:
        score: ``[C]``, mean.
        log_length: ``[C]``, mean.
        count: ``[C]``.
        positives: ``[C]``.
    """

    score: Tensor
    log_length: Tensor
    count: Tensor
    positives: Tensor


def _cells(batches: SizedBatches) -> _Cells:
    across = round(2 * SCORE_RANGE / SCORE_STEP)
    total: Tensor | None = None
    for score, log_length, label in batches():
        column = ((score.double() + SCORE_RANGE) / SCORE_STEP).long().clamp(0, across - 1)
        row = (log_length.double() / LENGTH_STEP).long().clamp(0, LENGTH_CELLS - 1)
        values = torch.stack([score.double(), log_length.double(), torch.ones_like(score).double(), label.double()])
        if total is None:
            total = values.new_zeros(4, LENGTH_CELLS * across)
        total.index_add_(1, row * across + column, values)
    total = torch.zeros(4, 1, dtype=torch.float64) if total is None else total.cpu()
    total = total[:, total[2] > 0]
    return _Cells(total[0] / total[2], total[1] / total[2], total[2], total[3])


def fit_probability(batches: SizedBatches, origin: float) -> ProbabilityMap:
    """Fit the map from scores to probabilities that makes validation's labels most likely.

    Pairs are counted in cells of nearly one score and one history length in a single pass, and g's slopes and offset, the gain
    and the exponent are fitted to these. There are at most ``MAX_KNOTS`` knots, each with ``POSITIVES_PER_KNOT`` positives
    between it and the next; with fewer than that in all, a straight line in the score alone.

    Args:
        batches: the data, in pieces; scores on the scale that :func:`fit_platt` gives them.
        origin: score of an item about which the history says nothing.

    Returns:
        The map; the identity where the labels are all alike.
    """
    cells = _cells(batches)
    positives = float(cells.positives.sum())
    if positives in (0.0, float(cells.count.sum())):
        return ProbabilityMap()
    n_knots = min(MAX_KNOTS, int(positives / POSITIVES_PER_KNOT) - 1)
    if n_knots < 0:
        return _most_likely(cells, origin, 0.0, 0, by_length=False)[1]
    return min((_most_likely(cells, origin, e, n_knots) for e in EXPONENTS), key=lambda found: found[0])[1]


def _most_likely(
    cells: _Cells, origin: float, exponent: float, n_knots: int, by_length: bool = True
) -> tuple[float, ProbabilityMap]:
    """Loss in nats and map for one exponent, by L-BFGS on g's logs of slopes, its value at the first knot and the gain."""
    x = (cells.score - origin) * (-exponent * cells.log_length).exp()
    share = cells.positives / cells.positives.sum()
    order = torch.argsort(x)
    quantiles = (
        torch.linspace(0, 1, n_knots + 2, dtype=torch.float64)[1:-1] if n_knots else torch.tensor([0.5]).double()
    )
    at = torch.searchsorted(share[order].cumsum(0), quantiles).clamp(max=len(x) - 1)
    knots = torch.unique(x[order][at])  # of a straight line, the median
    bounds = [-math.inf, *knots.tolist(), math.inf] if n_knots else [-math.inf, math.inf]
    # how far x is along each segment, from the first knot
    steps_of = [(x.clamp(low, high) - knots[0].clamp(low, high)) for low, high in itertools.pairwise(bounds)]
    segments = torch.stack(steps_of, 1)
    mean_length = float((share * cells.log_length).sum())
    length = cells.log_length - mean_length
    theta = torch.zeros(segments.shape[1] + 2, dtype=torch.float64)
    theta[0] = origin + float(knots[0]) * math.exp(exponent * mean_length)
    theta[2:] = exponent * mean_length
    start = theta[2:].clone()
    theta.requires_grad_(True)
    optimiser = torch.optim.LBFGS([theta], max_iter=300, tolerance_grad=1e-7, line_search_fn="strong_wolfe")

    def loss() -> Tensor:
        logit = theta[0] + segments @ theta[2:].exp()
        if by_length:
            logit = logit + theta[1] * length
        both = F.softplus(logit + math.log(2.0))  # -log(1 - q) = both - softplus(logit), -log q = both - logit
        fit = (cells.count * both - cells.positives * logit - (cells.count - cells.positives) * F.softplus(logit)).sum()
        # a nat or so: where the data say nothing, slopes stay alike and near the score's own
        steps = theta[3:] - theta[2:-1]
        return fit + 0.5 * steps.square().sum() + 0.05 * (theta[2:] - start).square().sum() + 0.5 * theta[1].square()

    def closure() -> float:
        optimiser.zero_grad()
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
        return value.item()

    with torch.enable_grad():
        optimiser.step(closure)
    value, found = loss().item(), theta.detach()
    if not (math.isfinite(value) and bool(found.isfinite().all())):
        return math.inf, ProbabilityMap()  # labels that the score tells apart without a mistake know no best slope
    slopes = tuple(found[2:].exp().tolist())
    gain = float(found[1]) if by_length else 0.0
    offset = float(found[0]) - slopes[0] * float(knots[0]) - gain * mean_length
    return value, ProbabilityMap(origin, exponent, gain, offset, slopes, tuple(knots.tolist()) if n_knots else ())


def expected_calibration_error(probability: Tensor, label: Tensor, bins: int = 15) -> float:
    """Average |share of positives - mean probability| over equally wide bins, weighted by size (Guo et al., ICML 2017).

    Args:
        probability: ``[P]`` in [0, 1].
        label: ``[P]`` bool.
        bins: number of bins over [0, 1].
    """
    if not len(probability):
        return 0.0
    probability = probability.double()
    index = (probability * bins).long().clamp(max=bins - 1)
    gap = torch.zeros(bins, dtype=torch.float64, device=probability.device).index_add_(
        0, index, probability - label.double()
    )
    return float(gap.abs().sum() / len(probability))
