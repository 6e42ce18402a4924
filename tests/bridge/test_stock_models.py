"""Stock models of every family run on today's libraries; benchmarks/stock_models.py runs all of them."""

import random

import pytest

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
import torch
from recbole.quick_start import run_recbole

from recbole_llm.bridge.repairs.configuration import NEEDED_MODULES

INTER = ["user_id", "item_id", "rating", "timestamp"]
FEATURES = {"inter": INTER, "user": ["user_id", "city"], "item": ["item_id", "year", "class"]}
GRAPH = {"inter": INTER, "kg": ["head_id", "relation_id", "tail_id"], "link": ["item_id", "entity_id"]}

GENERAL = dict(load_col={"inter": INTER})
CONTEXT = dict(load_col=FEATURES, threshold={"rating": 4})
SEQUENTIAL = dict(load_col={"inter": INTER}, MAX_ITEM_LIST_LENGTH=8)
SOFTMAX = dict(SEQUENTIAL, train_neg_sample_args=None)
TRANSFORMER = dict(SOFTMAX, n_layers=1, n_heads=1, hidden_size=8, inner_size=8)
KNOWLEDGE = dict(load_col=GRAPH)

MODELS = {
    "BPR": GENERAL,
    "Pop": GENERAL,
    "EASE": GENERAL,
    "ItemKNN": GENERAL,
    "NeuMF": dict(GENERAL, mlp_hidden_size=[8]),
    "DMF": dict(
        GENERAL, user_embedding_size=8, item_embedding_size=8, user_hidden_size_list=[8], item_hidden_size_list=[8]
    ),
    "LightGCN": GENERAL,
    "NGCF": dict(GENERAL, hidden_size_list=[8]),
    "SGL": GENERAL,
    "SimpleX": dict(GENERAL, train_neg_sample_args={"distribution": "uniform", "sample_num": 4}),
    "MultiVAE": dict(GENERAL, mlp_hidden_size=[8], latent_dimension=4),
    "DiffRec": dict(GENERAL, dims_dnn=[8]),
    "LR": CONTEXT,
    "FM": CONTEXT,
    "DeepFM": dict(CONTEXT, mlp_hidden_size=[8]),
    "DCN": dict(CONTEXT, mlp_hidden_size=[8]),
    "FPMC": SEQUENTIAL,
    "GRU4Rec": dict(SOFTMAX, hidden_size=8, num_layers=1),
    "SASRec": TRANSFORMER,
    "BERT4Rec": TRANSFORMER,
    "SRGNN": SOFTMAX,
    "SASRecF": dict(
        TRANSFORMER, load_col={"inter": INTER, "item": ["item_id", "year", "class"]}, selected_features=["class"]
    ),
    "DIN": dict(SEQUENTIAL, load_col={"inter": INTER, "user": ["user_id", "city"], "item": ["item_id", "year"]}),
    "CKE": dict(KNOWLEDGE, kg_embedding_size=8),
    "KGCN": dict(KNOWLEDGE, neighbor_sample_size=2),
    "CFKG": KNOWLEDGE,
}


@pytest.fixture(scope="module")
def data_path(tmp_path_factory):
    """40 users and 50 items; the last user has no row in the .user file, the last item none in the .item file."""
    draw = random.Random(0)
    folder = tmp_path_factory.mktemp("data")
    (folder / "made").mkdir()
    inter = [
        (u, i, draw.randint(1, 5), 100 * u + k) for u in range(40) for k, i in enumerate(draw.sample(range(50), 12))
    ]
    tables = {
        "inter": ("user_id:token\titem_id:token\trating:float\ttimestamp:float", inter),
        "user": ("user_id:token\tcity:token", [(u, f"c{u % 5}") for u in range(39)]),
        "item": ("item_id:token\tyear:token\tclass:token_seq", [(i, i % 7, f"a{i % 3} b{i % 4}") for i in range(49)]),
        "kg": (
            "head_id:token\trelation_id:token\ttail_id:token",
            [(f"e{i}", f"r{i % 3}", f"e{i + 9}") for i in range(60)],
        ),
        "link": ("item_id:token\tentity_id:token", [(i, f"e{i}") for i in range(50)]),
    }
    for suffix, (header, rows) in tables.items():
        lines = [header, *("\t".join(map(str, row)) for row in rows)]
        (folder / "made" / f"made.{suffix}").write_text("\n".join(lines) + "\n", encoding="utf-8")
    return folder


@pytest.mark.parametrize("model", MODELS)
def test_the_model_trains_validates_and_tests(model, data_path, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    quick = dict(epochs=1, show_progress=False, state="ERROR", gpu_id="", embedding_size=8, train_batch_size=128)
    keep_rows = dict(data_path=str(data_path), eval_batch_size=40000, filter_inter_by_user_or_item=False)
    done = run_recbole(model, "made", config_dict={**quick, **keep_rows, **MODELS[model]})
    for result in (done["best_valid_result"], done["test_result"]):
        assert result
        assert all(0 <= float(value) < float("inf") for value in result.values())
    trained = sorted((tmp_path / "saved").glob("*.pth"))
    assert len(trained) == 1
    state = torch.load(trained[0], weights_only=False)["state_dict"]
    assert all(bool(torch.isfinite(value).all()) for value in state.values() if value.is_floating_point())


def test_the_slice_has_every_family():
    from recbole.utils import get_model

    families = {get_model(name).type.name for name in MODELS}
    assert families == {"GENERAL", "TRADITIONAL", "CONTEXT", "SEQUENTIAL", "KNOWLEDGE"}
    assert len(MODELS) >= 20
    assert not set(MODELS) & set(NEEDED_MODULES)
