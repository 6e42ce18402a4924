"""What fine-tuning the text encoder is worth: towers that know items by their texts alone, and the hybrid with the closed form.

    python benchmarks/finetune.py --dataset amazon-office --data_path FOLDER

A share of the items is hidden from training (``recbole-llm split``). The towers are trained, then 200 steps are made twice from
the same state and on the same users: with the encoder frozen (the control: adapters of the towers alone), and with the encoder
tuned by LoRA, its texts cut at 32 tokens. Frozen and tuned encoder read as many tokens. Figures are of the test: warm, trained
items among themselves; cold, hidden items among themselves; differences are paired over users, with 95% intervals. The hybrid
solves the closed form on the content of each state and blends the towers of that state into it. The gate judges on validation,
and nothing is chosen on these figures: a gate that keeps the base is a result.

Seeds in the result file are not run again; the state of a seed that was stopped is in ``--work``.
"""

import argparse
import json
import logging
import resource
import sys
import time
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch
from timing import machine
from torch import Tensor

import recbole_llm  # noqa: F401  # before RecBole: its repairs
from recbole_llm.bridge.environment import versions
from recbole_llm.bridge.experiments.significance import paired_bootstrap
from recbole_llm.bridge.finetune_option import read_finetune
from recbole_llm.bridge.training.finetune import tuning_of
from recbole_llm.bridge.watched_run import run_watched
from recbole_llm.fitting.finetune import fine_tune
from recbole_llm.fitting.finetune_recipe import Recipe
from recbole_llm.fitting.logs import quietly
from recbole_llm.fitting.pipeline import fit
from recbole_llm.fitting.validation import TopKMetric, Validation, user_metric
from recbole_llm.importing.cold_split import split_dataset
from recbole_llm.scoring.rows import Rows, rows_from_pairs

NDCG = TopKMetric("ndcg", 10)
HIDDEN = 0.15  # of the items


def prepare(dataset: str, data_path: str, work: Path, seed: int) -> str:
    """Hide items from training; gives the name of the new dataset in ``work``."""
    name = f"{dataset}-{seed}"
    if not (work / name).is_dir():
        source = work / dataset
        if not source.exists():
            source.symlink_to(Path(data_path).resolve() / dataset)
        split_dataset(dataset, name, cold_items=HIDDEN, seed=seed, data_path=work)
    return name


def settings(dataset: str, work: Path, seed: int, tokens: int) -> dict[str, Any]:
    """Towers that know items by their texts alone."""
    texts = {
        "amazon-office": {
            "item_text_fields": ["title", "brand", "categories", "description"],
            "item_text_template": "{title}. Brand: {brand}. Categories: {categories}. {description}",
        }
    }
    return {
        **texts.get(dataset, {}),
        "data_path": str(work),
        "checkpoint_dir": str(work / f"saved-{seed}"),
        "benchmark_filename": ["train", "valid", "test"],
        "blocks": "learned",
        "use_item_id": False,
        "encoder_max_tokens": tokens,
        "seed": seed,
        "show_progress": False,
        "state": "WARNING",
        "gpu_id": "",
        "load_col": {"inter": ["user_id", "item_id"]},
    }


class Measure:
    """Test figures of a score, for each user.

    Args:
        model: whose histories count.
        splits: loaders of training, validation and test.
    """

    def __init__(self, model: Any, splits: Any) -> None:
        self.history, self.n_items = model.history, model.n_items
        self.trained = model.training_data().trained
        valid, test = (part._dataset.training_rows() for part in splits[1:])
        rows = [self.history, valid]
        self.seen = rows_from_pairs(
            torch.cat([each.row_of_entry() for each in rows]), torch.cat([each.ids for each in rows]), model.n_users
        )
        self.targets = {"warm": test.keep(self.trained[test.ids]), "cold": test.keep(~self.trained[test.ids])}

    def __call__(self, scorer: Any) -> dict[str, Tensor]:
        """NDCG@10 of each user who has a target, by group."""
        padding = torch.arange(self.n_items) == 0
        excluded = {"warm": ~self.trained, "cold": self.trained | padding}
        return {
            group: user_metric(scorer, targets, self.seen, self.n_items, NDCG, excluded[group])
            for group, targets in self.targets.items()
        }


def scorer_of(score: Any, history: Rows) -> Any:
    """Scores of users, those of cold items included wherever they would stand."""
    return lambda users: score.scores(history.select(users), score.user_parts(users), unlisted=True)


def hybrid(model: Any, validation: Validation) -> Any:
    """The closed form on the content as it is now, with the towers as they are now."""
    options = replace(model.options, blocks=("closed_form", "learned"))
    with quietly():
        return fit(model.training_data(), validation, options, model.towers.block, rank_all_cold=True).score


def one_seed(dataset: str, data_path: str, work: Path, seed: int, recipe: Recipe) -> dict[str, Any]:
    """Figures of one seed."""
    name = prepare(dataset, data_path, work, seed)
    began = time.perf_counter()
    _, watch = run_watched(
        "LLMTwoTower", name, [], settings(dataset, work, seed, recipe.max_tokens or 256), lambda config: None
    )
    trainer, splits = watch.trainer, watch.splits
    model = trainer.model.eval()
    logging.getLogger("recbole_llm.fitting").setLevel(logging.INFO)
    logging.getLogger("recbole_llm.fitting").addHandler(logging.StreamHandler(sys.stderr))
    validation = trainer.validation(splits[1], splits[0]._dataset)
    measure = Measure(model, splits)
    tuning, _ = tuning_of(model, splits[0]._dataset, trainer.config, recipe)
    towers: dict[str, dict[str, Tensor]] = {}
    blended: dict[str, dict[str, Tensor]] = {}
    marks = {"trained": time.perf_counter()}

    def observe(state: str) -> None:
        marks[f"{state} ends"] = time.perf_counter()
        towers[state] = measure(model.towers.block().scorer(model.history))
        if state != "start":
            blended[state] = measure(scorer_of(hybrid(model, validation), model.history))
        marks[f"{state} measured"] = time.perf_counter()
        print(seed, state, {group: round(float(each.mean()), 4) for group, each in towers[state].items()}, flush=True)

    file = work / f"state-{seed}.pt"
    resume = torch.load(file, weights_only=True) if file.is_file() else None
    outcome = fine_tune(
        tuning, model.training_data(), validation, resume, lambda state: torch.save(state, file), observe
    )
    file.unlink(missing_ok=True)
    seconds = marks["tuned ends"] - marks["control measured"]
    return {
        "seed": seed,
        "towers": {
            state: {group: round(float(v.mean()), 4) for group, v in found.items()} for state, found in towers.items()
        },
        "hybrid": {
            state: {group: round(float(v.mean()), 4) for group, v in found.items()} for state, found in blended.items()
        },
        "tuned_minus_control": {
            what: {group: paired(found["tuned"][group], found["control"][group]) for group in ("warm", "cold")}
            for what, found in (("towers", towers), ("hybrid", blended))
        },
        "users": {group: len(v) for group, v in towers["start"].items()},
        "gate": outcome.verdict.to_state(),
        "resumed": resume is not None,
        "seconds": {
            "training": round(marks["trained"] - began, 1),
            "control": round(marks["control ends"] - marks["start measured"], 1),
            "tuning": round(seconds, 1),
            "step, refreshes included": round(seconds / recipe.steps, 2),
        },
        "peak_mb": round(resource.getrusage(resource.RUSAGE_SELF).ru_maxrss / 1024),
    }


def paired(ours: Tensor, theirs: Tensor) -> dict[str, float]:
    """Mean difference over users and its 95% interval."""
    found = paired_bootstrap(ours.numpy(), theirs.numpy())
    return {key: round(getattr(found, key), 4) for key in ("mean", "low", "high", "p")}


def main() -> None:
    """Run the seeds that are missing, and write the result file after every one."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", "-d", default="amazon-office")
    parser.add_argument("--data_path", required=True, help="folder that holds the dataset's folder")
    parser.add_argument("--seeds", default="1,2,3")
    parser.add_argument("--finetune", default="{encoder: text, method: lora, max_tokens: 32}")
    parser.add_argument("--work", type=Path, required=True, help="folder for splits, checkpoints and states")
    parser.add_argument("--output", type=Path, default=None)
    arguments = parser.parse_args()
    sys.argv = sys.argv[:1]
    output = arguments.output or ROOT / "benchmarks" / "results" / f"finetune-{arguments.dataset}.json"
    arguments.work.mkdir(parents=True, exist_ok=True)
    recipe = read_finetune("finetune", arguments.finetune)
    assert recipe is not None
    seeds = json.loads(output.read_text())["seeds"] if output.is_file() else []
    for seed in map(int, arguments.seeds.split(",")):
        if seed in {each["seed"] for each in seeds}:
            continue
        seeds.append(one_seed(arguments.dataset, arguments.data_path, arguments.work, seed, recipe))
        result = {
            "benchmark": "finetune",
            "dataset": arguments.dataset,
            "hidden_items": HIDDEN,
            "recipe": recipe.to_state(),
            "machine": machine("cpu"),
            "versions": versions(),
            "seeds": seeds,
        }
        output.write_text(json.dumps(result, indent=1) + "\n", encoding="utf-8")
        print(json.dumps(seeds[-1]), flush=True)


if __name__ == "__main__":
    main()
