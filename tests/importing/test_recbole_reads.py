"""What the importer writes is what RecBole and our own reader read, without further configuration."""

import csv

import pytest

pytest.importorskip("pyarrow", reason="the extra 'import'")

from recbole_llm.content.text import choose_text_fields, read_atomic_table
from recbole_llm.importer import import_dataset

# as given, and as they are to be read
TITLES = {
    '"All quoted"': '"All quoted"',
    '"Opens': '"Opens',
    'a "middle" one': 'a "middle" one',
    "NA": "NA",
    "null": "null",
    'ends 5"': 'ends 5"',
    "tab\there": "tab here",
    "two\nlines": "two lines",
    "e\u0301 accent": "é accent",
    "'": "'",
    "": "",
    "#1, 2 | 3": "#1, 2 | 3",
}
USERS = ["u 1", "01", "1", "1.0", "é", "it's", 'a"b', "-", "#", "x:y", " lead", "trail "]


@pytest.fixture
def imported(tmp_path):
    """A dataset of awkward ids, texts and times: 12 users, 12 items, all but one item per user, 2.5 seconds apart."""
    pairs = [(u, f"i{n}") for k, u in enumerate(USERS) for n in range(len(TITLES)) if n != k]
    with (tmp_path / "inter.csv").open("w", newline="", encoding="utf-8") as file:
        rows = [(u, i, 1_700_000_000_000 + 2500 * (n * 61 % 132)) for n, (u, i) in enumerate(pairs)]
        csv.writer(file).writerows([["user", "item", "time"], *rows])
    with (tmp_path / "items.csv").open("w", newline="", encoding="utf-8") as file:
        items = [(f"i{n}", title, n % 5 or "") for n, title in enumerate(TITLES)]
        csv.writer(file).writerows([["item", "title", "price"], *items])
    report = import_dataset(
        tmp_path / "inter.csv", "x", items=tmp_path / "items.csv", data_path=tmp_path, text_columns=["title"]
    )
    return tmp_path, report, sorted(rows, key=lambda row: row[2])


def recbole_dataset(folder, monkeypatch, model="BPR", **settings):
    monkeypatch.chdir(folder)
    from recbole.config import Config
    from recbole.data import create_dataset

    files, settings = [str(folder / "x" / "x.yaml")], {"gpu_id": "", "state": "ERROR", **settings}
    config = Config(model, "x", config_file_list=files, config_dict=settings)
    return config, create_dataset(config)


def test_recbole_reads_every_interaction(imported, monkeypatch):
    folder, report, rows = imported
    _, dataset = recbole_dataset(folder, monkeypatch)
    users, items = (dataset.field2id_token[field] for field in ("user_id", "item_id"))
    found = list(zip(users[dataset.inter_feat["user_id"]], items[dataset.inter_feat["item_id"]], strict=True))
    assert found == [(user, item) for user, item, _ in rows]
    assert dataset.inter_num == report.interactions.rows_kept == len(USERS) * (len(TITLES) - 1)


def test_a_split_by_time_is_exact_though_recbole_holds_float32(imported, monkeypatch):
    folder, _, rows = imported
    from recbole.data import data_preparation

    settings = {"eval_args": {"split": {"RS": [0.5, 0.2, 0.3]}, "group_by": "user", "order": "TO", "mode": "full"}}
    config, dataset = recbole_dataset(folder, monkeypatch, **settings)
    train = data_preparation(config, dataset)[0].dataset
    assert len(set(dataset.inter_feat["timestamp"].tolist())) < len(rows) / 10  # float32 merges them
    tokens = [dataset.field2id_token[field][train.inter_feat[field]] for field in ("user_id", "item_id")]
    for user in USERS:
        earliest = [item for u, item, _ in rows if u == user][:6]
        assert [i for u, i in zip(*tokens, strict=True) if u == user] == earliest


def test_recbole_and_our_reader_find_the_same_texts(imported, monkeypatch):
    folder, _, _ = imported
    clean = list(TITLES.values())
    table = read_atomic_table(folder / "x" / "x.item", "item_id")
    assert [table.columns["title"][table.row_of[f"i{n}"]] for n in range(len(TITLES))] == clean
    assert choose_text_fields(table) == ("title",)
    _, dataset = recbole_dataset(folder, monkeypatch, load_col={"inter": "*", "item": "*"})
    words = dataset.field2id_token["title"]
    for token, row in zip(dataset.field2id_token["item_id"][1:], dataset.item_feat["title"][1:], strict=True):
        assert " ".join(words[word] for word in row if word) == clean[int(token[1:])]


def test_without_items_the_model_runs_on_ids(imported, monkeypatch, tmp_path):
    from recbole.quick_start import run_recbole

    monkeypatch.chdir(tmp_path)
    import_dataset(tmp_path / "inter.csv", "plain", data_path=tmp_path)
    quick = {
        "gpu_id": "",
        "epochs": 1,
        "embedding_size": 4,
        "train_batch_size": 8,
        "show_progress": False,
        "state": "ERROR",
    }
    quick |= {"checkpoint_dir": str(tmp_path / "saved")}
    result = run_recbole(
        "LLMTwoTower", "plain", config_file_list=[str(tmp_path / "plain" / "plain.yaml")], config_dict=quick
    )
    assert 0 <= result["test_result"]["recall@10"] <= 1
