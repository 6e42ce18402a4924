r"""From a score to a probability: Platt's two parameters, and the error that is left.

    P = sigmoid(a s + c),   a, c = argmin - sum_p [ y_p log P_p + (1 - y_p) log(1 - P_p) ]

(Platt, 1999). The problem is convex in two unknowns, so Newton's method with step halving solves it in a few passes over the
data, none of which is kept. Knows neither RecBole nor the kernels.
"""

import math
from collections.abc import Callable, Iterable

import torch
import torch.nn.functional as F
from torch import Tensor

Batches = Callable[[], Iterable[tuple[Tensor, Tensor]]]
"""Called once per pass; gives (score ``[P]`` floating point, label ``[P]`` bool) in the same order every time."""

MAX_PASSES = 30
TOLERANCE = 1e-8  # of the mean loss, in nats


def fit_platt(batches: Batches) -> tuple[float, float]:
    """Slope a > 0 and offset c that make sigmoid(a s + c) a probability of the label.

    Args:
        batches: the data, in pieces.

    Returns:
        (a, c); the identity (1, 0) where the labels are all alike, and (1, c) where the best slope is not positive, since a
        calibration must not turn a ranking around.
    """
    count, positives, total, squares = 0, 0, 0.0, 0.0
    for score, label in batches():
        count, positives = count + len(score), positives + int(label.sum())
        total, squares = total + float(score.double().sum()), squares + float(score.double().square().sum())
    if positives in (0, count):
        return 1.0, 0.0
    # in standardised scores Newton starts well wherever the scores lie
    mean = total / count
    deviation = max(squares / count - mean**2, 0.0) ** 0.5 or 1.0
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


def expected_calibration_error(probability: Tensor, label: Tensor, bins: int = 15) -> float:
    """Mean of |share of positives - mean probability| over equally wide bins, weighted by their size (Guo et al., ICML 2017).

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
