"""Towers: CSR rows, pooling weights, sums of parts, frozen features."""

import math

import pytest
import torch

from recbole_llm.scoring.rows import Rows, history_weights, pool, rows_from_pairs
from recbole_llm.scoring.towers import FrozenTensor, ItemTower, UserTower


def frozen(vectors, present):
    return FrozenTensor(vectors), FrozenTensor(present)


def dense(rows, n_items):
    out = torch.zeros(len(rows.offsets) - 1, n_items)
    weights = torch.ones(len(rows.ids)) if rows.weights is None else rows.weights
    out[rows.row_of_entry(), rows.ids] = weights
    return out


@pytest.fixture
def rows():
    # user 0 has nothing, user 2 repeats item 3, user 3 has one item
    return rows_from_pairs(torch.tensor([1, 2, 2, 1, 2, 3]), torch.tensor([4, 3, 1, 2, 3, 5]), 4)


def test_rows_are_sorted_unique_and_complete(rows):
    assert rows.offsets.tolist() == [0, 0, 2, 4, 5]
    assert rows.ids.tolist() == [2, 4, 1, 3, 5]
    assert rows.sizes.tolist() == [0, 2, 2, 1]
    assert rows.row_of_entry().tolist() == [1, 1, 2, 2, 3]


def test_no_pairs_give_empty_rows():
    empty = torch.empty(0, dtype=torch.int64)
    rows = rows_from_pairs(empty, empty, 3)
    assert rows.offsets.tolist() == [0, 0, 0, 0]
    assert pool(torch.ones(4, 2), rows, history_weights(rows, 0.5)).tolist() == [[0, 0]] * 3


def test_select_takes_rows_in_order_with_repeats_and_empties(rows):
    chosen = rows.select(torch.tensor([3, 0, 2, 3]))
    assert chosen.offsets.tolist() == [0, 1, 1, 3, 4]
    assert chosen.ids.tolist() == [5, 1, 3, 5]


def test_select_leaves_out_entries_by_chance_and_keeps_the_rest_in_order():
    rows = Rows(torch.tensor([0, 3000, 3000, 4000]), torch.arange(4000), torch.arange(4000.0))
    torch.manual_seed(0)
    some = rows.select(torch.tensor([2, 1, 0]), dropout=0.25)
    assert some.sizes[1] == 0 and abs(some.sizes[0] - 750) < 60 and abs(some.sizes[2] - 2250) < 100
    first, last = some.ids[: some.sizes[0]], some.ids[some.offsets[2] :]
    assert (first >= 3000).all() and (last < 3000).all() and (first.diff() > 0).all() and (last.diff() > 0).all()
    assert torch.equal(some.weights, some.ids.float())


def test_a_stretch_of_rows_shares_their_entries(rows):
    part = rows.stretch(1, 3)
    assert part.offsets.tolist() == [0, 2, 4] and part.ids.tolist() == [2, 4, 1, 3]
    assert part.ids.data_ptr() == rows.ids.data_ptr()
    assert rows.stretch(4, 4).offsets.tolist() == [0]


def test_keep_may_empty_a_row(rows):
    kept = rows.keep(torch.tensor([True, False, False, False, True]))
    assert kept.offsets.tolist() == [0, 0, 1, 1, 2]
    assert kept.ids.tolist() == [2, 5]


def test_decay_ranks_from_the_newest_and_a_repeat_counts_at_its_latest_time():
    user = torch.tensor([0, 0, 0, 0])
    item = torch.tensor([7, 5, 6, 7])
    rows = rows_from_pairs(user, item, 1, time=torch.tensor([1.0, 2.0, 3.0, 9.0]), decay=2.0)
    # newest first: 7 (at 9), 6, 5
    expected = {7: 1.0, 6: math.exp(-0.5), 5: math.exp(-1.0)}
    assert dict(zip(rows.ids.tolist(), rows.weights.tolist(), strict=True)) == pytest.approx(expected)


def test_decay_ranks_each_row_by_itself_and_ties_by_order():
    rows = rows_from_pairs(torch.tensor([1, 0, 1, 0]), torch.tensor([3, 3, 2, 1]), 2, torch.zeros(4), decay=1.0)
    got = dense(rows, 4)
    assert got[0].tolist() == pytest.approx([0, 1, 0, math.exp(-1)])
    assert got[1].tolist() == pytest.approx([0, 0, 1, math.exp(-1)])


def test_decay_without_time_says_what_to_do():
    with pytest.raises(ValueError, match="decay needs the time"):
        rows_from_pairs(torch.tensor([0]), torch.tensor([0]), 1, decay=3.0)


@pytest.mark.parametrize("exponent", [0.0, 0.5, 1.0])
def test_history_weights_follow_the_formula(rows, exponent):
    weighted = Rows(rows.offsets, rows.ids, torch.tensor([1.0, 0.5, 2.0, 1.0, 4.0]))
    expected = dense(weighted, 6)
    expected = expected / expected.sum(1, keepdim=True).clamp(min=1e-30).pow(exponent)
    vectors = torch.randn(6, 3)
    torch.testing.assert_close(pool(vectors, weighted, history_weights(weighted, exponent)), expected @ vectors)


def test_item_vectors_are_the_sum_of_their_parts_and_absent_rows_add_nothing():
    torch.manual_seed(0)
    present = torch.tensor([False, True, False, True])
    tower = ItemTower(4, 8, {"text": frozen(torch.randn(4, 5), present)})
    parts = tower.parts()
    torch.testing.assert_close(tower(), parts["text"] + parts["id"])
    assert parts["text"][2].abs().max() == 0  # no text: the ID alone
    assert tower()[0].abs().max() == 0  # padding
    ids = torch.tensor([3, 1, 3])
    torch.testing.assert_close(tower(ids), tower()[ids])


def test_an_item_tower_of_nothing_is_refused():
    with pytest.raises(ValueError, match="use_item_id"):
        ItemTower(4, 8, {}, use_id=False)


def test_a_source_of_another_length_is_refused():
    with pytest.raises(ValueError, match="has 3 rows, the catalogue has 4"):
        ItemTower(4, 8, {"text": frozen(torch.randn(3, 5), torch.ones(3, dtype=torch.bool))})


def test_features_are_frozen_absent_from_the_checkpoint_and_follow_the_module():
    tower = ItemTower(4, 8, {"text": frozen(torch.randn(4, 5), torch.ones(4, dtype=torch.bool))})
    assert set(tower.state_dict()) == {"adapters.text.weight", "id.weight"}
    assert not list(tower.buffers())
    assert tower.double().features["text"].value.dtype == torch.float64
    assert tower.present["text"].value.dtype == torch.bool


@pytest.mark.parametrize("parts", [("history",), ("id",), ("history", "id", "text")])
def test_user_vectors_are_the_sum_of_their_parts(parts):
    torch.manual_seed(0)
    text = frozen(torch.randn(5, 3), torch.tensor([False, True, True, False, True]))
    tower = UserTower(5, 4, parts, text=text)
    torch.nn.init.normal_(tower.offset)
    users, pooled = torch.tensor([1, 3]), torch.randn(2, 4)
    expected = tower.offset.expand(2, -1)
    if "history" in parts:
        expected = expected + pooled
    if "id" in parts:
        expected = expected + tower.id.weight[users]
    if "text" in parts:
        expected = expected + torch.stack([tower.adapter(text[0].value[1]), torch.zeros(4)])
    torch.testing.assert_close(tower(users, pooled), expected)


def test_a_user_tower_of_text_without_texts_is_refused():
    with pytest.raises(ValueError, match="user_tower contains text"):
        UserTower(5, 4, ("text",))
