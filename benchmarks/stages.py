"""What each stage of the fit costs and gains, one after the other, on one split of a dataset.

    python benchmarks/stages.py --dataset ml-100k
    python benchmarks/stages.py --dataset ml-100k --by_time

The stages are those of ``recbole_llm/fitting/pipeline.py``, called one by one; after each the test split is ranked by what there
is then. Processor time counts all threads. The figures show where the quality comes from; nothing is chosen by them.
"""

import argparse
import json
import pickle
import tempfile
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

import torch
from timing import machine

import recbole_llm  # noqa: F401  # before RecBole: its repairs
from recbole_llm.bridge.training.tower_choice import patience
from recbole_llm.fitting.pipeline import (
    calibrate,
    choose_decays,
    fit_closed_form_block,
    fit_next_item_block,
    fit_sequence_block,
    place_cold_items,
    weigh,
)
from recbole_llm.fitting.sequence import takes_part
from recbole_llm.fitting.validation import TopKMetric, user_metric
from recbole_llm.scoring.rows import Rows, rows_from_pairs
from recbole_llm.scoring.score import Score

NDCG = TopKMetric("ndcg", 10)
RESULTS = Path(__file__).resolve().parent / "results"
BY_TIME = {
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
}


def rows_of(split: Any, n_users: int) -> Rows:
    """The interactions of a split, a row for every user."""
    inter = split._dataset.inter_feat
    fields = split._dataset.uid_field, split._dataset.iid_field
    return rows_from_pairs(*(inter[field].long() for field in fields), n_users)


def joined(first: Rows, second: Rows) -> Rows:
    """Both rows of every user in one."""
    both = (first, second)
    rows = torch.cat([each.row_of_entry() for each in both])
    return rows_from_pairs(rows, torch.cat([each.ids for each in both]), len(first.sizes))


class Stages:
    """Times stages and measures what there is after each.

    Args:
        train: the training loader.
        valid: the validation loader.
        test: the test loader.
        model: the model whose towers are trained.
        keep: folder of stages that have run, which this program wrote itself; ``None`` for none.
    """

    def __init__(self, train: Any, valid: Any, test: Any, model: Any, keep: str | None = None) -> None:
        self.model, self.keep = model, keep
        self.valid = rows_of(valid, model.n_users)
        self.targets = rows_of(test, model.n_users)
        self.seen = joined(model.history, rows_of(valid, model.n_users))
        self.histories = model.history
        if model.history.ranks is not None:
            self.histories = train._dataset.training_ranks(valid._dataset.inter_feat)
        self.padding = torch.arange(model.n_items) == 0
        self.rows: list[dict[str, Any]] = []

    def run(self, name: str, stage: Callable[[], Any], score_of: Callable[[Any], Score]) -> Any:
        """Run a stage, and rank the test split by the score that is there afterwards."""
        kept = None if self.keep is None else Path(self.keep) / f"{len(self.rows)}.pickle"
        if kept is not None and kept.is_file():
            found, row = pickle.loads(kept.read_bytes())
            self.rows.append(row)
            return found
        wall, cpu = time.perf_counter(), time.process_time()
        found = stage()
        seconds, cpu_seconds = time.perf_counter() - wall, time.process_time() - cpu
        score = score_of(found)
        scorer = lambda users: score.of_users(users, self.histories)  # noqa: E731
        value = user_metric(scorer, self.targets, self.seen, self.model.n_items, NDCG, self.padding)
        row = {
            "stage": name,
            "seconds": round(seconds, 2),
            "cpu_seconds": round(cpu_seconds, 2),
            "valid_ndcg@10": round(float(self._of_validation(score).mean()), 4),
            "test_ndcg@10": round(float(value.mean()), 4),
            "blocks": {block.name: block.scale for block in score.counting},
        }
        print(json.dumps(row), flush=True)
        self.rows.append(row)
        if kept is not None:
            kept.write_bytes(pickle.dumps((found, row)))
        return found

    def _of_validation(self, score: Score) -> Any:
        model = self.model
        scorer = lambda users: score.of_users(users, model.history)  # noqa: E731
        return user_metric(scorer, self.valid, model.history, model.n_items, NDCG, self.padding)


def measure(
    dataset: str, data_path: str | None, by_time: bool, keep: str | None = None, seed: int | None = None
) -> dict[str, Any]:
    """The stages of one dataset."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    with tempfile.TemporaryDirectory() as folder:
        settings: dict[str, Any] = {"show_progress": False, "state": "WARNING", "checkpoint_dir": folder}
        settings |= ({"data_path": data_path} if data_path else {}) | ({} if seed is None else {"seed": seed})
        config = Config("LLMTwoTower", dataset, config_dict=settings | (BY_TIME if by_time else {}))
        init_seed(config["seed"], config["reproducibility"])
        train, valid, test = data_preparation(config, create_dataset(config))
        init_seed(config["seed"], config["reproducibility"])  # as run_recbole, so that the run is that of the command
        model = get_model("LLMTwoTower")(config, train._dataset)
        trainer = get_trainer(config["MODEL_TYPE"], "LLMTwoTower")(config, model)
        data, validation = model.training_data(), trainer.validation(valid)
        stages = Stages(train, valid, test, model, keep)
        listed = data.rows.listed()

        def of(*blocks: Any) -> Score:
            return Score(tuple(block for block in blocks if block is not None), listed, rows=data.rows)

        options = model.options
        closed = stages.run(
            "closed form", lambda: fit_closed_form_block(data, validation, options), lambda found: of(found.block)
        )
        following = stages.run(
            "next-item block",
            lambda: fit_next_item_block(data, closed, validation),
            lambda found: of(closed.block, *found),
        )
        trainer._train_data, trainer._saves = train, True
        trainer.stopping_step = patience(trainer, len(train) * int(config["eval_step"]))
        learned = stages.run("towers alone", lambda: trainer.train_towers(train, valid, False), of)
        sequence = None
        if takes_part(options.blocks, data, validation is not None):
            sequence = stages.run("sequence block alone", lambda: fit_sequence_block(data, validation), of)
        score = stages.run(
            "weights", lambda: weigh(data, validation, closed, following, learned, sequence), lambda found: found
        )
        score = stages.run("decays", lambda: choose_decays(score, data, validation), lambda found: found)
        score = stages.run(
            "cold-start items",
            lambda: place_cold_items(score, data, validation, options, closed.setting),
            lambda found: found,
        )
        stages.run("calibration", lambda: calibrate(score, data, validation), lambda found: replace(found))
    return {"dataset": dataset, "by_time": by_time, "stages": stages.rows}


def main() -> None:
    """Measure one dataset and put it into the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="ml-100k")
    parser.add_argument("--data_path", default=None, help="folder of the dataset; ml-100k needs none")
    parser.add_argument("--by_time", action="store_true", help="leave one out in the order of time")
    parser.add_argument("--keep", default=None, help="folder in which stages that have run are kept and found again")
    parser.add_argument("--seed", type=int, default=None, help="of the run; the default is RecBole's")
    parser.add_argument("--label", default=None, help="of this run, beside those without one in the file")
    parser.add_argument("--output", default=str(RESULTS / "stages.json"))
    arguments = parser.parse_args()
    if arguments.keep is not None:
        Path(arguments.keep).mkdir(parents=True, exist_ok=True)
    import sys

    sys.argv = sys.argv[:1]  # RecBole's Config reads the command line
    found = measure(arguments.dataset, arguments.data_path, arguments.by_time, arguments.keep, arguments.seed) | {
        "machine": machine("cpu")
    }
    path = Path(arguments.output)
    kept = json.loads(path.read_text())["runs"] if path.is_file() else []
    found |= {} if arguments.label is None else {"label": arguments.label}

    def key(run: dict[str, Any]) -> tuple[str, bool, str]:
        return run["dataset"], run["by_time"], run.get("label", "")

    runs = sorted([run for run in kept if key(run) != key(found)] + [found], key=key)
    path.write_text(json.dumps({"benchmark": "stages", "metric": "ndcg@10", "runs": runs}, indent=1) + "\n")


if __name__ == "__main__":
    main()
