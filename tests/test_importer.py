"""Files to a dataset: formats, rows, columns, times, what goes wrong, what is left behind."""

import csv
import gzip
import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest
import yaml

pa = pytest.importorskip("pyarrow", reason="the extra 'import'")

from recbole_llm.importer import import_dataset  # noqa: E402
from recbole_llm.importing import text_tables  # noqa: E402

ROOT = Path(__file__).resolve().parents[1]
HEADER = ["user", "item", "rating", "timestamp"]
ROWS = [
    ["u1", "i1", "5", "1700000000"],
    ["u1", "i2", "3", "1700000010"],
    ["u2", "i1", "4", "1700000005"],
    ["u3", "i3", "2", "1700000007"],
]
# texts that lose something with a careless reader or writer
ITEMS = [
    {"asin": "i1", "title": 'The "Big" Film', "brand": "A", "price": 3.5, "description": "two\nlines and a\ttab"},
    {"asin": "i2", "title": '"Quoted"', "brand": "A", "price": None, "description": "NA"},
    {"asin": "i4", "title": "Cold, and <b>bold</b> &amp; e\u0301", "brand": "B", "price": 12, "description": ""},
    {"asin": "i3", "title": "", "brand": "", "price": 1, "description": "  "},
]


def write_csv(path, header, rows, **style):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **style).writerows([header, *rows])
    return path


def read(folder, name="x", suffix="inter"):
    """The rows of an atomic file, header first, as lists of strings."""
    text = (Path(folder) / name / f"{name}.{suffix}").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [line.split("\t") for line in text[:-1].split("\n")]


@pytest.fixture
def files(tmp_path):
    """CSV files of the rows above."""
    inter = write_csv(tmp_path / "inter.csv", HEADER, ROWS)
    items = write_csv(tmp_path / "items.csv", list(ITEMS[0]), [list(item.values()) for item in ITEMS])
    return inter, items


@pytest.fixture
def run(tmp_path):
    """Import text as CSV with the dataset name x; gives the report and the rows written."""

    def go(text, items=None, **options):
        source = tmp_path / "given.csv"
        source.write_bytes(text if isinstance(text, bytes) else text.encode())
        report = import_dataset(source, "x", items=items, data_path=tmp_path / "out", overwrite=True, **options)
        table = report.interactions
        assert table.rows_read == table.rows_kept + sum(table.dropped.values())
        assert len(read(tmp_path / "out")) == table.rows_kept + 1
        return report, read(tmp_path / "out")

    return go


def test_ids_ratings_and_times_are_written_as_given_in_order_of_time(files, tmp_path):
    report = import_dataset(files[0], "x", data_path=tmp_path)
    assert read(tmp_path) == [
        ["user_id:token", "item_id:token", "rating:float", "timestamp:float"],
        ["u1", "i1", "5", "1700000000"],
        ["u2", "i1", "4", "1700000005"],
        ["u3", "i3", "2", "1700000007"],
        ["u1", "i2", "3", "1700000010"],
    ]
    assert (report.n_users, report.n_items) == (3, 3)
    assert any("float32, here in steps of up to 128 s" in note for note in report.notes)


def test_items_get_one_line_texts_and_ids_without_a_row_are_added(files, tmp_path):
    write_csv(files[0], HEADER, [*ROWS, ["u3", "i9", "1", "1700000008"]])
    report = import_dataset(files[0], "x", items=files[1], data_path=tmp_path)
    assert read(tmp_path, suffix="item") == [
        ["item_id:token", "title:token_seq", "brand:token", "price:float", "description:token_seq"],
        ["i1", 'The "Big" Film', "A", "3.5", "two lines and a tab"],
        ["i2", ' "Quoted"', "A", "", " NA"],
        ["i4", "Cold, and bold & é", "B", "12", ""],
        ["i3", "", "", "1", ""],
        ["i9", "", "", "", ""],
    ]
    assert (report.items.rows_kept, report.items.added, report.items.unseen, report.items.without_text) == (4, 1, 1, 2)
    assert "  without an interaction: 1 ids" in report.lines()
    assert any("'item: [item_id]'" in note for note in report.notes)
    # without its # the line is part of load_col
    settings = report.config_file.read_text(encoding="utf-8").replace("# item: ", "item: ")
    assert yaml.safe_load(settings)["load_col"]["item"] == ["item_id"]
    assert report.items.text_fields == ["title", "description"]
    lengths = [len('The "Big" Film') + len("two lines and a tab"), len('"Quoted"NA'), len("Cold, and bold & é")]
    assert report.items.text_length["max"] == max(lengths)
    assert report.items.text_length["mean"] == pytest.approx(sum(lengths) / 3)


def as_gzip(path):
    target = path.with_name(path.name + ".gz")
    target.write_bytes(gzip.compress(path.read_bytes()))
    return target


def as_json_lines(rows, path):
    path.write_text("".join(json.dumps(row) + "\n" for row in rows), encoding="utf-8")
    return path


def as_parquet(rows, path):
    import pyarrow.parquet as pq

    pq.write_table(pa.Table.from_pylist(rows), path)
    return path


@pytest.mark.parametrize(
    "kind", ["tsv", "semicolon", "quoted", "csv.gz", "jsonl", "jsonl.gz", "parquet", "numbers", "utf-16"]
)
def test_every_format_gives_the_same_dataset(files, tmp_path, kind):
    import_dataset(files[0], "a", items=files[1], data_path=tmp_path)
    inter, items = files
    options = {}
    typed = [dict(zip(HEADER, [u, i, float(r), int(t)], strict=True)) for u, i, r, t in ROWS]
    if kind == "tsv":
        inter = write_csv(tmp_path / "b.tsv", HEADER, ROWS, delimiter="\t")
    elif kind == "semicolon":
        inter = write_csv(tmp_path / "b.csv", HEADER, ROWS, delimiter=";")
    elif kind == "quoted":
        inter = write_csv(tmp_path / "b.csv", HEADER, ROWS, quoting=csv.QUOTE_ALL, lineterminator="\n")
    elif kind == "utf-16":
        for path in files:
            path.write_text(path.read_text(encoding="utf-8"), encoding="utf-16")
        options["encoding"] = "utf-16"
    elif kind == "csv.gz":
        inter, items = as_gzip(inter), as_gzip(items)
    elif kind.startswith("jsonl"):
        inter = as_json_lines([dict(zip(HEADER, row, strict=True)) for row in ROWS], tmp_path / "b.jsonl")
        items = as_json_lines(ITEMS, tmp_path / "i.jsonl")
        if kind.endswith("gz"):
            inter, items = as_gzip(inter), as_gzip(items)
    elif kind == "parquet":
        inter = as_parquet([{**row, "rating": str(int(row["rating"]))} for row in typed], tmp_path / "b.parquet")
        items = as_parquet(ITEMS, tmp_path / "i.parquet")
    else:
        inter = as_json_lines([{**row, "rating": int(row["rating"])} for row in typed], tmp_path / "b.jsonl")
    import_dataset(inter, "b", items=items, data_path=tmp_path, **options)
    for suffix in ("inter", "item"):
        assert read(tmp_path, "a", suffix) == read(tmp_path, "b", suffix)


def test_parquet_types_become_strings(tmp_path):
    import datetime as dt

    zone = dt.timezone(dt.timedelta(hours=2))
    rows = [
        {"user": 7.0, "item": 10**15 + 1, "when": dt.datetime(2020, 1, 1, 2, tzinfo=zone)},
        {"user": None, "item": 3, "when": dt.datetime(2020, 1, 1, tzinfo=dt.timezone.utc)},
        {"user": 8.0, "item": 3, "when": None},
        {"user": 9.0, "item": 4, "when": dt.datetime(2020, 1, 1, 0, 0, 0, 250000, tzinfo=dt.timezone.utc)},
    ]
    items = [{"item": 3, "tags": ["red", "", "big one"], "nested": {"a": 1}, "title": "A title of words"}]
    report = import_dataset(
        as_parquet(rows, tmp_path / "r.parquet"),
        "x",
        items=as_parquet(items, tmp_path / "i.parquet"),
        data_path=tmp_path,
        time_column="when",
    )
    assert read(tmp_path)[1:] == [["7", "1000000000000001", "1577836800"], ["9", "4", "1577836800.25"]]
    assert report.interactions.dropped == {"user id missing": 1, "time missing": 1}
    assert report.interactions.examples == {"user id missing": [2], "time missing": [3]}
    assert not any("no zone" in note for note in report.notes)
    assert read(tmp_path, suffix="item")[1][1] == "red, big one"
    assert "nested" in report.items.unused_columns


def test_keys_that_json_shows_late_are_columns_too(files, tmp_path, monkeypatch):
    monkeypatch.setattr(text_tables, "FIRST_ROWS", 1)
    items = as_json_lines([{"asin": "i1"}, {"asin": "i2", "title": "words of a title"}], tmp_path / "i.jsonl")
    import_dataset(files[0], "x", items=items, data_path=tmp_path)
    assert read(tmp_path, suffix="item")[:3] == [
        ["item_id:token", "title:token_seq"],
        ["i1", ""],
        ["i2", "words of a title"],
    ]


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
    # "time" holds no times, "score" no numbers
    report, rows = run("user,item,time,score\na,i,noon,high\n")
    assert rows[0] == ["user_id:token", "item_id:token"]
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
            small.setattr(text_tables, "BLOCK_BYTES", 64)
            small.setattr(text_tables, "FIRST_ROWS", 2)
            small.setattr("recbole_llm.importing.rows.GATHER_ROWS", 7)
            import_dataset(path, f"small{n}", data_path=tmp_path)
        assert read(tmp_path, f"whole{n}") == read(tmp_path, f"small{n}") == read(tmp_path, "whole0")
        assert len(read(tmp_path, f"small{n}")) == 17 * 13 + 1


WRONG = {
    "empty": (b"", {}, "the file is empty"),
    "blank": (b"\n\r\n\n", {}, "only blank lines"),
    "header only": (b"user,item\n", {}, "no row is left of 0: it has only a header"),
    "no user": (b"a,b\n1,2\n", {}, r"which column holds the users\? Give --user-column. The columns are 'a', 'b'"),
    "no such column": (b"user,item\n1,2\n", {"time_column": "when"}, "--time-column names 'when', and the columns are"),
    "one for two": (b"user,item\n1,2\n", {"user_column": "user", "item_column": "user"}, "given for two purposes"),
    "twice": (b"user,item,user\n1,2,3\n", {}, "the header names 'user' more than once"),
    "ragged": (b"user,item\na,i\nb\nc,i,x\n", {}, "line 3: wrong number of cells"),
    "ragged after a line break": (b'user,item\n"a\nb",i\nb\n', {}, "line 4: wrong number of cells"),
    "open quote": (b'user,item\na,"i\nb,j\nc,k\n', {}, "line 4: unexpected end of data. A double quote"),
    "text after a quote": (b'user,item\na,"i"x\n', {}, "line 2: .* --quoting none"),
    "not UTF-8": (b"user,item\na,i\nb,caf\xe9\n", {}, r"line 3 is not utf-8: byte 0xe9 in 'caf\\udce9'"),
    "not UTF-8, quoted": (b'user,item\n"a",i\nb,caf\xe9\n', {}, "line 3 is not utf-8: byte 0xe9"),
    "not UTF-8 header": (b"user,it\xe9m\n1,2\n", {}, "line 1 is not utf-8"),
    "UTF-16": ("user,item\na,i\n".encode("utf-16"), {}, "give --encoding utf-16"),
    "NUL": (b"u\x00s\x00e\x00r\x00\n\x00", {}, "NUL bytes"),
    "ZIP": (b"PK\x03\x04 spreadsheet", {}, "ZIP archive or a spreadsheet"),
    "unknown encoding": (b"user,item\na,i\n", {"encoding": "utf-9"}, "encoding 'utf-9' is unknown"),
    "words for ratings": (b"user,item,rating\na,i,5\nb,i,good\n", {}, r"line 3: rating is not a number \('good'\)"),
    "three labels": (
        b"user,item,label\na,i,1\nb,i,2\n",
        {"label_column": "label"},
        r"line 3: label is neither 0 nor 1 \('2'\)",
    ),
    "mixed times": (
        b"user,item,time\na,i,1700000000\nb,i,1700000000000\n",
        {},
        "line 3: time is no number of seconds like",
    ),
    "no dates": (b"user,item,when\na,i,noon\n", {"time_column": "when"}, "neither numbers nor dates"),
    "tab in an id": (b'user,item\na,"i\tj"\n', {}, r"line 2: item id with a tab.*\('i\\tj'\)"),
    "line break in an id": (b'user,item\n"a\nb",i\n', {}, "line 2: user id with a tab, line break"),
    "quote before an id": (b'user,item\n"""a""",i\n', {}, "a quote in front"),
    "threshold without ratings": (b"user,item\na,i\n", {"threshold": 4.0}, "threshold needs ratings"),
    "threshold and labels": (b"user,item\na,i\n", {"threshold": 4.0, "label_column": "l"}, "give one of them"),
    "all dropped": (b"user,item,rating\na,i,1\n", {"threshold": 4.0}, "no row is left of 1: {'rating below 4': 1}"),
    "texts of nothing": (b"user,item\na,i\n", {"text_columns": ["title"]}, "text_columns needs items"),
    "choice": (b"user,item\na,i\n", {"duplicates": "best"}, "duplicates must be one of last, first, keep"),
    "separator": (b"user,item\na,i\n", {"separator": "ab"}, "separator must be one character"),
}


@pytest.mark.parametrize("name", WRONG)
def test_what_is_wrong_is_said_and_nothing_is_left(tmp_path, name):
    content, options, message = WRONG[name]
    source = tmp_path / "given.csv"
    source.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        import_dataset(source, "x", data_path=tmp_path / "out", **options)
    assert not list((tmp_path / "out").glob("*")) and not list((tmp_path / "out").glob(".*"))


@pytest.mark.parametrize(
    ("name", "content", "message"),
    [
        ("a.jsonl", b'[{"user": 1}]', "JSON array; write one object a line"),
        ("a.jsonl", b'{"user": "a", "item": "i"}\n{"user": "a", \n', "line 2: not a JSON object"),
        (
            "a.jsonl",
            b'{"user": "a", "item": "1"}\n{"user": "a", "item": 1}\n',
            "holds ids as numbers and ids in quotes",
        ),
        (
            "a.jsonl",
            b'{"user": "a", "item": "i"}\n{"user": "\\ud800", "item": "i"}\n',
            "line 2 is not utf-8: half of a surrogate",
        ),
        ("a.jsonl", b"nothing\n", "no line among the first 1000 holds a JSON object"),
        ("a.parquet", b"user,item\n", "a.parquet is not a Parquet file"),
        ("a.parquet", b"PAR1 broken PAR1", "not a readable Parquet file"),
        ("a.csv.gz", gzip.compress(b"user,item\n" + b"a,i\n" * 9999)[:40], "damaged or cut off"),
        ("absent/a.csv", None, "no such file"),
    ],
)
def test_wrong_files_of_other_formats(tmp_path, name, content, message):
    path = tmp_path / name
    if content is not None:
        path.write_bytes(content)
    with pytest.raises(ValueError, match=message):
        import_dataset(path, "x", data_path=tmp_path / "out")


def test_bad_rows_can_be_dropped_and_are_counted(run):
    text = "user,item,rating,time\na,i,5,10\n\nb\nc,i,good,10\nd,i,5,noon\ne,,5,10\nNA,i,5,10\nf,i,5,10\n"
    report, rows = run(text, bad_rows="drop")
    assert [row[0] for row in rows[1:]] == ["a", "f"]
    assert report.interactions.dropped == {
        "wrong number of cells": 1,
        "item id missing": 1,
        "user id is a word that RecBole reads as missing (NA, null, None, ...)": 1,
        "rating is not a number": 1,
        "time is no number of seconds like the first ones": 1,
    }
    assert report.interactions.examples["rating is not a number"] == [5]
    assert report.interactions.blank_lines == 1
    assert report.interactions.rows_read == 7


def test_blank_lines_are_counted_and_do_not_shift_the_places(run):
    report, rows = run("user,item,rating\na,i,5\n\n\nb,j,\n,k,4\n")
    assert report.interactions.blank_lines == 2
    assert report.interactions.examples == {"user id missing": [6]}
    assert rows[1:] == [["a", "i", "5"], ["b", "j", ""]]


def test_items_report_their_rows_too(files, tmp_path):
    rows = [["i1", "first title"], ["", "no id"], ["i1", "last title"], ["i2"], ["i\t2", "a tab"], ["i5", "new one"]]
    items = write_csv(tmp_path / "i.csv", ["asin", "title"], rows)
    with pytest.raises(ValueError, match=r"i\.csv, line 5: wrong number of cells"):
        import_dataset(files[0], "x", items=items, data_path=tmp_path / "out")
    report = import_dataset(files[0], "x", items=items, data_path=tmp_path, bad_rows="drop")
    assert (report.items.rows_read, report.items.rows_kept, sum(report.items.dropped.values())) == (6, 2, 4)
    assert [row[:2] for row in read(tmp_path, suffix="item")[1:]] == [
        ["i1", "last title"],
        ["i5", "new one"],
        ["i2", ""],
        ["i3", ""],
    ]
    import_dataset(files[0], "y", items=items, data_path=tmp_path, bad_rows="drop", duplicates="first")
    assert read(tmp_path, "y", "item")[1] == ["i1", "first title"]


def test_quotes_that_are_plain_characters(tmp_path):
    inter = write_csv(tmp_path / "inter.tsv", ["user", "item"], [["u", "a"], ["u", "b"]], delimiter="\t")
    items = tmp_path / "items.tsv"
    items.write_text('item\ttitle\na\t"An open quote\nb\tEnds in inches 5"\n')
    # read as quoting, both lines are one row; that is what the format says, and the report shows it
    report = import_dataset(inter, "x", items=items, data_path=tmp_path)
    assert (report.items.rows_read, report.items.multiline_cells, report.items.added) == (1, 1, 1)
    import_dataset(inter, "y", items=items, data_path=tmp_path, quoting="none")
    assert read(tmp_path, "y", "item")[1:] == [["a", ' "An open quote'], ["b", 'Ends in inches 5"']]
    atomic = items.rename(tmp_path / "a.item")
    import_dataset(inter, "z", items=atomic, data_path=tmp_path)
    assert read(tmp_path, "z", "item") == read(tmp_path, "y", "item")


def test_an_existing_folder_is_kept_unless_told(files, tmp_path):
    import_dataset(files[0], "x", data_path=tmp_path)
    (tmp_path / "x" / "mine.txt").write_text("mine")
    with pytest.raises(ValueError, match="exists. Give --overwrite"):
        import_dataset(files[0], "x", data_path=tmp_path)
    assert (tmp_path / "x" / "mine.txt").exists()
    files[0].write_text("user,item\n")
    with pytest.raises(ValueError, match="no row is left"):
        import_dataset(files[0], "x", data_path=tmp_path, overwrite=True)
    assert (tmp_path / "x" / "mine.txt").exists()
    write_csv(files[0], HEADER, ROWS)
    import_dataset(files[0], "x", data_path=tmp_path, overwrite=True)
    assert sorted(p.name for p in (tmp_path / "x").iterdir()) == ["import_report.json", "x.inter", "x.yaml"]
    assert not list(tmp_path.glob(".*"))


@pytest.mark.parametrize("name", ["", "a/b", "..", ".x", "ml-100k", "sample", "a b"])
def test_names_that_recbole_could_not_read(files, tmp_path, name):
    with pytest.raises(ValueError, match="dataset"):
        import_dataset(files[0], name, data_path=tmp_path)


def environment():
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}


def test_a_killed_import_leaves_no_dataset_and_the_next_one_clears_up(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    big = tmp_path / "inter.csv"
    big.write_text("user,item\n" + "".join(f"u{n},i{n % 7}\n" for n in range(1000)))
    code = (
        "import sys, time; from recbole_llm import importer; from recbole_llm.importing.rows import RowFile\n"
        "RowFile.finish = lambda *a, **k: (print('writing', flush=True), time.sleep(60))\n"
        "importer.import_dataset(sys.argv[1], 'x', data_path=sys.argv[2])"
    )
    command = [sys.executable, "-c", code, str(big), str(tmp_path / "out")]
    process = subprocess.Popen(command, env=environment(), stdout=subprocess.PIPE, text=True)
    assert process.stdout.readline() == "writing\n"
    left = list((tmp_path / "out").iterdir())
    assert [p.name.startswith(".x.importing-") for p in left] == [True]
    import_dataset(big, "y", data_path=tmp_path / "out")  # neither its own nor abandoned
    with pytest.raises(ValueError, match="another"):
        # at work: must not be cleared up
        (tmp_path / "out" / "x").write_text("")
        import_dataset(big, "x", data_path=tmp_path / "out")
    (tmp_path / "out" / "x").unlink()
    assert left[0].exists()
    process.send_signal(signal.SIGKILL)
    process.wait()
    assert not (tmp_path / "out" / "x").exists()
    import_dataset(big, "x", data_path=tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["x", "y"]


def test_the_module_is_light():
    code = "import sys, recbole_llm.importer; print({'numpy', 'pyarrow', 'torch', 'recbole', 'yaml', 'tqdm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_the_command(files, tmp_path, capsys):
    import argparse

    from recbole_llm.importer import add_arguments, run_import

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = [str(files[0]), "--items", str(files[1]), "--dataset", "x", "--data_path", str(tmp_path / "out")]
    arguments += ["--text-columns", "title,description", "--separator", ",", "--threshold", "3", "--quiet"]
    assert run_import(parser.parse_args(arguments)) == 0
    printed = capsys.readouterr().out
    assert "inter.csv: 4 rows read, 3 kept, 1 dropped" in printed
    assert "dropped 1: rating below 3" in printed
    assert "text: title, description; 1 ids without text" in printed
    assert f"--config_files {tmp_path / 'out' / 'x' / 'x.yaml'}" in printed
    report = json.loads((tmp_path / "out" / "x" / "import_report.json").read_text())
    assert report["interactions"]["dropped"] == {"rating below 3": 1}
    started = time.perf_counter()
    with pytest.raises(ValueError, match="exists"):
        run_import(parser.parse_args(arguments))
    assert time.perf_counter() - started < 5
