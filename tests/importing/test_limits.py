"""Records, columns and blocks are bounded while they are read; ids as long as the service takes; what the report says."""

import gzip
import json
import resource
import sys

import pytest
from made_files import read, write_csv

pytest.importorskip("pyarrow", reason="the extra 'import'")

import pyarrow as pa
import pyarrow.parquet as pq

from recbole_llm.identifiers import ITEM_ROUTE_ENDINGS, MAX_ID_CHARACTERS
from recbole_llm.importer import import_dataset
from recbole_llm.importing import limits
from recbole_llm.importing.lines import Lines
from recbole_llm.importing.sources import open_source
from recbole_llm.importing.values import clean_text

HEAD = b"user_id,item_id,rating\nu1,i1,3\n"


@pytest.fixture
def small(monkeypatch):
    """Limits a thousand times smaller, so that small files go beyond them."""
    for name, value in dict(
        BLOCK_BYTES=1 << 12, HEADER_BYTES=1 << 9, JSON_BLOCK_BYTES=1 << 11, MAX_RECORD=1 << 12, MAX_UNFINISHED=1 << 14,
        MAX_COLUMNS=40, FREE_EXPANSION=1 << 16, FREE_ROWS=1000,
    ).items():  # fmt: skip
        monkeypatch.setattr(limits, name, value)


def given(folder, name, content, **options):
    (folder / name).write_bytes(content)
    return import_dataset(folder / name, "x", data_path=folder / "out", overwrite=True, **options)


ENDLESS = {
    "no line end": ("a.csv", HEAD + b"a" * 9000, "line 3 is longer than 4,096 characters. Is a quote not closed"),
    "header": ("a.csv", b"a" * 9000, "line 1 is longer than 4,096 characters"),
    "behind a quote": ("a.csv", HEAD + b'"u2",i2,3\n' + b"a" * 9000, "line 4 is longer than 4,096 characters"),
    "one cell": ("a.csv", HEAD + b'u2,"' + b"ab\n" * 3000, r"line \d+: field larger than field limit \(4096\)"),
    "many cells of many lines": ("a.csv", HEAD + b'u2,"' + b'a\n","' * 9000, "begins a row of more than 16,384 characters"),
    "blank lines": ("a.csv", b"\n" * 40_000, "line 1 begins a row of more than 16,384|only blank lines"),
    "quotes as characters": ("a.tsv", b"user_id\titem_id\n" + b'"' * 9000, "line 2 is longer", {"quoting": "none"}),
    "JSON": ("a.jsonl", b'{"user_id": "u", "item_id": "i"}\n{"a": "' + b"a" * 9000, "line 2 is longer than .* One JSON object"),
    "UTF-16": ("a.csv", ("user_id,item_id\n" + "ü" * 9000).encode("utf-16"), "line 2 is longer", {"encoding": "utf-16"}),
    "columns": ("a.csv", b",".join(b"c%d" % n for n in range(41)) + b"\n", "41 columns, and at most 40 are read"),
    "keys": ("a.jsonl", json.dumps({f"c{n}": n for n in range(41)}).encode(), "41 columns, and at most 40"),
    "late keys": (
        "a.jsonl",
        b"".join(b'{"user_id": "u%d", "item_id": "i"}\n' % n for n in range(3000))
        + b"".join(b'{"user_id": "u", "item_id": "i", "c%d": 1}\n' % n for n in range(39)),
        "41 columns, and at most 40",
    ),
    "name": ("a.csv", b"n" * 600 + b",item_id\na,b\n", "a column's name of 600 characters begins with 'nnn"),
}  # fmt: skip


@pytest.mark.parametrize("compressed", [False, True])
@pytest.mark.parametrize("kind", ENDLESS)
def test_what_does_not_end_is_refused_and_named(small, tmp_path, kind, compressed):
    name, content, message, *options = ENDLESS[kind]
    if compressed:
        name, content = name + ".gz", gzip.compress(content, mtime=0)
    with pytest.raises(ValueError, match=message) as caught:
        given(tmp_path, name, content, **(options[0] if options else {}))
    assert "\n" not in str(caught.value)
    assert not list((tmp_path / "out").glob("*"))


def test_just_within_the_limits_is_read(small, tmp_path):
    text = "word " * 800
    assert 3900 < len(text) < limits.MAX_RECORD
    rows = [[f"i{n}", text] for n in range(30)]
    inter = write_csv(tmp_path / "o.csv", ["user", "item"], [["u", "i1"]])
    for style in ({}, {"quoting": 1}):
        items = write_csv(tmp_path / "i.csv", ["item", "title"], rows, **style)
        report = import_dataset(inter, "x", items=items, data_path=tmp_path, overwrite=True)
        assert report.items.rows_kept == 30
        assert {len(row[1]) for row in read(tmp_path, suffix="item")[1:]} == {len(text) - 1}


def test_lines_are_those_of_python_in_blocks_of_every_size(tmp_path):
    text = "a\r\nbc\rd\n\n\r\r\né\u2028f\x85g\n" * 3 + "end"
    expected = list(open_text(tmp_path, text))
    for size in (1, 2, 3, 7, 1000):
        for encoding in ("utf-8", "utf-16"):
            (tmp_path / "a").write_bytes(text.encode(encoding))
            with (tmp_path / "a").open("rb") as stream:
                assert list(Lines(stream, encoding, size, ValueError)) == expected


def open_text(folder, text):
    (folder / "t").write_bytes(text.encode())
    with (folder / "t").open(encoding="utf-8", newline="") as file:
        yield from file


@pytest.mark.parametrize("line", [b"u1,i1,3\n", b'"u1","i1","3"\n', b"\n"])
def test_a_file_that_expands_more_than_any_table_is_refused(small, tmp_path, line):
    packed = gzip.compress(HEAD + line * (2_000_000 // len(line)), 9, mtime=0)
    with pytest.raises(ValueError, match="holds more than 100 times its size.*unpack it"):
        given(tmp_path, "a.csv.gz", packed)
    assert given(tmp_path, "a.csv", gzip.decompress(packed)).interactions.rows_kept == 1  # what it says is true


def test_an_ordinary_compressed_file_is_read(small, tmp_path):
    rows = b"".join(b"u%d,i%d,%d\n" % (n % 97, n * 31 % 89, n % 5) for n in range(20_000))
    report = given(tmp_path, "a.csv.gz", gzip.compress(HEAD + rows, mtime=0))
    assert report.interactions.rows_read == 20_001
    assert report.interactions.read_as["compressed"] == "gzip"


def repeated(value, rows):
    return pa.DictionaryArray.from_arrays(pa.array([0] * rows, pa.int32()), pa.array([value]))


@pytest.mark.parametrize(
    ("columns", "message"),
    [
        ({"user_id": repeated("u1", 50_000), "item_id": repeated("i1", 50_000)}, "said to hold 50,000 rows"),
        ({"user_id": ["u"], "item_id": ["x" * 5000]}, "column 'item_id' holds a text of 5,000 bytes; at most 4,096"),
        ({"user_id": ["u"] * 900, "item_id": repeated("x" * 4000, 900)}, "holds more than 100 times its size"),
        ({f"c{n}": [n] for n in range(41)}, "41 columns, and at most 40 are read"),
        ({"user_id": ["u"], "n" * 600: ["i"]}, "a column's name of 600 characters"),
    ],
)
def test_parquet_that_says_or_holds_too_much_is_refused(small, tmp_path, columns, message):
    pq.write_table(pa.table(columns), tmp_path / "a.parquet")
    with pytest.raises(ValueError, match=message):
        import_dataset(tmp_path / "a.parquet", "x", data_path=tmp_path)


@pytest.mark.parametrize("encoding", ["dictionary", "plain", "DELTA_BYTE_ARRAY", "DELTA_LENGTH_BYTE_ARRAY"])
@pytest.mark.parametrize("group", [7, 1000])
def test_parquet_batches_are_as_small_as_their_texts_are_long(monkeypatch, tmp_path, encoding, group):
    from recbole_llm.importing import parquet

    monkeypatch.setattr(parquet, "DICTIONARY_BYTES", 4000)
    monkeypatch.setattr(parquet, "LIST_VALUES", 60)
    texts = ["long text " * 30 if n % 3 else f"short {n}" for n in range(100)]
    lists = [[f"tag {n}", None, "x"] * (n % 4) for n in range(100)]
    table = pa.table({"user_id": [f"u{n}" for n in range(100)], "title": texts, "tags": lists, "n": range(100)})
    options = {"use_dictionary": encoding == "dictionary"}
    if encoding.startswith("DELTA"):
        options["column_encoding"] = dict.fromkeys(["user_id", "title"], encoding)
    pq.write_table(table, tmp_path / "a.parquet", row_group_size=group, **options)
    source = open_source(tmp_path / "a.parquet")
    batches = list(source.batches(["user_id", "title"]))
    assert [cell for batch in batches for cell in batch.columns["title"].to_pylist()] == texts
    assert [line for batch in batches for line in batch.lines] == [*range(1, 101)]
    if encoding == "dictionary":
        assert max(len(batch.lines) for batch in batches) <= 4000 // 300
    lengths = [len(batch.lines) for batch in source.batches(["tags"])]
    assert sum(lengths) == 100 and max(lengths) <= 60 * 100 // (450 - 25)


@pytest.mark.skipif(sys.platform != "linux", reason="ru_maxrss in KiB")
def test_much_is_refused_in_little_memory(tmp_path):
    """With the limits as they are: a line of 200 MB, packed into 200 kB, in a process of a few tens of MB more."""
    import zlib

    stream = zlib.compressobj(9, zlib.DEFLATED, 31)
    zeros = b"0" * (1 << 20)
    packed = b"".join([stream.compress(HEAD), *(stream.compress(zeros) for _ in range(200)), stream.flush()])
    before = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    with pytest.raises(ValueError, match="line 3 is longer than 4,194,304 characters"):
        given(tmp_path, "a.csv.gz", packed)
    assert resource.getrusage(resource.RUSAGE_SELF).ru_maxrss - before < 150 * 1024


@pytest.mark.parametrize(
    "piece", ["<!--", "<script>", "<style", "&#9", "</script ", "\u0315\u0300", "\u0315\u0300a", "<a ", "&#x"]
)
def test_texts_made_to_take_long_do_not(piece):
    """Each took the square of its length: minutes or hours."""
    text = piece * (300_000 // len(piece))
    assert len(clean_text(text)) > 100
    assert (clean_text(f"{text}9; -->") == "") == (piece == "<!--")


def test_text_without_an_end_is_kept_and_with_one_is_not():
    assert clean_text("a <!-- b") == "a <!-- b"
    assert clean_text("a <!-- b --> c <!-- d") == "a c <!-- d"
    assert clean_text("a <SCRIPT x='1'>b<!-- c</script > d <!-- e --> f") == "a d f"
    assert clean_text("a <script>b <style>c</style> d") == "a <script>b d"
    assert clean_text("&#99999999999; &#x110000000; &#101;") == "&#99999999999; &#x110000000; e"


# ------------------------------------------------------------------ ids


def test_ids_are_as_long_as_the_service_takes(run):
    from recbole_llm.serving.schemas import MAX_ID_CHARACTERS as SERVED

    assert SERVED == MAX_ID_CHARACTERS == 256
    longest = "é" * 256
    assert run(f"user,item\n{longest},{longest}\n")[1][1] == [longest, longest]
    for text, who in ((f"user,item\nu,i\n{longest}x,i\n", "user"), (f"user,item\nu,i\nu,{longest}x\n", "item")):
        with pytest.raises(ValueError, match=f"line 3: {who} id of more than 256 characters.* .'é{{60}}'"):
            run(text)
        report, _ = run(text, bad_rows="drop")
        assert list(report.interactions.dropped) == [
            f"{who} id of more than 256 characters, which the service does not take"
        ]


def test_item_ids_that_end_like_a_route_are_refused(run, tmp_path):
    assert ITEM_ROUTE_ENDINGS == ("/similar", "/image")
    for ending in ITEM_ROUTE_ENDINGS:
        with pytest.raises(ValueError, match=rf"line 3: item id that ends in /similar or /image.*\('a{ending}'\)"):
            run(f"user,item\nu,i\nu,a{ending}\n")
    assert run("user,item\nu/similar,a/similar/b\n")[1][1] == ["u/similar", "a/similar/b"]
    items = write_csv(tmp_path / "i.csv", ["item", "title"], [["i", "a title"], ["b/similar", "x"]])
    with pytest.raises(ValueError, match="i.csv, line 3: item id that ends in /similar"):
        run("user,item\nu,i\n", items=items)


# ------------------------------------------------------------------ the report


@pytest.mark.parametrize(
    ("name", "content", "options", "read_as"),
    [
        ("a.csv", b"user,item\na,i\n", {}, "format CSV, encoding utf-8, separator ,"),
        (
            "a.csv",
            b"\xef\xbb\xbfuser;item\na;i\n",
            {},
            "format CSV, encoding utf-8 with a byte-order mark, separator ;",
        ),
        ("a.tsv", b"user\titem\na\ti\n", {"quoting": "none"}, "separator tab, quotes plain characters"),
        ("a.csv", "user|item\na|i\n".encode("utf-16"), {"encoding": "utf-16"}, "encoding utf-16, separator |"),
        (
            "a.jsonl",
            b'\xef\xbb\xbf{"user": "a", "item": "i"}\n',
            {},
            "format JSON Lines, encoding utf-8 with a byte-order mark",
        ),
        (
            "a.inter",
            b"\xef\xbb\xbfuser_id:token\titem_id:token\na\ti\n",
            {},
            "byte-order mark, separator tab, quotes plain",
        ),
    ],
)
def test_how_the_file_was_read_is_said(tmp_path, name, content, options, read_as):
    for compress in (False, True):
        report = given(
            tmp_path, *((name + ".gz", gzip.compress(content, mtime=0)) if compress else (name, content)), **options
        )
        assert read(tmp_path / "out")[1:] == [["a", "i"]]
        said = report.interactions.lines()[1].replace(", compressed gzip", "")
        assert said.startswith("  read as: ") and read_as in said


def test_what_is_missing_and_repeated_is_said_in_words(tmp_path):
    orders = [["u1", "i1"], ["u1", "i1"], ["u1", "i1"], ["u2", "i2"], ["u3", "i9"]]
    inter = write_csv(tmp_path / "o.csv", ["user", "item"], orders)
    rows = [
        ["i1", "A title", "words of it"],
        ["i2", "Another title", ""],
        ["i3", "", ""],
        ["i4", "A fourth title", "and words"],
    ]
    items = write_csv(tmp_path / "i.csv", ["item", "title", "description"], rows)
    report = import_dataset(inter, "x", items=items, data_path=tmp_path)
    assert report.interactions.notes == [
        "2 of 5 rows (40%) name a user and an item that another row names too. Of such rows one is kept, the last in the file; "
        "how often an item was taken counts for nothing. --duplicates sum adds their weights up; --duplicates keep writes every "
        "row."
    ]
    assert report.items.empty_texts == {"title": 1, "description": 2}
    said = "\n".join(report.lines())
    assert "empty: title in 1 of 4 rows (25%), description in 2 of 4 rows (50%)" in said
    assert "added 1: of the 3 ids of the interactions 33% have no row here; they get empty cells" in said
    assert "2 ids without text (40%)" in said
    assert (
        json.loads((tmp_path / "x" / "import_report.json").read_text())["items"]["empty_texts"]
        == report.items.empty_texts
    )


def test_a_name_cannot_command_the_terminal(run):
    report, _ = run('user,item,"a\x1b[31m\nb"\nu,i,x\n')
    assert all(line.isprintable() for line in report.lines())


def test_the_next_command_is_quoted_for_a_shell(tmp_path, capsys):
    import argparse
    import shlex

    from recbole_llm.commands.import_ import add_arguments, run_import

    inter = write_csv(tmp_path / "o.csv", ["user", "item"], [["a", "i"]])
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    run_import(parser.parse_args([str(inter), "--dataset", "x", "--data-path", str(tmp_path / "my $data"), "--quiet"]))
    last = capsys.readouterr().out.splitlines()[-1]
    config = tmp_path / "my $data" / "x" / "x.yaml"
    expected = ["recbole-llm", "run", "--dataset", "x", "--config-files", str(config)]
    assert shlex.split(last.removeprefix("next: ")) == shlex.split(config.read_text().splitlines()[1][2:]) == expected


def test_text_columns_with_commas_in_their_names(tmp_path):
    import argparse

    from recbole_llm.commands.import_ import add_arguments, run_import

    inter = write_csv(tmp_path / "o.csv", ["user", "item"], [["a", "i"]])
    items = write_csv(tmp_path / "i.csv", ["item", "title, long", "b", "c"], [["i", "A long title", "bee", "sea"]])
    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = [str(inter), "--items", str(items), "--dataset", "x", "--data-path", str(tmp_path), "--quiet"]
    run_import(parser.parse_args([*arguments, "--text-columns", '"title, long",b', "--text-columns", "c"]))
    report = json.loads((tmp_path / "x" / "import_report.json").read_text())
    assert report["items"]["text_fields"] == ["title_long", "b", "c"]
