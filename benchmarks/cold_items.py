"""Items that nobody has touched: how well they are ranked among themselves, and what they add to the ranking of all.

    python benchmarks/cold_items.py --dataset ml-100k
    python benchmarks/cold_items.py --dataset amazon-office --data_path FOLDER --draws 0,1

For each draw ``recbole-llm split`` hides 15% of the items from training; half of their interactions go to validation, half to
test. LLMTwoTower trains with its defaults. Two protocols: *test*, the test split as RecBole evaluates it; *launch*, the test split
and every interaction with a hidden item. Beside it: content kNN (sum over the history of max(cosine, 0)^3 of the texts) and chance,
among the cold items; and the ranking of all without the cold items. Draws are kept in ``--work``; the summary is one JSON file.
"""

import argparse
import json
import sys
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch
from timing import logged, machine
from torch import Tensor

import recbole_llm  # noqa: F401  # before RecBole: its repairs
from recbole_llm.bridge.evaluation.cold_items import report
from recbole_llm.fitting.ease import content_centre, content_directions
from recbole_llm.fitting.validation import TopKMetric, user_metric
from recbole_llm.importing.cold_split import split_dataset
from recbole_llm.scoring.rows import pool, rows_from_pairs, union

NDCG = TopKMetric("ndcg", 10)
SHARE = 0.15


def train(dataset: str, data_path: str, folder: Path) -> tuple[Any, tuple[Any, ...]]:
    """A trained model on benchmark files, and the three loaders."""
    sys.argv = sys.argv[:1]
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    values = {
        "data_path": data_path,
        "benchmark_filename": ["train", "valid", "test"],
        "show_progress": False,
        "state": "ERROR",
        "checkpoint_dir": str(folder / "saved"),
        "metrics": ["NDCG", "Recall"],
        "topk": [10],
    }
    config = Config(model="LLMTwoTower", dataset=dataset, config_dict=values)
    init_seed(config["seed"], True)
    parts = data_preparation(config, create_dataset(config))
    model = get_model("LLMTwoTower")(config, parts[0]._dataset)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    trainer.fit(parts[0], parts[1], saved=True, show_progress=False)
    return trainer, parts


def draw(dataset: str, data_path: str, number: int, folder: Path) -> dict[str, Any]:
    """One draw of hidden items."""
    name = f"{dataset}-cold-{number}"
    if not (Path(data_path) / name).is_dir():
        split_dataset(dataset, name, cold_items=SHARE, seed=number, data_path=data_path)
    began = time.perf_counter()
    with logged("recbole_llm.fitting") as told:
        trainer, parts = train(name, data_path, folder)
    seconds = time.perf_counter() - began
    table = report(trainer, parts[2], lambda text: None)
    assert table is not None
    model = trainer.model.eval()
    train_rows, valid, test = (
        rows_from_pairs(
            part._dataset.inter_feat["user_id"].long(), part._dataset.inter_feat["item_id"].long(), model.n_users
        )
        for part in parts
    )
    cold, n_items = model.cold, model.n_items
    warm_valid = valid.keep(~cold[valid.ids])
    protocols = {
        "test": (test, union(train_rows, valid)),
        "launch": (union(test, valid.keep(cold[valid.ids])), union(train_rows, warm_valid)),
    }
    features, present = model.training_data().content["text"]
    directions = content_directions(features, present, content_centre(features, present))
    weights = torch.ones(1)
    score = model.score
    placed = score.cold

    def ours_alone(users: Tensor) -> Tensor:
        scores = torch.full((len(users), n_items), -torch.inf)
        every = score.scores(model.history.select(users), score.user_parts(users), unlisted=True)
        scores[:, placed.ids] = every[:, placed.ids]
        return scores

    def content(users: Tensor) -> Tensor:
        history = train_rows.select(users)
        similarity = (directions @ directions.T).clamp(min=0).pow(3)
        return pool(similarity, history, weights.expand(len(history.ids)).contiguous())

    generator = torch.Generator().manual_seed(0)
    noise = torch.rand(model.n_users, n_items, generator=generator)
    scorers: dict[str, Callable[[Tensor], Tensor]] = {
        "ours": ours_alone,
        "content_knn": content,
        "chance": lambda users: noise[users].clone(),
    }
    found: dict[str, Any] = {
        "draw": number,
        "cold_items": int(cold.sum()),
        "placed": len(placed.ids),
        "log": [line for line in told if "cold" in line or "no training interaction" in line],
        "seconds": round(seconds, 1),
        "cold_report": table.metrics,
    }
    outside = ~cold
    padding = torch.zeros_like(cold)
    padding[0] = True
    for protocol, (targets, seen) in protocols.items():
        own = targets.keep(cold[targets.ids])
        among = {
            name: float(user_metric(scorer, own, seen, n_items, NDCG, outside).mean())
            for name, scorer in scorers.items()
        }
        warm_targets = targets.keep(~cold[targets.ids])
        with torch.no_grad():
            joint, without = (
                float(user_metric(model.scores, targets, seen, n_items, NDCG, excluded).mean())
                for excluded in (padding, cold | padding)
            )
            warm, warm_alone = (
                float(user_metric(model.scores, warm_targets, seen, n_items, NDCG, excluded).mean())
                for excluded in (padding, cold | padding)
            )
        found[protocol] = {
            "cold_only": among,
            "joint": joint,
            "joint_without_cold": without,
            "joint_gain": joint / without - 1,
            "warm": warm,
            "warm_alone": warm_alone,
            "warm_cost": 1 - warm / warm_alone,
        }
        print(
            f"{name} {protocol:6}: cold-only ours {among['ours']:.4f}, content kNN {among['content_knn']:.4f}, chance "
            f"{among['chance']:.4f}; joint {joint:.4f} ({joint / without - 1:+.2%}), warm {warm / warm_alone - 1:+.2%}",
            flush=True,
        )
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", "-d", default="ml-100k")
    parser.add_argument("--data_path", default=None, help="folder of the dataset; ml-100k needs none")
    parser.add_argument("--draws", default="0,1", help="seeds of recbole-llm split")
    parser.add_argument("--minutes", type=float, default=None, help="begin nothing further after so long; exit code 3")
    parser.add_argument("--work", default="cold")
    parser.add_argument("--output", default=None, help="JSON; default benchmarks/results/cold-<dataset>.json")
    arguments = parser.parse_args()
    work, began = Path(arguments.work), time.monotonic()
    data = work / "data"
    data.mkdir(parents=True, exist_ok=True)
    if arguments.data_path and not (data / arguments.dataset).exists():
        (data / arguments.dataset).symlink_to((Path(arguments.data_path) / arguments.dataset).resolve())
    draws = []
    for number in map(int, arguments.draws.split(",")):
        kept = work / f"{arguments.dataset}-{number}.json"
        if not kept.is_file():
            if arguments.minutes is not None and time.monotonic() - began > 60 * arguments.minutes:
                print("out of time: run the same command again to go on")
                return 3
            kept.write_text(json.dumps(draw(arguments.dataset, str(data), number, work)))
        draws.append(json.loads(kept.read_text()))
    result = {
        "benchmark": "cold_items",
        "dataset": arguments.dataset,
        "share_hidden": SHARE,
        "metric": "ndcg@10",
        "draws": draws,
        "machine": machine("cpu"),
    }
    path = Path(arguments.output or ROOT / "benchmarks" / "results" / f"cold-{arguments.dataset}.json")
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
