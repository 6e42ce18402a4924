"""Labels, ratings and times as people write them: understood, or refused with the row, the value and the way out."""

import pytest
from made_files import read, write_csv

pa = pytest.importorskip("pyarrow", reason="the extra 'import'")

import numpy as np  # noqa: E402

from recbole_llm.importer import import_dataset  # noqa: E402
from recbole_llm.importing.dates import DateFormat  # noqa: E402
from recbole_llm.importing.numbers import LabelReader, NumberReader  # noqa: E402
from recbole_llm.importing.times import TimeReader  # noqa: E402


def texts(*cells):
    return pa.array(cells, pa.string())


# ------------------------------------------------------------------ labels


@pytest.mark.parametrize("yes, no", [("1", "0"), ("1.0", "0.0"), ("true", "False"), ("YES", "no"), ("y", "n"), ("t", "f"),
                                     ("1", "-1"), ("+1", "-1"), ("1,0", "0,0")])  # fmt: skip
def test_words_for_yes_and_no(run, yes, no):
    text = f"user;item;label\na;i;{yes}\na;j;{no}\nb;i;{yes}\nb;k;{no}\n"
    report, rows = run(text)
    assert rows[1:] == [["a", "i"], ["b", "i"]]
    assert report.interactions.dropped == {"label 0": 2}
    assert (yes == "1" and no == "0") == (not any("labels of 'label'" in note for note in report.notes)) or yes == "1.0"
    assert [row[2] for row in run(text, keep_negatives=True)[1][1:]] == ["1", "0", "1", "0"]


@pytest.mark.parametrize("odd", ["2", "maybe", "10", "-2", "nan1", "0.5"])
@pytest.mark.parametrize("line", [3, 1500])
def test_one_odd_label_is_an_error_that_names_it(run, odd, line):
    rows = [f"u{n},i{n},{n % 2}" for n in range(2000)]
    rows[line - 2] = f"u,i,{odd}"
    with pytest.raises(
        ValueError, match=f"line {line}: label is neither 0 nor 1 .'{odd}'.*--label-column ''.*--bad-rows"
    ):
        run("user,item,label\n" + "\n".join(rows) + "\n")
    report, kept = run("user,item,label\n" + "\n".join(rows) + "\n", bad_rows="drop")
    assert report.interactions.dropped["label is neither 0 nor 1"] == 1
    assert len(kept) - 1 + report.interactions.dropped["label 0"] == 1999
    assert len(run("user,item,label\n" + "\n".join(rows) + "\n", label_column="")[1]) == 2001


def test_a_label_column_of_something_else_is_an_error(run):
    with pytest.raises(ValueError, match="line 2: the column 'target' has the name of a label, and 'a@b.c' is none"):
        run("user,item,target\na,i,a@b.c\nb,i,d@e.f\n")
    assert len(run("user,item,target\na,i,a@b.c\nb,i,d@e.f\n", label_column="")[1]) == 3
    # an empty one is none
    report, _ = run("user,item,label\na,i,\nb,i,NA\n")
    assert report.interactions.unused_columns == {"label": "not an interaction's field"}


def test_minus_one_and_zero_do_not_both_mean_no(run):
    with pytest.raises(ValueError, match="line 4: label is neither 0 nor 1 .'-1'"):
        run("user,item,label\na,i,1\nb,i,0\nc,i,-1\n")
    reader = LabelReader()
    assert reader.read(texts("1", "-1", "yes", None)).tolist() == [1, 0, 1, -1]
    assert reader.read(texts("0", "1", "-1", "no")).tolist() == [-1, 1, 0, 0]
    assert reader.describe() == "'-1' is 0, 'no' is 0, 'yes' is 1"


# ------------------------------------------------------------------ numbers


@pytest.mark.parametrize(
    ("cells", "decimal", "values"),
    [
        (["4,5", "3", "0,25"], ",", [4.5, 3, 0.25]),
        (["4", "3", "4,5"], ",", [4, 3, 4.5]),
        (["4.5", "3"], ".", [4.5, 3]),
        (["4.5", "4,5"], ".", [4.5, None]),
        (["4,5", "4.5"], ",", [4.5, None]),
        (["1.299,00", "12,5"], ",", [1299, 12.5]),
        (["1,299.00", "12.5"], ".", [1299, 12.5]),
        (["1,000", "2,000"], None, [None, None]),  # a thousand, or one
        (["1,000", "2,5"], ",", [1, 2.5]),
        (["1", "2"], None, [1, 2]),
        (["1,2,3", "4"], None, [None, 4]),
        ([",5", "1,"], ",", [None, None]),
    ],
)
def test_the_decimal_sign_is_found_or_left_open(cells, decimal, values):
    reader = NumberReader()
    found = reader.read(texts(*cells))
    assert [None if np.isnan(v) else v for v in found.tolist()] == values
    assert reader.decimal == decimal


def test_the_decimal_sign_holds_for_the_whole_column():
    reader = NumberReader()
    assert reader.read(texts("5", "4")).tolist() == [5, 4]
    assert reader.read(texts("4,5", "4")).tolist() == [4.5, 4]
    assert np.isnan(reader.read(texts("4.5"))).all()
    told = NumberReader(".")
    assert np.isnan(told.read(texts("4,5"))).all()
    assert NumberReader(",").read(texts("1,000")).tolist() == [1.0]


def test_ratings_with_a_decimal_comma(run):
    text = "user;item;rating\na;i;4,5\nb;i;3\nc;i;2,25\n"
    report, rows = run(text, threshold=2.5)
    assert rows[1:] == [["a", "i", "4.5"], ["b", "i", "3"]]
    assert report.interactions.read_as == {
        "format": "CSV", "encoding": "utf-8", "separator": ";", "decimal sign": ","
    }  # fmt: skip
    assert any("decimal sign ," in line for line in report.lines())
    with pytest.raises(ValueError, match="line 2: the column 'rating' has the name of a rating, and '4,5' is none"):
        run(text, decimal=".")
    with pytest.raises(ValueError, match=r"line 2, 4: rating is not a number \('4,5'\). --decimal , reads"):
        run(text, decimal=".", rating_column="rating")
    with pytest.raises(ValueError, match="'1,000' is none: expected is a number .--decimal says"):
        run('user,item,rating\na,i,"1,000"\nb,i,"2,000"\n')
    assert run('user,item,rating\na,i,"1,000"\nb,i,"2,000"\n', decimal=",")[1][1:] == [["a", "i", "1"], ["b", "i", "2"]]


def test_prices_of_items_with_a_decimal_comma(tmp_path):
    inter = write_csv(tmp_path / "o.csv", ["user", "item"], [["a", "i1"], ["b", "i2"]], delimiter=";")
    rows = [["i1", "A good title", "9,90", "000505", "1.299,00"], ["i2", "Another title", "12", "007", "3,5"]]
    items = write_csv(tmp_path / "i.csv", ["item", "title", "price", "sku", "list"], rows, delimiter=";")
    report = import_dataset(inter, "x", items=items, data_path=tmp_path)
    assert read(tmp_path, suffix="item")[0][2:] == ["price:float", "sku:token", "list:float"]
    assert [row[2:] for row in read(tmp_path, suffix="item")[1:]] == [["9.9", "000505", "1299"], ["12", "007", "3.5"]]
    assert report.items.read_as["decimal sign"] == ","
    # between commas "9,90" may be a list of two codes: only where it is told
    items = write_csv(tmp_path / "i2.csv", ["item", "title", "price", "sku", "list"], rows)
    import_dataset(inter, "y", items=items, data_path=tmp_path)
    assert read(tmp_path, "y", "item")[0][2] == "price:token"
    import_dataset(inter, "z", items=items, data_path=tmp_path, decimal=",")
    assert [row[2] for row in read(tmp_path, "z", "item")] == ["price:float", "9.9", "12"]


def test_numbers_of_json_and_parquet_have_a_point_whatever_is_told(tmp_path):
    import pyarrow.parquet as pq

    rows = [{"user": "a", "item": "i", "rating": 4.125}, {"user": "b", "item": "i", "rating": 3}]
    (tmp_path / "a.jsonl").write_text("\n".join(str(row).replace("'", '"') for row in rows))
    pq.write_table(
        pa.Table.from_pylist([{**row, "rating": float(row["rating"])} for row in rows]), tmp_path / "a.parquet"
    )
    for name in ("a.jsonl", "a.parquet"):
        import_dataset(tmp_path / name, "x", data_path=tmp_path, decimal=",", overwrite=True)
        assert [row[2] for row in read(tmp_path)[1:]] == ["4.125", "3"]


# ------------------------------------------------------------------ times

MAY_31 = 1717113600  # 2024-05-31, midnight UTC


@pytest.mark.parametrize(
    ("form", "cell", "seconds"),
    [
        ("%d/%m/%Y %H:%M", "31/05/2024 12:30", MAY_31 + 45000),
        ("%m/%d/%Y", "05/31/2024", MAY_31),
        ("%d.%m.%y", "31.05.24", MAY_31),
        ("%d.%m.%y", "31.05.69", -18576000),  # 1969, as POSIX has it
        ("%d.%m.%y", "31.05.68", 3105648000),
        ("%d %b %Y", "31 May 2024", MAY_31),
        ("%B %d, %Y %I:%M %p", "May 31, 2024 01:05 PM", MAY_31 + 13 * 3600 + 300),
        ("%m %d, %Y", "05 31, 2024", MAY_31),
        ("%Y%m%dT%H%M%S.%f", "20240531T000001.25", MAY_31 + 1.25),
        ("%a %d %b %Y %T %z", "Fri 31 May 2024 02:00:00 +0200", MAY_31),
        ("%F %T%z", "2024-05-31 00:00:00Z", MAY_31),
        ("(%d)+%m.*%Y", "(31)+05.*2024", MAY_31),  # no regular expression
    ],
)
def test_a_format_is_read(form, cell, seconds):
    found, _ = DateFormat.of(form).seconds(texts(cell, None, cell + "x"))
    assert found[0] == pytest.approx(seconds) and np.isnan(found[1:]).all()


@pytest.mark.parametrize(
    "cell", ["31/02/2024", "00/05/2024", "31/13/2024", "1/1/0000", "31/05/2024 24:00", "31/05/2024 1:60"]
)
def test_a_date_that_is_none_is_not_another_one(cell):
    form = "%d/%m/%Y" + (" %H:%M" if " " in cell else "")
    assert np.isnan(DateFormat.of(form).seconds(texts(cell))[0]).all()
    assert np.isnan(DateFormat.of(form).seconds(texts(cell.split()[0] + " 12:00"))[0]).all() or " " in cell


def test_datetime_reads_the_same():
    import datetime as dt

    rng = np.random.default_rng(0)
    form = "%d.%m.%Y %H:%M:%S"
    days = [dt.datetime(1900, 1, 1) + dt.timedelta(seconds=int(s)) for s in rng.integers(0, 6_300_000_000, 500)]
    cells = [day.strftime(form) for day in days]
    expected = [day.replace(tzinfo=dt.timezone.utc).timestamp() for day in days]
    np.testing.assert_array_equal(DateFormat.of(form).seconds(texts(*cells))[0], expected)


@pytest.mark.parametrize(
    ("cells", "shown", "kept"),
    [
        (["05/06/2024", "31/05/2024 12:00", "1/2/2024"], "day/month/year", ["1717545600", "1717156800", "1706745600"]),
        (["05/06/2024", "05/31/2024 12:00", "1/2/2024"], "month/day/year", ["1714953600", "1717156800", "1704153600"]),
        (["05.06.2024", "31.05.2024 0:00:01"], "day/month/year", ["1717545600", "1717113601"]),
        (["5-6-2024", "31-5-2024 1:00 PM"], "day/month/year", ["1717545600", "1717160400"]),
    ],
)
def test_a_row_tells_the_day_from_the_month(run, cells, shown, kept):
    report, rows = run("user,item,date\n" + "".join(f"u{n},i,{cell}\n" for n, cell in enumerate(cells)), order="file")
    assert [row[2] for row in rows[1:]] == kept
    assert report.interactions.read_as["times"] == f"date of the form {shown}"
    assert any(f"line 3 ({cells[1]!r}) tells the day from the month" in note for note in report.notes)
    assert any("name no zone" in note for note in report.notes)


def test_the_telling_row_may_stand_behind_the_first_ones(run, monkeypatch):
    from recbole_llm.importing import limits

    monkeypatch.setattr(limits, "BLOCK_BYTES", 64)
    cells = ["05/06/2024"] * 50 + ["13/06/2024"]
    report, rows = run(
        "user,item,when\n" + "".join(f"u{n},i,{cell}\n" for n, cell in enumerate(cells)), time_column="when"
    )
    assert rows[1][2] == "1717545600"
    assert any("line 52 ('13/06/2024')" in note for note in report.notes)


def test_dates_that_may_be_either_are_refused(run):
    text = "user,item,date\na,i,05/06/2024\nb,i,07/06/2024 12:00\n"
    with pytest.raises(
        ValueError, match="may begin with the day or with the month, and no row tells which. Give --time-format"
    ):
        run(text)
    assert run(text.replace(" 12:00", ""), time_format="%d/%m/%Y")[1][1][2] == "1717545600"
    assert run(text.replace(" 12:00", ""), time_format="%m/%d/%Y")[1][1][2] == "1714953600"
    assert len(run(text, time_column="")[1]) == 3


def test_a_row_of_the_other_order_is_refused(run):
    text = "user,item,date\na,i,31/05/2024\nb,i,05/31/2024\n"
    with pytest.raises(ValueError, match=r"line 3: time is no date of the form day/month/year \('05/31/2024'\)"):
        run(text)
    assert run(text, bad_rows="drop")[0].interactions.rows_kept == 1


@pytest.mark.parametrize(
    ("cell", "seconds"),
    [
        ("2024/05/31", MAY_31), ("2024.5.31 9:05", MAY_31 + 32700), ("2024-5-31", MAY_31), ("2024/05/31 12:00 AM", MAY_31),
        ("20240531", MAY_31), ("20240531093000", MAY_31 + 34200),
    ],
)  # fmt: skip
def test_dates_with_the_year_first(cell, seconds):
    reader = TimeReader.detect(texts(cell, cell))
    assert reader.seconds(texts(cell, None)).tolist()[0] == seconds
    assert reader.without_zone == 1


def test_a_count_is_not_taken_for_a_date():
    assert TimeReader.detect(texts("20240531", "20241399")).unit == "s"
    assert TimeReader.detect(texts("1700000000")).unit == "s"


def test_a_time_column_of_something_else_is_an_error(run):
    with pytest.raises(
        ValueError, match="line 2: the column 'date' has the name of a time, and '31.05.24' is none.*--time-format"
    ):
        run("user,item,date\na,i,31.05.24\n")
    assert run("user,item,date\na,i,31.05.24\n", time_format="%d.%m.%y")[1][1][2] == str(MAY_31)


def test_the_report_says_between_which_days_the_times_lie(run):
    report, _ = run("user,item,timestamp\na,i,1\nb,i,86401\n")
    assert "times lie between 1970-01-01 and 1970-01-02." in report.interactions.notes
