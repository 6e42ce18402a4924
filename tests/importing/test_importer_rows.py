"""Which rows and columns an import takes."""

import csv

import pytest
import yaml
from made_files import HEADER, read, write_csv

pytest.importorskip("pyarrow", reason="the extra 'import'")

from recbole_llm.importer import import_dataset
from recbole_llm.importing import limits, text_tables


@pytest.mark.parametrize(
    ("options", "kept"),
    [
        ({}, ["b 1", "a 9"]),
        ({"duplicates": "first"}, ["a 2", "b 1"]),
        ({"duplicates": "keep"}, ["a 5", "a 2", "b 1", "a 9"]),
        ({"time_column": ""}, ["b", "a"]),
        ({"order": "time"}, ["b 1", "a 9"]),
        ({"duplicates": "keep", "order": "time"}, ["b 1", "a 2", "a 5", "a 9"]),
    ],
)
def test_duplicates_and_order(run, options, kept):
    report, rows = run("user,item,time\na,i,5\na,i,2\nb,i,1\na,i,9\n", **options)
    assert [" ".join([row[0], *row[2:]]) for row in rows[1:]] == kept
    assert sum(report.interactions.dropped.values()) == 4 - len(kept)


def test_the_last_rating_decides_before_the_threshold(run):
    text = "user,item,rating,time\na,i,5,1\na,i,2,2\nb,i,4,1\nc,i,3.9,1\nd,i,,1\n"
    report, rows = run(text, threshold=4)
    assert rows[1:] == [["b", "i", "4", "1"]]
    assert report.interactions.dropped == {
        "rating missing": 1,
        "duplicate user and item (last one kept)": 1,
        "rating below 4": 2,
    }
    report, rows = run(text, threshold=4, keep_negatives=True)
    assert rows[0] == ["user_id:token", "item_id:token", "rating:float", "label:float", "timestamp:float"]
    assert [row[3] for row in rows[1:]] == ["0", "1", "0"]


def test_labels_choose_the_interactions(run):
    text = "user,item,clicked\na,i,1\na,j,0\nb,i,true\nb,j,\n"
    report, rows = run(text)
    assert rows == [["user_id:token", "item_id:token"], ["a", "i"], ["b", "i"]]
    assert report.interactions.dropped == {"label 0": 1, "label missing": 1}
    assert run(text, keep_negatives=True)[1][1:] == [["a", "i", "1"], ["a", "j", "0"], ["b", "i", "1"]]


def test_columns_are_found_by_name_and_content(run):
    report, rows = run("verified,reviewTime,overall,asin,reviewerID,unixReviewTime\nTrue,09 13,5,p,r,1100000000\n")
    assert rows == [
        ["user_id:token", "item_id:token", "rating:float", "timestamp:float"],
        ["r", "p", "5", "1100000000"],
    ]
    assert set(report.interactions.unused_columns) == {"verified", "reviewTime"}
    # "time" holds no times, "timestamp" does; "score" no numbers, "rating" does
    report, rows = run("user,item,time,timestamp,score,rating\na,i,noon,5,high,4\n")
    assert rows[1] == ["a", "i", "4", "5"]
    assert report.interactions.unused_columns == {
        "time": "the time is read from timestamp",
        "score": "the rating is read from rating",
    }
    # atomic headers, a pandas index
    assert run(",user_id:token,item_id:token\n0,a,i\n")[1][1:] == [["a", "i"]]
    assert run("w,b,who\n7,i,a\n", user_column="who", item_column="b")[1][1:] == [["a", "i"]]


@pytest.mark.parametrize(
    ("name", "value", "found"),
    [
        ("shipped_at", "2026-05-01 10:00:00", True),
        ("lastSeenAt", "2026-05-01T10:00:00Z", True),
        ("EVENT DATE", "2026-05-01", True),
        ("play-time", "1700000000", True),
        ("watch_time", "35.5", False),  # a duration
        ("format", "2026-05-01", False),
        ("delivery_date", "soon", False),
    ],
)
def test_times_under_names_that_nobody_knows(run, name, value, found):
    report, rows = run(f"user,item,{name}\na,i,{value}\n")
    assert (rows[0][-1] == "timestamp:float") == found
    assert (name in report.interactions.unused_columns) != found


def test_of_two_times_none_is_guessed(run):
    report, rows = run("user,item,shipped_at,paid_at\na,i,2026-05-01,2026-04-30\n")
    assert rows[0] == ["user_id:token", "item_id:token"]
    assert set(report.interactions.unused_columns) == {"shipped_at", "paid_at"}


def test_the_id_column_of_items_is_found_by_the_ids(files, tmp_path):
    rows = [["100", f"i{n}", f"a title of number {n}"] for n in range(1, 5)]
    items = write_csv(tmp_path / "i.csv", ["id", "code", "title"], rows)
    report = import_dataset(files[0], "x", items=items, data_path=tmp_path)
    assert report.items.columns["code"] == "item_id:token"
    assert report.items.added == 0
    report = import_dataset(files[0], "y", items=items, data_path=tmp_path, items_id_column="id")
    assert report.items.added == 3
    assert any("no id of the interactions is in i.csv" in note for note in report.notes)


def test_fields_keep_apart_what_recbole_would_mix(files, tmp_path):
    items = write_csv(
        tmp_path / "i.csv", ["item", "rating", "Zip Code", "sku no", "name"], [["i1", "4.5", "10", "007", "The name"]]
    )
    users = write_csv(tmp_path / "u.csv", ["user", "name", "age", "bio"], [["u1", "Ann Lee", "30", "likes long films"]])
    report = import_dataset(files[0], "x", items=items, users=users, data_path=tmp_path)
    assert read(tmp_path, suffix="item")[0] == [
        "item_id:token",
        "item_rating:float",
        "Zip_Code:token",
        "sku_no:token",
        "name:token_seq",
    ]
    assert read(tmp_path, suffix="user")[0] == ["user_id:token", "user_name:token_seq", "age:float", "bio:token_seq"]
    assert report.users.added == 2
    settings = (tmp_path / "x" / "x.yaml").read_text()
    assert "item_text_fields: [name]" in settings
    assert "user_text_fields: [user_name, bio]" in settings
    assert yaml.safe_load(settings.replace("# user_tower", "user_tower"))["user_tower"] == "history+text"
    assert any("'user_tower'" in note for note in report.notes)


def test_ids_that_look_alike_stay_apart_and_are_told(run):
    report, rows = run("user,item\na,i\na ,i\n a,i\nA,i\n1,i\n1.0,i\n")
    assert [row[0] for row in rows[1:]] == ["a", "a ", " a", "A", "1", "1.0"]
    assert any("2 user ids differ from another only in white space" in note for note in report.notes)


def test_small_blocks_change_nothing(files, tmp_path, monkeypatch):
    rows = [[f"u{n % 17}", f"i{n % 13}", n % 5, 1_700_000_000 + n * 7 % 101] for n in range(500)]
    for n, style in enumerate([{}, {"quoting": csv.QUOTE_ALL}, {"lineterminator": "\r"}]):
        path = write_csv(tmp_path / f"{n}.csv", HEADER, rows, **style)
        import_dataset(path, f"whole{n}", data_path=tmp_path)
        with monkeypatch.context() as small:
            small.setattr(limits, "BLOCK_BYTES", 64)
            small.setattr(text_tables, "FIRST_ROWS", 2)
            small.setattr("recbole_llm.importing.rows.GATHER_ROWS", 7)
            import_dataset(path, f"small{n}", data_path=tmp_path)
        assert read(tmp_path, f"whole{n}") == read(tmp_path, f"small{n}") == read(tmp_path, "whole0")
        assert len(read(tmp_path, f"small{n}")) == 17 * 13 + 1
