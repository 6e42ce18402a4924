"""Intervals of shares over customers, by the bootstrap.

Customers with the same figures are alike, so a resample of customers is a multinomial draw over the different figures: the same
distribution as drawing customers one by one, at a cost that does not grow with their number.
"""

from dataclasses import dataclass

import numpy as np

DRAWS = 4000
LEVELS = (0.025, 0.975)


@dataclass(frozen=True)
class Interval:
    """A figure and the ends of its 95% interval."""

    value: float
    low: float
    high: float


def ratio(part: np.ndarray, whole: np.ndarray, draws: int = DRAWS, seed: int = 0) -> Interval:
    """The ratio of two sums over customers, with a percentile interval of the bootstrap over customers.

    Args:
        part: ``[U]``, such as hits of each customer, or the difference of two models' hits.
        whole: ``[U]``, such as targets of each customer; their sum must not be 0.
        draws: resamples.
        seed: of the resampling.

    Raises:
        ValueError: if the lengths differ or ``whole`` sums to 0.
    """
    part, whole = np.asarray(part, dtype=np.float64), np.asarray(whole, dtype=np.float64)
    if part.shape != whole.shape or part.ndim != 1:
        raise ValueError(f"part and whole must be equally long, got {part.shape} and {whole.shape}.")
    if not whole.sum():
        raise ValueError("whole sums to 0, so there is no ratio.")
    kinds, count = np.unique(np.stack([part, whole], axis=1), axis=0, return_counts=True)
    value = float(part.sum() / whole.sum())
    n = len(part)
    weights = np.random.default_rng(seed).multinomial(n, count / n, size=draws).astype(np.float64)
    sums = weights @ kinds
    drawn = sums[sums[:, 1] != 0]
    low, high = np.quantile(drawn[:, 0] / drawn[:, 1], LEVELS)
    return Interval(value, float(low), float(high))
