"""RecBole's ``run_recbole`` with its output under control: who watches decides what a terminal shows, the log file gets everything.

``run_recbole`` makes its logger, data, model and trainer by names of its own module. They are replaced while it runs, so that
its steps stay its own and what it made is at hand afterwards.
"""

import logging
import re
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from recbole_llm.fitting.logs import stage

COLOURS = re.compile(r"\x1b\[[0-9;]*m")
EPOCH = re.compile(r"epoch (\d+) (training|evaluating)(?:.*valid_score: (-?[\d.]+))?", re.DOTALL)
_TEXT = 300  # characters of a setting that are kept


class Watch(logging.Handler):
    """What a run made and logged.

    Attributes:
        log_file: where RecBole logs to; ``None`` before it does, or where it does not.
        config: its ``Config``.
        splits: loaders of training, validation and test data.
        trainer: its trainer, which holds the model.
        console: the handler that shows the run on the terminal; ``None`` for RecBole's.
    """

    def __init__(self) -> None:
        super().__init__(logging.INFO)
        self.log_file: Path | None = None
        self.config: Any = None
        self.splits: tuple[Any, ...] = ()
        self.trainer: Any = None
        self.console: logging.Handler | None = None
        self._stages: list[dict[str, Any]] = []
        self._search: list[dict[str, Any]] = []
        self._valid: list[list[float]] = []

    def emit(self, record: logging.LogRecord) -> None:
        """Keep what the record says of a stage, a setting that was tried or an epoch's validation."""
        if hasattr(record, "seconds") and hasattr(record, "stage"):
            self._stages.append({"stage": record.stage, "seconds": record.seconds})
        elif hasattr(record, "trial"):
            trial: Mapping[str, Any] = record.trial
            self._search.append({**trial, "setting": str(trial["setting"])[:_TEXT]})
        elif (epoch := epoch_of(record)) is not None and epoch[1] is not None:
            self._valid.append([epoch[0], epoch[1]])

    @property
    def history(self) -> dict[str, Any]:
        """Curves and times, as :mod:`recbole_llm.reporting.record` holds them."""
        losses = getattr(self.trainer, "train_loss_dict", {})
        return {
            "loss": [float(losses[epoch]) for epoch in sorted(losses)],
            "valid": self._valid,
            "valid_metric": str(self.config["valid_metric"]),
            "valid_metric_bigger": bool(self.config["valid_metric_bigger"]),
            "most_epochs": most_epochs(self.config),
            "search": self._search,
            "stages": self._stages,
        }


def most_epochs(config: Any) -> int:
    """How many epochs a run trains at most; 0 where the model is solved at once, whatever ``epochs`` says.

    Args:
        config: of the run.
    """
    from recbole.utils import ModelType

    return 0 if config["MODEL_TYPE"] == ModelType.TRADITIONAL else int(config["epochs"])


def epoch_of(record: logging.LogRecord) -> tuple[int, float | None] | None:
    """Number and validation score of the epoch that RecBole's trainer reports here; ``None`` for any other record."""
    if not isinstance(record.msg, str) or "epoch" not in record.msg:
        return None
    found = EPOCH.match(COLOURS.sub("", record.msg))
    if found is None:
        return None
    return int(found[1]), None if found[3] is None else float(found[3])


def run_watched(
    model: str,
    dataset: str,
    files: Sequence[str],
    settings: Mapping[str, Any],
    console: Callable[[Any], logging.Handler | None],
) -> tuple[dict[str, Any], Watch]:
    """Train and test, as ``run_recbole``.

    Args:
        model: its name.
        dataset: its name.
        files: YAML files.
        settings: configuration values.
        console: gives the handler that takes the place of RecBole's on the terminal, by the run's ``Config``; ``None`` leaves
            RecBole's.

    Returns:
        RecBole's result, and what was watched.
    """
    import recbole.quick_start.quick_start as quick

    watch = Watch()
    with _loggers_restored(), _replaced(quick, watch, console):
        result = quick.run_recbole(
            model=model, dataset=dataset, config_file_list=list(files), config_dict=dict(settings)
        )
    verdict = getattr(getattr(watch.trainer, "model", None), "finetuning", None)
    return result if verdict is None else {**result, "finetune": dict(verdict)}, watch


@contextmanager
def _loggers_restored() -> Iterator[None]:
    """Leave the root logger as found; close what a run has opened."""
    root = logging.getLogger()
    handlers, level = root.handlers[:], root.level
    try:
        yield
    finally:
        for handler in [each for each in root.handlers if each not in handlers]:
            root.removeHandler(handler)
            handler.close()
        root.handlers[:] = handlers
        root.setLevel(level)


@contextmanager
def _replaced(quick: Any, watch: Watch, console: Callable[[Any], logging.Handler | None]) -> Iterator[None]:
    """Replace what ``run_recbole`` calls by names of its module."""
    own = _Steps(quick, watch, console)
    names = ("init_logger", "create_dataset", "data_preparation", "get_model", "get_trainer")
    stock = {name: getattr(quick, name) for name in names}
    vars(quick).update({name: getattr(own, name) for name in names})
    try:
        yield
    finally:
        vars(quick).update(stock)


class _Steps:
    """The steps of ``run_recbole``, stock's with a look at what they make."""

    def __init__(self, quick: Any, watch: Watch, console: Callable[[Any], logging.Handler | None]) -> None:
        self._watch, self._console = watch, console
        self._init_logger, self._create_dataset = quick.init_logger, quick.create_dataset
        self._data_preparation = quick.data_preparation
        self._get_model, self._get_trainer = quick.get_model, quick.get_trainer

    def init_logger(self, config: Any) -> None:
        self._watch.config = config
        root = logging.getLogger()
        before, root.handlers = root.handlers, []  # basicConfig does nothing beside handlers of somebody else
        self._init_logger(config)
        made, root.handlers = root.handlers, before
        shown = self._watch.console = self._console(config)
        for handler in made:
            if isinstance(handler, logging.FileHandler):
                self._watch.log_file = Path(handler.baseFilename)
                root.addHandler(handler)
            elif shown is None:
                root.addHandler(handler)
        root.addHandler(self._watch)
        if shown is not None:
            root.addHandler(shown)

    def create_dataset(self, config: Any) -> Any:
        with stage("data"):
            return self._create_dataset(config)

    def data_preparation(self, config: Any, dataset: Any) -> Any:
        self._watch.splits = self._data_preparation(config, dataset)
        return self._watch.splits

    def get_model(self, name: str) -> Any:
        made = self._get_model(name)

        def make(config: Any, dataset: Any) -> Any:
            with stage("model and texts"):
                return made(config, dataset)

        return make

    def get_trainer(self, *given: Any) -> Any:
        made = self._get_trainer(*given)

        def make(config: Any, model: Any) -> Any:
            if self._watch.console is not None:
                config["show_progress"] = False  # RecBole's bars, two for each epoch; texts are encoded by now
            self._watch.trainer = made(config, model)
            return self._watch.trainer

        return make
