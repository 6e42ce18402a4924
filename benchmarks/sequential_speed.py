"""What RecBole's sequential models lose to PyTorch's anomaly mode, which one of RecBole's own files turns on for all of them.

    python benchmarks/sequential_speed.py
    python benchmarks/sequential_speed.py --models SASRec --batch_size 1024 --length 20 --output sasrec.json

Importing any sequential model of RecBole 1.2 imports sine.py, which ends every backward operation of the process with a search
for NaN. ``import recbole_llm`` leaves the mode as it was. Here one model takes training steps in both modes in turn, at RecBole's
defaults but for what is given.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch
from temporal import SPLIT
from timing import machine, paired, ratio, summary

import recbole_llm  # noqa: F401  # before RecBole: its repairs

MODELS = ("SASRec", "GRU4Rec", "BERT4Rec", "NARM", "CORE")


def measure(model_name: str, arguments: argparse.Namespace) -> dict[str, Any]:
    """Training steps of one model with and without anomaly mode, in turn."""
    sys.argv = sys.argv[:1]
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, init_seed

    settings: dict[str, Any] = {
        "eval_args": SPLIT,
        "train_neg_sample_args": None,
        "MAX_ITEM_LIST_LENGTH": arguments.length,
        "train_batch_size": arguments.batch_size,
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
        "state": "WARNING",
        "gpu_id": "" if arguments.device == "cpu" else "0",
    }
    if arguments.data_path:
        settings["data_path"] = arguments.data_path
    config = Config(model=model_name, dataset=arguments.dataset, config_dict=settings)
    init_seed(config["seed"], True)
    train_data, _, _ = data_preparation(config, create_dataset(config))
    model = get_model(model_name)(config, train_data._dataset).to(config["device"])
    optimizer = torch.optim.Adam(model.parameters(), lr=config["learning_rate"])
    batch = next(iter(train_data)).to(config["device"])

    def step() -> None:
        optimizer.zero_grad()
        loss = model.calculate_loss(batch)
        loss.backward()
        optimizer.step()
        loss.item()

    def step_in_anomaly_mode() -> None:
        with torch.autograd.set_detect_anomaly(True):
            step()

    variants = {"anomaly mode": step_in_anomaly_mode, "repaired": step}
    times = paired(variants, arguments.seconds, arguments.device)
    return {
        "rounds": times["rounds"],
        **{name: summary(times["wall"][name]) for name in variants},
        "repaired_is_faster": {
            clock: round(ratio(times[clock]["anomaly mode"], times[clock]["repaired"]), 3) for clock in ("wall", "cpu")
        },
    }


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", "-d", default="ml-100k")
    parser.add_argument("--data_path", default=None, help="folder of the dataset; ml-100k needs none")
    parser.add_argument("--models", "-m", default=",".join(MODELS))
    parser.add_argument("--batch_size", type=int, default=2048, help="train_batch_size; RecBole's default")
    parser.add_argument("--length", type=int, default=50, help="MAX_ITEM_LIST_LENGTH; RecBole's default")
    parser.add_argument("--seconds", type=float, default=60.0, help="of measuring per model")
    parser.add_argument("--device", default="cpu", choices=("cpu", "cuda"))
    parser.add_argument("--output", default=str(ROOT / "benchmarks" / "results" / "sequential_speed.json"))
    arguments = parser.parse_args()
    models = {}
    for name in arguments.models.split(","):
        models[name] = measure(name, arguments)
        print(name, json.dumps(models[name]), flush=True)
    result = {
        "benchmark": "sequential_speed",
        "dataset": arguments.dataset,
        "train_batch_size": arguments.batch_size,
        "MAX_ITEM_LIST_LENGTH": arguments.length,
        "models": models,
        "machine": machine(arguments.device),
    }
    Path(arguments.output).write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {arguments.output}")


if __name__ == "__main__":
    main()
