"""Recommendation quality of LLMTwoTower against RecBole's stock models: same split, same metric, same users.

    python benchmarks/model_quality.py --dataset ml-100k
    python benchmarks/model_quality.py --dataset amazon-office --data_path FOLDER --budget 4 --minutes 8

Each stock model is tuned by validation NDCG@10 alone over configs/<dataset>/<model>.hyper or configs/stock/<model>.hyper:
``--budget`` different settings drawn at random (seed 0), all of them where the grid is smaller; no trial evaluates the test
split. LLMTwoTower runs with its defaults. Only then is the test split used: once per model, seed and split seed, with the
setting that validation chose. On the first split, the one tuned on, a model that draws random numbers is trained
``--seeds`` times, fewer where ``--seed_minutes`` of processor time are over before, on the others ``--further_seeds`` times.

Every trial and every final training is a file in ``--work``. A run that was stopped goes on there, ``--minutes`` begins no
further piece after so long (exit code 3 while something is left), and ``--model_minutes`` ends a slow model's search early;
the number of settings tried stands in the result. The summary is one JSON file in benchmarks/results/.
"""

import argparse
import ast
import hashlib
import itertools
import json
import pickle
import random
import sys
import time
from collections.abc import Sequence
from dataclasses import replace
from functools import cache
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from timing import machine

from recbole_llm.bridge.experiments.comparison import Comparison, as_json, as_markdown, compare
from recbole_llm.bridge.experiments.experiment import Experiment, Outcome, run_isolated

OURS = "LLMTwoTower"
MODELS = (OURS, "EASE", "ADMMSLIM", "SLIMElastic", "ItemKNN", "NCEPLRec", "RecVAE", "MultiVAE", "LightGCN", "SimpleX")
MODELS += ("BPR", "NeuMF", "DMF", "DiffRec", "Pop")
COMMON = ("--metrics=['NDCG','Recall','MRR','ItemCoverage','AveragePopularity']", "--topk=[10]")
COMMON += ("--valid_metric=NDCG@10", "--eval_batch_size=4000000", "--show_progress=False", "--state=WARNING")


class OutOfTimeError(Exception):
    """``--minutes`` are over; the pieces that are done are kept."""


def say(text: str) -> None:
    print(text, flush=True)


def grid_of(model: str, dataset: str) -> list[dict[str, Any]]:
    """Every setting of the model's .hyper file, whose lines read ``name choice [values]``; one empty setting without one."""
    for folder in (dataset, "stock"):
        path = ROOT / "configs" / folder / f"{model}.hyper"
        if path.is_file():
            lines = [line.split(maxsplit=2) for line in path.read_text(encoding="utf-8").splitlines() if line.strip()]
            if unknown := [line for line in lines if len(line) != 3 or line[1] != "choice"]:
                raise ValueError(f"{path}: {' '.join(unknown[0])!r} is not a choice; expected: name choice [a,b]")
            names = [line[0] for line in lines]
            return [
                dict(zip(names, v, strict=True)) for v in itertools.product(*(ast.literal_eval(x[2]) for x in lines))
            ]
    return [{}]


@cache
def code_of(model: str) -> bytes:
    """What the model's outcomes depend on, a stock model's on its repairs: with other code they are run anew."""
    package = ROOT / "recbole_llm"
    files = [package / "bridge" / "repairs" / "models.py"]
    if model == OURS:
        rooms = (package / room for room in ("fitting", "scoring"))
        files = sorted([*package.glob("*.py"), *(package / "properties").glob("*.yaml")])
        files += sorted(file for room in rooms for file in room.rglob("*.py"))
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).digest()


class Pieces:
    """Outcomes of experiments of one seed each, on disk.

    Args:
        folder: where they are kept.
        minutes: no further piece begins after so long; ``None`` for no limit.
        seed_minutes: of the processor, after which no further seed of an experiment is begun.
    """

    def __init__(self, folder: Path, minutes: float | None, seed_minutes: float = float("inf")) -> None:
        self.folder, self.end = folder, time.monotonic() + 60 * minutes if minutes is not None else float("inf")
        self.seed_seconds = 60 * seed_minutes
        folder.mkdir(parents=True, exist_ok=True)

    def of(self, experiment: Experiment) -> Outcome:
        """The outcome, run if it is not there yet."""
        settings = repr(sorted(vars(experiment).items())).encode()
        name = hashlib.sha256(settings + code_of(experiment.model)).hexdigest()[:16]
        path = self.folder / f"{experiment.model}-{name}.pickle"
        if path.is_file():
            return pickle.loads(path.read_bytes())
        if time.monotonic() > self.end:
            raise OutOfTimeError
        outcome = run_isolated(experiment)
        partial = path.with_suffix(".partial")
        partial.write_bytes(pickle.dumps(outcome))
        partial.replace(path)
        return outcome

    def __call__(self, experiment: Experiment) -> Outcome:
        """One experiment of several seeds as pieces of one."""
        outcomes: list[Outcome] = []
        for seed in experiment.seeds:
            outcomes.append(self.of(replace(experiment, seeds=(seed,))))
            used = sum(training.cpu_seconds for outcome in outcomes for training in outcome.trainings)
            if outcomes[-1].deterministic or outcomes[-1].error or used > self.seed_seconds:
                break
        trainings = tuple(training for outcome in outcomes for training in outcome.trainings)
        peak = max(outcome.peak_bytes for outcome in outcomes)
        return replace(outcomes[-1], experiment=experiment, trainings=trainings, peak_bytes=peak)


def tune(
    model: str, arguments: argparse.Namespace, overrides: Sequence[str], pieces: Pieces
) -> tuple[dict[str, Any], dict[str, Any]]:
    """The setting that validation chooses, and a report of the search; the test split is not read."""
    grid = [{}] if model == OURS else grid_of(model, arguments.dataset)
    if len(grid) == 1:
        return grid[0], {"settings_in_grid": 1, "trials": []}
    drawn = random.Random(0).sample(grid, min(arguments.budget, len(grid)))
    trials: list[dict[str, Any]] = []
    for setting in drawn:
        if sum(trial["cpu_seconds"] for trial in trials) > 60 * arguments.model_minutes:
            break
        outcome = pieces.of(Experiment(model, arguments.dataset, (), setting, tuple(overrides), test=False))
        training = next(iter(outcome.trainings), None)
        valid, seconds = None, 0.0
        if training is not None:
            valid, seconds = training.best_valid_score, training.cpu_seconds or training.seconds
        trials.append({"setting": setting, "valid": valid, "cpu_seconds": round(seconds, 2), "error": outcome.error})
        say(f"  {model} {setting}: {outcome.error or f'valid {valid:.4f}, {seconds:.1f} s'}")
    found = [trial for trial in trials if trial["valid"] is not None]
    best = max(found, key=lambda trial: trial["valid"])["setting"] if found else {}
    return best, {"settings_in_grid": len(grid), "trials": trials}


def best_stock(comparison: Comparison) -> str | None:
    """The stock model that is first on the test split: the hardest to beat, whatever validation said."""
    return next((row.model for row in comparison.rows if row.model != OURS and not row.error), None)


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", "-d", default="ml-100k")
    parser.add_argument("--data_path", default=None, help="folder of the dataset; ml-100k needs none")
    parser.add_argument("--models", "-m", default=",".join(MODELS))
    parser.add_argument("--budget", type=int, default=6, help="different settings tried per stock model")
    parser.add_argument(
        "--seeds", type=int, default=5, help="trainings on the first split of a model that draws random numbers"
    )
    parser.add_argument("--further_seeds", type=int, default=1, help="the same on splits after the first")
    parser.add_argument("--seed_minutes", type=float, default=float("inf"), help="of the processor, per model's seeds")
    parser.add_argument("--further_models", default=None, help="the models on splits after the first; default all")
    parser.add_argument(
        "--split_seeds", default="2020,2021,2022", help="RecBole seeds of the splits; the first is tuned on"
    )
    parser.add_argument("--minutes", type=float, default=None, help="begin nothing further after so long")
    parser.add_argument(
        "--model_minutes",
        type=float,
        default=float("inf"),
        help="of the processor, per model's search",
    )
    parser.add_argument("--work", default="quality", help="trials and trainings, so that a stopped run goes on")
    parser.add_argument(
        "--part", default=None, help="what a further result file of the same dataset is for, such as slim"
    )
    parser.add_argument(
        "--output", default=None, help="JSON; default benchmarks/results/quality-<dataset>[-<part>].json"
    )
    arguments = parser.parse_args()
    models = arguments.models.split(",")
    if OURS not in models:
        parser.error(f"--models must contain {OURS}")
    further = (arguments.further_models or arguments.models).split(",")
    if OURS not in further or not set(further) <= set(models):
        parser.error(f"--further_models must contain {OURS} and be among --models")
    pieces = Pieces(Path(arguments.work) / arguments.dataset, arguments.minutes, arguments.seed_minutes)
    common = [*COMMON, *([f"--data_path={arguments.data_path}"] if arguments.data_path else [])]
    splits = [int(seed) for seed in arguments.split_seeds.split(",")]
    try:
        tuned = {model: tune(model, arguments, [*common, f"--seed={splits[0]}"], pieces) for model in models}
        reports = []
        for split in splits:
            found = compare(
                models if split == splits[0] else further,
                arguments.dataset,
                seeds=arguments.seeds if split == splits[0] else arguments.further_seeds,
                metric="ndcg@10",
                reference=OURS,
                overrides=[*common, f"--seed={split}"],
                settings={model: setting for model, (setting, _) in tuned.items()},
                run=pieces,
                progress=lambda text, split=split: say(f"  split {split}: {text}"),
            )
            say(f"\nsplit {split}\n{as_markdown(found)}\n")
            reports.append({"split_seed": split, "best_stock": best_stock(found), **as_json(found)})
    except OutOfTimeError:
        say("out of time: run the same command again to go on")
        return 3
    result = {
        "benchmark": "model_quality",
        "dataset": arguments.dataset,
        "protocol": "RecBole RS 8:1:1 by user, full ranking, history masked; settings chosen by validation NDCG@10",
        "part": arguments.part,
        "seconds": "from the model's making to the end of its training",
        "budget": arguments.budget,
        "model_minutes": arguments.model_minutes if arguments.model_minutes < float("inf") else None,
        "seed_minutes": arguments.seed_minutes if arguments.seed_minutes < float("inf") else None,
        "settings": {model: setting for model, (setting, _) in tuned.items()},
        "tuning": {model: report for model, (_, report) in tuned.items()},
        "splits": reports,
        "machine": machine("cpu"),
    }
    name = "-".join(filter(None, ("quality", arguments.dataset, arguments.part)))
    path = Path(arguments.output or ROOT / "benchmarks" / "results" / f"{name}.json")
    path.parent.mkdir(parents=True, exist_ok=True)
    path.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
    say(f"written: {path}")
    return 0


if __name__ == "__main__":
    sys.exit(main())
