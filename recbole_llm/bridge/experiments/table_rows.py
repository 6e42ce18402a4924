"""Rows measured under the protocol of :mod:`recbole_llm.bridge.experiments.leave_one_out`, each in a process of its own."""

import sys
import tempfile
import time
from dataclasses import dataclass
from typing import Any

import numpy as np

from recbole_llm.bridge.experiments.baselines import BASELINES, WITH_BUDGET, RefusedRowError, Solved
from recbole_llm.bridge.experiments.experiment import in_own_process, peak_bytes
from recbole_llm.bridge.experiments.leave_one_out import OURS, RULES, LeaveOneOut, Loaded, load, prepare

ROWS = (*BASELINES, OURS)  # measured where none are asked for
SEEDED = (OURS, *WITH_BUDGET)  # rows that are trained from random numbers


@dataclass(frozen=True)
class Measured:
    """One row of the table.

    Attributes:
        name: of the row.
        seed: of its training; 0 where there is none.
        chosen_by: the rule of ``RULES`` by which its validation chose.
        setting: what validation chose, in words.
        valid: NDCG@10 on validation.
        figures: test metrics by rule and metric.
        users: NDCG@10 of each test user by rule, ``[U]`` float64.
        cpu_seconds: of the processor, from making the model to the end of its training.
        seconds: the same by the clock.
        peak_bytes: largest resident memory of the process so far.
    """

    name: str
    seed: int
    chosen_by: str
    setting: str
    valid: float
    figures: dict[str, dict[str, float]]
    users: dict[str, np.ndarray]
    cpu_seconds: float
    seconds: float
    peak_bytes: int


def measure(loaded: Loaded, name: str, seed: int = 0, minutes: float | None = None) -> Measured:
    """Fit one row and measure it on the test split.

    Args:
        loaded: the data set.
        name: ``LLMTwoTower``, one of ``BASELINES`` or one of ``WITH_BUDGET``.
        seed: added to the configuration's; ignored by rows that are solved for.
        minutes: of the processor, for a row of ``WITH_BUDGET``.

    Raises:
        ValueError: if there is no such row, or it lacks its budget.
    """
    from recbole.utils import init_seed

    if name not in (*ROWS, *WITH_BUDGET):
        raise ValueError(f"rows: {name!r} is not one; expected some of {', '.join([*ROWS, *WITH_BUDGET])}.")
    init_seed(loaded.config["seed"] + seed, loaded.config["reproducibility"])
    loaded.loaders[0].generator.manual_seed(loaded.config["seed"] + seed)
    started, cpu_started = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as checkpoints:
        loaded.config["checkpoint_dir"] = checkpoints  # the best epoch of the towers is read back from there
        rows, model, trainer = prepare(loaded)
        if name == OURS:
            trainer.fit(*loaded.loaders[:2], saved=True, show_progress=False)
            model.eval().at_test = True
            found = Solved(_blocks_in_words(model), float(trainer.best_valid_result["ndcg@10"]), model.scores)
        else:
            found = _baseline(rows, name, minutes)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    figures: dict[str, dict[str, float]] = {}
    users: dict[str, np.ndarray] = {}
    for rule in RULES:
        by_user = rows.figures(found.scorer, rule)
        figures[rule] = {metric: float(value.mean()) for metric, value in by_user.items()}
        users[rule] = by_user["ndcg@10"].cpu().numpy()
    return Measured(
        name,
        seed if name in SEEDED else 0,
        RULES[bool(loaded.config["repeatable"])],
        found.setting,
        found.valid,
        figures,
        users,
        cpu_seconds,
        seconds,
        peak_bytes(),
    )


def _baseline(rows: LeaveOneOut, name: str, minutes: float | None) -> Solved:
    if name in BASELINES:
        return BASELINES[name](rows)
    if minutes is None or not minutes > 0:
        raise ValueError(f"{name} is trained within a budget, and budget is {minutes}; give --budget MINUTES above 0.")
    return WITH_BUDGET[name](rows, minutes)


def _blocks_in_words(model: Any) -> str:
    parts = []
    for block in model.score.counting:
        decay = "" if block.decay is None else f", decay {block.decay:g}"
        direct = "" if block.direct is None else f" + {len(block.direct.ids) / len(block.direct.sizes):.0f} a row"
        parts.append(f"{block.name} ({'full' if block.target is None else block.dim}{direct}{decay})")
    return " + ".join(parts)


# ---------------------------------------------------------------- in a process of its own


@dataclass(frozen=True)
class RowRequest:
    """A row to be measured elsewhere.

    Attributes:
        dataset: name of the data set.
        name: of the row.
        seed: of its training.
        unmasked: whether choices follow the rule ``unmasked``.
        minutes: its budget; ``None`` for none.
        config_files: YAML files.
        arguments: of the command line, as RecBole reads them.
    """

    dataset: str
    name: str
    seed: int = 0
    unmasked: bool = False
    minutes: float | None = None
    config_files: tuple[str, ...] = ()
    arguments: tuple[str, ...] = ()


def measure_isolated(request: RowRequest) -> Measured:
    """Measure one row in a fresh process, so that its peak of memory is its own.

    Raises:
        ValueError: if the row cannot be measured, a ``RefusedRowError`` if this data set cannot have it.
        ChildProcessError: if the process ended without an answer, such as for want of memory.
    """
    found = in_own_process(_answer, request)
    if isinstance(found, ValueError):
        raise found
    assert isinstance(found, Measured)
    return found


def _answer(request: RowRequest) -> Measured | ValueError:
    from recbole_llm.bridge.repairs.configuration import PROGRAM

    sys.argv = [PROGRAM, *request.arguments]  # RecBole reads its configuration here
    try:
        loaded = load(request.dataset, request.config_files, unmasked=request.unmasked)
        return measure(loaded, request.name, request.seed, request.minutes)
    except ValueError as error:
        return (RefusedRowError if isinstance(error, RefusedRowError) else ValueError)(str(error))
