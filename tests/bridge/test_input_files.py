"""Configurations and atomic files with a fault: read right, or a ValueError that names the file."""

import logging

import pytest

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.config import Config
from recbole.data import create_dataset

from recbole_llm import cli
from recbole_llm.bridge.repairs.input_files import count_cells

HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
ROWS = [f"u{n % 5}\ti{n * 7 % 11}\t{1 + n % 5}\t{n}" for n in range(40)]


def dataset(folder, content, item=None, **more):
    target = folder / "m"
    target.mkdir(exist_ok=True)
    (target / "m.inter").write_bytes(content if isinstance(content, bytes) else content.encode())
    if item is not None:
        (target / "m.item").write_text(item, encoding="utf-8")
    load = {"inter": ["user_id", "item_id", "rating", "timestamp"]} | ({} if item is None else {"item": "*"})
    settings = {"data_path": str(folder), "gpu_id": "", "show_progress": False, "load_col": load} | more
    return create_dataset(Config("BPR", "m", config_dict=settings))


def text(*rows, header=HEADER):
    return "\n".join([header, *rows]) + "\n"


def ids_and_numbers(data):
    frame = data.inter_feat
    fields = ("user_id", "item_id")
    tokens = [data.field2id_token[field][frame[field]].tolist() for field in fields]
    return [*zip(*tokens, frame["rating"].tolist(), strict=True)]


@pytest.mark.parametrize("form", ["mark", "crlf", "mark and crlf", "utf-16"])
def test_the_same_rows_with_a_byte_order_mark_or_other_line_ends(tmp_path, form):
    plain = text(*ROWS)
    content, more = plain, {}
    if "crlf" in form:
        content = content.replace("\n", "\r\n")
    content = content.encode("utf-16") if form == "utf-16" else content.encode()
    if "mark" in form:
        content = b"\xef\xbb\xbf" + content
    if form == "utf-16":
        more["encoding"] = "utf-16"
    (tmp_path / "plain").mkdir()
    data = dataset(tmp_path, content, **more)
    assert ids_and_numbers(data) == ids_and_numbers(dataset(tmp_path / "plain", plain))
    assert data.config["encoding"] == more.get("encoding")


@pytest.mark.parametrize(
    ("content", "message"),
    [
        ("\n", "m.inter is empty: its first line must hold name:type"),
        (text(*ROWS, header="user_id\titem_id"), "m.inter: the header cell 'user_id' is not name:type"),
        (text(*ROWS, header=HEADER.replace("float", "flt")), "'rating:flt' is not name:type"),
        (text(*ROWS, header=HEADER.replace("\t", ",")), "Columns are split at field_separator, which is '\\\\t'"),
        (text(*ROWS[:3], ROWS[3] + "\ta\tb"), "m.inter, line 5: 6 cells where the header has 4"),
        (text(*ROWS[:3], "", "", ROWS[3] + "\ta"), "m.inter, line 7: 5 cells"),
        (text(*ROWS[:3], "u1\ti2\tinf\t5"), "m.inter, row 4: the column 'rating' holds an infinite number"),
        (text(*ROWS[:3], "u1\ti2\t1\t1e400"), "row 4: the column 'timestamp' holds an infinite number"),
        (text(*ROWS[:3], "u1\ti2\tgood\t5"), "m.inter, line 5: 'good' in the column 'rating' is no number"),
        (text(*ROWS[:3], 'u1\t"i2\t4\t5'), "m.inter cannot be read: .* double quote at the start of a cell"),
        (text(*ROWS).encode("utf-16"), "m.inter cannot be read as utf-8: .* It is UTF-16: set encoding to utf-16"),
        (text("u1\ti2\t3\t4").encode("utf-16-le"), "begins with zero bytes, as UTF-16 does"),
        (text("ü1\ti2\t3\t4").encode("latin-1"), "m.inter cannot be read as utf-8: .*codec can't decode"),
    ],
)
def test_what_is_wrong_with_an_atomic_file_is_said_with_its_name(tmp_path, content, message):
    with pytest.raises(ValueError, match=message):
        dataset(tmp_path, content)


def test_cells_that_are_missing_are_counted_and_said(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    data = dataset(tmp_path, text(*ROWS[:3], "u9\ti2", *ROWS[4:]))
    assert len(data.inter_feat) == 40
    said = [record.getMessage() for record in caplog.records]
    assert any("1 lines have fewer cells than the header (the first is line 5)" in line for line in said)
    assert any("1 values of 'rating' are missing (the first in row 4)" in line for line in said)


def test_lines_that_quotes_join_are_counted_and_said(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    item = "item_id:token\ttitle:token_seq\n" + "".join(f"i{n}\tword\n" for n in range(9)) + 'i9\t"two\ni10\tlines"\n'
    data = dataset(tmp_path, text(*ROWS), item)
    assert data.item_num == 11  # with the padding: i10 has no row of its own
    assert any("11 lines became 10 rows" in record.getMessage() for record in caplog.records)


def test_a_good_file_is_read_without_a_word(tmp_path, caplog):
    caplog.set_level(logging.WARNING)
    dataset(tmp_path, text(*ROWS), "item_id:token\tprice:float\n" + "".join(f"i{n}\t\n" for n in range(11)))
    assert not [r for r in caplog.records if "m.inter" in r.getMessage() or "m.item" in r.getMessage()]


def test_cells_are_counted_across_blocks(tmp_path, monkeypatch):
    monkeypatch.setattr("recbole_llm.bridge.repairs.input_files._BLOCK", 7)
    (tmp_path / "a").write_bytes(b"h\th\n1\t2\n\n\r\n3\n4\t5\t6\n7\t8\r\n9")
    found = count_cells(tmp_path / "a", "\t", 2)
    assert (found.count, found.short, found.first_short, found.first_long, found.long_cells) == (5, 2, 5, 6, 3)
    assert not found.quoted
    (tmp_path / "a").write_bytes(b'h\th\n1\t2\n1\t"2\n')
    assert count_cells(tmp_path / "a", "\t", 2).quoted


@pytest.mark.parametrize(
    ("content", "message"),
    [
        (b"- a\n- b\n", "holds no keys"),
        (b"just words\n", "holds no keys"),
        (b"epochs: [1\n", "is no YAML of plain values"),
        (b"note: !!python/object/apply:os.system [x]\n", "YAML of plain values"),
        ("epochs: 5\n".encode("utf-16"), "is UTF-16, and UTF-8 is expected"),
        ("note: ü\n".encode("latin-1"), "line 1: byte 0xfc is not UTF-8"),
    ],
)
def test_what_is_wrong_with_a_configuration_is_said_with_its_name(tmp_path, capsys, content, message):
    (tmp_path / "my settings.yaml").write_bytes(content)
    assert cli.main(["run", "--config_files", str(tmp_path / "my settings.yaml"), "--epochs=1"]) == 2
    said = capsys.readouterr().err.splitlines()
    assert len(said) == 2 and message in said[0]


@pytest.mark.parametrize("content", [b"", b"# nothing\n", b"\xef\xbb\xbfepochs: 7\n"])
def test_an_empty_configuration_sets_nothing_and_a_mark_is_dropped(tmp_path, content):
    (tmp_path / "a.yaml").write_bytes(content)
    (tmp_path / "b.yaml").write_text("learning_rate: 0.5\n")
    config = Config("BPR", "ml-100k", config_file_list=[str(tmp_path / "a.yaml"), str(tmp_path / "b.yaml")])
    assert config["learning_rate"] == 0.5
    assert config["epochs"] == (7 if b"epochs" in content else 300)
