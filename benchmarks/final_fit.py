"""What a second fit is worth: train + validation with the chosen constants, against train alone with the same histories.

    python benchmarks/final_fit.py --datasets ml-100k amazon-office amazon-beauty ml-1m-text --data_path FOLDER

LLMTwoTower trains with its defaults and chooses on validation (RecBole's 8:1:1 split of each user). Then ``refit_rows: valid`` fits
it once more on train + validation with those choices. Both models rank the test users by the same histories, train + validation,
of which nothing has a place. NDCG@10 and Recall@10 of each test user are paired; the interval is a bootstrap's. Every data set is a
part of its own in ``--work``, so that a stopped run goes on (seconds are then those of its last piece);
``benchmarks/results/final-fit.json`` holds those that are there.
"""

import argparse
import json
import sys
import time
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch
from timing import machine

import recbole_llm  # noqa: F401  # before RecBole: its repairs
from recbole_llm.bridge.experiments.significance import paired_bootstrap
from recbole_llm.fitting.validation import TopKMetric, user_metric
from recbole_llm.scoring.rows import Rows

METRICS = (TopKMetric("ndcg", 10), TopKMetric("recall", 10))
# beyond these a data set is cut, so that one processor solves it in minutes
SETTINGS: dict[str, dict[str, Any]] = {
    "amazon-beauty": {"user_inter_num_interval": "[10,inf)", "item_inter_num_interval": "[10,inf)"},
}


def train(dataset: str, values: dict[str, Any]) -> tuple[Any, tuple[Any, ...], float]:
    """A trained model's trainer, its loaders, and the seconds of processor time."""
    sys.argv = sys.argv[:1]
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    config = Config(model="LLMTwoTower", dataset=dataset, config_dict=values)
    init_seed(config["seed"], True)
    parts = data_preparation(config, create_dataset(config))
    init_seed(config["seed"], True)
    model = get_model("LLMTwoTower")(config, parts[0]._dataset)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
    began = time.process_time()
    trainer.fit(parts[0], parts[1], saved=True, show_progress=False)
    return trainer, parts, time.process_time() - began


def going_on(values: dict[str, Any], folder: Path) -> dict[str, Any]:
    """Settings of a run with a folder of its own, which goes on where it was stopped."""
    stopped = sorted(folder.glob("*-last.pth"))
    return values | {"checkpoint_dir": str(folder)} | ({"resume_from": str(stopped[-1])} if stopped else {})


def values_of(model: Any, histories: Rows, targets: Rows) -> dict[str, torch.Tensor]:
    """Metrics of each user who has a test target, ranked by these histories."""
    padding = torch.zeros(model.n_items, dtype=torch.bool)
    padding[0] = True
    score = model.eval().score

    def scorer(users: torch.Tensor) -> torch.Tensor:
        return score.of_users(users, histories)

    with torch.no_grad():
        return {str(m): user_metric(scorer, targets, histories, model.n_items, m, padding) for m in METRICS}


def part(dataset: str, data_path: str | None, work: Path) -> dict[str, Any]:
    """One data set."""
    values: dict[str, Any] = {
        "show_progress": False,
        "state": "ERROR",
        "metrics": ["NDCG", "Recall"],
        "topk": [10],
        **({"data_path": data_path} if data_path else {}),
        **SETTINGS.get(dataset, {}),
    }
    trainer, parts, seconds = train(dataset, going_on(values, work / dataset / "choosing"))
    first, split = trainer.model, parts[0]._dataset
    later = split.later_splits
    histories = split.training_ranks(later[0]) or split.training_rows(None, later[0])
    targets = later[1].training_rows()
    again = {"refit_rows": "valid", "refit_from": trainer.saved_model_file}
    second, _, more = train(dataset, going_on(values | again, work / dataset / "again"))
    assert len(second.model.history.ids) == len(histories.ids)
    before, after = (values_of(each.model, histories, targets) for each in (trainer, second))
    own = values_of(first, first.history, targets)
    found: dict[str, Any] = {
        "dataset": dataset,
        "settings": SETTINGS.get(dataset, {}),
        "interactions": {
            name: len(each._dataset.inter_feat) for name, each in zip(("train", "valid", "test"), parts, strict=True)
        },
        "users": int((targets.sizes > 0).sum()),
        "chosen": first.chosen.to_state(),
        "cpu_seconds": {"choosing": round(seconds, 1), "once more": round(more, 1)},
    }
    for name in before:
        gain = paired_bootstrap(after[name].numpy(), before[name].numpy())
        found[name.lower()] = {
            "train, histories of train": float(own[name].mean()),
            "train, histories of train + validation": float(before[name].mean()),
            "train + validation": float(after[name].mean()),
            "difference": vars(gain),
        }
    return found


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--datasets", "-d", nargs="+", default=["ml-100k"])
    parser.add_argument("--data_path", default=None, help="folder of the data sets' folders; ml-100k needs none")
    parser.add_argument("--work", default="final-fit")
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "final-fit.json"))
    arguments = parser.parse_args()
    work = Path(arguments.work)
    work.mkdir(parents=True, exist_ok=True)
    for dataset in arguments.datasets:
        kept = work / f"{dataset}.json"
        if not kept.is_file():
            path = None if dataset == "ml-100k" else arguments.data_path
            kept.write_text(json.dumps(part(dataset, path, work)), encoding="utf-8")
    parts = [json.loads(path.read_text(encoding="utf-8")) for path in sorted(work.glob("*.json"))]
    for each in parts:
        line = each["ndcg@10"]
        print(
            f"{each['dataset']}: {line['train, histories of train + validation']:.4f} -> {line['train + validation']:.4f}, "
            f"difference {line['difference']['mean']:+.4f} [{line['difference']['low']:+.4f}, {line['difference']['high']:+.4f}]"
        )
    result = {"benchmark": "final_fit", "metric": "ndcg@10", "datasets": parts, "machine": machine("cpu")}
    Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {arguments.output}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
