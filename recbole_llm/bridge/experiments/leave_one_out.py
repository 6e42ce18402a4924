"""Leave one out in the order of time, every item ranked: the protocol of the canonical tables.

A user's last item is the test, the one before it the validation. Histories at test hold every item before the last. Every choice
is made on validation. Each row is measured under both rules that papers follow: ``masked``, where items of the history have no
place, and ``unmasked``, where they have one. Of a full ranking, RecBole's own evaluation gives the first for general models and,
with ``repeatable: true``, the second.
"""

import hashlib
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from recbole_llm.bridge.options import Options
from recbole_llm.content.encoders.resolve import file_digest
from recbole_llm.fitting.data import TrainingData
from recbole_llm.fitting.validation import CHUNK_ELEMENTS, TopKMetric, Validation, hide_seen
from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.score import Scorer

PROTOCOL = {
    "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
    "metrics": ["NDCG", "Recall"],
    "topk": [5, 10],
    "valid_metric": "NDCG@10",
}
METRICS = tuple(TopKMetric(name, k) for name in ("recall", "ndcg") for k in (5, 10))
RULES = ("masked", "unmasked")
OURS = "LLMTwoTower"


@dataclass(frozen=True)
class LeaveOneOut:
    """The rows of a data set under the protocol.

    Attributes:
        data: the training interactions, with ranks.
        times: ``[nnz]`` float64, when each entry of the training histories was made, in the data set's unit.
        validation: targets and what is seen, with the rule that choices follow.
        later: histories at test.
        targets: the test items.
    """

    data: TrainingData
    times: Tensor
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
    def groups(self) -> dict[str, Tensor]:
        """Sort the test users by their target and their history; ``[U]`` bool each, of users with a target in ascending order.

        ``popular`` are targets among the most popular items that make up half of the training interactions, ``rare`` the other
        trained ones, ``untrained`` those without a training interaction. ``short`` are histories of at most the median length.
        """
        train, valid, test = (loader._dataset for loader in self.loaders)
        targets, history = test.training_rows(), train.training_rows(None, valid)
        users = torch.nonzero(targets.sizes).squeeze(1)
        count = torch.bincount(train.training_rows().ids, minlength=train.item_num)
        order = torch.argsort(count, descending=True, stable=True)
        before = torch.empty_like(count)
        before[order] = count[order].cumsum(0) - count[order]  # interactions of more popular items
        item, length = targets.ids[targets.offsets[users]], history.sizes[users]
        popular = (2 * before < count.sum())[item]
        trained, short = count[item] > 0, length <= length.median()
        return {
            "popular": popular & trained,
            "rare": ~popular & trained,
            "untrained": ~trained,
            "short": short,
            "long": ~short,
        }

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


def inputs_digest(loaded: Loaded) -> str:
    """Hash what a row reads beside the interactions: their times, and the files that describe the items."""
    train = loaded.loaders[0]._dataset
    history = train.training_ranks()
    digest = hashlib.sha256(history.ranks.numpy().tobytes() + train.training_times(history).numpy().tobytes())
    described = Path(train.dataset_path) / f"{train.dataset_name}.item"
    for file in (described, *map(Path, Options.from_config(loaded.config).feature_files.values())):
        digest.update(file_digest(file).encode() if file.is_file() else b"none")
    return digest.hexdigest()


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
    data = model.training_data()
    times = train._dataset.training_times(data.history)
    rows = LeaveOneOut(data, times, validation, later, test._dataset.training_rows())
    return rows, model, trainer
