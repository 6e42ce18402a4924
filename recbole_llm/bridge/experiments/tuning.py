"""``recbole-llm tune``: RecBole's HyperTuning, resumable, each trial in a process of its own, chosen on validation alone."""

import json
import os
import sys
import tempfile
from collections.abc import Callable, Iterator, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, redirect_stdout
from dataclasses import dataclass
from io import StringIO
from pathlib import Path
from typing import Any

from recbole_llm.atomic import write_atomically
from recbole_llm.bridge.experiments.experiment import Experiment, Outcome, run_isolated
from recbole_llm.bridge.experiments.search_file import read_space
from recbole_llm.text_files import read_text

ALGORITHMS = ("exhaustive", "random", "bayes")
_SEED_VARIABLE = "HYPEROPT_FMIN_SEED"  # read by hyperopt's fmin


@dataclass(frozen=True)
class Trial:
    """One setting and what came of it.

    Attributes:
        params: values by key.
        score: best value of ``valid_metric``; ``None`` if it failed.
        valid: validation metrics of the best epoch.
        test: test metrics of the same model; they choose nothing.
        seconds: of training.
        larger_is_better: of ``score``.
        error: why it failed.
    """

    params: dict[str, Any]
    score: float | None
    valid: dict[str, float]
    test: dict[str, float]
    seconds: float
    larger_is_better: bool
    error: str


class _Log:
    """Trials on disk, one JSON line each, so that a search that was stopped goes on where it was."""

    def __init__(self, path: Path, identity: Mapping[str, Any]) -> None:
        self.path = path
        self.trials: dict[str, Trial] = {}
        if path.is_file():
            text = path.read_text(encoding="utf-8")
            header, *lines = text.splitlines() or [""]
            found = json.loads(header) if header else {}
            if found != identity:
                changed = sorted(k for k in {*found, *identity} if found.get(k) != identity.get(k))
                raise ValueError(
                    f"output: {path} holds trials of another search (different: {', '.join(changed)}). "
                    "Give another --output, or remove that file."
                )
            for line in lines:
                try:
                    trial = Trial(**json.loads(line))
                except (ValueError, TypeError):
                    continue  # the line that a kill cut short
                self.trials[name_of(trial.params)] = trial
            if not text.endswith("\n"):
                with path.open("a", encoding="utf-8") as file:
                    file.write("\n")  # the next trial would be a part of the line that was cut short
        else:
            path.parent.mkdir(parents=True, exist_ok=True)
            write_atomically(path, json.dumps(identity) + "\n")

    def add(self, trial: Trial) -> None:
        with self.path.open("a", encoding="utf-8") as file:
            file.write(json.dumps(vars(trial)) + "\n")
            file.flush()
            os.fsync(file.fileno())
        self.trials[name_of(trial.params)] = trial


def name_of(params: Mapping[str, Any]) -> str:
    """Turn a setting into a key that does not depend on the order of its values.

    Example:
        >>> name_of({"b": 1, "a": 2}) == name_of({"a": 2, "b": 1})
        True
    """
    return json.dumps(params, sort_keys=True, default=str)


def tune(
    model: str,
    dataset: str,
    params_file: str,
    *,
    algorithm: str = "exhaustive",
    max_evals: int = 20,
    early_stop: int = 10,
    workers: int = 1,
    output: str | Path = "tuning",
    config_files: Sequence[str] = (),
    overrides: Sequence[str] = (),
    seed: int = 0,
    run: Callable[[Experiment], Outcome] = run_isolated,
    progress: Callable[[str], None] = lambda text: None,
) -> list[Trial]:
    """Search hyper-parameters with RecBole's ``HyperTuning``.

    Args:
        model: name of a model.
        dataset: name of a dataset.
        params_file: the space in RecBole's notation, a line each: ``learning_rate loguniform -8,-4``.
        algorithm: ``exhaustive``, ``random`` or ``bayes`` (tree-structured Parzen estimator).
        max_evals: trials of ``random`` and ``bayes``.
        early_stop: trials without progress after which the search ends.
        workers: trials at a time; more than one only where a trial does not depend on those before it.
        output: folder; holds ``trials.jsonl``. A search that is started again with it runs only what is missing.
        config_files: YAML files.
        overrides: ``--key=value`` arguments.
        seed: of the search.
        run: how an experiment is run.
        progress: told of each trial.

    Returns:
        The trials of this search, in its order, failed ones included.

    Raises:
        ValueError: on an argument that does not fit, a missing hyperopt (names the extra), or trials of another search.
    """
    if algorithm not in ALGORITHMS:
        raise ValueError(f"algo must be one of {', '.join(ALGORITHMS)}, got {algorithm!r}.")
    if not os.path.isfile(params_file):
        raise ValueError(
            f"params_file: {params_file!r} does not exist. A line of it reads: learning_rate choice [0.01,0.001]"
        )
    if workers > 1 and algorithm == "bayes":
        raise ValueError(
            "workers must be 1 with bayes: each trial depends on those before it. Use random or exhaustive."
        )
    space = read_space(params_file, model)
    identity = {
        "model": model,
        "dataset": dataset,
        "space": read_text(params_file, "params_file"),
        "algorithm": algorithm,
        "seed": seed,
        "configuration": [read_text(f, "config_files:") for f in config_files],
        "overrides": sorted(overrides),
    }
    log = _Log(Path(output) / "trials.jsonl", identity)

    def experiment(params: Mapping[str, Any]) -> Experiment:
        return Experiment(model, dataset, tuple(config_files), dict(params), tuple(overrides))

    def settle(params: Mapping[str, Any]) -> Trial:
        params = _plain(params)
        known = log.trials.get(name_of(params))
        if known is None:
            known = _trial(params, run(experiment(params)))
            log.add(known)
            progress(line_of(known))
        return known

    if workers > 1:
        with ThreadPoolExecutor(workers) as pool:  # each trial is a process of its own
            list(pool.map(settle, _proposals(space, algorithm, max_evals, seed)))
    order: list[Trial] = []

    def settle_in_order(params: Mapping[str, Any]) -> Trial:
        order.append(settle(params))
        return order[-1]

    _search(space, algorithm, max_evals, early_stop, seed, settle_in_order)
    return order


def _proposals(space: str, algorithm: str, max_evals: int, seed: int) -> list[dict[str, Any]]:
    """List the settings that a search would try whatever their results."""
    found: dict[str, dict[str, Any]] = {}

    def note(params: Mapping[str, Any]) -> Trial:
        plain = _plain(params)
        found.setdefault(name_of(plain), plain)
        return Trial(plain, -float(len(found)), {}, {}, 0.0, False, "")  # always progress: no early stop

    _search(space, algorithm, max_evals, 10**9, seed, note)
    return list(found.values())


def _search(
    space: str,
    algorithm: str,
    max_evals: int,
    early_stop: int,
    seed: int,
    settle: Callable[[Mapping[str, Any]], Trial],
) -> None:
    try:
        import hyperopt  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError("tune needs hyperopt: pip install -e '.[tune]' in the checkout.") from error
    from recbole.trainer import HyperTuning

    ours = sys.stdout

    def objective(config_dict: Mapping[str, Any], config_file_list: Any = None) -> dict[str, Any]:
        with redirect_stdout(ours):
            trial = settle(config_dict)
        worst = float("-inf") if trial.larger_is_better else float("inf")
        return {
            "model": "",
            "best_valid_score": worst if trial.score is None else trial.score,
            "valid_score_bigger": trial.larger_is_better,
            "best_valid_result": trial.valid,
            "test_result": trial.test,
        }

    with tempfile.TemporaryDirectory() as folder:
        file = Path(folder) / "space.hyper"
        file.write_text(space, encoding="utf-8")
        tuning = HyperTuning(
            objective, params_file=str(file), algo=algorithm, max_evals=max_evals, early_stop=early_stop
        )
    with _environment(_SEED_VARIABLE, str(seed)), redirect_stdout(StringIO()):  # it prints every setting; so do we
        tuning.run()


@contextmanager
def _environment(name: str, value: str) -> Iterator[None]:
    before = os.environ.get(name)
    os.environ[name] = value
    try:
        yield
    finally:
        if before is None:
            del os.environ[name]
        else:
            os.environ[name] = before


def _plain(params: Mapping[str, Any]) -> dict[str, Any]:
    """Convert values to what JSON keeps, so that a setting read back is equal."""
    return json.loads(json.dumps(dict(params), default=lambda v: v.item() if hasattr(v, "item") else str(v)))


def _trial(params: dict[str, Any], outcome: Outcome) -> Trial:
    if outcome.error or not outcome.trainings:
        return Trial(params, None, {}, {}, 0.0, outcome.larger_is_better, outcome.error or "no training finished")
    done = outcome.trainings[0]
    return Trial(params, done.best_valid_score, done.valid, done.test, done.seconds, outcome.larger_is_better, "")


def line_of(trial: Trial) -> str:
    """Format a trial as a line of the log."""
    setting = ", ".join(f"{key}={value}" for key, value in trial.params.items())
    return f"{setting}: {'failed: ' + trial.error if trial.score is None else f'valid {trial.score:.4f}'} ({trial.seconds:.1f} s)"


def ranked(trials: Sequence[Trial]) -> list[Trial]:
    """Sort the trials, best validation score first, failed ones last."""
    return sorted(
        trials, key=lambda t: (t.score is None, -(t.score or 0.0) if t.larger_is_better else (t.score or 0.0))
    )
