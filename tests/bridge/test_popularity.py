"""Quality by popularity: the buckets, and metrics against a count by hand."""

import math

import pytest
import torch

pytest.importorskip("recbole")
from recbole_llm.bridge.evaluation.popularity import popularity_buckets, quality_by_popularity
from recbole_llm.fitting.validation import TopKMetric
from recbole_llm.scoring.rows import rows_from_pairs


def test_thirds_of_the_interactions_and_what_has_none():
    #                                  padding, 10 of 30, then 10 and 4+3+2+1, then none
    count = torch.tensor([0, 4, 10, 3, 0, 10, 2, 1])
    assert popularity_buckets(count).tolist() == [-1, 2, 0, 2, 3, 1, 2, 2]
    assert popularity_buckets(torch.tensor([0, 0, 0])).tolist() == [-1, 3, 3]
    # one item with nearly everything is the head alone; the item behind it is past the second third
    assert popularity_buckets(torch.tensor([0, 98, 1, 1])).tolist() == [-1, 0, 2, 2]


def test_each_bucket_counts_its_own_targets_in_the_whole_ranking():
    count = torch.tensor([0, 10, 10, 10, 0])  # head 1, middle 2, tail 3, cold 4
    items = torch.tensor([[1, 3, 2], [3, 1, 2], [2, 1, 3]])
    positives = rows_from_pairs(torch.tensor([0, 0, 1, 1, 2]), torch.tensor([1, 2, 3, 4, 1]), 3)
    hits = torch.tensor([[True, False, True], [True, False, False], [False, True, False]])
    found = quality_by_popularity(items, hits, positives, count, [TopKMetric("ndcg", 3), TopKMetric("recall", 1)])
    assert {name: (b.items, b.targets, b.users) for name, b in found.items()} == {
        "head": (1, 2, 2),
        "middle": (1, 1, 1),
        "tail": (1, 1, 1),
        "cold": (1, 1, 1),
    }
    assert found["head"].metrics["ndcg@3"] == pytest.approx((1 + 1 / math.log2(3)) / 2)
    assert found["head"].metrics["recall@1"] == 0.5
    assert found["middle"].metrics["ndcg@3"] == pytest.approx(0.5)  # third place
    assert found["tail"].metrics == {"ndcg@3": 1.0, "recall@1": 1.0}
    assert found["cold"].metrics == {"ndcg@3": 0.0, "recall@1": 0.0}


def test_a_bucket_without_a_target_is_left_out():
    count = torch.tensor([0, 10, 10, 10])
    positives = rows_from_pairs(torch.tensor([0]), torch.tensor([1]), 1)
    found = quality_by_popularity(
        torch.tensor([[1]]), torch.tensor([[True]]), positives, count, [TopKMetric("recall", 1)]
    )
    assert list(found) == ["head"]
