"""Metrics by popularity of the wanted items; a model that only repeats best-sellers shows here."""

from collections.abc import Iterable
from dataclasses import dataclass

import torch
from torch import Tensor

from recbole_llm.fitting.validation import TopKMetric
from recbole_llm.scoring.rows import Rows

BUCKETS = ("head", "middle", "tail", "cold")


@dataclass(frozen=True)
class BucketQuality:
    """Quality of one bucket of items.

    Attributes:
        items: of the catalogue, in this bucket.
        targets: of the split, in this bucket.
        users: with such a target.
        metrics: by metric such as ``ndcg@10``, the mean over those users, each of whom wants these targets alone; the
            ranking is that of the whole catalogue.
    """

    items: int
    targets: int
    users: int
    metrics: dict[str, float]


def popularity_buckets(count: Tensor) -> Tensor:
    """Sort every item into a bucket: three thirds of the training interactions, and the items without any.

    Args:
        count: ``[N]`` int64, training interactions of each item, with padding item 0.

    Returns:
        ``[N]`` int64, places in ``BUCKETS``: the most popular items that make up a third of the interactions are the head, the
        next third the middle, the rest the tail; items without an interaction are cold. The padding item has -1.
    """
    order = torch.argsort(count, descending=True, stable=True)
    before = count[order].cumsum(0) - count[order]  # interactions of the more popular items
    bucket = torch.empty_like(count)
    bucket[order] = (3 * before // max(int(count.sum()), 1)).clamp(max=2)
    bucket[count == 0] = BUCKETS.index("cold")
    bucket[0] = -1
    return bucket


def quality_by_popularity(
    items: Tensor, hits: Tensor, positives: Rows, count: Tensor, metrics: Iterable[TopKMetric]
) -> dict[str, BucketQuality]:
    """Compute the metrics of each bucket from existing rankings.

    Args:
        items: ``[M, k]`` int64, the best items of M users.
        hits: ``[M, k]`` bool, which of them are targets.
        positives: M rows, the targets.
        count: ``[N]`` int64, training interactions of each item, with padding item 0.
        metrics: of at most k places.

    Returns:
        By name of ``BUCKETS``; buckets without a target are left out.
    """
    bucket = popularity_buckets(count)
    bucket_of_target, row = bucket[positives.ids], positives.row_of_entry()
    found = {}
    for number, name in enumerate(BUCKETS):
        n_targets = torch.bincount(row[bucket_of_target == number], minlength=len(items))
        asked = n_targets > 0
        if not bool(asked.any()):
            continue
        of_bucket = (hits & (bucket[items] == number))[asked]
        found[name] = BucketQuality(
            items=int((bucket == number).sum()),
            targets=int(n_targets.sum()),
            users=int(asked.sum()),
            metrics={
                str(metric).lower(): float(metric.of(of_bucket[:, : metric.k], n_targets[asked]).mean())
                for metric in metrics
            },
        )
    return found
