"""Every evaluation setting that RecBole allows: two epochs run, and nothing held out reaches the model.

RecBole groups the splits LS and TS by user whatever ``group_by`` says (data/dataset/dataset.py:1865-1877), and with
``benchmark_filename`` it ignores split, order and group (:1815): settings that are the same run once.
"""

import os
import random
from functools import cache
from pathlib import Path

import pytest

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
import torch
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.data.dataset import Dataset
from recbole.utils import get_model, get_trainer, init_seed

N_USERS, N_ITEMS, PER_USER = 20, 24, 10
HEADER = "user_id:token\titem_id:token\trating:float\ttimestamp:float"
SPLITS = {
    "RS": {"RS": [0.8, 0.1, 0.1]},
    "LS valid_and_test": {"LS": "valid_and_test"},
    "LS valid_only": {"LS": "valid_only"},
    "TS": {"TS": [0.8, 0.1, 0.1]},
    "benchmark_filename": None,
}
if not hasattr(Dataset, "time_based_split"):  # RecBole 1.2.0
    del SPLITS["TS"]
SETTINGS = [
    (split, order, group)
    for split in SPLITS
    for order in (("RO", "TO") if split != "benchmark_filename" else ("TO",))
    for group in (("user", "none") if split == "RS" else ("user",))
]
MODES = ("full", "uni100", "pop100", "labeled")
PARTS = ("train", "valid", "test")


@pytest.fixture(scope="module")
def rows():
    """(user, item, rating, time): two anchors who have every item between them, so that ids never change, then users."""
    draw = random.Random(0)
    made = [("anchor", f"i{i}", draw.randint(1, 5), 40 * i) for i in range(N_ITEMS - 1)]
    made += [("anchor 2", f"i{N_ITEMS - 1 - i}", draw.randint(1, 5), 90 * i) for i in range(PER_USER)]
    for user in range(N_USERS):
        times = draw.sample(range(1000), PER_USER)
        items = draw.sample(range(N_ITEMS), PER_USER)
        made += [(f"u{user}", f"i{i}", draw.randint(1, 5), t) for i, t in zip(items, times, strict=True)]
    return made


@pytest.fixture(scope="module")
def train(rows, tiny_encoder, tmp_path_factory):
    """A function: setting, mode, what is poisoned, whether it validates -> what came of two epochs."""
    folder = tmp_path_factory.mktemp("settings")
    before = os.getcwd()
    os.chdir(folder)  # RecBole writes its logs where it is

    @cache
    def run(setting, mode="full", poisoned=(), validates=True):
        split, order, group = setting
        settings = dict(
            data_path=str(folder / "-".join(("data", *setting, *poisoned))),
            load_col={"inter": ["user_id", "item_id", "rating", "timestamp"], "item": ["item_id", "title"]},
            eval_args={"order": order, "group_by": group, "mode": mode},
            encoder=str(tiny_encoder),
            feature_cache_dir=str(folder / "features"),
            checkpoint_dir=str(folder / "saved"),
            **dict(gpu_id="", epochs=2, embedding_size=8, train_batch_size=8, show_progress=False, state="ERROR"),
        )
        if SPLITS[split] is None:
            settings["benchmark_filename"] = list(PARTS)
        else:
            settings["eval_args"]["split"] = SPLITS[split]
        if mode == "labeled":
            settings |= dict(threshold={"rating": 3}, metrics=["AUC", "LogLoss"], valid_metric="AUC")
        held_out = {pair for part in poisoned for pair in run(setting)["pairs"][part]}
        write(Path(settings["data_path"]), poison(rows, held_out))

        config = Config("LLMTwoTower", "small", config_dict=settings)
        init_seed(config["seed"], config["reproducibility"])
        dataset = create_dataset(config)
        loaders = data_preparation(config, dataset)
        init_seed(config["seed"], config["reproducibility"])
        model = get_model("LLMTwoTower")(config, loaders[0]._dataset)
        trainer = get_trainer(config["MODEL_TYPE"], "LLMTwoTower")(config, model)
        first = model_inputs(model)
        score, valid = trainer.fit(loaders[0], loaders[1] if validates else None, saved=False, verbose=False)
        test = trainer.evaluate(loaders[2], load_best_model=False)
        parts = {name: loader._dataset for name, loader in zip(PARTS, loaders, strict=True)}
        return dict(
            model=model,
            fitted=dict(model.state_dict()) | {"other": model.other_parameter(), "inputs": first},
            results=(score, valid, test),
            pairs={name: pairs_of(part) for name, part in parts.items()},
            times={name: times_of(part) for name, part in parts.items()},
            ids={field: list(dataset.field2id_token[field]) for field in ("user_id", "item_id")},
        )

    yield run
    os.chdir(before)


def write(folder, rows):
    """Atomic files ``folder/small``, whole and as benchmark files cut at two moments."""
    target = folder / "small"
    if target.is_dir():
        return
    target.mkdir(parents=True)
    files = {"": rows}
    files |= {f".{part}": [] for part in PARTS}
    for row in rows:
        files[".train" if row[3] < 700 else ".valid" if row[3] < 850 else ".test"].append(row)
    for name, lines in files.items():
        text = "\n".join([HEADER, *("\t".join(map(str, line)) for line in lines)])
        (target / f"small{name}.inter").write_text(text + "\n", encoding="utf-8")
    words = ("star", "rocket", "cow", "barn", "ship", "whale")
    items = [f"i{i}\ta story of {words[i % 6]} and {words[i % 5]}" for i in range(N_ITEMS)]
    (target / "small.item").write_text("\n".join(["item_id:token\ttitle:token_seq", *items]) + "\n", encoding="utf-8")


def poison(rows, held_out):
    """The rows with another item, and another rating, wherever (user, item) is held out; the anchors' stay."""
    taken = {}
    for user, item, _, _ in rows:
        taken.setdefault(user, []).append(int(item[1:]))
    poisoned = []
    for user, item, rating, time in rows:
        if not user.startswith("anchor") and (user, item) in held_out:
            other = next(i for i in range(N_ITEMS) if i not in taken[user])
            taken[user].append(other)
            item, rating = f"i{other}", 6 - rating
        poisoned.append((user, item, rating, time))
    return poisoned


def pairs_of(dataset):
    tokens = [dataset.field2id_token[field] for field in ("user_id", "item_id")]
    users, items = (dataset.inter_feat[field].tolist() for field in ("user_id", "item_id"))
    return {(str(tokens[0][user]), str(tokens[1][item])) for user, item in zip(users, items, strict=True)}


def times_of(dataset):
    """Times of each user's interactions."""
    found = {}
    for user, time in zip(
        dataset.inter_feat["user_id"].tolist(), dataset.inter_feat["timestamp"].tolist(), strict=True
    ):
        found.setdefault(user, []).append(time)
    return found


def model_inputs(model):
    """What the model knows before its first step: histories, the catalogue, texts, popularities."""
    tensors = [tensor.value for tensors in model._features.values() for tensor in tensors]
    return [model.history.offsets, model.history.ids, model.trained.value, model.item_bias.detach().clone(), *tensors]


def differences(a, b, path=""):
    """Paths of the values in which two nested structures differ by a bit."""
    if isinstance(a, torch.Tensor):
        return [] if isinstance(b, torch.Tensor) and torch.equal(a, b) else [path]
    if isinstance(a, dict) and isinstance(b, dict):
        keys = [] if a.keys() == b.keys() else [f"{path}: keys"]
        return keys + [found for key in a if key in b for found in differences(a[key], b[key], f"{path}/{key}")]
    if isinstance(a, (list, tuple)) and isinstance(b, (list, tuple)) and len(a) == len(b):
        pairs = zip(a, b, strict=True)
        return [found for n, (x, y) in enumerate(pairs) for found in differences(x, y, f"{path}/{n}")]
    return [] if a == b else [path]


def name(setting):
    return "-".join(setting).replace(" ", "_")


@pytest.mark.parametrize("mode", MODES)
@pytest.mark.parametrize("setting", SETTINGS, ids=name)
def test_two_epochs_run_and_are_evaluated(train, setting, mode):
    score, valid, test = train(setting, mode)["results"]
    metrics = (
        {"auc", "logloss"} if mode == "labeled" else {f"{m}@10" for m in ("recall", "mrr", "ndcg", "hit", "precision")}
    )
    assert score > 0
    for result in (valid, test):
        if result is test and setting[0] == "LS valid_only":
            assert result is None  # RecBole leaves the test split empty
            continue
        assert set(result) == metrics
        assert all(0 <= value < float("inf") for value in result.values())
        assert result.get("recall@10", 1) > 0


@pytest.mark.parametrize("setting", SETTINGS, ids=name)
def test_a_history_is_the_users_training_split(train, setting):
    done = train(setting)
    history, (users, items) = done["model"].history, done["ids"].values()
    found = zip(history.row_of_entry().tolist(), history.ids.tolist(), strict=True)
    assert {(str(users[user]), str(items[item])) for user, item in found} == done["pairs"]["train"]
    assert done["pairs"]["train"].isdisjoint(done["pairs"]["valid"] | done["pairs"]["test"])
    assert done["pairs"]["valid"]


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s[1] == "TO" or s[0] == "TS"], ids=name)
def test_ordered_by_time_a_history_is_the_past(train, setting):
    times = train(setting)["times"]
    seen = 0
    for part in ("valid", "test"):
        for user, held_out in times[part].items():
            past = times["train"].get(user, [])
            assert not past or max(past) <= min(held_out)
            seen += len(past)
    assert seen


@pytest.mark.parametrize("setting", [s for s in SETTINGS if s[0] != "LS valid_only"], ids=name)
def test_other_test_interactions_leave_the_same_model(train, setting):
    clean, other = train(setting), train(setting, poisoned=("test",))
    assert clean["ids"] == other["ids"]
    assert clean["pairs"]["test"] != other["pairs"]["test"]
    assert clean["results"][:2] == other["results"][:2]
    assert differences(clean["fitted"], other["fitted"]) == []


@pytest.mark.parametrize("setting", SETTINGS, ids=name)
def test_without_validation_other_held_out_interactions_leave_the_same_model(train, setting):
    clean, other = train(setting, validates=False), train(setting, poisoned=("valid", "test"), validates=False)
    assert clean["ids"] == other["ids"]
    assert clean["pairs"]["valid"] != other["pairs"]["valid"]
    assert differences(clean["fitted"], other["fitted"]) == []


def test_other_training_interactions_leave_another_model(train):
    setting = ("RS", "TO", "user")
    clean, other = train(setting), train(setting, poisoned=("train",))
    assert {"/item_bias", "/inputs/1"} <= set(differences(clean["fitted"], other["fitted"]))
