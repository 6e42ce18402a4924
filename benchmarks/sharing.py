"""What sharing parameters, learned IDs and texts are worth: quality, parameters, memory and time of the learned block.

    python benchmarks/sharing.py --dataset ml-100k

One item has a vector as a part of histories and one as a candidate: of one tower (tied) or of two. A tower maps the text, or has a
learned vector per item, or adds both. Each variant trains with the defaults; test NDCG@10 of the learned block alone and blended
with the closed form. Trainings are kept in ``--work``; the summary is one JSON file in benchmarks/results/.
"""

import argparse
import json
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import numpy as np
from model_quality import COMMON, OutOfTimeError, Pieces
from timing import machine

import recbole_llm  # noqa: F401  # before RecBole: its repairs
from recbole_llm.bridge.experiments.experiment import Experiment

TOWERS: dict[str, dict[str, Any]] = {
    "IDs": {"use_item_id": True, "tower_features": False},
    "text": {"use_item_id": False, "tower_features": True},
    "text + IDs": {"use_item_id": True, "tower_features": True},
}


def parameters(dataset: str, data_path: str | None, variants: list[dict[str, Any]]) -> list[int]:
    """Trained numbers of each variant."""
    sys.argv = sys.argv[:1]
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model

    counts = []
    for variant in variants:
        values = {"show_progress": False, "state": "ERROR", "blocks": "learned"} | variant
        config = Config(
            model="LLMTwoTower", dataset=dataset, config_dict=values | ({"data_path": data_path} if data_path else {})
        )
        train, _, _ = data_preparation(config, create_dataset(config))
        model = get_model("LLMTwoTower")(config, train._dataset)
        counts.append(sum(p.numel() for p in model.parameters() if p.requires_grad))
    return counts


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", "-d", default="ml-100k")
    parser.add_argument("--data_path", default=None, help="folder of the dataset; ml-100k needs none")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--minutes", type=float, default=None, help="begin nothing further after so long; exit code 3")
    parser.add_argument("--work", default="sharing")
    parser.add_argument("--output", default=None, help="JSON; default benchmarks/results/sharing-<dataset>.json")
    arguments = parser.parse_args()
    pieces = Pieces(Path(arguments.work) / arguments.dataset, arguments.minutes)
    overrides = tuple([*COMMON, *([f"--data_path={arguments.data_path}"] if arguments.data_path else [])])
    variants = [
        (name, tied, options | {"share_parameters": tied}) for name, options in TOWERS.items() for tied in (False, True)
    ]
    counts = parameters(arguments.dataset, arguments.data_path, [options for _, _, options in variants])
    rows = []
    try:
        for (name, tied, options), count in zip(variants, counts, strict=True):
            row: dict[str, Any] = {"item": name, "towers": "one, tied" if tied else "two", "parameters": count}
            for blocks in ("learned", "closed_form+learned"):
                trainings, peak = [], 0
                for seed in range(arguments.seeds):
                    changes = options | {"blocks": blocks}
                    outcome = pieces.of(
                        Experiment("LLMTwoTower", arguments.dataset, (), changes, overrides, seeds=(seed,))
                    )
                    trainings += outcome.trainings
                    peak = max(peak, outcome.peak_bytes)
                row[blocks] = {
                    "valid": float(np.mean([t.best_valid_score for t in trainings])),
                    "test": float(np.mean([t.test["ndcg@10"] for t in trainings])),
                    "recall": float(np.mean([t.test["recall@10"] for t in trainings])),
                    "seconds": round(float(np.mean([t.seconds for t in trainings])), 1),
                    "peak_mib": round(peak / 2**20),
                    "seeds": len(trainings),
                }
            rows.append(row)
            print(
                f"{name:10} {row['towers']:9} {count:>9,} parameters, alone {row['learned']['test']:.4f} "
                f"({row['learned']['seconds']} s), blended {row['closed_form+learned']['test']:.4f}",
                flush=True,
            )
    except OutOfTimeError:
        print("out of time: run the same command again to go on")
        return 3
    result = {"benchmark": "sharing", "dataset": arguments.dataset, "rows": rows, "machine": machine("cpu")}
    path = Path(arguments.output or ROOT / "benchmarks" / "results" / f"sharing-{arguments.dataset}.json")
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    print(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
