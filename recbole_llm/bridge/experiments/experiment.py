"""Train and test one model through RecBole and keep its per-user results; the base of ``compare`` and ``tune``."""

import multiprocessing
import os
import re
import sys
import threading
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_llm.bridge.evaluation.popularity import BucketQuality, quality_by_popularity
from recbole_llm.fitting.validation import METRICS, TopKMetric


@dataclass(frozen=True)
class Experiment:
    """What to run.

    Attributes:
        model: name of a model.
        dataset: name of a dataset.
        config_files: YAML files.
        config_dict: values over the files.
        overrides: ``--key=value`` arguments over everything.
        seeds: one training per seed; the split is that of the configuration's own ``seed`` every time.
        per_user: whether to keep each test user's metrics.
        test: whether the test split is evaluated at all; a search that chooses by validation has no need of it.
    """

    model: str
    dataset: str
    config_files: tuple[str, ...] = ()
    config_dict: Mapping[str, Any] = field(default_factory=dict)
    overrides: tuple[str, ...] = ()
    seeds: tuple[int, ...] = (0,)
    per_user: bool = False
    test: bool = True


@dataclass(frozen=True)
class Training:
    """One seed's result.

    Attributes:
        seed: added to the configuration's seed for the training.
        best_valid_score: value of ``valid_metric``.
        valid: validation metrics.
        test: test metrics; empty unless asked for.
        seconds: from the model's making, in which stock closed forms are fitted, to the end of training, validations
            included.
        test_seconds: of the test.
        user_ids: ``[U]`` internal ids of the test users; ``None`` unless asked for.
        user_metrics: by metric such as ``ndcg@10``, ``[U]`` float64; empty unless asked for.
        user_targets: ``[U]`` int64, how many targets each has; ``None`` unless asked for.
        cpu_seconds: as ``seconds``, of the processor: what other programs on the machine do not lengthen.
        by_popularity: test metrics by how popular the targets are; empty unless per-user metrics are asked for and the
            metrics include one, such as ItemCoverage, for which RecBole keeps the recommended items.
    """

    seed: int
    best_valid_score: float
    valid: dict[str, float]
    test: dict[str, float]
    seconds: float
    test_seconds: float
    user_ids: np.ndarray | None = None
    user_metrics: dict[str, np.ndarray] = field(default_factory=dict)
    cpu_seconds: float = 0.0
    by_popularity: dict[str, BucketQuality] = field(default_factory=dict)
    user_targets: np.ndarray | None = None


@dataclass(frozen=True)
class Outcome:
    """What became of an experiment.

    Attributes:
        experiment: what was run.
        trainings: the seeds that finished.
        deterministic: whether the model ignores the seed, so that one training says all.
        larger_is_better: of ``best_valid_score``.
        peak_bytes: the largest resident memory of its process; 0 where the system does not tell.
        error: why it ended early; empty if it did not.
        split: what was held out, in words.
    """

    experiment: Experiment
    trainings: tuple[Training, ...] = ()
    deterministic: bool = False
    larger_is_better: bool = True
    peak_bytes: int = 0
    error: str = ""
    split: str = ""


def run_experiment(experiment: Experiment) -> Outcome:
    """Train and test in this process.

    Raises:
        Exception: whatever RecBole raises; :func:`run_isolated` turns it into the outcome's ``error``.
    """
    from recbole_llm.bridge.repairs.configuration import PROGRAM

    sys.argv = [PROGRAM, *experiment.overrides]  # this name says that the arguments are meant for RecBole
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import ModelType, get_model, get_trainer, init_logger, init_seed

    config = Config(
        model=experiment.model,
        dataset=experiment.dataset,
        config_file_list=list(experiment.config_files) or None,
        config_dict=dict(experiment.config_dict) or None,
    )
    init_seed(config["seed"], config["reproducibility"])
    init_logger(config)
    train, valid, test = data_preparation(config, create_dataset(config))
    deterministic = config["MODEL_TYPE"] == ModelType.TRADITIONAL
    trainings = []
    for seed in experiment.seeds[:1] if deterministic else experiment.seeds:
        init_seed(config["seed"] + seed, config["reproducibility"])
        train.generator.manual_seed(config["seed"] + seed)
        started, cpu_started = time.perf_counter(), time.process_time()
        model = get_model(config["model"])(config, train._dataset).to(config["device"])
        trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, model)
        score, valid_result = trainer.fit(train, valid, saved=True, show_progress=config["show_progress"])
        trained, cpu_trained = time.perf_counter(), time.process_time()
        structs: list[Any] = []
        _keep_struct(trainer, structs)
        test_result = None
        if experiment.test:
            test_result = trainer.evaluate(test, load_best_model=True, show_progress=config["show_progress"])
        finished = time.perf_counter()
        user_ids, user_metrics, user_targets = _per_user(config, test, structs) if experiment.per_user else _NO_USERS
        by_popularity = _by_popularity(config, train, test, structs) if experiment.per_user else {}
        trainings.append(
            Training(
                seed,
                float(score),
                _plain(valid_result),
                _plain(test_result),
                trained - started,
                finished - trained,
                user_ids,
                user_metrics,
                cpu_trained - cpu_started,
                by_popularity,
                user_targets,
            )
        )
    bigger = bool(config["valid_metric_bigger"])
    return Outcome(experiment, tuple(trainings), deterministic, bigger, peak_bytes(), split=split_in_words(config))


def split_in_words(config: Any) -> str:
    """How a configuration splits the interactions, in a few words for a caption.

    Args:
        config: RecBole's ``Config``.
    """
    given = config["eval_args"] or {}
    way, shares = next(iter((given.get("split") or {}).items()), ("", None))
    if config["benchmark_filename"]:
        return "the data set's own split"
    order = {"TO": "by time", "RO": "at random"}.get(str(given.get("order")), "")
    whose = "each user's interactions" if given.get("group_by") == "user" else "all interactions"
    if way == "LS":
        return f"leave one out of {whose}, {order}"
    parts = [f"{100 * share / sum(shares):g}" for share in shares] if isinstance(shares, (list, tuple)) else []
    return f"{'/'.join(parts)} split of {whose} {order}".strip()


def run_isolated(experiment: Experiment) -> Outcome:
    """Train and test in a process of its own: a crash or a lack of memory becomes the outcome's ``error``."""
    try:
        found = in_own_process(_caught, experiment)
    except ChildProcessError as error:
        return Outcome(experiment, error=str(error))
    assert isinstance(found, Outcome)
    return found


def _caught(experiment: Experiment) -> Outcome:
    try:
        return run_experiment(experiment)
    except (Exception, SystemExit) as error:
        getLogger().debug(traceback.format_exc())
        return Outcome(experiment, error=f"{type(error).__name__}: {error}".strip(), peak_bytes=peak_bytes())


def in_own_process(function: Callable[[Any], Any], argument: Any) -> Any:
    """Call a function in a fresh process, whose memory is its own from the start.

    Args:
        function: of a module, so that the process can find it.
        argument: that can be pickled.

    Returns:
        What the function returned.

    Raises:
        ChildProcessError: if the process ended without an answer.
    """
    context = multiprocessing.get_context("spawn")
    receive, send = context.Pipe(duplex=False)
    process = context.Process(target=_child, args=(function, argument, send), daemon=False)
    process.start()
    send.close()
    try:
        found = receive.recv()
    except EOFError:
        process.join()
        raise ChildProcessError(_exit_reason(process.exitcode)) from None
    process.join()
    return found


def _end_with_parent() -> None:
    """Exit when the parent process dies, since no one will read the result."""
    parent = multiprocessing.parent_process()
    if parent is not None:
        parent.join()
        os._exit(1)


def _child(function: Callable[[Any], Any], argument: Any, send: Any) -> None:
    threading.Thread(target=_end_with_parent, daemon=True).start()
    send.send(function(argument))


def _exit_reason(code: int | None) -> str:
    if code == -9:
        return "killed, as the system does to a process when memory runs out"
    return f"its process ended with code {code}"


def _keep_struct(trainer: Any, structs: list[Any]) -> None:
    evaluate = trainer.evaluator.evaluate

    def keep(struct: Any) -> Any:
        structs.append(struct)
        return evaluate(struct)

    trainer.evaluator.evaluate = keep


PerUser = tuple[np.ndarray | None, dict[str, np.ndarray], np.ndarray | None]
_NO_USERS: PerUser = (None, {}, None)


def _per_user(config: Any, test: Any, structs: Sequence[Any]) -> PerUser:
    """Compute each user's id, metrics and number of targets from the hits that RecBole's evaluator was given."""
    if not structs or "rec.topk" not in structs[-1] or not hasattr(test, "uid_list"):
        return _NO_USERS
    places = structs[-1].get("rec.topk").cpu()
    hits, n_targets = places[:, :-1].bool(), places[:, -1].long()
    metrics = {
        str(metric).lower(): metric.of(hits[:, : metric.k], n_targets).numpy() for metric in _topk_metrics(config)
    }
    return np.asarray(test.uid_list), metrics, n_targets.numpy()


def _topk_metrics(config: Any) -> list[TopKMetric]:
    return [
        TopKMetric(name, k) for name in map(str.lower, config["metrics"]) if name in METRICS for k in config["topk"]
    ]


def _by_popularity(config: Any, train: Any, test: Any, structs: Sequence[Any]) -> dict[str, BucketQuality]:
    """Compute quality by popularity from the items that RecBole's evaluator was given."""
    if not structs or "rec.topk" not in structs[-1] or "rec.items" not in structs[-1]:
        return {}
    from recbole_llm.bridge.evaluation.rows import ranked_rows

    places, items = structs[-1].get("rec.topk").cpu(), structs[-1].get("rec.items").cpu()
    trained = train._dataset.inter_feat[train._dataset.iid_field].long()
    count = torch.bincount(trained, minlength=test._dataset.item_num)
    return quality_by_popularity(
        items, places[:, :-1].bool(), ranked_rows(test).positives, count, _topk_metrics(config)
    )


def _plain(result: Mapping[str, Any] | None) -> dict[str, float]:
    return {name: float(value) for name, value in (result or {}).items()}


def peak_bytes() -> int:
    """Return the largest resident memory of this process so far; 0 where the system does not tell."""
    try:
        status = Path("/proc/self/status").read_text(encoding="ascii")
    except OSError:
        status = ""
    # what getrusage tells of a process that another has started is at least the other's
    own = re.search(r"^VmHWM:\s*(\d+) kB$", status, re.MULTILINE)
    if own:
        return int(own[1]) * 1024
    try:
        import resource
    except ImportError:  # Windows
        return 0
    peak = resource.getrusage(resource.RUSAGE_SELF).ru_maxrss
    return peak if sys.platform == "darwin" else peak * 1024
