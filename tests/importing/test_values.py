"""Cells: texts, times, numbers, ids."""

import numpy as np
import pytest

pa = pytest.importorskip("pyarrow", reason="the extra 'import'")

from recbole_llm.importing.ids import ID_PROBLEMS, MISSING, MISSING_WORD, UNUSABLE, IdColumn, look_alikes  # noqa: E402
from recbole_llm.importing.numbers import LabelReader, cast_or_null, number_strings, numbers  # noqa: E402
from recbole_llm.importing.parquet import as_strings  # noqa: E402
from recbole_llm.importing.times import TimeReader  # noqa: E402
from recbole_llm.importing.values import NA_STRINGS, clean_text, protected, trimmed  # noqa: E402


@pytest.mark.parametrize(
    ("text", "clean"),
    [
        ("  two \t spaces\r\nand a line  ", "two spaces and a line"),
        ("<p>Bold <b>word</b>s</p><br/>next", "Bold words next"),
        ('<a href="x.html">link</a> &amp; &eacute;&#233;&#xe9;', "link & ééé"),
        ("&lt;br&gt;twice &amp;eacute;scaped", "twice éscaped"),
        ("<script>alert('x < y')</script>kept<!-- not this -->", "kept"),
        ("x <y and z> 2, a < b > c", "x <y and z> 2, a < b > c"),
        ("5 &lt; 6 AT&T R&D &nothing;", "5 < 6 AT&T R&D &nothing;"),
        ("e\u0301 \u212b", "é Å"),
        ("nul\x00 bell\x07 bom\ufeff nbsp\u00a0line\u2028sep\x85end", "nul bell bom nbsp line sep end"),
        ("", ""),
        ('"quoted" NA', '"quoted" NA'),
    ],
)
def test_clean_text(text, clean):
    assert clean_text(text) == clean


def test_html_can_be_kept():
    assert clean_text(" <b>x</b> &amp;\n", keep_html=True) == "<b>x</b> &amp;"


def test_words_for_missing_values_are_those_of_pandas():
    from pandas._libs.parsers import STR_NA_VALUES

    assert NA_STRINGS | {""} == STR_NA_VALUES


def test_protected_cells_are_read_by_pandas_as_the_text():
    import io

    import pandas as pd

    cells = ['"open', '"both"', "NA", "null", "plain", 'mid "quote"', '""']
    text = "t:token_seq\tn\n" + "".join(f"{protected(cell)}\t1\n" for cell in cells)
    read = pd.read_csv(io.StringIO(text), sep="\t", engine="python", dtype=str)["t:token_seq"]
    assert [cell.strip() for cell in read] == cells


def test_ids_are_kept_unless_an_atomic_file_loses_them():
    good = ["1", "01", "1.0", " a", "a b", "é", "e\u0301", "it's", 'a"b', "#1", "a:b", "Na"]
    bad = {
        "": MISSING,
        "  ": MISSING,
        "NA": MISSING_WORD,
        "null": MISSING_WORD,
        '"x': UNUSABLE,
        "a\tb": UNUSABLE,
        "a\nb": UNUSABLE,
        "a\rb": UNUSABLE,
        "\x00": UNUSABLE,
        "a\x85": UNUSABLE,
        "a\u2028b": UNUSABLE,
        "[PAD]": UNUSABLE,
    }
    column = IdColumn()
    problems, encoded = column.problems(pa.array([*good, *bad, None]))
    assert problems.tolist() == [0] * len(good) + [*bad.values(), MISSING]
    column.append(encoded, problems == 0)
    codes = column.finish()
    assert [column.ids[int(code)].as_py() for code in codes] == good
    assert all(code in ID_PROBLEMS for code in bad.values())
    assert look_alikes(column.ids.take(pa.array(codes))) == [("é", "e\u0301")]


def test_codes_are_the_same_across_batches():
    column = IdColumn()
    for batch in (["b", "a"], ["a", "c", "b"], ["c"]):
        column.append(column.problems(pa.array(batch))[1], np.ones(len(batch), dtype=bool))
    codes = column.finish()
    assert column.ids.take(pa.array(codes)).to_pylist() == ["b", "a", "a", "c", "b", "c"]
    assert len(column.ids) == 3


def test_look_alikes_name_the_ids():
    ids = pa.array(["x", " x", "y ", " y", "z"])
    assert look_alikes(ids) == [("x", " x"), ("y ", " y")]


@pytest.mark.parametrize(
    ("cells", "unit", "seconds"),
    [
        (["881250949", "0", "1700000000.25"], "s", [881250949, 0, 1700000000.25]),
        (["1700000000123", "1700000000000"], "ms", [1700000000.123, 1700000000]),
        (["1700000000123456"], "us", [1700000000.123456]),
        (["1700000000123456789"], "ns", [1700000000.1234567]),
        (["2020-01-01", "2020-01-01T00:00:01", "2020-01-01 00:01"], "iso", [1577836800, 1577836801, 1577836860]),
        (["2020-01-01T00:00:00.5Z", "2020-01-01 02:00:00+02:00"], "iso", [1577836800.5, 1577836800]),
        (["2019-12-31T19:00:00-0500", "2020-01-01 00:00:00 UTC"], "iso", [1577836800, 1577836800]),
        (["2020-01-01T00:00:00.123456789Z"], "iso", [1577836800.123456]),
        (["1969-12-31T23:59:59Z", "0001-01-01"], "iso", [-1, -62135596800]),
    ],
)
def test_times_are_seconds(cells, unit, seconds):
    reader = TimeReader.detect(pa.array(cells))
    assert reader.unit == unit
    np.testing.assert_allclose(reader.seconds(pa.array(cells)), seconds, rtol=1e-16, atol=0)


def test_a_time_of_another_unit_is_not_taken():
    reader = TimeReader.detect(pa.array(["1700000000"] * 3))
    assert np.isnan(reader.seconds(pa.array(["1700000000000", "x", None, "2020-01-01"]))).all()
    fixed = TimeReader.detect(pa.array(["5"]), unit="ms")
    assert fixed.seconds(pa.array(["5"])).tolist() == [0.005]


def test_dates_without_a_zone_are_counted():
    reader = TimeReader("iso")
    seconds = reader.seconds(pa.array(["2020-01-01", "2020-01-01T00:00:00Z", "2020-02-30", None]))
    assert np.isfinite(seconds).tolist() == [True, True, False, False]
    assert reader.without_zone == 1


def test_words_are_no_times():
    assert TimeReader.detect(pa.array(["soon", "later", "2020-01-01"])) is None
    assert TimeReader.detect(pa.array([], pa.string())) is None


def test_numbers_and_labels():
    cells = trimmed(pa.array([" 3.5 ", "1e3", "NaN", "inf", "x", "", None, "1,5"]))
    assert np.nan_to_num(numbers(cells), nan=-1).tolist() == [3.5, 1000, -1, -1, -1, -1, -1, -1]
    assert LabelReader().read(trimmed(pa.array(["0", "1.0", "True", "false", "2", None, ""]))).tolist() == [
        0,
        1,
        1,
        0,
        -1,
        -1,
        -1,
    ]


def test_cast_or_null_finds_each_bad_cell():
    assert cast_or_null(pa.array(["1", "x", "3", "y", "5"]), pa.float64()).to_pylist() == [1, None, 3, None, 5]


def test_number_strings_read_back_the_same():
    values = np.array([0.0, 1577836800, 1700000000.123, -1.5, 1e18, 0.1 + 0.2, np.nan])
    texts = number_strings(values).to_pylist()
    assert texts[:3] == ["0", "1577836800", "1700000000.123"]
    assert texts[-1] is None
    assert [float(text) for text in texts[:-1]] == values[:-1].tolist()


@pytest.mark.parametrize(
    "values",
    [
        [1.0, 2.0, -0.0, 2.0**52],
        [1.0, None, float("nan"), 3.0],
        [1.5, 2.0, None, 2.0**53, -1e300, float("inf")],
        [None, float("nan")],
        [],
    ],
)
@pytest.mark.parametrize("kind", [pa.float32(), pa.float64()])
def test_floats_become_whole_numbers_where_they_are_and_nan_nothing(values, kind):
    array = pa.array(values, kind)
    kept = [None if v is None or v != v else v for v in array.to_pylist()]
    whole = [v is not None and abs(v) < 2.0**53 and v == int(v) for v in kept]
    read = kind.to_pandas_dtype()  # the shortest digits that tell a float32 from the others
    strings = as_strings(array).to_pylist()
    assert [s if w else s and read(s) for s, w in zip(strings, whole, strict=True)] == [
        str(int(v)) if w else v for v, w in zip(kept, whole, strict=True)
    ]
