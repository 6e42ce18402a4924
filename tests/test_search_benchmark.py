"""What the benchmark of searches counts, on rankings that can be counted by hand."""

import sys
from dataclasses import dataclass
from pathlib import Path

import numpy as np
import pytest

BENCHMARKS = str(Path(__file__).resolve().parents[1] / "benchmarks")


@pytest.fixture
def measures(monkeypatch):
    monkeypatch.syspath_prepend(BENCHMARKS)
    pytest.importorskip("recbole")
    import search_measures

    yield search_measures
    for name in ("search_measures", "search_data"):
        sys.modules.pop(name, None)


@dataclass(frozen=True)
class Asked:
    user: int
    query: int
    relevant: list
    masked: list


@dataclass(frozen=True)
class Users:
    n_users: int


def test_items_of_one_title_count_as_one(measures):
    import search_data

    titles = ["pan", "pan", "pan", "lid", "pot", ""]
    known = search_data.Known(["pan", "lid", "pot"], [0, 3, 4])
    rankings = [[2, 1, 0], [0, 1, 2, 3], [0, 1, 5]]
    # pan is first though row 0 is third; lid is second of two titles; pot is not found
    assert measures.found(known, titles, rankings.__getitem__) == {"first_ten": 2 / 3, "first": 1 / 3}
    many = [*(f"t{n}" for n in range(11)), "lid"]
    late = search_data.Known(["lid"], [11])
    assert measures.found(late, many, lambda at: range(12)) == {"first_ten": 0.0, "first": 0.0}


def test_categories_and_what_they_share(measures):
    tags = [frozenset({"a"}), frozenset({"a", "b"}), frozenset()]
    assert measures.in_category(["a", "b"], tags, [[0, 1, 2], [2, 1, 0]]) == 1.0  # two of two, one of one
    assert measures.in_category(["a"], tags, [[0, 2]]) == 0.5
    assert measures.shared([[0, 1, 2], [2, 1, 5], [7]]) == pytest.approx(2 / 3)
    assert measures.same_tag([0, 2], tags, [[1, 2], [0, 1]]) == 0.5  # the query without a tag does not count


def test_ndcg_is_averaged_by_user(measures):
    asked = [Asked(0, 9, [1, 2], []), Asked(0, 9, [3], []), Asked(2, 9, [4], [])]
    rankings = [[1, 8, 2], [7, 8, 9], [4]]
    ideal = 1 + 1 / np.log2(3)
    first = (1 + 1 / np.log2(4)) / ideal
    np.testing.assert_allclose(measures.ndcg(asked, Users(4), rankings.__getitem__), [first / 2, 1.0])
