"""Answers as they are printed: titles whole or cut at their end within the terminal, every column, nothing that commands it."""

import pickle
import sys

import pandas as pd
import pytest

from recbole_llm.answer_frame import AnswerFrame
from recbole_llm.commands.recommend import _table
from recbole_llm.recommend import Row
from recbole_llm.terminal import columns_of, cut, filled

ASKED = "a film about a cat and a witch with a broom"
LONG = "Kolya, or how a musician of no great means came to love a child (1996)"
WIDE = "千と千尋の神隠し"
TITLES = [LONG, WIDE, "Café Müller", "red\x1b[31m"]
SHOWN = [LONG, WIDE, "Café Müller", "red [31m"]
COLUMNS = ["user", "rank", "item", "title", "score", "probability", "cold", "rules"]


@pytest.fixture
def frame():
    rows = [(ASKED, n, f"i{n}", title, 1 / n, None, False, "") for n, title in enumerate(TITLES, 1)]
    return AnswerFrame(rows, columns=COLUMNS).astype({"probability": "float64"})


@pytest.fixture
def terminal(monkeypatch):
    """Make standard output a terminal of so many columns, or with ``None`` a pipe."""

    def made(columns):
        monkeypatch.setattr(sys.stdout, "isatty", lambda: columns is not None, raising=False)
        monkeypatch.setenv("COLUMNS", str(columns or 20))

    return made


@pytest.mark.parametrize(
    ("text", "columns", "shown"),
    [("Fargo", 5, "Fargo"), ("Fargo!", 5, "Farg…"), (WIDE, 16, WIDE), (WIDE, 14, "千と千尋の神…"), (WIDE, 4, "千…")],
)
def test_a_text_is_cut_by_the_columns_it_takes(text, columns, shown):
    assert cut(text, columns) == shown
    assert columns_of(filled(shown, columns)) == columns


def test_in_a_pipe_all_is_whole(frame, terminal):
    terminal(None)
    lines = repr(frame).split("\n")
    assert lines[0].split() == COLUMNS and len(lines) == 1 + len(TITLES)
    for line, title in zip(lines[1:], SHOWN, strict=True):
        assert ASKED in line and f" {title} " in line


@pytest.mark.parametrize("columns", [200, 130, 100, 80])
def test_on_a_terminal_a_line_fits_and_holds_every_column(frame, terminal, columns):
    terminal(columns)
    lines = repr(frame).split("\n")
    assert lines[0].split() == COLUMNS and len(lines) == 1 + len(TITLES)
    assert max(map(columns_of, lines)) <= columns
    if columns == 200:
        assert all(ASKED in line and title in line for line, title in zip(lines[1:], SHOWN, strict=True))
    else:
        start = lines[1][lines[1].index("Kolya") :].split("…")[0]
        assert LONG.startswith(start) and len(start) >= 15  # the words that were asked for are shortened before titles
        assert all(title in line for line, title in zip(lines[2:], SHOWN[1:], strict=True))


def test_on_a_narrow_terminal_lines_are_wrapped(frame, terminal):
    terminal(40)
    lines = repr(frame).split("\n")
    assert max(map(columns_of, lines)) <= 40
    assert [word for line in lines for word in line.split() if word in COLUMNS] == COLUMNS
    assert "…" in lines[1] and "i1" in lines[1]


def test_a_long_frame_leaves_rows_out_and_no_column(frame, terminal):
    terminal(100)
    many = AnswerFrame(pd.concat([frame] * 500, ignore_index=True))
    text = repr(many)
    assert text.split("\n")[0].split() == COLUMNS
    assert text.endswith("[2000 rows x 8 columns]") and text.count("\n") < 20


def test_it_is_a_data_frame(frame, terminal):
    terminal(60)
    before = frame.copy()
    repr(frame)
    pd.testing.assert_frame_equal(frame, before)
    assert type(frame.head(2)) is AnswerFrame and type(pickle.loads(pickle.dumps(frame))) is AnswerFrame
    assert repr(frame[["rank", "score"]]) == repr(pd.DataFrame(frame)[["rank", "score"]])
    assert repr(frame.iloc[:0]) == repr(pd.DataFrame(frame).iloc[:0])
    assert LONG in frame._repr_html_()


@pytest.mark.parametrize("columns", [None, 120, 60])
def test_the_commands_table_keeps_its_columns_in_line(terminal, columns):
    terminal(columns)
    rows = [Row(ASKED, n, f"i{n}", title, 1 / n, 0.5, n == 2) for n, title in enumerate(TITLES, 1)]
    lines = _table(rows)
    at = columns_of(lines[0].split("id")[0])
    assert [columns_of(line.rsplit(f"i{n}", 1)[0]) for n, line in enumerate(lines[1:], 1)] == [at] * len(rows)
    assert columns is None or max(map(columns_of, lines)) <= columns
    assert (LONG in lines[1]) == (columns != 60) and WIDE in lines[2] and "\x1b" not in lines[4]
