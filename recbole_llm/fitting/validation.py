"""What every fitted choice is made by: a top-k metric of each user on the validation data.

The metrics repeat RecBole's full-ranking evaluation (``evaluator/metrics.py``). The items a user has seen get no place, except
those that are targets themselves. The mean runs over the users who have a target. Nothing of size ``[users, items]`` is
allocated beyond a chunk of rows.
"""

import math
import re
from dataclasses import dataclass

import torch
from torch import Tensor

from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.score import Scorer

CHUNK_ELEMENTS = 2**23  # scores held at once: 32 MiB in float32, where a larger chunk is no faster on two cores
MAX_PAIRS = 100_000_000  # of users and items in one evaluation of a choice: beyond 5,000 items, fewer than 20,000 users
MIN_USERS = 2_000
METRICS = ("hit", "map", "mrr", "ndcg", "precision", "recall")


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

        Example:
            >>> TopKMetric.parse("NDCG@10")
            TopKMetric(name='ndcg', k=10)
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
        """Compute the metric of each row.

        Args:
            hits: ``[B, k]`` bool, whether the item at each place is a target.
            n_targets: ``[B]`` int64, targets of the row, at least 1.

        Returns:
            ``[B]`` float64 in [0, 1].

        Example:
            >>> TopKMetric("recall", 2).of(torch.tensor([[True, False]]), torch.tensor([4])).tolist()
            [0.25]
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


def hide_seen(scores: Tensor, seen: Rows, targets: Rows | None = None, excluded: Tensor | None = None) -> Tensor | None:
    """Set the scores of items that get no place to -inf, in place.

    Args:
        scores: ``[B, N]``.
        seen: B rows of items without a place, unless they are targets of the same row.
        targets: B rows of relevant items; ``None`` for none.
        excluded: ``[N]`` bool, items without a place in any row.

    Returns:
        ``[B, N]`` bool, which items are targets; ``None`` without ``targets``.
    """
    row, ids, relevant = seen.row_of_entry(), seen.ids, None
    if targets is not None:
        relevant = torch.zeros(scores.shape, dtype=torch.bool, device=scores.device)
        relevant[targets.row_of_entry(), targets.ids] = True
        masked = ~relevant[row, ids]
        row, ids = row[masked], ids[masked]
    scores[row, ids] = -math.inf
    if excluded is not None:
        scores[:, excluded] = -math.inf
    return relevant


def user_metric(
    scorer: Scorer, targets: Rows, seen: Rows, n_items: int, metric: TopKMetric, excluded: Tensor | None = None
) -> Tensor:
    """Compute one metric value for every row that has a target.

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
        relevant = hide_seen(scores, seen.select(chunk_rows), targets.select(chunk_rows), excluded)
        assert relevant is not None
        top, items = scores.topk(min(metric.k, n_items), dim=1)
        values[start : start + chunk] = metric.of(relevant.gather(1, items) & (top > -math.inf), sizes[chunk_rows])
    return values


def evenly(ids: Tensor, most: int) -> Tensor:
    """Return ``ids`` (``[n]``), or at most so many of them, evenly spaced."""
    if len(ids) <= most:
        return ids
    return ids[torch.linspace(0, len(ids) - 1, most, dtype=torch.float64).long()]


@dataclass(frozen=True)
class Validation:
    """The validation data that choices are made by.

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

    def subset(self, n_items: int = 1) -> "Validation":
        """Return the users evaluated as a selection of their own.

        Args:
            n_items: size of the catalogue; of a large one fewer users are evaluated, within ``MAX_PAIRS``.
        """
        most = min(self.max_users, max(MIN_USERS, MAX_PAIRS // n_items))
        users = evenly(torch.nonzero(self.targets.sizes).squeeze(1), most)
        return Validation(
            self.history.select(users), self.targets.select(users), self.seen.select(users), self.metric, self.max_users
        )

    def value(self, scorer: Scorer, n_items: int, excluded: Tensor | None = None) -> float:
        """Average the metric over the users with a target, of scores of the rows of ``history``."""
        return float(user_metric(scorer, self.targets, self.seen, n_items, self.metric, excluded).mean())
