"""Weights of interactions: a column, kinds of events, age, repeats; what RecBole and the model read of them."""

import numpy as np
import pytest
import yaml
from made_files import read

pytest.importorskip("pyarrow", reason="the extra 'import'")

from recbole_llm.cli import main
from recbole_llm.importing import limits, rows

DAY = 86_400
EVENTS = {"view": 1.0, "cart": 3.0, "buy": 5.0}
TEXT = (
    "user,item,event,time\n"
    f"a,i,view,{0 * DAY}\n"
    f"a,i,buy,{10 * DAY}\n"
    f"a,j,cart,{20 * DAY}\n"
    f"b,i,view,{20 * DAY}\n"
    f"a,i,view,{5 * DAY}\n"
)


def weights(table):
    at = table[0].index("weight:float")
    return {(row[0], row[1]): float(row[at]) for row in table[1:]}


def test_kinds_of_events_add_up_and_fade(run):
    """The kept row is the last in time; all three count, each by its own age."""
    report, table = run(TEXT, event_weights=EVENTS, duplicates="sum", half_life=10.0)
    wanted = {
        ("a", "i"): 1 * 2.0**-2 + 5 * 2.0**-1 + 1 * 2.0**-1.5,
        ("a", "j"): 3.0,
        ("b", "i"): 1.0,
    }
    assert weights(table) == {pair: np.float32(weight) for pair, weight in wanted.items()}
    assert [row[:3] for row in table[1:]] == [
        ["a", "i", str(10 * DAY)],
        ["a", "j", str(20 * DAY)],
        ["b", "i", str(20 * DAY)],
    ]
    assert report.interactions.dropped == {"duplicate user and item (last one kept)": 2}
    assert report.interactions.columns["event"] == "weight:float"
    settings = yaml.safe_load(report.config_file.read_text())
    assert settings["weight_field"] == "weight" and "weight" in settings["load_col"]["inter"]


def test_each_part_alone(run):
    assert set(weights(run(TEXT, event_weights=EVENTS)[1]).values()) == {5.0, 3.0, 1.0}
    assert weights(run(TEXT, duplicates="sum")[1]) == {("a", "i"): 3.0, ("a", "j"): 1.0, ("b", "i"): 1.0}
    kept = run(TEXT, half_life=10.0, duplicates="keep")[1]
    at = kept[0].index("weight:float")
    assert [float(row[at]) for row in kept[1:]] == [np.float32(2.0**-age) for age in (2, 1, 0, 0, 1.5)]
    header = run(TEXT)[1][0]
    assert "weight:float" not in header


def test_a_column_of_numbers_may_be_that_of_the_ratings(run):
    text = "user,item,rating,qty\na,i,4,2\na,j,2,1\nb,i,5,0\nb,j,3,\n"
    report, table = run(text, weight_column="rating")
    assert weights(table) == {("a", "i"): 4, ("a", "j"): 2, ("b", "i"): 5, ("b", "j"): 3}
    assert report.interactions.columns["rating"] == "rating:float, weight:float"
    report, table = run(text, weight_column="qty", bad_rows="drop")
    assert weights(table) == {("a", "i"): 2, ("a", "j"): 1}
    assert report.interactions.dropped == {"weight 0": 1, "weight missing": 1}
    assert weights(run('user,item,w\na,i,"1,5"\na,j,"2,25"\n', weight_column="w")[1]) == {
        ("a", "i"): 1.5,
        ("a", "j"): 2.25,
    }


def test_what_is_below_the_threshold_adds_nothing_to_what_is_liked(run):
    text = "user,item,rating,time\na,i,1,1\na,i,1,2\na,i,5,3\na,j,5,1\na,j,1,2\n"
    _, table = run(text, threshold=4, keep_negatives=True, duplicates="sum")
    assert weights(table) == {("a", "i"): 1, ("a", "j"): 1}
    _, table = run(text, threshold=4, duplicates="sum", weight_column="rating")
    assert weights(table) == {("a", "i"): 5}


def test_the_oldest_interaction_still_counts(run):
    _, table = run(f"user,item,time\na,i,0\na,j,{3650 * DAY}\n", half_life=1.0)
    assert 0 < weights(table)[("a", "i")] < 1e-8 and weights(table)[("a", "j")] == 1


def test_small_pieces_change_nothing(run, monkeypatch):
    options = {"event_weights": EVENTS, "duplicates": "sum", "half_life": 10.0}
    whole = run(TEXT, **options)[1]
    monkeypatch.setattr(limits, "BLOCK_BYTES", 32)
    monkeypatch.setattr(rows, "GATHER_ROWS", 1)
    assert run(TEXT, **options)[1] == whole


@pytest.mark.parametrize(
    ("text", "options", "message"),
    [
        ("user,item,event\na,i,wish\n", {"event_weights": EVENTS}, "line 2: event without a weight .'wish'."),
        ("user,item,w\na,i,-1\n", {"weight_column": "w"}, "line 2: weight is negative .'-1'."),
        ("user,item,w\na,i,1e39\n", {"weight_column": "w"}, "line 2: weight is not between 1e-30 and 1e.30 .'1e39'."),
        ("user,item,w\na,i,1e-50\n", {"weight_column": "w"}, "line 2: weight is not between 1e-30 and 1e.30 .'1e-50'."),
        ("user,item,event\na,i,view\n", {"event_weights": {"view": 1e39}}, "weight is not between .* .'view'."),
        ("user,item,w\na,i,much\n", {"weight_column": "w"}, "line 2: weight is not a number .'much'."),
        ("user,item,w\na,i,1\n", {"weight_column": "v"}, "--weight-column names 'v'"),
        ("user,item\na,i\n", {"event_weights": EVENTS}, "which column holds the events"),
        ("user,item\na,i\n", {"half_life": 3.0}, "--half-life needs times"),
        ("user,item\na,i\n", {"half_life": 0.0}, "half_life is 0.0; expected a number of days above 0"),
        ("user,item,k\na,i,x\n", {"event_column": "k"}, "event_column 'k' needs event_weights"),
        ("user,item,event\na,i,view\n", {"event_weights": {"view": -1.0}}, "view weighs -1.0"),
        ("user,item,event\na,i,view\n", {"event_weights": {"view": 0.0}}, "leaves every kind of event out"),
        (
            "user,item,event\na,i,view\n",
            {"event_weights": EVENTS, "event_column": "user", "user_column": "user"},
            "two",
        ),
    ],
)
def test_mistakes_are_named(run, text, options, message):
    with pytest.raises(ValueError, match=message):
        run(text, **options)


def test_the_command_reads_kinds_and_says_what_it_made(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "a.csv").write_text(TEXT.replace("cart", '"put, in cart"'))
    command = ["import", "a.csv", "-d", "x", "--quiet", "--duplicates", "sum", "--half-life", "10"]
    assert main([*command, "--event-weights", 'view=1,"put, in cart=3",buy=5']) == 0
    out = capsys.readouterr().out
    assert "weights are the event in 'event' (view 1, put, in cart 3, buy 5) times age (half after 10 days)" in out
    assert weights(read(tmp_path / "dataset"))[("a", "j")] == 3
    for wrong in ("view", "view=x", "view=1,view=2", "=3"):
        assert main([*command, "--overwrite", "--event-weights", wrong]) == 2
        assert "is no kind with its weight" in capsys.readouterr().err


@pytest.mark.filterwarnings("ignore")
def test_recbole_reads_the_weights_and_the_model_their_sums(tmp_path, monkeypatch, run):
    """Rows of a pair that the file still holds twice add up in a history; the average is 1."""
    pytest.importorskip("recbole")
    from recbole.config import Config
    from recbole.data import create_dataset

    import recbole_llm  # noqa: F401

    report, _ = run(TEXT, event_weights=EVENTS, duplicates="keep")
    monkeypatch.chdir(tmp_path)
    split = {"eval_args": {"split": {"RS": [1, 0, 0]}, "order": "RO", "group_by": "none", "mode": "full"}}
    config = Config(
        "LLMTwoTower", "x", [str(report.config_file)], {**split, "encoder": None, "data_path": str(tmp_path / "out")}
    )
    train = create_dataset(config).build()[0]
    found = train.training_rows()
    pairs = zip(found.row_of_entry().tolist(), found.ids.tolist(), found.confidence.tolist(), strict=True)
    named = {(train.id2token("user_id", u), train.id2token("item_id", i)): c for u, i, c in pairs}
    mean = (1 + 5 + 3 + 1 + 1) / 5
    assert named == pytest.approx({("a", "i"): 7 / mean, ("a", "j"): 3 / mean, ("b", "i"): 1 / mean})
    config["weight_field"] = "worth"
    with pytest.raises(ValueError, match="weight_field is 'worth', and of x.inter user_id, item_id, timestamp, weight"):
        train.training_rows()
    config["weight_field"] = "weight"
    train.inter_feat["weight"][0] = 0
    with pytest.raises(ValueError, match="a weight is above 0 and finite, and x.inter holds 0. Leave such rows out"):
        train.training_rows()


@pytest.mark.parametrize(("part", "wrong"), [(1, float("inf")), (2, -1.0)])
@pytest.mark.filterwarnings("ignore")
def test_a_weight_that_no_history_can_hold_is_named_before_the_training(tmp_path, monkeypatch, run, part, wrong):
    """Validation's and test's interactions are histories where the model answers, after a training that may have taken hours."""
    pytest.importorskip("recbole")
    from recbole.config import Config
    from recbole.data import create_dataset

    import recbole_llm  # noqa: F401

    report, _ = run(TEXT, event_weights=EVENTS, duplicates="keep")
    monkeypatch.chdir(tmp_path)
    split = {"eval_args": {"split": {"RS": [1, 1, 1]}, "order": "RO", "group_by": "none", "mode": "full"}}
    given = split | {"encoder": None, "data_path": str(tmp_path / "out")}
    splits = create_dataset(Config("LLMTwoTower", "x", [str(report.config_file)], given)).build()
    assert len(splits[0].training_rows().confidence)
    splits[part].inter_feat["weight"][0] = wrong
    with pytest.raises(ValueError, match=f"a weight is above 0 and finite, and x.inter holds {wrong:g}. Leave such"):
        splits[0].training_rows()


@pytest.mark.parametrize("setting", [{"normalize_all": True}, {"normalize_field": ["weight"]}])
@pytest.mark.filterwarnings("ignore")
def test_recbole_scales_no_weight_to_nothing(tmp_path, monkeypatch, run, setting):
    pytest.importorskip("recbole")
    from recbole.config import Config
    from recbole.data import create_dataset

    import recbole_llm  # noqa: F401

    report, _ = run(TEXT, event_weights=EVENTS, duplicates="sum", half_life=10.0)
    monkeypatch.chdir(tmp_path)
    given = setting | {"encoder": None, "data_path": str(tmp_path / "out")}
    dataset = create_dataset(Config("LLMTwoTower", "x", [str(report.config_file)], given))
    assert sorted(dataset.inter_feat["weight"].tolist()) == pytest.approx([1, 3, 1 / 4 + 5 / 2 + 2**-1.5], rel=1e-6)
