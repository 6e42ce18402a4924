"""What the blocks that read order are worth under the canonical protocol, at documented constants: no search but that of weights.

    python benchmarks/next_item.py --dataset amazon-beauty --data_path FOLDER
    python benchmarks/next_item.py --dataset amazon-beauty --data_path FOLDER --sequence 3

The closed form has the constants of ``Setting()``, the next-item block those of ``SPARSE_START`` with content at its first weight,
both solved for exactly. Decays and weights of the blocks are chosen on validation by ``choose_decays``, as in a fit, once for each
rule of ``recbole-llm leaderboard``; the test part is ranked once for each row. ``--sequence N`` adds N trainings of the sequence
block. The result file is written after every step, so that one that was stopped holds what there is.
"""

import argparse
import json
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
from recbole_llm.fitting.ease import Setting
from recbole_llm.fitting.next_item import CONTENT_WEIGHTS, SPARSE_START, directions_of, next_item_blocks
from recbole_llm.fitting.pipeline import choose_decays, fit_sequence_block, weigh
from recbole_llm.fitting.stage_values import FittedBlock
from recbole_llm.fitting.validation import Validation
from recbole_llm.scoring.score import Score

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
        self.found: list[dict[str, Any]] = []
        self.started = time.process_time()

    def add(self, name: str, chosen_by: str, score: Score, seed: int | None = None) -> None:
        """Rank the test part by a score under both rules."""
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
            "blocks": [[block.name, block.scale, block.decay] for block in score.counting],
            "figures": figures,
            "cpu_seconds_until_here": round(cpu, 1),
            "peak_bytes": peak_bytes(),
        }
        self.found.append(row)
        self.path.write_text(json.dumps(self.about | {"rows": self.found}, indent=1) + "\n")
        print(json.dumps(row), flush=True)


def rule_of(validation: Validation, unmasked: bool) -> Validation:
    """The same validation under a rule."""
    if not unmasked:
        return validation
    return replace(validation, seen=validation.seen.keep(torch.zeros_like(validation.seen.ids, dtype=torch.bool)))


def measure(options: argparse.Namespace, write: Callable[[LeaveOneOut], Table]) -> None:
    """Solve, choose and rank."""
    values = {"data_path": options.data_path, "show_progress": False, "state": "WARNING"}
    rows, _, _ = prepare(load(options.dataset, config_dict=values))
    data, table = rows.data, write(rows)
    form = fit_closed_form(data.history, data.n_items, data.content, None, dim="full", setting=Setting())
    closed = FittedBlock(replace(form.block(), decay=START_DECAY), form.setting)
    setting = SPARSE_START
    for modality in data.content:
        setting = setting.with_content(modality, CONTENT_WEIGHTS[0])
    solved = next_item_blocks(data.history, data.n_items, setting, None, directions_of(data.content, data.trained))
    following = tuple(replace(block, scale=START_SCALE) for block in solved)
    for rule in (False, True):
        validation = rule_of(rows.validation, rule)
        score = choose_decays(weigh(data, validation, closed, following, None), data, validation)
        table.add("closed form + next item", RULES[rule], score)
    for block in (closed.block, *following):
        table.add(block.name, "", Score((block,), data.rows.listed(), rows=data.rows))
    for seed in range(options.sequence):
        torch.manual_seed(seed)
        block = fit_sequence_block(data, rows.validation)
        assert block is not None
        table.add("sequence", RULES[0], Score((block,), data.rows.listed(), rows=data.rows), seed)
        joined = weigh(data, rows.validation, closed, following, None, block)
        table.add("all three", RULES[0], choose_decays(joined, data, rows.validation), seed)


def main() -> None:
    """Measure one data set."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--dataset", default="amazon-beauty")
    parser.add_argument("--data_path", required=True, help="folder that holds the data set's folder")
    parser.add_argument("--sequence", type=int, default=0, help="trainings of the sequence block")
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
