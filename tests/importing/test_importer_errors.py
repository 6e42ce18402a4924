"""What is wrong with given files is said; what a killed import leaves behind; the command."""

import gzip
import json
import os
import signal
import subprocess
import sys

import pytest
from made_files import HEADER, ROWS, environment, read, write_csv
from waiting import LIMIT

pytest.importorskip("pyarrow", reason="the extra 'import'")

from recbole_llm.importer import import_dataset

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
    "UTF-16 without a mark": (
        "user,item\na,i\n".encode("utf-16-le"),
        {},
        "not utf-8 but UTF-16-LE: give --encoding utf-16-le",
    ),
    "big-endian UTF-16": ("user,item\na,i\n".encode("utf-16-be"), {}, "give --encoding utf-16-be"),
    "UTF-32": ("user,item\na,i\n".encode("utf-32"), {}, "give --encoding utf-32"),
    "UTF-8 as UTF-16": (b"user,item\na,i\n", {"encoding": "utf-16"}, "given.csv: not utf-16: "),
    "no text encoding": (b"user,item\na,i\n", {"encoding": "base64"}, "encoding 'base64' is unknown"),
    "NUL": (b"us\x00er,item\na,i\n", {}, "NUL bytes"),
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
    "quote as separator": (b"user,item\na,i\n", {"separator": '"'}, "is a quote or ends a line"),
    "two forms of time": (b"user,item\na,i\n", {"time_unit": "s", "time_format": "%Y%m%d"}, "give one of them"),
    "time format": (b"user,item\na,i\n", {"time_format": "%d/%m"}, r"time_format '%d/%m': %Y is missing"),
    "time format, unknown": (b"user,item\na,i\n", {"time_format": "%d/%m/%Q"}, "'%Q' is not known"),
    "time format, twice": (b"user,item\na,i\n", {"time_format": "%d/%d/%m/%Y"}, "occurs twice"),
    "decimal": (b"user,item\na,i\n", {"decimal": ";"}, "decimal must be one of ., ',', and ';' was given"),
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
        ("a.csv.gz", gzip.compress(b"user,item\n" + b"a,i\n" * 9999, mtime=0)[:40], "damaged or cut off"),
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


def test_a_killed_import_leaves_no_dataset_and_the_next_one_clears_up(tmp_path):
    os.mkfifo(tmp_path / "pipe")
    big = tmp_path / "inter.csv"
    big.write_text("user,item\n" + "".join(f"u{n},i{n % 7}\n" for n in range(1000)))
    code = (
        "import sys, time; from recbole_llm import importer; from recbole_llm.importing.rows import RowFile\n"
        "RowFile.finish = lambda *a, **k: (print('writing', flush=True), time.sleep(3600))\n"
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
    process.wait(LIMIT)
    process.stdout.close()
    assert not (tmp_path / "out" / "x").exists()
    import_dataset(big, "x", data_path=tmp_path / "out")
    assert sorted(p.name for p in (tmp_path / "out").iterdir()) == ["x", "y"]


def test_everything_is_on_the_disk_before_it_has_its_name(files, tmp_path, monkeypatch):
    seen, fsync, replace = [], os.fsync, os.replace

    def synced(descriptor):
        seen.append(os.path.basename(os.readlink(f"/proc/self/fd/{descriptor}")))
        fsync(descriptor)

    def named(old, new):
        seen.append(("named", os.path.basename(new)))
        replace(old, new)

    monkeypatch.setattr(os, "fsync", synced)
    monkeypatch.setattr(os, "replace", named)
    import_dataset(files[0], "x", data_path=tmp_path / "out")
    at = seen.index(("named", "x"))
    assert {"x.inter", "x.yaml", "import_report.json"} <= set(seen[:at])
    assert seen[at + 1 :] == ["out"]


def test_the_module_is_light():
    code = "import sys, recbole_llm.importer; print({'numpy', 'pyarrow', 'torch', 'recbole', 'yaml', 'tqdm'} & set(sys.modules))"
    done = subprocess.run([sys.executable, "-c", code], env=environment(), capture_output=True, text=True)
    assert done.stdout.strip() == "set()", done.stderr


def test_the_command(files, tmp_path, capsys, monkeypatch):
    import argparse

    from recbole_llm.commands.import_ import add_arguments, run_import

    parser = argparse.ArgumentParser()
    add_arguments(parser)
    arguments = [str(files[0]), "--items", str(files[1]), "--dataset", "x", "--data-path", str(tmp_path / "out")]
    arguments += ["--text-columns", "title,description", "--separator", ",", "--threshold", "3", "--quiet"]
    assert run_import(parser.parse_args(arguments)) == 0
    printed = capsys.readouterr().out
    assert "inter.csv: 4 rows read, 3 kept, 1 dropped" in printed
    assert "dropped 1: rating below 3" in printed
    assert "text: title, description; 1 ids without text" in printed
    assert f"--config-files {tmp_path / 'out' / 'x' / 'x.yaml'}" in printed
    report = json.loads((tmp_path / "out" / "x" / "import_report.json").read_text())
    assert report["interactions"]["dropped"] == {"rating below 3": 1}
    # a dataset that exists is found before the rows are read
    monkeypatch.setattr(
        "recbole_llm.importing.text_tables.CsvSource.batches", lambda *_, **__: pytest.fail("rows are read")
    )
    with pytest.raises(ValueError, match="exists"):
        run_import(parser.parse_args(arguments))
