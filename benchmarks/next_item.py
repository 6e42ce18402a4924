"""What the blocks that read order are worth under the canonical protocol, at documented constants: no search but that of weights.

    python benchmarks/next_item.py --dataset amazon-beauty --data_path FOLDER
    python benchmarks/next_item.py --dataset amazon-beauty --data_path FOLDER --sequence 3

The closed form has the constants of ``Setting()``, the next-item block those of ``SPARSE_START`` with content at its first weight,
both solved for exactly. Decays and weights of the blocks are chosen on validation by ``choose_decays``, as in a fit, once for each
rule of ``recbole-llm leaderboard``; the test part is ranked once for each row. ``--sequence N`` adds N trainings of the sequence
block, alone and beside the solved ones. The result file is written after every step, so that one that was stopped holds what there
is; rows of an earlier run stay where this one has none of their name, rule and seed. ``--keep FOLDER`` keeps solved and trained
blocks, pickles of this program's own, and ``--only sequence`` measures no solved row again.
"""

import argparse
import json
import pickle
import sys
import time
from collections.abc import Callable
from dataclasses import replace
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

import torch
from timing import machine

import recbole_llm  # noqa: F401  # before RecBole: its repairs
from recbole_llm.bridge.experiments.experiment import peak_bytes
from recbole_llm.bridge.experiments.leave_one_out import RULES, LeaveOneOut, load, prepare
from recbole_llm.fitting.closed_form import fit_closed_form
from recbole_llm.fitting.data import TrainingData
from recbole_llm.fitting.ease import Setting
from recbole_llm.fitting.next_item import CONTENT_WEIGHTS, SPARSE_START, directions_of, next_item_blocks
from recbole_llm.fitting.pipeline import MAX_DECAY_USERS, choose_decays, fit_sequence_block, weigh
from recbole_llm.fitting.stage_values import FittedBlock
from recbole_llm.fitting.validation import TopKMetric, Validation, evenly, user_metric
from recbole_llm.scoring.score import LinearBlock, Score
from recbole_llm.scoring.sequence import SequenceBlock

NDCG = TopKMetric("ndcg", 10)
KEY = ("row", "chosen_by", "seed")
START_DECAY, START_SCALE = 3.0, 6.0  # where the search of decays and weights begins


class Table:
    """Measures rows and writes them as soon as they are there.

    Args:
        path: of the result file.
        about: what else it holds.
        rows: the data.
    """

    def __init__(self, path: Path, about: dict[str, Any], rows: LeaveOneOut) -> None:
        self.path, self.about, self.rows = path, about, rows
        self.found: list[dict[str, Any]] = json.loads(path.read_text())["rows"] if path.is_file() else []
        self.started = time.process_time()

    def valid(self, score: Score) -> float:
        """NDCG@10 of the validation users by whom decays are chosen, items of the history masked."""
        validation, data = self.rows.validation, self.rows.data
        users = evenly(torch.nonzero(validation.targets.sizes).squeeze(1), MAX_DECAY_USERS)
        some = validation.targets.select(users), data.history.select(users)
        scorer = lambda ids: score.scores(some[1].select(ids), unlisted=True)  # noqa: E731
        return float(user_metric(scorer, *some, data.n_items, NDCG, ~data.trained).mean())

    def add(self, name: str, chosen_by: str, score: Score, seed: int | None = None, **more: float) -> None:
        """Rank the validation users and the test part by a score, the latter under both rules."""
        cpu = time.process_time() - self.started
        figures = {}
        for rule in RULES:
            values = self.rows.figures(lambda users: score.of_users(users, self.rows.later), rule)
            figures[rule] = {metric: float(value.mean()) for metric, value in values.items()}
            error = values["ndcg@10"].std(correction=0) / len(values["ndcg@10"]) ** 0.5
            figures[rule]["standard_error"] = float(error)
        row = {
            "row": name,
            "chosen_by": chosen_by,
            "seed": seed,
            "valid_ndcg@10": self.valid(score),
            "blocks": [[block.name, block.scale, block.decay] for block in score.counting],
            "figures": figures,
            "cpu_seconds_until_here": round(cpu, 1),
            "peak_bytes": peak_bytes(),
            **more,
        }
        key = [row[part] for part in KEY]
        self.found = [each for each in self.found if [each[part] for part in KEY] != key] + [row]
        self.path.write_text(json.dumps(self.about | {"rows": self.found}, indent=1) + "\n")
        print(json.dumps(row), flush=True)


def rule_of(validation: Validation, unmasked: bool) -> Validation:
    """The same validation under a rule."""
    if not unmasked:
        return validation
    return replace(validation, seen=validation.seen.keep(torch.zeros_like(validation.seen.ids, dtype=torch.bool)))


def kept(folder: str | None, name: str, make: Callable[[], Any]) -> tuple[Any, float]:
    """What ``make`` gives and its processor seconds, or what an earlier run has kept of both."""
    path = None if folder is None else Path(folder) / f"{name}.pickle"
    if path is not None and path.is_file():
        found: tuple[Any, float] = pickle.loads(path.read_bytes())
        return found
    started = time.process_time()
    found = make(), time.process_time() - started
    if path is not None:
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(pickle.dumps(found))
    return found


def solve(data: TrainingData) -> tuple[FittedBlock, tuple[LinearBlock, ...]]:
    """The solved blocks at documented constants."""
    form = fit_closed_form(data.history, data.n_items, data.content, None, dim="full", setting=Setting())
    closed = FittedBlock(replace(form.block(), decay=START_DECAY), form.setting)
    setting = SPARSE_START
    for modality in data.content:
        setting = setting.with_content(modality, CONTENT_WEIGHTS[0])
    solved = next_item_blocks(data.history, data.n_items, setting, None, directions_of(data.content, data.trained))
    return closed, tuple(replace(block, scale=START_SCALE) for block in solved)


def measure(options: argparse.Namespace, write: Callable[[LeaveOneOut], Table]) -> None:
    """Solve, choose and rank."""
    values = {"data_path": options.data_path, "show_progress": False, "state": "WARNING"}
    rows, _, _ = prepare(load(options.dataset, config_dict={k: v for k, v in values.items() if v is not None}))
    data, table, keep = rows.data, write(rows), options.keep
    (closed, following), _ = kept(keep, f"{options.dataset}-solved", lambda: solve(data))
    for rule in (False, True) if options.only != "sequence" else ():
        validation = rule_of(rows.validation, rule)
        score = choose_decays(weigh(data, validation, closed, following, None), data, validation)
        table.add("closed form + next item", RULES[rule], score)
    for block in (closed.block, *following) if options.only != "sequence" else ():
        table.add(block.name, "", Score((block,), data.rows.listed(), rows=data.rows))
    for seed in range(options.sequence):

        def train(seed: int = seed) -> SequenceBlock | None:
            torch.manual_seed(seed)
            return fit_sequence_block(data, rows.validation)

        block, seconds = kept(keep, f"{options.dataset}-sequence-{seed}", train)
        assert block is not None
        more = {"training_cpu_seconds": round(seconds, 1), "epochs": block.constants["epochs"]}
        table.add("sequence", RULES[0], Score((block,), data.rows.listed(), rows=data.rows), seed, **more)
        for rule in (False, True):
            validation = rule_of(rows.validation, rule)
            joined = weigh(data, validation, closed, following, None, block)
            table.add("all three", RULES[rule], choose_decays(joined, data, validation), seed)


def main() -> None:
    """Measure one data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="amazon-beauty")
    parser.add_argument("--data_path", default=None, help="folder that holds the data set's folder; ml-100k needs none")
    parser.add_argument("--sequence", type=int, default=0, help="trainings of the sequence block")
    parser.add_argument("--keep", default=None, help="folder of blocks that were solved for and trained")
    parser.add_argument("--only", default=None, choices=["sequence"], help="measure no solved row again")
    parser.add_argument("--output", default=None, help="JSON; default benchmarks/results/next_item-<dataset>.json")
    options = parser.parse_args()
    command = (
        f"python benchmarks/next_item.py --dataset {options.dataset} --data_path FOLDER --sequence {options.sequence}"
    )
    sys.argv = sys.argv[:1]  # RecBole's Config reads the command line
    path = Path(options.output or ROOT / "benchmarks" / "results" / f"next_item-{options.dataset}.json")
    about = {"benchmark": "next_item", "command": command, "dataset": options.dataset, "machine": machine("cpu")}
    measure(options, lambda rows: Table(path, about, rows))


if __name__ == "__main__":
    main()
