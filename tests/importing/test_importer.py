"""Files to a dataset: formats, ids, texts, times."""

import csv
import gzip
import json

import pytest
import yaml
from made_files import HEADER, ITEMS, ROWS, read, write_csv

pa = pytest.importorskip("pyarrow", reason="the extra 'import'")

from recbole_llm.importer import import_dataset  # noqa: E402
from recbole_llm.importing import text_tables  # noqa: E402


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
    settings = report.config_file.read_text(encoding="utf-8")
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
