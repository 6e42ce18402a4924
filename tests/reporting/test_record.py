"""What a record may hold, and what it says in words."""

import copy
import math
from types import SimpleNamespace

import numpy as np
import pytest
from made_record import figures, interval, made_record

from recbole_llm.reporting import words
from recbole_llm.reporting.intervals import ratio
from recbole_llm.reporting.record import checked, kept


def test_the_interval_of_a_ratio_is_that_of_the_plain_bootstrap():
    rng = np.random.default_rng(0)
    targets = rng.integers(1, 6, 400)
    hits = rng.binomial(targets, 0.3)
    found = ratio(hits, targets)
    assert found.value == hits.sum() / targets.sum()
    picks = rng.integers(400, size=(4000, 400))
    plain = np.quantile(hits[picks].sum(1) / targets[picks].sum(1), [0.025, 0.975])
    np.testing.assert_allclose([found.low, found.high], plain, atol=0.004)
    # customers who are all alike leave no doubt
    sure = ratio(np.full(50, 1), np.full(50, 2))
    assert (sure.value, sure.low, sure.high) == (0.5, 0.5, 0.5)
    with pytest.raises(ValueError, match="no ratio"):
        ratio(np.zeros(3), np.zeros(3))
    with pytest.raises(ValueError, match=r"\(2,\) and \(3,\)"):
        ratio(np.zeros(2), np.ones(3))


def test_a_record_is_taken_as_it_is_and_without_curves():
    record = made_record()
    assert checked(record) == record
    assert kept({"report": record}) == record
    assert kept({}) is None
    record["history"] = {}
    assert checked(record)["history"] == {}


def ordered(value, width):
    return made_record(
        order={"users": 90, "ordered": 0.1, "shuffled": 0.1 * (1 - value), "lost": interval(value, width)}
    )


def test_what_the_order_is_worth_is_one_line_where_it_was_measured():
    assert words.order_in_words(made_record()) == []
    record = ordered(0.31, 0.02)
    assert checked(record) == record
    (line,) = words.order_in_words(record)
    assert line.startswith(
        "Order matters: 31% of NDCG@10 is lost without it (29% to 33%, 95% interval; NDCG@10 0.1000, 0.0690 "
    )
    assert line in words.answer(record) and any("Order matters" in each for each in words.card(record))
    (line,) = words.order_in_words(ordered(0.01, 0.02))
    assert line.startswith("Order tells nothing clear: 1% of NDCG@10 is lost without it (-1% to 3%")
    with pytest.raises(ValueError, match="record.order"):
        checked(made_record(order={"users": 90}))


@pytest.mark.parametrize(
    ("place", "value", "message"),
    [
        (("models", "ItemKNN", "ndcg"), "0.3", "record.models.ItemKNN.ndcg"),
        (("models", "ItemKNN", "ndcg"), math.nan, "no finite number"),
        (("models", "ItemKNN", "ndcg"), True, "no finite number"),
        (("dataset",), "a\x1b[2J", "control characters"),
        (("dataset",), "a" * 301, "too long"),
        (("dataset",), {"a": 1}, "record.dataset"),
        (("models",), [1], "record.models is no mapping"),
        (("calibration",), {}, "record.calibration is no list"),
        (("lead",), {"value": 1.0}, "low, high is lacking"),
        (("split", "evil"), 1, "evil is unknown"),
        (("version",), 2, "another version"),
        (("best_baseline",), "SLIM", "best baseline"),
        (("history", "loss"), [0.0] * 100_001, "too large"),
    ],
)
def test_another_form_is_refused_by_its_place(place, value, message):
    record = copy.deepcopy(made_record())
    at = record
    for name in place[:-1]:
        at = at[name]
    at[place[-1]] = value
    with pytest.raises(ValueError, match=message):
        checked(record)


def test_the_words():
    record = made_record()
    assert words.headline(record) == (
        "Of 100 held-out purchases 36 are in the first ten; bestsellers reach 21, ItemKNN 30."
    )
    assert "Better than the best baseline, ItemKNN, by 6" in words.verdict(record)
    assert words.verdict(made_record(lead=interval(0.01))).startswith("No clear difference from ItemKNN")
    worse = words.verdict(made_record(lead=interval(-0.05)))
    assert worse.startswith("Worse than ItemKNN by 5") and "better choice" in worse
    assert "chosen at random" in words.split_in_words(record)
    later = {**record["split"], "order": "TO"}
    assert "held out: 10% of each customer's purchases, the latest" in words.split_in_words(made_record(split=later))
    rated = words.answer(made_record(rated=True))
    assert "ratings" in rated[0] and "purchases" not in "".join(rated) and "users with a hit" in "".join(rated)
    assert words.of_100(0.3649) == "36" and words.of_100(0.034) == "3.4" and words.of_100(0.0) == "0"
    assert words.of_100(-0.0001) == "0"


@pytest.mark.parametrize(
    ("low", "high", "told"),
    [
        (0.3, 0.4, "30 to 40"),
        (0.148, 0.1532, "14.8 to 15.3"),
        (0.15004, 0.15006, "15.004 to 15.006"),
        (0.0301, 0.0304, "3.01 to 3.04"),
        (-0.0004, 0.0003, "-0.04 to 0.03"),
        (0.15, 0.15, "15 to 15"),
        (-0.021, 0.034, "-2.1 to 3.4"),
    ],
)
def test_ends_of_a_narrow_interval_are_told_apart(low, high, told):
    assert words.span_of_100(low, high) == told


def test_percentages_of_a_narrow_interval_are_told_apart():
    assert words.span_of_100(0.291, 0.329, "%", 0) == "29% to 33%"
    assert words.span_of_100(0.311, 0.313, "%", 0) == "31.1% to 31.3%"
    words.span_of_100(0.1, 0.1 + 1e-15)  # ends


def of_training(values, most, lead=-0.05, every=1, **more):
    """A record of a training with these validation values, behind ItemKNN by default."""
    trained = max(len(values) * every, more.pop("trained", 0))
    valid = [[every * n - 1, value] for n, value in enumerate(values, 1)]
    history = {"loss": [1.0] * trained, "valid": valid, "valid_metric": "NDCG@10", "most_epochs": most, **more}
    return checked(made_record(history=history, lead=interval(lead)))


def test_a_training_that_was_still_rising_is_told_to_go_on_before_the_model_is_given_up():
    said = words.verdict(of_training([0.1, 0.2, 0.3], most=3))
    assert said.startswith("Worse than ItemKNN by 5")
    first, second = said.index("train longer first, as with --epochs=30"), said.index("ItemKNN is the better choice")
    assert first < second and "after its last epoch, 3:" in said
    assert "--epochs=30" in words.verdict(of_training([0.1, 0.2, 0.3], most=3, lead=0.01))
    assert "--epochs" not in words.verdict(of_training([0.1, 0.2, 0.3], most=3, lead=0.06))
    assert "--epochs=10" in words.verdict(of_training([0.1], most=1))
    assert "--epochs=40" in words.verdict(of_training([0.1, 0.2], most=4, every=2))
    assert "--epochs=50" in words.verdict(of_training([0.1, 0.2], most=5, every=2, trained=5))
    falling = {"valid_metric_bigger": False}
    assert "--epochs=30" in words.verdict(of_training([0.3, 0.2, 0.1], most=3, **falling))


@pytest.mark.parametrize(
    "history",
    [
        of_training([0.1, 0.3, 0.2], most=3),
        of_training([0.1, 0.2, 0.3], most=300),  # something else ended it
        of_training([0.3], most=0),  # solved at once
        of_training([0.1, 0.2, 0.3], most=3, valid_metric_bigger=False),
        of_training([], most=3),
        made_record(history={}, lead=interval(-0.05)),
    ],
)
def test_any_other_training_is_advised_the_better_model(history):
    said = words.verdict(history)
    assert "train longer" not in said and said.endswith("ItemKNN is the better choice for these data.")


def test_what_is_left_out_and_what_was_not_fitted_is_said():
    text = "\n".join(words.answer(made_record(not_fitted={"ItemKNN": "its budget is 30,000 items"})))
    assert "ItemKNN was not fitted: its budget is 30,000 items." in text
    assert "350 of 400 items are among somebody's first 10." in text
    assert "Items without a training interaction: 10; 4 of them are never shown" in text
    assert "Customers without a training interaction: 3." in text


@pytest.mark.parametrize(
    ("placed", "items", "users"),
    [
        (10, "Items without a training interaction: 10; they are placed by their content.", "fits everybody"),
        (7, "Items without a training interaction: 10; 7 of them are placed by their content.", "fits everybody"),
        (0, "Items without a training interaction: 10.", "fits everybody"),
        (None, "Items without a training interaction: 10.", "Customers without a training interaction: 3."),
    ],
)
def test_only_a_model_that_reads_content_places_items_by_it(placed, items, users):
    """A stock model says nothing of the kind."""
    left = {**made_record()["left_out"], "items_that_cannot_be_shown": 0}
    if placed is not None:
        left["items_placed_by_content"] = placed
    lines = words.left_out_in_words(checked(made_record(left_out=left)))
    assert items in lines and users in lines[-1]


def test_a_stock_model_is_not_said_to_read_content():
    from recbole_llm.reporting.quality import _placed

    def model(sharded=False, cold=None):
        return SimpleNamespace(item_rows=SimpleNamespace(sharded=sharded), score=SimpleNamespace(cold=cold))

    assert _placed(SimpleNamespace(score=print)) == {}
    assert _placed(model(cold=SimpleNamespace(ids=range(7)))) == {"items_placed_by_content": 7}
    assert _placed(model()) == _placed(model(sharded=True)) == {"items_placed_by_content": 0}


def test_the_card_shows_no_markup_of_the_data():
    text = "\n".join(words.card(made_record(dataset="<img src=x>|[a](b)*c*`d`")))
    assert "<img" not in text and "&lt;img" in text and "\\[a\\]" in text and "\\|" in text and "\\`d\\`" in text
    assert "| LLMTwoTower | 36 | 34 to 38 |" in text


def test_a_checkpoint_of_somebody_else_makes_no_words():
    lines = words.quality_of({"report": made_record(dataset="\x1b[2J")})
    assert lines[2].startswith("Not told: record.dataset") and "\x1b" not in "".join(lines)
    assert "Not measured" in words.quality_of({})[2]
    assert (
        words.quality_of({"report": made_record(models={**made_record()["models"], "Pop": figures(0.2)})})[0]
        == "## Quality"
    )
