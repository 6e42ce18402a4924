"""What every fitted choice is made by: a top-k metric of one user at a time, and the weight between blocks of a score.

The metrics repeat RecBole's full-ranking evaluation (``evaluator/metrics.py``): the items a user has seen get no place,
except those that are targets themselves, and the mean runs over the users who have a target. Nothing of size
``[users, items]`` is allocated beyond a chunk of rows. Knows neither RecBole nor the kernels.
"""

import math
import re
from collections.abc import Callable, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recbole_llm.towers import Rows, pool

BLEND_WEIGHTS = (0.0, 0.1, 0.2, 0.35, 0.5, 0.65, 0.8)
CHUNK_ELEMENTS = 2**23  # scores held at once: 32 MiB in float32, where a larger chunk is no faster on two cores
METRICS = ("hit", "map", "mrr", "ndcg", "precision", "recall")

Scorer = Callable[[Tensor], Tensor]
"""Row ids ``[B]`` int64 -> scores ``[B, n_items]`` in a fresh tensor, which the caller may overwrite."""


@dataclass(frozen=True)
class TopKMetric:
    """A metric of the first ``k`` places.

    Attributes:
        name: one of ``METRICS``.
        k: places that count, at least 1.
    """

    name: str
    k: int

    @classmethod
    def parse(cls, text: str) -> "TopKMetric":
        """Read RecBole's notation, such as ``"NDCG@10"``; case does not matter.

        Raises:
            ValueError: if the text is not one of ``METRICS`` with a number of places.
        """
        match = re.fullmatch(r"\s*([a-z]+)\s*@\s*([1-9]\d*)\s*", text.lower())
        if match is None or match[1] not in METRICS:
            raise ValueError(
                f"metric {text!r} is not a top-k metric; expected one of {', '.join(METRICS)} as 'ndcg@10'."
            )
        return cls(match[1], int(match[2]))

    def __str__(self) -> str:
        return f"{self.name.upper()}@{self.k}"

    def of(self, hits: Tensor, n_targets: Tensor) -> Tensor:
        """The metric of each row.

        Args:
            hits: ``[B, k]`` bool, whether the item at each place is a target.
            n_targets: ``[B]`` int64, targets of the row, at least 1.

        Returns:
            ``[B]`` float64 in [0, 1].
        """
        hit = hits.double()
        place = torch.arange(1, hit.shape[1] + 1, device=hit.device, dtype=torch.float64)
        if self.name == "hit":
            return hits.any(1).double()
        if self.name == "precision":
            return hit.sum(1) / self.k
        if self.name == "recall":
            return hit.sum(1) / n_targets
        if self.name == "mrr":
            return (hit / place).amax(1)
        reachable = n_targets.clamp(max=self.k)
        if self.name == "map":
            return (hit * hit.cumsum(1) / place).sum(1) / reachable
        gain = 1 / torch.log2(torch.arange(2, self.k + 2, device=hit.device, dtype=torch.float64))
        return (hit * gain[: hit.shape[1]]).sum(1) / gain.cumsum(0)[reachable - 1]


DEFAULT_METRIC = TopKMetric("ndcg", 10)


@dataclass(frozen=True)
class LinearScorer:
    """Scores <sum_j a_uj source_j, target_i> + bias_i of each history; a ``Scorer``.

    Attributes:
        history: one row per user; its ``weights`` are a_uj, ``None`` for the plain sum.
        source: ``[n_items, d]``.
        target: ``[n_items, d]``; ``None`` for the identity (d = n_items).
        bias: ``[n_items]``; ``None`` for zeros.
    """

    history: Rows
    source: Tensor
    target: Tensor | None = None
    bias: Tensor | None = None

    def __call__(self, rows: Tensor) -> Tensor:
        """Scores of rows ``[B]`` int64: ``[B, n_items]``."""
        scores = pool(self.source, self.history.select(rows))
        if self.target is not None:
            scores = scores @ self.target.T
        return scores if self.bias is None else scores.add_(self.bias)


def user_metric(
    scorer: Scorer, targets: Rows, seen: Rows, n_items: int, metric: TopKMetric, excluded: Tensor | None = None
) -> Tensor:
    """One metric value for every row that has a target.

    Args:
        scorer: scores of the rows of ``targets``, on its device.
        targets: the relevant items of each row; rows without one are left out.
        seen: as many rows; items that get no place, unless they are targets of the same row.
        n_items: columns of the scores.
        metric: which metric, at how many places. With fewer than k items there are fewer places.
        excluded: ``[n_items]`` bool, items without a place in any row (RecBole: the padding item); ``None`` for none.

    Returns:
        ``[M]`` float64 for the M rows with a target, in ascending order of the row.

    Raises:
        ValueError: if ``seen`` and ``targets`` have different numbers of rows.
    """
    if len(seen.offsets) != len(targets.offsets):
        raise ValueError(
            f"seen has {len(seen.offsets) - 1} rows and targets {len(targets.offsets) - 1}; both need one row per user."
        )
    sizes = targets.sizes
    rows = torch.nonzero(sizes).squeeze(1)
    values = torch.empty(len(rows), dtype=torch.float64, device=rows.device)
    for start in range(0, len(rows), chunk := max(1, CHUNK_ELEMENTS // n_items)):
        chunk_rows = rows[start : start + chunk]
        scores = scorer(chunk_rows)
        chunk_targets, chunk_seen = targets.select(chunk_rows), seen.select(chunk_rows)
        relevant = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        relevant[chunk_targets.row_of_entry(), chunk_targets.ids] = True
        seen_row = chunk_seen.row_of_entry()
        masked = ~relevant[seen_row, chunk_seen.ids]
        scores[seen_row[masked], chunk_seen.ids[masked]] = -math.inf
        if excluded is not None:
            scores[:, excluded] = -math.inf
        top, items = scores.topk(min(metric.k, n_items), dim=1)
        values[start : start + chunk] = metric.of(relevant.gather(1, items) & (top > -math.inf), sizes[chunk_rows])
    return values


def evenly(ids: Tensor, most: int) -> Tensor:
    """``ids`` (``[n]``), or at most so many of them, evenly spaced."""
    if len(ids) <= most:
        return ids
    return ids[torch.linspace(0, len(ids) - 1, most, dtype=torch.float64).long()]


@dataclass(frozen=True)
class Selection:
    """What the choices are made by: validation targets, ranked without what the user has seen.

    Attributes:
        history: input of each user's scores, one row per user; its ``weights`` are a_uj, ``None`` for the plain sum.
        targets: validation items, as many rows.
        seen: items without a place in the ranking; normally the training interactions.
        metric: by which the best is chosen.
        max_users: with more users that have a target, this many of them, evenly spaced, are evaluated.
    """

    history: Rows
    targets: Rows
    seen: Rows
    metric: TopKMetric = DEFAULT_METRIC
    max_users: int = 20_000

    def subset(self) -> "Selection":
        """The users evaluated, as a selection of their own."""
        users = evenly(torch.nonzero(self.targets.sizes).squeeze(1), self.max_users)
        return Selection(
            self.history.select(users), self.targets.select(users), self.seen.select(users), self.metric, self.max_users
        )

    def value(self, scorer: Scorer, n_items: int, excluded: Tensor | None = None) -> float:
        """Mean of the metric over the users with a target, of scores of the rows of ``history``."""
        return float(user_metric(scorer, self.targets, self.seen, n_items, self.metric, excluded).mean())


def score_deviation(scorer: Scorer, rows: Tensor, n_items: int, columns: Tensor | None = None) -> float:
    """Population standard deviation of all scores, in chunks, accumulated in float64.

    Args:
        scorer: scores of rows.
        rows: ``[R]`` int64, the rows to run over, on the scorer's device.
        n_items: columns of the scores.
        columns: ``[n_items]`` bool, the columns that count; ``None`` for all.

    Returns:
        The deviation; 0.0 where there is nothing to measure.
    """
    count, total, squares = 0, 0.0, 0.0
    for chunk in rows.split(max(1, CHUNK_ELEMENTS // n_items)):
        scores = scorer(chunk)
        if columns is not None:
            scores = scores[:, columns]
        count += scores.numel()
        total += float(scores.sum(dtype=torch.float64))
        squares += float(scores.double().square_().sum())
    return math.sqrt(max(squares / count - (total / count) ** 2, 0.0)) if count else 0.0


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
        rows: ``[R]`` int64, the rows over which the deviations are taken.
        n_items: columns of the scores.
        value: the validation value of a scorer; larger is better.
        weights: ascending candidates for w in [0, 1).
        columns: ``[n_items]`` bool, the items whose scores set the scale; ``None`` for all.

    Returns:
        The best weight; the smaller one of equals.
    """
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
