"""The id column of items and users: by its name first, unique, and with a note on what it was chosen against."""

import pytest
from made_files import read, write_csv

pytest.importorskip("pyarrow", reason="the extra 'import'")

from recbole_llm.importer import import_dataset
from recbole_llm.importing import keys, limits

# 30 of 300 items were bought; the ids are small numbers, as shelves, stocks and ages are
ORDERS = [[f"u{n % 40}", 1 + n * 7 % 30] for n in range(200)]


def imported(folder, item_header, rows, inter_header=("user_id", "product_id"), kind="items", **options):
    inter = write_csv(folder / "orders.csv", list(inter_header), ORDERS)
    table = write_csv(folder / f"{kind}.csv", item_header, rows)
    report = import_dataset(inter, "x", data_path=folder / "out", overwrite=True, **{kind: table}, **options)
    return getattr(report, kind)


def id_column(report):
    return next(name for name, field in report.columns.items() if field.split(":")[0] in ("item_id", "user_id"))


def test_the_name_of_the_interactions_goes_before_more_hits(tmp_path):
    rows = [[p, f"product number {p}", p % 9 + 1, p % 30 + 1] for p in range(1, 301)]
    report = imported(tmp_path, ["product_id", "name", "shelf", "stock"], rows)
    assert id_column(report) == "product_id"
    assert (report.rows_kept, report.added, report.unseen) == (300, 0, 270)
    assert report.columns["shelf"] == "shelf:float"
    (note,) = report.notes
    assert note.startswith("ids are read from 'product_id', which has the name of the interactions' column; not taken")
    assert "'shelf' (they repeat)" in note and "'stock' (they repeat)" in note
    table = {row[0]: row for row in read(tmp_path / "out", suffix="item")[1:]}
    assert table["7"][1] == "product number 7"


def test_names_are_compared_without_case_and_signs_in_any_script(tmp_path):
    rows = [[p % 9, p, f"text number {p} here"] for p in range(1, 301)]
    assert id_column(imported(tmp_path, ["shelf", "Product-ID", "name"], rows)) == "Product-ID"
    inter = ("用户ID", "商品ID")
    report = imported(tmp_path, ["订单数", "商品ID", "标题"], rows, inter)
    assert id_column(report) == "商品ID"
    assert report.columns["标题"].startswith("标题:")


def test_the_number_of_an_order_is_not_an_item(tmp_path):
    rows = [[n, f"u{n % 5}", f"i{n % 7}"] for n in range(100)]
    for header, user, item in (
        (["订单ID", "用户ID", "商品ID"], "用户ID", "商品ID"),
        (["id", "user_id", "artikelnummer"], "user_id", "artikelnummer"),
        (["номер", "Пользователь ID", "Товар"], "Пользователь ID", "Товар"),
    ):
        report = import_dataset(write_csv(tmp_path / "o.csv", header, rows), "x", data_path=tmp_path, overwrite=True)
        assert report.interactions.columns == {user: "user_id:token", item: "item_id:token"}
    # alone, "id" is the number of a row unless it repeats
    with pytest.raises(ValueError, match="which column holds the items"):
        write_csv(tmp_path / "o.csv", ["user_id", "id"], [[f"u{n}", n] for n in range(9)])
        import_dataset(tmp_path / "o.csv", "x", data_path=tmp_path, overwrite=True)
    write_csv(tmp_path / "o.csv", ["user_id", "id"], [[f"u{n}", n % 3] for n in range(9)])
    report = import_dataset(tmp_path / "o.csv", "x", data_path=tmp_path, overwrite=True)
    assert report.n_items == 3


def test_users_likewise(tmp_path):
    rows = [[n % 6, f"u{n}", "likes long walks"] for n in range(60)]
    report = imported(tmp_path, ["age_group", "user_id", "bio"], rows, kind="users")
    assert id_column(report) == "user_id"
    # the group alone holds ids: no key, whatever it is called
    inter = write_csv(tmp_path / "o.csv", ["user_id", "item_id"], [[n % 6, n] for n in range(50)])
    users = write_csv(tmp_path / "u.csv", ["age_group", "bio"], [[n % 6, f"likes walk number {n}"] for n in range(60)])
    with pytest.raises(ValueError, match="None of 'age_group', 'bio' holds ids of the interactions, each once"):
        import_dataset(inter, "y", users=users, data_path=tmp_path)


def test_without_a_known_name_the_unique_column_with_the_ids_is_taken(tmp_path):
    rows = [[p % 9 + 1, p + 1000, p, f"product number {p}"] for p in range(1, 301)]
    report = imported(tmp_path, ["shelf", "row", "nummer", "text"], rows)
    assert id_column(report) == "nummer"
    assert report.notes[0].startswith("ids are read from 'nummer', which holds 30 of the 30 ids of the interactions")
    # beyond the first rows too: these hold none of the ids
    rows = [[p, f"product number {p}"] for p in range(3000, 0, -1)]
    assert id_column(imported(tmp_path, ["nummer", "text"], rows)) == "nummer"


def test_two_columns_that_fit_equally_are_not_guessed(tmp_path):
    rows = [[p, p + 1, f"product number {p}"] for p in range(0, 301)]
    with pytest.raises(
        ValueError, match=r"Several hold ids of the interactions: 'a' \(30 of them\), 'b' \(30 of them\)"
    ):
        imported(tmp_path, ["a", "b", "text"], rows)
    assert id_column(imported(tmp_path, ["a", "b", "text"], rows, items_id_column="b")) == "b"


def test_a_name_whose_values_are_others_does_not_win(tmp_path):
    """The interactions' product_id is the shop's number; in the catalogue that is called sku."""
    rows = [[f"P-{p}", p, f"product number {p}"] for p in range(1, 301)]
    report = imported(tmp_path, ["product_id", "sku", "name"], rows)
    assert id_column(report) == "sku" and report.added == 0
    # a family of products is no product
    rows = [[p // 10, p, f"product number {p}"] for p in range(1, 301)]
    assert id_column(imported(tmp_path, ["product_id", "sku", "name"], rows)) == "sku"


def test_a_few_repeats_are_kept_and_said_and_many_are_refused(tmp_path):
    rows = [[p, f"product number {p}"] for p in range(1, 301)]
    report = imported(tmp_path, ["product_id", "name"], [*rows, *rows[:3]])
    assert (report.rows_kept, report.dropped) == (300, {"duplicate id (last one kept)": 3})
    assert report.notes[1].startswith(
        "3 of 303 rows (less than 1%) repeat the id of another row. Of each item the last row is kept"
    )
    often = [[1 + n % 30, f"review number {n}"] for n in range(300)]
    with pytest.raises(ValueError, match="300 rows hold only 30 different ones: no key of items"):
        imported(tmp_path, ["product_id", "review"], often)
    assert imported(tmp_path, ["product_id", "review"], often, items_id_column="product_id").rows_kept == 30


def test_the_repeats_may_stand_far_apart(tmp_path, monkeypatch):
    monkeypatch.setattr(limits, "BLOCK_BYTES", 256)
    rows = [[1 + n % 30, f"text {n}"] for n in range(300)]  # in no block does an id repeat
    with pytest.raises(ValueError, match="no key of items"):
        imported(tmp_path, ["product_id", "text"], rows)


def test_no_id_in_common_is_said(tmp_path):
    rows = [[f"P-{p}", f"product number {p}"] for p in range(1, 31)]
    report = imported(tmp_path, ["product_id", "name"], rows)
    assert id_column(report) == "product_id" and report.added == 30


@pytest.mark.parametrize("rows", [[], [["", "a text"]]])
def test_a_table_without_ids_gives_none(tmp_path, rows):
    report = imported(tmp_path, ["product_id", "name"], rows)
    assert (report.rows_kept, report.added) == (0, 30)


def test_columns_without_a_name_are_never_ids(tmp_path):
    rows = [[p - 1, p, f"product number {p}"] for p in range(1, 301)]
    for nameless in ("", "Unnamed: 0", "__index_level_0__"):
        report = imported(tmp_path, [nameless, "nummer", "text"], rows)
        assert id_column(report) == "nummer"
        assert "no name" in report.unused_columns.values()


def test_very_many_columns_are_not_all_compared(tmp_path, monkeypatch):
    monkeypatch.setattr(keys, "MOST_COMPARED", 3)
    names = [f"c{n}" for n in range(50)]
    rows = [[*[p] * 50, p, f"product number {p}"] for p in range(1, 301)]
    assert id_column(imported(tmp_path, [*names, "product_id", "text"], rows)) == "product_id"


def test_a_parquet_index_is_no_column(tmp_path):
    pd = pytest.importorskip("pandas")
    orders = pd.DataFrame({"user_id": [f"u{n % 9}" for n in range(90)], "item_id": [n % 40 + 1 for n in range(90)]})
    orders.sample(frac=1, random_state=0).to_parquet(tmp_path / "o.parquet")
    items = pd.DataFrame({"nummer": range(1, 301), "name": [f"thing {n} in words" for n in range(1, 301)]})
    items = items.sample(frac=1, random_state=1)
    items.to_parquet(tmp_path / "i.parquet")
    report = import_dataset(tmp_path / "o.parquet", "x", items=tmp_path / "i.parquet", data_path=tmp_path)
    assert id_column(report.items) == "nummer"
    index = {"__index_level_0__": "index of a pandas table"}
    assert report.interactions.unused_columns == report.items.unused_columns == index
    assert {row[0]: row[1] for row in read(tmp_path, suffix="item")[1:]}["7"] == "thing 7 in words"
    # an index that has a name is a column; one without is read where it is asked for
    items.set_index("nummer").to_parquet(tmp_path / "i.parquet")
    report = import_dataset(tmp_path / "o.parquet", "y", items=tmp_path / "i.parquet", data_path=tmp_path)
    assert id_column(report.items) == "nummer"
    items.set_index("nummer").rename_axis(None).to_parquet(tmp_path / "i.parquet")
    asked = {"items": tmp_path / "i.parquet", "items_id_column": "__index_level_0__", "data_path": tmp_path}
    assert import_dataset(tmp_path / "o.parquet", "z", **asked).items.added == 0
    # consecutive numbers, which pandas keeps as a range beside the columns
    whole = items.sort_values("nummer").set_index("nummer")
    whole.index = pd.RangeIndex(1, 301, name="nummer")
    whole.to_parquet(tmp_path / "i.parquet")
    with pytest.raises(
        ValueError, match="not usable: nummer .index of pandas that is a range and no column; reset_index"
    ):
        import_dataset(tmp_path / "o.parquet", "r", items=tmp_path / "i.parquet", data_path=tmp_path)
