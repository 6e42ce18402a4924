"""The weight between two blocks of a score, chosen on validation."""

import math
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recbole_llm.fitting.validation import CHUNK_ELEMENTS
from recbole_llm.scoring.score import Scorer

MAX_REMEMBERED = 120_000_000  # scores of a block that are kept while weights are tried, 480 MB in float32
BLEND_WEIGHTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8)


LEAST_DEVIATION = 1e-6  # of the root mean square: float32 rounds scores that do not vary to a tenth of that


def deviation_of(mean: float, mean_square: float) -> float:
    """Compute a standard deviation from two means; 0 where it is no more than what rounding leaves of equal scores.

    Scaled to a deviation of 1 such scores would drown those of any other block.

    Args:
        mean: of the scores.
        mean_square: of their squares.
    """
    variance = mean_square - mean**2
    return math.sqrt(variance) if variance > LEAST_DEVIATION**2 * mean_square else 0.0


def score_deviation(scorer: Scorer, rows: Tensor, n_items: int, columns: Tensor | None = None) -> float:
    """Compute the population standard deviation of all scores, in chunks, accumulated in float64.

    Args:
        scorer: scores of rows.
        rows: ``[R]`` int64, the rows to run over, on the scorer's device.
        n_items: columns of the scores.
        columns: ``[n_items]`` bool, the columns that count; ``None`` for all.

    Returns:
        The deviation; 0.0 where there is nothing to measure, or scores do not vary (:func:`deviation_of`).
    """
    count, total, squares = 0, 0.0, 0.0
    for chunk in rows.split(max(1, CHUNK_ELEMENTS // n_items)):
        scores = scorer(chunk)
        if columns is not None:
            scores = scores[:, columns]
        count += scores.numel()
        total += float(scores.sum(dtype=torch.float64))
        squares += float(scores.double().square_().sum())
    return deviation_of(total / count, squares / count) if count else 0.0


def remembered(scorer: Scorer, rows: Tensor, n_items: int) -> Scorer:
    """Return a scorer that computes the scores of ``rows`` once, where they fit ``MAX_REMEMBERED``; else the scorer itself.

    Args:
        scorer: scores of rows.
        rows: ``[R]`` int64, 0 .. R - 1: the rows that will be asked for.
        n_items: columns of the scores.
    """
    if len(rows) * n_items > MAX_REMEMBERED:
        return scorer
    scores = torch.cat([scorer(chunk) for chunk in rows.split(max(1, CHUNK_ELEMENTS // n_items))])
    return lambda ids: scores[ids]


@dataclass(frozen=True)
class Blend:
    """The chosen weight between two blocks: score = (1 - weight) / first_std * first + weight / second_std * second.

    Attributes:
        weight: share of the second block, in [0, 1].
        first_std: standard deviation of the first block's scores.
        second_std: of the second block's.
        trials: every weight tried, with its validation value.
    """

    weight: float
    first_std: float
    second_std: float
    trials: tuple[tuple[float, float], ...]

    @property
    def scales(self) -> tuple[float, float]:
        """Factors of the two blocks. A block whose scores do not vary gets 0."""
        first = (1 - self.weight) / self.first_std if self.first_std else 0.0
        second = self.weight / self.second_std if self.second_std else 0.0
        return first, second


def choose_blend(
    first: Scorer,
    second: Scorer,
    rows: Tensor,
    n_items: int,
    value: Callable[[Scorer], float],
    weights: Sequence[float] = BLEND_WEIGHTS,
    columns: Tensor | None = None,
) -> Blend:
    """Weigh two blocks of a score, each scaled by the deviation of its scores, on validation data.

    While the best weight is the largest tried below 1, the next one half-way to 1 is tried too, up to .95.

    Args:
        first: scores of the block that has weight 1 - w.
        second: scores of the block that has weight w.
        rows: ``[R]`` int64, 0 .. R - 1, the rows that ``value`` asks for; the deviations are taken over them.
        n_items: columns of the scores.
        value: the validation value of a scorer; larger is better.
        weights: ascending candidates for w in [0, 1).
        columns: ``[n_items]`` bool, the items whose scores set the scale; ``None`` for all.

    Returns:
        The best weight; the smaller one of equals.
    """
    if len(rows):
        first, second = (remembered(scorer, rows, n_items) for scorer in (first, second))
    stds = score_deviation(first, rows, n_items, columns), score_deviation(second, rows, n_items, columns)
    if not all(stds):
        weight = 0.0 if stds[0] or not stds[1] else 1.0
        return Blend(weight, *stds, trials=())

    def blended(weight: float) -> Scorer:
        scales = Blend(weight, *stds, trials=()).scales
        return lambda ids: first(ids).mul_(scales[0]).add_(second(ids), alpha=scales[1])

    trials = [(weight, value(blended(weight))) for weight in weights]
    best = max(trials, key=lambda trial: (trial[1], -trial[0]))
    while best == trials[-1] and (further := round((1 + best[0]) / 2, 3)) < 0.96:
        trials.append((further, value(blended(further))))
        best = max(trials, key=lambda trial: (trial[1], -trial[0]))
    return Blend(best[0], *stds, trials=tuple(trials))
