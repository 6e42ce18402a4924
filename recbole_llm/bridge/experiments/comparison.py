"""``recbole-llm compare``: several models on the same split and seeds, with their spread and a paired test over users."""

import textwrap
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.bridge.environment import versions
from recbole_llm.bridge.experiments.experiment import Experiment, Outcome, Training, run_isolated
from recbole_llm.bridge.experiments.significance import Difference, holm, paired_bootstrap
from recbole_llm.bridge.register import registered_models

OURS = "LLMTwoTower"
SIGNIFICANT = 0.05


@dataclass(frozen=True)
class Row:
    """One model of the table.

    Attributes:
        model: its name.
        mean: test metrics, mean over seeds; empty if it failed.
        spread: standard deviation over seeds; 0 for one seed.
        seeds: how many trainings the figures are from; 1 for a model that ignores the seed.
        seconds: from the model's making to the end of its training, validations included, mean over seeds.
        test_seconds: of the test, mean over seeds.
        peak_bytes: largest resident memory of its process.
        cpu_seconds: as ``seconds``, of the processor.
        by_popularity: by bucket of items (``BUCKETS`` of :mod:`recbole_llm.bridge.evaluation.popularity`): how many items,
            targets and users it has, and its metrics, mean over seeds.
        difference: of ``metric`` against the reference, over users; ``None`` for the reference or without per-user values.
        p: of ``difference``, corrected for the number of comparisons (Holm).
        error: why there are no figures.
    """

    model: str
    mean: Mapping[str, float]
    spread: Mapping[str, float]
    seeds: int
    seconds: float
    test_seconds: float
    peak_bytes: int
    cpu_seconds: float
    by_popularity: Mapping[str, Mapping[str, float]]
    difference: Difference | None
    p: float | None
    error: str


@dataclass(frozen=True)
class Comparison:
    """The table and what it was made of.

    Attributes:
        dataset: its name.
        metric: by which rows are ordered and tested, such as ``ndcg@10``.
        reference: the model the others are tested against.
        reference_reason: why it is that one.
        rows: best first, failed ones last.
        outcomes: every training, in the order run.
    """

    dataset: str
    metric: str
    reference: str
    reference_reason: str
    rows: tuple[Row, ...]
    outcomes: tuple[Outcome, ...]


def compare(
    models: Sequence[str],
    dataset: str,
    *,
    seeds: int = 1,
    metric: str | None = None,
    reference: str | None = None,
    config_files: Sequence[str] = (),
    overrides: Sequence[str] = (),
    settings: Mapping[str, Mapping[str, Any]] | None = None,
    run: Callable[[Experiment], Outcome] = run_isolated,
    progress: Callable[[str], None] = lambda text: None,
) -> Comparison:
    """Train each model with each seed on one split, each in a process of its own.

    Args:
        models: names; at least one.
        dataset: name of a dataset.
        seeds: trainings per model. The split is the same for all; models that ignore the seed train once.
        metric: test metric to order and test by, such as ``ndcg@10``; ``None`` for the first NDCG, else the first metric.
        reference: the model to test the others against; ``None`` for the best stock model by validation, which a choice by
            the test split would favour. Without a validation split, LLMTwoTower: each stock model then has its own test
            against it, and none is chosen; without LLMTwoTower too, the first of ``models``.
        config_files: YAML files.
        overrides: ``--key=value`` arguments.
        settings: values of one model alone, by its name.
        run: how an experiment is run.
        progress: told of each model's start and end.

    Raises:
        ValueError: if the models repeat or are none, the reference is not among them, or ``metric`` is none of those measured;
            the first model that finishes tells.
    """
    if not models or len(set(models)) != len(models):
        raise ValueError(f"models must be different names, at least one, got {list(models)}.")
    if seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {seeds}.")
    if reference is not None and reference not in models:
        raise ValueError(f"reference must be one of {', '.join(models)}, got {reference!r}.")
    outcomes = []
    for number, model in enumerate(models, 1):
        progress(f"[{number}/{len(models)}] {model}")
        outcome = run(
            Experiment(
                model,
                dataset,
                tuple(config_files),
                dict((settings or {}).get(model, {})),
                tuple(overrides),
                seeds=tuple(range(seeds)),
                per_user=True,
            )
        )
        _check_metric(metric, outcome)
        outcomes.append(outcome)
        progress(f"[{number}/{len(models)}] {model}: {_summary(outcome)}")
    metric = metric or _default_metric(outcomes)
    reason = "as asked for"
    if reference is None:
        reference, reason = _choose_reference(outcomes, metric)
    return Comparison(dataset, metric, reference, reason, tuple(_rows(outcomes, reference, metric)), tuple(outcomes))


def larger_is_better(metric: str) -> bool:
    """Return whether a larger value is better, as RecBole says of its metrics: not so of ``rmse`` or ``logloss``."""
    from recbole.evaluator.register import smaller_metrics

    return metric.partition("@")[0] not in smaller_metrics


def _check_metric(metric: str | None, outcome: Outcome) -> None:
    names = [name for training in outcome.trainings[:1] for name in training.test]
    if metric is not None and names and metric not in names:
        raise ValueError(
            f"metric is {metric!r}, and measured are {', '.join(names)}: name one of them, or let metrics and topk hold yours."
        )


def _default_metric(outcomes: Sequence[Outcome]) -> str:
    names = [name for outcome in outcomes for training in outcome.trainings[:1] for name in training.test]
    return next((name for name in names if name.startswith("ndcg")), names[0] if names else "ndcg@10")


def _summary(outcome: Outcome) -> str:
    if outcome.error:
        return f"failed: {outcome.error}"
    metric = _default_metric([outcome])
    mean = np.mean([training.test[metric] for training in outcome.trainings])
    return f"{metric} {mean:.4f}, {sum(t.seconds for t in outcome.trainings):.1f} s of training"


def _choose_reference(outcomes: Sequence[Outcome], metric: str) -> tuple[str, str]:
    """Name the model to test the others against, chosen without the test split, and say why it is that one."""
    own = next((o for o in outcomes if o.experiment.model == OURS), None)
    stock = [o for o in outcomes if o.experiment.model not in registered_models()]
    valid = {o.experiment.model: v for o in stock if (v := _valid_mean(o, metric)) is not None}
    # one of another family may be ranked on other rows, where it can be tested against nobody
    alike = {o.experiment.model for o in stock if own is not None and _same_rows(own, o)} & valid.keys()
    if valid:
        choose = max if larger_is_better(metric) else min
        best = choose(alike or valid, key=lambda name: valid[name])
        return best, f"the best stock model by validation ({metric} {valid[best]:.4f})"
    why = f"no stock model has a validation {metric} to be chosen by"
    if own is not None:
        return OURS, f"{why}, so that each is tested against {OURS}"
    return outcomes[0].experiment.model, f"the first named, as {why}"


def _valid_mean(outcome: Outcome, metric: str) -> float | None:
    if outcome.error or not outcome.trainings or any(metric not in training.valid for training in outcome.trainings):
        return None
    return float(np.mean([training.valid[metric] for training in outcome.trainings]))


def _user_mean(outcome: Outcome, metric: str) -> np.ndarray | None:
    """Average each test user's metric over seeds."""
    if outcome.error or not outcome.trainings or any(metric not in t.user_metrics for t in outcome.trainings):
        return None
    return np.mean([t.user_metrics[metric] for t in outcome.trainings], axis=0)


def _same_rows(first: Outcome, second: Outcome) -> bool:
    """Return whether both were tested on the same users, each with as many targets."""
    if not first.trainings or not second.trainings:
        return False
    a, b = first.trainings[0], second.trainings[0]
    if a.user_ids is None or b.user_ids is None or not np.array_equal(a.user_ids, b.user_ids):
        return False
    return a.user_targets is None or b.user_targets is None or np.array_equal(a.user_targets, b.user_targets)


def _rows(outcomes: Sequence[Outcome], reference: str, metric: str) -> list[Row]:
    against = next(outcome for outcome in outcomes if outcome.experiment.model == reference)
    base = _user_mean(against, metric)
    differences: dict[str, Difference] = {}
    for outcome in outcomes:
        mine = _user_mean(outcome, metric)
        if outcome is against or base is None or mine is None or not _same_rows(against, outcome):
            continue  # another family may be tested on other rows: its figures stand, untested
        differences[outcome.experiment.model] = paired_bootstrap(mine, base)
    p = dict(zip(differences, holm([d.p for d in differences.values()]), strict=True))
    rows = []
    for outcome in outcomes:
        model, trainings = outcome.experiment.model, outcome.trainings
        names = list(trainings[0].test) if trainings else []
        values = {name: [t.test[name] for t in trainings] for name in names}
        rows.append(
            Row(
                model,
                {name: float(np.mean(v)) for name, v in values.items()},
                {name: float(np.std(v, ddof=1)) if len(v) > 1 else 0.0 for name, v in values.items()},
                len(trainings),
                float(np.mean([t.seconds for t in trainings])) if trainings else 0.0,
                float(np.mean([t.test_seconds for t in trainings])) if trainings else 0.0,
                outcome.peak_bytes,
                float(np.mean([t.cpu_seconds for t in trainings])) if trainings else 0.0,
                _popularity_means(trainings),
                differences.get(model),
                p.get(model),
                outcome.error,
            )
        )
    sign = -1.0 if larger_is_better(metric) else 1.0
    return sorted(rows, key=lambda row: (bool(row.error), metric not in row.mean, sign * row.mean.get(metric, 0.0)))


def _popularity_means(trainings: Sequence[Training]) -> dict[str, dict[str, float]]:
    found = {}
    for name, first in trainings[0].by_popularity.items() if trainings else ():
        of_seeds = [t.by_popularity[name].metrics for t in trainings]
        means = {metric: float(np.mean([metrics[metric] for metrics in of_seeds])) for metric in first.metrics}
        found[name] = {"items": first.items, "targets": first.targets, "users": first.users, **means}
    return found


# ------------------------------------------------------------------ what it looks like


def cells(comparison: Comparison) -> tuple[list[str], list[list[str]]]:
    """Format the table: the header, and a line of cells for each model."""
    names = next((list(row.mean) for row in comparison.rows if row.mean), [])
    header = [
        "model",
        *names,
        f"{comparison.metric} against {comparison.reference} [95%]",
        "p",
        "train s",
        "test s",
        "GiB",
    ]
    body = []
    for row in comparison.rows:
        if row.error:
            body.append([row.model, f"failed: {row.error}", *[""] * (len(header) - 2)])
            continue
        figures = [
            f"{row.mean[n]:.4f}" + (f" ± {row.spread[n]:.4f}" if row.seeds > 1 else "") if n in row.mean else ""
            for n in names
        ]
        d = row.difference
        tested = ["reference" if row.model == comparison.reference else "not tested", ""]
        if d is not None and row.p is not None:
            tested = [f"{d.mean:+.4f} [{d.low:+.4f}, {d.high:+.4f}]", f"{row.p:.4f}"]
        size = f"{row.peak_bytes / 2**30:.2f}" if row.peak_bytes else ""
        body.append([row.model, *figures, *tested, f"{row.seconds:.1f}", f"{row.test_seconds:.2f}", size])
    return header, body


def as_rows(comparison: Comparison) -> tuple[list[str], list[list[Any]]]:
    """The table as plain values, for a worksheet: the header, and a row for each model; ``None`` where there is no value."""
    names = next((list(row.mean) for row in comparison.rows if row.mean), [])
    against = f"{comparison.metric} against {comparison.reference}"
    header = ["model", *(text for name in names for text in (name, f"{name} standard deviation")), "trainings"]
    header += [against, "95% from", "95% to", "p (Holm)", "train s", "test s", "GiB", "failed"]
    rows = []
    for row in comparison.rows:
        d = row.difference
        spread = row.spread if row.seeds > 1 else {}
        figures = [value for name in names for value in (row.mean.get(name), spread.get(name))]
        tested = [None] * 3 if d is None else [d.mean, d.low, d.high]
        seconds = [None, None] if row.error else [row.seconds, row.test_seconds]
        size = row.peak_bytes / 2**30 if row.peak_bytes else None
        rows.append([row.model, *figures, row.seeds, *tested, row.p, *seconds, size, row.error or None])
    return header, rows


def about_tests(comparison: Comparison) -> str:
    """Say what the table's differences and p-values are of."""
    trained = [row for row in comparison.rows if not row.error]
    most = max((row.seeds for row in trained), default=1)
    once = [row.model for row in trained if row.seeds == 1]
    seeds = ""
    if most > 1:
        seeds = f" ±: standard deviation over {most} seeds"
        seeds += f"; {', '.join(once)}: one training, which no seed changes." if once else "."
    return (
        f"Reference: {comparison.reference}, {comparison.reference_reason}. Differences of {comparison.metric} over test "
        f"users, paired bootstrap; p corrected for the number of models (Holm).{seeds}"
    )


def as_markdown(comparison: Comparison) -> str:
    """Format the table as GitHub Markdown."""
    header, body = cells(comparison)
    escaped = [[cell.replace("|", "\\|").replace("\n", " ") for cell in line] for line in body]
    lines = [header, ["---"] * len(header), *escaped]
    return "\n".join(f"| {' | '.join(line)} |" for line in lines)


def as_json(comparison: Comparison) -> dict[str, Any]:
    """Return everything but the per-user values, ready for JSON."""
    rows = []
    for row in comparison.rows:
        entry = {k: v for k, v in vars(row).items() if k != "difference"}
        rows.append(entry | {"difference": None if row.difference is None else vars(row.difference)})
    return {
        "dataset": comparison.dataset,
        "metric": comparison.metric,
        "reference": comparison.reference,
        "reference_reason": comparison.reference_reason,
        "rows": rows,
        "trainings": [
            {"model": o.experiment.model, "seed": t.seed, "valid": t.valid, "test": t.test, "seconds": t.seconds}
            for o in comparison.outcomes
            for t in o.trainings
        ],
        "versions": versions(),
    }


def draw(comparison: Comparison, path: str | Path) -> None:
    """Draw a dot per model at its mean, its spread over seeds as a bar, best on top.

    A line stands at the reference; models that do not differ from it significantly have a hollow dot.

    Raises:
        ValueError: if matplotlib is not installed; names the extra.
    """
    try:
        from matplotlib.figure import Figure
    except ModuleNotFoundError as error:
        raise ValueError("The picture needs matplotlib: pip install -e '.[report]' in the checkout.") from error
    rows = [row for row in reversed(comparison.rows) if not row.error]
    figure = Figure(figsize=(6, 0.4 * len(rows) + 1.2), layout="constrained")
    axes = figure.add_subplot()
    for row in rows:
        mean, spread = (of.get(comparison.metric, 0.0) for of in (row.mean, row.spread))
        differs = row.model == comparison.reference or (row.p is not None and row.p < SIGNIFICANT)
        fill = "C0" if differs else "white"
        axes.errorbar(mean, row.model, xerr=spread, fmt="o", capsize=3, color="C0", markerfacecolor=fill)
        if row.model == comparison.reference:
            axes.axvline(mean, color="0.6", linestyle="--", linewidth=1, zorder=0)
    dashed = textwrap.fill(f"dashed: {comparison.reference}, {comparison.reference_reason}", 90)
    figure.suptitle(f"{dashed}\nhollow: no significant difference from it", fontsize=8)
    axes.set_xlabel(f"{comparison.metric} on the test split of {comparison.dataset}")
    axes.grid(axis="x", alpha=0.3)
    figure.savefig(path, dpi=150)


# ------------------------------------------------------------------ the command
