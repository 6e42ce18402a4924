"""A search of hyper-parameters as one HTML file."""

from collections.abc import Mapping, Sequence
from statistics import median
from typing import Any

from recbole_llm.bridge.experiments.tuning import Trial, name_of, ranked
from recbole_llm.reporting.document import document, figures, pairs, shown_settings, table, text
from recbole_llm.reporting.drawing import GREY, OURS, SECOND, Picture, Sheet, style

MOST_ROWS = 200  # of the table
MOST_PICTURES = 6  # of parameters
LOGARITHMIC = 20.0  # from this ratio of the largest value to the smallest, the axis is logarithmic


def tuning_page(
    model: str,
    dataset: str,
    trials: Sequence[Trial],
    algorithm: str,
    given: Mapping[str, Any],
    versions: Mapping[str, str],
    date: str,
) -> str:
    """The report of a search.

    Args:
        model: its name.
        dataset: its name.
        trials: in the order tried.
        algorithm: how the space was searched.
        given: configuration values of all trials; paths are left out.
        versions: of the packages.
        date: of the search.
    """
    tried = list({name_of(trial.params): trial for trial in trials}.values())
    best_first = ranked(tried)
    done = [trial for trial in tried if trial.score is not None]
    failed = [trial for trial in tried if trial.score is None]
    keys = list(dict.fromkeys(key for trial in tried for key in trial.params))
    metric = metric_of(best_first)
    with style():
        drawn = [*_course(done, metric), *_parameters(done, keys, metric)]
    parts = [
        f'<p class="lead">{text(headline(best_first, metric))}</p>',
        *_about_best(best_first, metric),
        *figures(drawn),
        "<h2>Settings</h2>",
        *_table(best_first, keys, metric),
        *[f"<p>{text(_setting(trial))} failed: {text(trial.error)}</p>" for trial in failed[:20]],
        *([f"<p>{len(failed) - 20:,} more failed; tuning.json has their reasons.</p>"] if len(failed) > 20 else []),
        "<h2>How it was done</h2>",
        f"<p>{text(algorithm.capitalize())} search. Every setting trains once, in a process of its own. Validation alone "
        "chooses; the test split is looked at and decides nothing.</p>",
        *pairs("Given to all settings", shown_settings(given)),
        *pairs("Versions", versions),
    ]
    return document(f"{model} on {dataset}, tuned", f"Search of {date}", parts)


def metric_of(trials: Sequence[Trial]) -> str:
    """The name of the metric that the scores are of, such as ``ndcg@10``; ``validation score`` where it is not known."""
    for trial in trials:
        for name, value in trial.valid.items():
            if value == trial.score:
                return name
    return "validation score"


def headline(best_first: Sequence[Trial], metric: str) -> str:
    """The one sentence: the best setting and what it reaches."""
    best = best_first[0]
    if best.score is None:
        return "No setting finished."
    return f"The best of {len(best_first)} settings reaches {metric} {best.score:.4f} on validation: {_setting(best)}."


def _setting(trial: Trial) -> str:
    return ", ".join(f"{key} {_shown(value)}" for key, value in trial.params.items())


def _shown(value: Any) -> str:
    return f"{value:.4g}" if isinstance(value, float) else str(value)


def _about_best(best_first: Sequence[Trial], metric: str) -> list[str]:
    best, scores = best_first[0], [trial.score for trial in best_first if trial.score is not None]
    if best.score is None:
        return []
    lines = [f"<p>Half of the settings reach {median(scores):.4f} or less; the last one reaches {scores[-1]:.4f}.</p>"]
    if not best.larger_is_better:
        lines = [f"<p>Smaller is better. Half of the settings stay at {median(scores):.4f} or above.</p>"]
    if best.test:
        told = ", ".join(f"{name} {value:.4f}" for name, value in best.test.items())
        lines.append(f"<p>On the test split the best setting has {text(told)}.</p>")
    return lines


# ---------------------------------------------------------------- in pictures


def _course(done: Sequence[Trial], metric: str) -> list[Picture]:
    if len(done) < 2:
        return []
    scores = [float(trial.score or 0.0) for trial in done]
    larger = done[0].larger_is_better
    so_far = [max(scores[: n + 1]) if larger else min(scores[: n + 1]) for n in range(len(scores))]
    at = so_far.index(so_far[-1])
    sheet = Sheet(2.4)
    places = range(1, len(scores) + 1)
    sheet.axes.step(places, so_far, where="post", color=GREY, linewidth=1.2)
    sheet.axes.plot(places, scores, "o", color=SECOND, markersize=5)
    sheet.axes.plot([at + 1], [scores[at]], "o", color=OURS, markersize=8)
    sheet.axes.set_xlabel("settings that finished, in the order tried")
    sheet.axes.set_ylabel(f"validation {metric}")
    sheet.whole_numbers()
    title = f"The best is number {at + 1} of the {len(scores)} settings that finished"
    return [Picture(title, sheet.svg("course", title), "The line is the best so far.")]


def _parameters(done: Sequence[Trial], keys: Sequence[str], metric: str) -> list[Picture]:
    """A picture of each parameter that takes several values, those that matter most first."""
    if len(done) < 2:
        return []
    best = ranked(done)[0]
    found = []
    for key in keys:
        values = [trial.params.get(key) for trial in done]
        if len({str(value) for value in values}) > 1:
            found.append((_matters(done, key), key))
    found.sort(key=lambda each: -each[0])
    return [_parameter(done, best, key, metric, f"parameter-{n}") for n, (_, key) in enumerate(found[:MOST_PICTURES])]


def _matters(done: Sequence[Trial], key: str) -> float:
    """By how much the medians of the values differ."""
    groups: dict[str, list[float]] = {}
    for trial in done:
        groups.setdefault(str(trial.params.get(key)), []).append(float(trial.score or 0.0))
    middles = [median(scores) for scores in groups.values()]
    return max(middles) - min(middles)


def _parameter(done: Sequence[Trial], best: Trial, key: str, metric: str, name: str) -> Picture:
    values = [trial.params.get(key) for trial in done]
    scores = [float(trial.score or 0.0) for trial in done]
    numbers = [float(v) for v in values if isinstance(v, (int, float)) and not isinstance(v, bool)]
    sheet = Sheet(2.4)
    own = best.params.get(key)
    if len(numbers) == len(values) and len(set(numbers)) > 2:
        at: list[float] = numbers
        best_at = float(own)  # type: ignore[arg-type]
        if min(numbers) > 0 and max(numbers) / min(numbers) >= LOGARITHMIC:
            sheet.logarithmic()
        elif all(isinstance(value, int) for value in values):
            sheet.whole_numbers()
    else:
        names = sorted({str(value) for value in values}, key=_order)
        at = [float(names.index(str(value))) for value in values]
        best_at = float(names.index(str(own)))
        sheet.axes.set_xticks(range(len(names)), [name[:24] for name in names])
        sheet.axes.set_xlim(-0.5, len(names) - 0.5)
    sheet.axes.plot(at, scores, "o", color=SECOND, markersize=5)
    sheet.axes.plot([best_at], [float(best.score or 0.0)], "o", color=OURS, markersize=8)
    sheet.axes.set_xlabel(key)
    sheet.axes.set_ylabel(f"validation {metric}")
    sheet.axes.grid(color="none")
    title = f"{key}: the best setting has {_shown(own)}"
    return Picture(title, sheet.svg(name, title), "")


def _order(name: str) -> tuple[float, str]:
    try:
        return float(name), name
    except ValueError:
        return float("inf"), name


def _table(best_first: Sequence[Trial], keys: Sequence[str], metric: str) -> list[str]:
    shown = best_first[:MOST_ROWS]
    header = ["place", *keys, f"validation {metric}", "seconds"]
    rows = [
        [
            str(place),
            *(_shown(trial.params.get(key, "")) for key in keys),
            "failed" if trial.score is None else f"{trial.score:.4f}",
            f"{trial.seconds:.1f}",
        ]
        for place, trial in enumerate(shown, 1)
    ]
    more = len(best_first) - len(shown)
    said = [f"<p>{more:,} more are in tuning.json.</p>"] if more else []
    return [*table("Settings, the best first", header, rows, "1"), *said]
