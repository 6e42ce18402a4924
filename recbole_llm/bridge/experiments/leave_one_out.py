r"""Leave one out in the order of time, every item ranked: the protocol of the canonical tables, and rows measured under it.

A user's last item is the test, the one before it the validation. Histories at test hold every item before the last. Every choice
is made on validation. Each row is measured under both rules that papers follow: ``masked``, where items of the history have no
place, and ``unmasked``, where they have one. Of a full ranking, RecBole's own evaluation gives the first for general models and,
with ``repeatable: true``, the second.

Three rows are solved here beside LLMTwoTower:

    Popularity      s_ui = training interactions of i
    Transitions     s_ui = sum_{j in H_u} exp(-rank_uj / tau) sum over histories with j at gap d before i of exp(-d / tau)
    EASE            s_ui = sum_{j in H_u} B_ji (Steck, WWW 2019), its ridge by validation
"""

import tempfile
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.bridge.experiments.experiment import peak_bytes
from recbole_llm.fitting.data import TrainingData
from recbole_llm.fitting.ease import Setting, solve, user_weights, weighted_gram
from recbole_llm.fitting.hyperparameters import search_setting
from recbole_llm.fitting.next_item import next_item_gram
from recbole_llm.fitting.validation import CHUNK_ELEMENTS, TopKMetric, Validation, hide_seen
from recbole_llm.fitting.warm_items import warm_items
from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.score import LinearBlock, Scorer

PROTOCOL = {
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
    "metrics": ["NDCG", "Recall"],
    "topk": [5, 10],
    "valid_metric": "NDCG@10",
}
METRICS = tuple(TopKMetric(name, k) for name in ("recall", "ndcg") for k in (5, 10))
RULES = ("masked", "unmasked")
OURS = "LLMTwoTower"
TRANSITION_DECAYS = (0.5, 1.0, 2.0, 4.0, 10.0)
MAX_ITEMS = 20_000  # of Transitions and EASE, whose matrices are [n, n]


@dataclass(frozen=True)
class LeaveOneOut:
    """The rows of a data set under the protocol.

    Attributes:
        data: the training interactions, with ranks.
        validation: targets and what is seen, with the rule that choices follow.
        later: histories at test.
        targets: the test items.
    """

    data: TrainingData
    validation: Validation
    later: Rows
    targets: Rows

    def seen(self, rule: str) -> Rows:
        """Return the items without a place at test under a rule of ``RULES``."""
        if rule == "masked":
            return self.later
        return self.later.keep(torch.zeros_like(self.later.ids, dtype=torch.bool))

    def figures(self, scorer: Scorer, rule: str) -> dict[str, Tensor]:
        """Rank every test user once; each of ``METRICS`` by name, ``[U]`` float64."""
        users = torch.nonzero(self.targets.sizes).squeeze(1)
        seen, most = self.seen(rule), max(metric.k for metric in METRICS)
        hits = []
        for few in users.split(max(1, CHUNK_ELEMENTS // self.data.n_items)):
            scores = scorer(few)
            relevant = hide_seen(scores, seen.select(few), self.targets.select(few), self.padding)
            assert relevant is not None
            top, items = scores.topk(min(most, self.data.n_items), dim=1)
            hits.append(relevant.gather(1, items) & (top > -torch.inf))
        places, sizes = torch.cat(hits), self.targets.sizes[users]
        return {str(metric).lower(): metric.of(places[:, : metric.k], sizes) for metric in METRICS}

    @property
    def padding(self) -> Tensor:
        """The item that is none, ``[N]`` bool."""
        return torch.arange(self.data.n_items) == 0


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


@dataclass
class Loaded:
    """A data set prepared by RecBole.

    Attributes:
        config: RecBole's.
        loaders: of training, validation and test.
    """

    config: Any
    loaders: tuple[Any, Any, Any]

    @property
    def n_users(self) -> int:
        """Users with an interaction."""
        return int(self.loaders[0]._dataset.user_num) - 1

    @property
    def n_items(self) -> int:
        """Items with an interaction."""
        return int(self.loaders[0]._dataset.item_num) - 1


def load(
    dataset: str, config_files: Sequence[str] = (), config_dict: Mapping[str, Any] | None = None, unmasked: bool = False
) -> Loaded:
    """Read a data set under the protocol.

    Args:
        dataset: its name.
        config_files: YAML files.
        config_dict: values over the files; the protocol's own stand above both.
        unmasked: whether choices follow the rule ``unmasked``.

    Raises:
        ValueError: if the data set has no column of times.
    """
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import init_logger, init_seed

    values = dict(config_dict or {}) | PROTOCOL | {"repeatable": unmasked}
    config = Config(OURS, dataset, config_file_list=list(config_files) or None, config_dict=values)
    columns = dict(config["load_col"] or {})
    if columns.get("inter") and config["TIME_FIELD"] not in columns["inter"]:
        config["load_col"] = columns | {"inter": [*columns["inter"], config["TIME_FIELD"]]}
    init_seed(config["seed"], config["reproducibility"])
    init_logger(config)
    loaders = data_preparation(config, create_dataset(config))
    if loaders[0]._dataset.training_ranks() is None:
        raise ValueError(
            f"dataset {dataset!r} has no column {config['TIME_FIELD']!r}, which leave one out by time needs; name the column of "
            "times as TIME_FIELD."
        )
    return Loaded(config, loaders)


def prepare(loaded: Loaded) -> tuple[LeaveOneOut, Any, Any]:
    """Make a model, its trainer and the rows that all are measured on.

    Returns:
        The rows, the model, the trainer.
    """
    from recbole.utils import get_model, get_trainer

    train, valid, test = loaded.loaders
    model = get_model(OURS)(loaded.config, train._dataset).to(loaded.config["device"])
    trainer = get_trainer(loaded.config["MODEL_TYPE"], OURS)(loaded.config, model)
    validation = trainer.validation(valid, train._dataset)
    later = train._dataset.training_ranks(valid._dataset)
    rows = LeaveOneOut(model.training_data(), validation, later, test._dataset.training_rows())
    return rows, model, trainer


def measure(loaded: Loaded, name: str, seed: int = 0) -> Measured:
    """Fit one row and measure it on the test split.

    Args:
        loaded: the data set.
        name: ``LLMTwoTower`` or one of ``BASELINES``.
        seed: added to the configuration's; ignored by rows that are solved for.

    Raises:
        ValueError: if there is no such row.
    """
    from recbole.utils import init_seed

    if name != OURS and name not in BASELINES:
        raise ValueError(f"rows: {name!r} is not one; expected some of {', '.join([OURS, *BASELINES])}.")
    init_seed(loaded.config["seed"] + seed, loaded.config["reproducibility"])
    loaded.loaders[0].generator.manual_seed(loaded.config["seed"] + seed)
    started, cpu_started = time.perf_counter(), time.process_time()
    with tempfile.TemporaryDirectory() as checkpoints:
        loaded.config["checkpoint_dir"] = checkpoints  # the best epoch of the towers is read back from there
        rows, model, trainer = prepare(loaded)
        if name == OURS:
            trainer.fit(*loaded.loaders[:2], saved=True, show_progress=False)
            valid = float(trainer.best_valid_result["ndcg@10"])
            model.eval().at_test = True
            setting, scorer = _blocks_in_words(model), model.scores
        else:
            setting, valid, scorer = BASELINES[name](rows)
    seconds, cpu_seconds = time.perf_counter() - started, time.process_time() - cpu_started
    figures: dict[str, dict[str, float]] = {}
    users: dict[str, np.ndarray] = {}
    for rule in RULES:
        found = rows.figures(scorer, rule)
        figures[rule] = {metric: float(value.mean()) for metric, value in found.items()}
        users[rule] = found["ndcg@10"].cpu().numpy()
    chosen_by = RULES[bool(loaded.config["repeatable"])]
    return Measured(
        name,
        seed if name == OURS else 0,
        chosen_by,
        setting,
        valid,
        figures,
        users,
        cpu_seconds,
        seconds,
        peak_bytes(),
    )


def _blocks_in_words(model: Any) -> str:
    parts = []
    for block in model.score.counting:
        decay = "" if block.decay is None else f", decay {block.decay:g}"
        parts.append(f"{block.name} ({'full' if block.target is None else block.dim}{decay})")
    return " + ".join(parts)


# ---------------------------------------------------------------- rows that are solved for

Solved = tuple[str, float, Scorer]
"""What validation chose in words, its value, and the scores of known users at test."""


def popularity(rows: LeaveOneOut) -> Solved:
    """Rank by the number of training interactions."""
    count = rows.data.popularity.float()

    def scorer(users: Tensor) -> Tensor:
        return count.expand(len(users), -1).clone()

    return "", rows.validation.value(scorer, rows.data.n_items, rows.padding), scorer


def transitions(rows: LeaveOneOut) -> Solved:
    """Rank by counts of what followed the items of a history, both decayed; the decay by validation.

    Raises:
        ValueError: if the data set has more than ``MAX_ITEMS`` items.
    """
    _refuse_many("Transitions", rows.data.n_items)
    best: tuple[float, float, LinearBlock] | None = None
    for tau in TRANSITION_DECAYS:
        counts = next_item_gram(rows.data.history, rows.data.n_items, tau)[1].to_dense()
        block = LinearBlock("transitions", counts, decay=tau)
        value = rows.validation.value(block.scorer(rows.data.history), rows.data.n_items, rows.padding)
        if best is None or value > best[0]:
            best = value, tau, block
    assert best is not None
    return f"decay {best[1]:g}", best[0], best[2].scorer(rows.later)


def ease(rows: LeaveOneOut) -> Solved:
    """Rank by EASE, its ridge by a line search on validation.

    Raises:
        ValueError: if the data set has more than ``MAX_ITEMS`` items.
    """
    _refuse_many("EASE", rows.data.n_items)
    items = warm_items(rows.data.history, {}, rows.data.n_items)
    gram = weighted_gram(items.train, user_weights(items.train, 0.0), len(items.items))
    best: tuple[float, Setting, LinearBlock] | None = None

    def value(setting: Setting) -> float:
        nonlocal best
        matrix = torch.zeros(rows.data.n_items, rows.data.n_items)
        matrix[items.items[:, None], items.items] = solve(gram, {}, setting).cpu()
        block = LinearBlock("ease", matrix.to(gram.device))
        history = replace(rows.data.history, ranks=None)
        found = rows.validation.value(block.scorer(history), rows.data.n_items, rows.padding)
        if best is None or found > best[0]:
            best = found, setting, block
        return found

    search_setting(value, Setting.of_ease(8.0), {})
    assert best is not None
    return f"ridge {best[1].ridge:g} mean diagonals", best[0], best[2].scorer(replace(rows.later, ranks=None))


def _refuse_many(name: str, n_items: int) -> None:
    if n_items > MAX_ITEMS:
        raise ValueError(
            f"{name} holds an item-item matrix, and {n_items} items are more than {MAX_ITEMS}; leave it out of --rows."
        )


BASELINES = {"Popularity": popularity, "Transitions": transitions, "EASE": ease}
