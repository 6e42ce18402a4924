"""Whether one model is better than another on the same users: a paired bootstrap, corrected for many comparisons."""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

DRAWS = 4000


@dataclass(frozen=True)
class Difference:
    """Mean of paired differences with its uncertainty.

    Attributes:
        mean: of first minus second.
        low: end of the 95% percentile interval of the bootstrap.
        high: the other end.
        p: two-sided: twice the smaller share of bootstrap means on one side of 0, with 1 added to both counts.
    """

    mean: float
    low: float
    high: float
    p: float


def paired_bootstrap(first: np.ndarray, second: np.ndarray, draws: int = DRAWS, seed: int = 0) -> Difference:
    """Bootstrap the mean difference over users (Efron and Tibshirani, 1993; for retrieval Sakai, SIGIR 2006).

    Args:
        first: ``[U]``, one value per user.
        second: ``[U]``, of the same users in the same order.
        draws: resamples of U users with replacement.
        seed: of the resampling.

    Raises:
        ValueError: if the lengths differ or there is no user.

    Example:
        >>> found = paired_bootstrap(np.array([0.5, 0.25, 0.75]), np.array([0.25, 0.0, 0.5]))
        >>> found.mean, found.low, found.high
        (0.25, 0.25, 0.25)
    """
    first, second = np.asarray(first, dtype=np.float64), np.asarray(second, dtype=np.float64)
    if first.shape != second.shape or first.ndim != 1 or not len(first):
        raise ValueError(f"first and second must be equally long and not empty, got {first.shape} and {second.shape}.")
    difference = first - second
    rng = np.random.default_rng(seed)
    means = np.empty(draws)
    step = max(1, 2**24 // len(difference))
    for start in range(0, draws, step):
        picks = rng.integers(len(difference), size=(min(step, draws - start), len(difference)))
        means[start : start + step] = difference[picks].mean(1)
    low, high = np.quantile(means, [0.025, 0.975])
    side = min((means <= 0).sum(), (means >= 0).sum())
    return Difference(float(difference.mean()), float(low), float(high), float(min(1.0, 2 * (side + 1) / (draws + 1))))


def holm(p: Sequence[float]) -> list[float]:
    """Correct p-values for their number (Holm, 1979); order kept, each at most 1.

    Example:
        >>> holm([0.01, 0.04, 0.03])
        [0.03, 0.06, 0.06]
    """
    order = sorted(range(len(p)), key=lambda i: p[i])
    corrected, running = [0.0] * len(p), 0.0
    for rank, i in enumerate(order):
        running = max(running, min(1.0, (len(p) - rank) * p[i]))
        corrected[i] = running
    return corrected
