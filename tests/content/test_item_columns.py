"""Columns of the item file as vectors, against values by hand."""

import math
from pathlib import Path

import numpy as np
import pytest
import torch

from recbole_llm.content.item_columns import MOST_VALUES, as_number, column_vectors, modality_of
from recbole_llm.content.text.atomic_files import AtomicTable


def made(seq_separator=" ", **columns):
    """A table of columns, each a type and its cells, and the ids in reverse with padding and a stranger."""
    n = len(next(iter(columns.values()))[1])
    ids = [f"i{at}" for at in range(n)]
    types = {"item_id": "token"} | {name: kind for name, (kind, _) in columns.items()}
    cells = {"item_id": ids} | {name: list(cells) for name, (_, cells) in columns.items()}
    table = AtomicTable(
        Path("shop.item"), "item_id", types, {item: at for at, item in enumerate(ids)}, cells, 0, seq_separator
    )
    return table, [None, *ids, "stranger"]


def only(table, tokens, wanted):
    ((found,), left) = column_vectors(table, tokens, wanted)
    assert not left
    return found


def test_categories_are_unit_indicators_of_shared_values_and_masks():
    table, tokens = made(
        genre=("token_seq", ["Drama comedy", "DRAMA", "comedy  drama", "", "western", "comedy comedy"])
    )
    found = only(table, tokens, {"genre": "auto"})
    assert found.table.modality == "column_genre"
    half = 1 / math.sqrt(2)  # comedy and drama have three items each, by name
    expected = [[0, 0], [half, half], [0, 1], [half, half], [0, 0], [0, 0], [1, 0], [0, 0]]
    np.testing.assert_allclose(found.table.vectors.numpy(), expected, atol=1e-7)
    assert found.table.present.tolist() == [False, True, True, True, False, False, True, False]
    assert "2 values, 1 that one item alone has left out; 4 of 7 items have one" in found.line


def test_a_token_is_one_value_with_its_spaces_and_phrases_are_split_where_commas_stand():
    table, tokens = made(brand=("token", ["Acme Inc", "acme  inc", "Acme", "Acme", ""]))
    assert only(table, tokens, {"brand": "category"}).table.vectors.shape[1] == 2
    table, tokens = made(kind=("token_seq", ["Office Chairs, Desks", "Desks", "Office Chairs"]))
    found = only(table, tokens, {"kind": "auto"})
    np.testing.assert_allclose(found.table.vectors[1], [math.sqrt(0.5)] * 2, atol=1e-7)
    assert found.table.vectors.shape[1] == 2


def test_values_beyond_the_bound_are_left_out_and_counted():
    cells = [f"v{at // 2}" for at in range(2 * MOST_VALUES + 20)] + ["v0"]
    table, tokens = made(brand=("token", cells))
    found = only(table, tokens, {"brand": "category"})
    assert found.table.vectors.shape[1] == MOST_VALUES
    assert int(found.table.present.sum()) == 2 * MOST_VALUES + 1
    assert "10 beyond the 512 of most items left out" in found.line


def test_numbers_are_a_smooth_kernel_of_their_quantiles():
    values = [1.0, 2.0, 2.0, 3.0, 1e9, float("nan")]
    table, tokens = made(price=("float", ["$1", "2", "2.0", "3", "1,000,000,000", "n/a"]))
    found = only(table, tokens, {"price": "auto"})
    quantiles = [0.1, 0.4, 0.4, 0.7, 0.9]  # of five numbers, those that are equal in the middle of theirs
    raw = np.array([[math.exp(-((q - k / 16) ** 2) / 0.02) for k in range(17)] for q in quantiles])
    raw /= np.linalg.norm(raw, axis=1, keepdims=True)
    np.testing.assert_allclose(found.table.vectors[1:6].numpy(), raw, atol=1e-6)
    assert not found.table.vectors[6].any() and found.table.present.tolist() == [False, *[True] * 5, False, False]
    kernel = found.table.vectors[1:6] @ found.table.vectors[1:6].T
    assert kernel[1, 2] == pytest.approx(1) and kernel[0, 1] > kernel[0, 3] > kernel[0, 4]
    assert (
        f"{len(set(values[:5]))} different ones from 1 to 1e+09" in found.line and "1 cells are no number" in found.line
    )


@pytest.mark.parametrize(
    ("cell", "number"),
    [
        ("1995", 1995.0),
        (" -3.5e2 ", -350.0),
        ("$1,299.50", 1299.5),
        ("0", 0.0),
        ("12 €", 12.0),
        ("1995-01-01", 728294.0),
        ("1995-01-01T10:00:00", 728294.0),
        ("01-Jan-1995", 728294.0),
        ("1995-02-31", None),
        ("1,2,3", None),
        ("1e999", None),
        ("nan", None),
        ("cheap", None),
        ("٣", 3.0),
    ],
)
def test_what_a_number_is(cell, number):
    assert as_number(cell) == number


def test_zero_is_a_number_and_no_gap():
    table, tokens = made(price=("float", ["0", "1", "0"]))
    assert only(table, tokens, {"price": "number"}).table.present.tolist()[1:4] == [True] * 3


def test_auto_takes_what_several_items_share_and_says_why_not_of_the_rest():
    n = 60
    table, tokens = made(
        title=("token_seq", [f"word{at} thing{at * 7 % 59}" for at in range(n)]),
        brand=("token", [f"b{at % 5}" for at in range(n)]),
        code=("token", [f"c{at}" for at in range(n)]),
        year=("token", [str(1950 + at) for at in range(n)]),
        shelf=("token", [str(at % 3) for at in range(n)]),
        released=("token", [f"19{50 + at % 40}-01-0{at % 9 + 1}" for at in range(n)]),
        same=("float", ["1"] * n),
        vector=("float_seq", ["0 1"] * n),
        image=("token", ["images/a.png"] * n),
    )
    found, left = column_vectors(table, tokens, "auto", taken=["image"])
    assert [each.name for each in found] == ["brand", "year", "shelf", "released"]
    assert [" number:" in each.line or " number: " in each.line for each in found] == [False, True, False, True]
    assert [line.split("'")[1] for line in left] == ["title", "code", "same", "vector"]


@pytest.mark.parametrize(
    ("wanted", "message"),
    [
        ({"genre": "auto"}, "names 'genre'; shop.item has the columns item_id:token, brand:token"),
        ({"item_id": "auto"}, "of which 'item_id' is the id"),
        ({"empty": "number"}, "names 'empty', which holds 0 different numbers"),
        ({"one": "number"}, "which holds one number alone"),
        ({"unique": "category"}, "holds no two values that several items have"),
        ({"vector": "auto"}, "holds vectors, which are given as item_features_file"),
        ({"a b": "auto", "a_b": "auto"}, "'a b' and 'a_b' differ in signs alone"),
    ],
)
def test_columns_that_say_nothing_are_refused_by_name(wanted, message):
    two = ["x", "x"]
    table, tokens = made(
        **{
            "brand": ("token", two),
            "empty": ("float", ["", ""]),
            "one": ("float", ["3", "3"]),
            "unique": ("token", ["x", "y"]),
            "vector": ("float_seq", two),
            "a b": ("token", two),
            "a_b": ("token", two),
        }
    )
    with pytest.raises(ValueError, match=message):
        column_vectors(table, tokens, wanted)


def test_the_fingerprint_is_of_the_values():
    first = only(*made(price=("float", ["1", "2", "4"])), {"price": "auto"}).table
    again = only(*made(price=("float", ["10", "20", "40"])), {"price": "auto"}).table
    other = only(*made(price=("float", ["4", "2", "1"])), {"price": "auto"}).table
    assert first.fingerprint == again.fingerprint, "quantiles do not ask for the unit"
    assert first.fingerprint != other.fingerprint and torch.equal(first.vectors, again.vectors)
    assert modality_of("release year") == "column_release_year"
