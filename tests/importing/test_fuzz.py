"""Malformed files: a ValueError or a right result, and every row accounted for."""

import csv
import io
import json
import sys
import tempfile
from contextlib import contextmanager
from pathlib import Path
from unittest import mock

import pytest

pytest.importorskip("pyarrow", reason="the extra 'import'")

import pandas as pd
from fuzzing import fuzz
from hypothesis import strategies as st

from recbole_llm.content.text import read_atomic_table
from recbole_llm.importer import import_dataset
from recbole_llm.importing import limits, text_tables

CHARACTERS = [*"ab1 \"',\t\n\r\x00é\u2028\x85\ufeff\\😀"]
WORDS = ["", "1.0", "NA", "null", "nan", "inf", "-1", "1e999", "[PAD]", "<b>", "&amp;", "e\u0301", "\r\n"]
NASTY = [*CHARACTERS, *WORDS, "1700000000", "1700000000000", "2020-01-01T00:00:00Z"]
cell = st.lists(st.sampled_from(NASTY), max_size=3).map("".join)
row = st.lists(cell, min_size=4, max_size=4)
options = st.fixed_dictionaries(
    {},
    optional={
        "bad_rows": st.sampled_from(["error", "drop"]),
        "duplicates": st.sampled_from(["last", "first", "keep"]),
        "quoting": st.sampled_from(["csv", "none"]),
        "threshold": st.sampled_from([1.0, -5.0]),
        "keep_negatives": st.booleans(),
        "order": st.sampled_from(["auto", "time", "file"]),
        "rating_column": st.just(""),
        "time_column": st.just(""),
        "keep_html": st.booleans(),
    },
)


@contextmanager
def small_blocks():
    blocks = mock.patch.multiple(limits, BLOCK_BYTES=16, JSON_BLOCK_BYTES=16)
    rows = mock.patch.multiple(text_tables, FIRST_ROWS=2, ROWS=3)
    with blocks, rows:
        yield


def check_import(content, name, given_options, items=None, small=True):
    """Import bytes; the report, or ``None`` where the input was refused. What is written must be what is reported."""
    with tempfile.TemporaryDirectory() as folder:
        folder = Path(folder)
        (folder / name).write_bytes(content)
        if items is not None:
            (folder / f"items-{name}").write_bytes(items)
        try:
            with small_blocks() if small else mock.patch.object(text_tables, "ROWS", text_tables.ROWS):
                report = import_dataset(
                    folder / name,
                    "x",
                    items=None if items is None else folder / f"items-{name}",
                    data_path=folder / "out",
                    **given_options,
                )
        except ValueError as error:
            assert type(error) is ValueError, repr(error)
            assert str(error)
            assert not (folder / "out" / "x").exists()
            return None, None
        check_atomic(folder / "out" / "x" / "x.inter", report.interactions, 0)
        if items is not None:
            check_atomic(folder / "out" / "x" / "x.item", report.items, report.items.added)
            read_atomic_table(folder / "out" / "x" / "x.item", "item_id")
        return report, (folder / "out" / "x" / "x.inter").read_bytes()


def check_atomic(path, report, added):
    assert report.rows_read == report.rows_kept + sum(report.dropped.values())
    lines = path.read_bytes().decode("utf-8").split("\n")
    assert lines[-1] == ""
    assert {line.count("\t") for line in lines[:-1]} == {lines[0].count("\t")}
    assert len(lines) - 2 == report.rows_kept + added
    # as RecBole reads it: no id lost, no row merged
    types = {name: float if name.endswith(":float") else str for name in lines[0].split("\t")}
    frame = pd.read_csv(path, delimiter="\t", dtype=types, encoding="utf-8", engine="python")
    assert len(frame) == len(lines) - 2
    for at, name in enumerate(frame.columns):
        if name in ("user_id:token", "item_id:token"):
            assert frame[name].tolist() == [line.split("\t")[at] for line in lines[1:-1]]


@fuzz(
    content=st.binary(max_size=200),
    suffix=st.sampled_from(["csv", "tsv", "jsonl", "parquet", "csv.gz", "jsonl.gz", "inter", ""]),
)
def test_any_bytes(content, suffix):
    check_import(content, f"given.{suffix}", {})


def valid_files():
    """A small file of each format."""
    import gzip

    import pyarrow as pa
    import pyarrow.parquet as pq

    rows = [{"user": f"u{n % 3}", "item": f"i{n}", "rating": "5", "time": str(1_700_000_000 + n)} for n in range(12)]
    text = io.StringIO(newline="")
    csv.writer(text).writerows([list(rows[0]), *(list(r.values()) for r in rows), ["u9", 'i "9"', "1", "1700000000"]])
    table = io.BytesIO()
    pq.write_table(pa.Table.from_pylist(rows), table)
    lines = "".join(json.dumps(r) + "\n" for r in rows).encode()
    files = {"csv": text.getvalue().encode(), "jsonl": lines, "parquet": table.getvalue()}
    return {**files, "csv.gz": gzip.compress(files["csv"], mtime=0), "jsonl.gz": gzip.compress(lines, mtime=0)}


VALID = valid_files()
damage = st.tuples(
    st.floats(0, 1), st.integers(0, 3), st.one_of(st.binary(max_size=2), st.sampled_from(NASTY).map(str.encode))
)


@fuzz(
    suffix=st.sampled_from(sorted(VALID)),
    damages=st.lists(damage, min_size=1, max_size=3),
    bad_rows=st.sampled_from(["error", "drop", "drop"]),
)
def test_damaged_files(suffix, damages, bad_rows):
    content = bytearray(VALID[suffix])
    for where, length, patch in damages:
        at = int(where * len(content))
        content[at : at + length] = patch
    check_import(bytes(content), f"given.{suffix}", {"bad_rows": bad_rows})


@fuzz(
    body=st.lists(st.sampled_from([*NASTY, "u1", "i1", ",", ",", "\n", "\n", "\n"]), max_size=60).map("".join),
    foreign=st.sampled_from([b"", b"", b"", b"\xff"]),
    given_options=options,
)
def test_any_text_below_a_header(body, foreign, given_options):
    given_options.setdefault("bad_rows", "drop")
    content = b"user,item,rating,timestamp\nu0,i0,3,1700000000\n" + body.encode() + foreign
    report, _ = check_import(content, "given.csv", given_options)
    if report is None or given_options.get("quoting") == "none":
        return
    # an independent count of the records
    records = list(csv.reader(io.StringIO(content.decode(errors="surrogateescape"), newline=""), strict=True))
    table = report.interactions
    assert table.rows_read + table.blank_lines == len(records) - 1


@fuzz(
    rows=st.lists(row, min_size=1, max_size=12),
    items=st.lists(row, min_size=1, max_size=8),
    given_options=options,
    quote=st.booleans(),
)
def test_well_formed_csv_of_nasty_cells(rows, items, given_options, quote):
    given_options = {**given_options, "quoting": "csv", "bad_rows": "drop"}
    rows = [["u0", "i0", "3", "1700000000"], *rows]
    if sys.version_info < (3, 11):  # its csv module neither writes nor reads NUL
        rows, items = ([[cell.replace("\0", "") for cell in cells] for cells in table] for table in (rows, items))
    files = []
    for header, table in (
        (["user", "item", "rating", "timestamp"], rows),
        (["item", "title", "price", "rating"], items),
    ):
        text = io.StringIO(newline="")
        csv.writer(text, quoting=csv.QUOTE_ALL if quote else csv.QUOTE_MINIMAL).writerows([header, *table])
        files.append(text.getvalue().encode())
    report, _ = check_import(files[0], "given.csv", given_options, files[1])
    if report is not None:
        assert report.interactions.rows_read == len(rows)
        assert report.items.rows_read == len(items)
        assert (
            report.items.without_text is None
            or report.items.without_text <= report.items.rows_kept + report.items.added
        )


@fuzz(
    rows=st.lists(
        st.tuples(st.sampled_from("abcé "), st.sampled_from("ijk"), st.integers(0, 5), st.integers(0, 9)),
        min_size=1,
        max_size=40,
    )
)
def test_kept_rows_are_those_of_an_oracle(rows):
    content = "user,item,rating,time\n" + "".join(f"x{u},{i},{r},{t}\n" for u, i, r, t in rows)
    report, written = check_import(content.encode(), "given.csv", {"threshold": 3.0})
    last = {}
    for place, (user, item, rating, when) in enumerate(rows):
        if (user, item) not in last or (when, place) >= last[user, item][:2]:
            last[user, item] = (when, place, f"x{user}\t{item}\t{rating}\t{when}", rating)
    kept = [text for _, _, text, rating in sorted(last.values(), key=lambda entry: entry[1]) if rating >= 3]
    if report is None:
        assert not kept
    else:
        assert written.decode().split("\n")[1:-1] == kept


json_value = st.one_of(
    cell,
    st.none(),
    st.booleans(),
    st.integers(),
    st.floats(),
    st.lists(cell, max_size=2),
    st.dictionaries(cell, cell, max_size=1),
)


@fuzz(
    rows=st.lists(
        st.fixed_dictionaries(
            {"user": json_value, "item": json_value}, optional={"rating": json_value, "time": json_value}
        ),
        max_size=8,
    ),
    garbage=st.lists(
        st.sampled_from(
            ["", "{", "[]", "null", '{"user": "a"', "\x00", '{"user": "\\udc00", "item": "i"}', "[" * 10_000]
        ),
        max_size=2,
    ),
    given_options=options,
)
def test_json_lines(rows, garbage, given_options):
    given_options.setdefault("bad_rows", "drop")
    lines = ['{"user": "u0", "item": "i0", "rating": 3, "time": 1700000000}', *map(json.dumps, rows), *garbage]
    report, _ = check_import("\n".join(lines).encode(), "given.jsonl", given_options)
    if report is not None:
        assert report.interactions.rows_read + report.interactions.blank_lines in (len(lines), len(lines) - 1)


@fuzz(
    rows=st.lists(st.lists(st.text(alphabet='ab1 é"', max_size=4), min_size=2, max_size=2), min_size=1, max_size=30),
    end=st.sampled_from(["\n", "\r\n", "\r"]),
)
def test_pyarrow_and_the_csv_module_read_alike(rows, end):
    """Without quotes in the file pyarrow reads it; with quotes around every cell the csv module does."""
    rows = [["".join(c for c in value if c != '"') for value in entry] for entry in rows]
    made = []
    for style in (csv.QUOTE_NONE, csv.QUOTE_ALL):
        text = io.StringIO(newline="")
        csv.writer(text, quoting=style, lineterminator=end).writerows([["user", "item"], *rows])
        made.append(
            check_import(text.getvalue().encode(), "given.csv", {"duplicates": "keep"}, small=len(rows) % 2 == 0)
        )
    assert made[0][1] == made[1][1]
    assert made[0][0] is None or made[0][0].interactions.dropped == made[1][0].interactions.dropped
