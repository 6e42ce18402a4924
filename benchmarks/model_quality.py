"""Recommendation quality of LLMTwoTower against RecBole's stock models: same split, same metric, same users.

    python benchmarks/model_quality.py --dataset ml-100k
    python benchmarks/model_quality.py --dataset amazon-office --data_path FOLDER --budget 4 --seeds 3

Each stock model is tuned by validation NDCG@10 alone, over configs/<dataset>/<model>.hyper or configs/stock/<model>.hyper, at most
``--budget`` settings drawn at random (seed 0), all of them where the grid is smaller; LLMTwoTower runs with its defaults. Only then
is the test split used: once per model, seed and split seed, with the setting that validation chose. Trials and results are kept in
``--work``, so that a run that was stopped goes on; the summary is one JSON file in benchmarks/results/.
"""

import argparse
import json
import platform
import subprocess
import sys
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]

from recbole_llm.bridge.compare import Comparison, as_json, as_markdown, compare
from recbole_llm.bridge.tuning import ranked, tune

MODELS = (
    "LLMTwoTower",
    "EASE",
    "ItemKNN",
    "NCEPLRec",
    "ADMMSLIM",
    "SLIMElastic",
    "MultiVAE",
    "RecVAE",
    "LightGCN",
    "SimpleX",
)
MODELS += ("BPR", "NeuMF", "DMF", "DiffRec", "Pop")
OURS = "LLMTwoTower"
COMMON = (
    "--metrics=['NDCG','Recall','MRR','ItemCoverage','AveragePopularity']",
    "--topk=[10]",
    "--valid_metric=NDCG@10",
)
COMMON += ("--eval_batch_size=4000000", "--show_progress=False", "--state=WARNING")


def say(text: str) -> None:
    print(text, flush=True)


def grid_of(model: str, dataset: str) -> Path | None:
    for folder in (dataset, "stock"):
        path = ROOT / "configs" / folder / f"{model}.hyper"
        if path.is_file():
            return path
    return None


def tune_stock(
    model: str, arguments: argparse.Namespace, overrides: list[str]
) -> tuple[dict[str, Any], list[dict[str, Any]]]:
    """The setting that validation chooses, and every trial's validation score; test figures are not read here."""
    grid = grid_of(model, arguments.dataset)
    if model == OURS or grid is None:
        return {}, []
    trials = tune(
        model,
        arguments.dataset,
        str(grid),
        algorithm="random",
        max_evals=arguments.budget,
        early_stop=10**6,
        output=Path(arguments.work) / arguments.dataset / model,
        overrides=overrides,
        progress=lambda text: say(f"  {model}: {text}"),
    )
    best = ranked(trials)[0]
    return best.params, [{"params": t.params, "valid": t.score, "seconds": t.seconds, "error": t.error} for t in trials]


def commit() -> str:
    done = subprocess.run(["git", "describe", "--always", "--dirty"], cwd=ROOT, capture_output=True, text=True)
    return done.stdout.strip() or "unknown"


def best_stock(comparison: Comparison) -> str | None:
    return next((row.model for row in comparison.rows if row.model != OURS and not row.error), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", "-d", default="ml-100k")
    parser.add_argument("--data_path", default=None, help="folder of the dataset; ml-100k needs none")
    parser.add_argument("--models", "-m", default=",".join(MODELS))
    parser.add_argument("--budget", type=int, default=6, help="settings tried per stock model")
    parser.add_argument("--seeds", type=int, default=3, help="trainings per model that is not deterministic")
    parser.add_argument(
        "--split_seeds", default="2020,2021", help="RecBole seeds that make the splits; the first is tuned on"
    )
    parser.add_argument("--work", default="quality", help="trials, so that a stopped run goes on")
    parser.add_argument("--output", default=None, help="JSON; default benchmarks/results/quality-<dataset>.json")
    arguments = parser.parse_args()
    models = arguments.models.split(",")
    if OURS not in models:
        parser.error(f"--models must contain {OURS}")
    common = [*COMMON, *([f"--data_path={arguments.data_path}"] if arguments.data_path else [])]
    splits = [int(seed) for seed in arguments.split_seeds.split(",")]

    settings, trials = {}, {}
    for model in models:
        settings[model], trials[model] = tune_stock(model, arguments, [*common, f"--seed={splits[0]}"])
    reports = []
    for split in splits:
        found = compare(
            models,
            arguments.dataset,
            seeds=arguments.seeds,
            metric="ndcg@10",
            reference=OURS,
            overrides=[*common, f"--seed={split}"],
            settings=settings,
            progress=lambda text, split=split: say(f"  split {split}: {text}"),
        )
        say(f"\nsplit {split}\n{as_markdown(found)}\n")
        reports.append({"split_seed": split, "best_stock": best_stock(found), **as_json(found)})
    result = {
        "benchmark": "model_quality",
        "dataset": arguments.dataset,
        "protocol": "RecBole RS 8:1:1 by user, full ranking, history masked; settings chosen by validation NDCG@10",
        "budget": arguments.budget,
        "settings": settings,
        "tuning": trials,
        "splits": reports,
        "machine": {"platform": platform.platform(), "processor": platform.processor() or platform.machine()},
        "commit": commit(),
    }
    path = Path(arguments.output or ROOT / "benchmarks" / "results" / f"quality-{arguments.dataset}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    say(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
