"""Probes of test_compat.py, run as it runs its own: single stock models."""

import sys
import types
from pathlib import Path


def write_entities(folder):
    """A knowledge graph over the toy's items, with a vector for each entity and relation."""
    target = Path(folder, "toy")
    files = {
        "kg": [
            "head_id:token\trelation_id:token\ttail_id:token",
            *(f"e{i}\tr{i % 2}\te{(i + 1) % 30}" for i in range(30)),
        ],
        "link": ["item_id:token\tentity_id:token", *(f"i{i}\te{i}" for i in range(30))],
        "ent": ["ent_id:token\tent_emb:float_seq", *(f"e{i}\t{i}.5 {i} 1 2" for i in range(30))],
        "rel": ["rel_id:token\trel_emb:float_seq", "r0\t1 2 3 4", "r1\t4 3 2 1"],
    }
    for suffix, lines in files.items():
        Path(target, f"toy.{suffix}").write_text("\n".join(lines) + "\n", encoding="utf-8")


GRAPH = {
    "inter": ["user_id", "item_id", "timestamp"],
    "kg": ["head_id", "relation_id", "tail_id"],
    "link": ["item_id", "entity_id"],
}


def probes(run, settings, dataset, context):
    """By the name of the repair.

    Args:
        run: trains a model, by its name and more settings.
        settings: of a quick run, and more.
        dataset: configuration and dataset, by the name of a model and more settings.
        context: settings of a context-aware model.
    """

    def flops():
        columns = {"inter": ["user_id", "item_id", "timestamp"]}
        small = dict(n_layers=1, n_heads=1, hidden_size=8, inner_size=8, reranker_CAN_NUM=5)
        return run("SASRecCPR", load_col=columns, train_neg_sample_args=None, **small)

    def tree_defaults():
        from recbole.config import Config

        for name in ("lightgbm", "xgboost"):
            sys.modules[name] = types.ModuleType(name)
            sys.modules[name].Booster = type("Booster", (), {})
        return str(Config("XGBoost", "toy", config_dict=settings(**context))["xgb_num_boost_round"])

    def kgat():
        write_entities(".")
        return run("KGAT", load_col=GRAPH, kg_embedding_size=8, layers=[8])

    def ksr():
        write_entities(".")
        columns = {
            **GRAPH,
            "ent": ["ent_id", "ent_emb"],
            "rel": ["rel_id", "rel_emb"],
        }
        return run(
            "KSR",
            load_col=columns,
            additional_feat_suffix=["ent", "rel"],
            alias_of_entity_id=["ent_id"],
            alias_of_relation_id=["rel_id"],
            preload_weight={"ent_id": "ent_emb", "rel_id": "rel_emb"},
            kg_embedding_size=4,
            hidden_size=8,
            eval_args={"split": {"LS": "valid_and_test"}, "order": "TO", "mode": "full"},
            train_neg_sample_args=None,
        )

    def anomaly_mode():
        import torch
        from recbole.utils import get_model

        get_model("SASRec")
        return f"checks gradients: {torch.is_anomaly_enabled()}"

    def dgcf():
        return run("DGCF", train_batch_size=2048, n_factors=2, n_iterations=1)

    def pop():
        from recbole.data import data_preparation
        from recbole.utils import get_model, get_trainer

        config, data = dataset("Pop", train_batch_size=32)
        train = data_preparation(config, data)[0]
        model = get_model("Pop")(config, train._dataset)
        get_trainer(config["MODEL_TYPE"], "Pop")(config, model).fit(train, saved=False, verbose=False)
        count = train._dataset.inter_feat["item_id"].bincount(minlength=train._dataset.item_num)
        return f"counts interactions: {model.item_cnt[:, 0].tolist() == count.tolist()}"

    def bert4rec():
        import torch
        from recbole.utils import get_model

        small = dict(n_layers=1, n_heads=1, hidden_size=8, inner_size=8, train_neg_sample_args=None)
        config, data = dataset("BERT4Rec", load_col={"inter": ["user_id", "item_id", "timestamp"]}, **small)
        model = get_model("BERT4Rec")(config, data.build()[0]).eval()
        sequences = torch.zeros(2, config["MAX_ITEM_LIST_LENGTH"], dtype=torch.int64)
        sequences[:, 0] = torch.tensor([1, 2])
        rows = {"item_id_list": sequences, "item_length": torch.ones(2, dtype=torch.int64)}
        first, second = model.full_sort_predict(rows)
        return f"an only item matters: {not torch.equal(first, second)}"

    return {name: f for name, f in locals().items() if name not in ("run", "settings", "dataset", "context")}
