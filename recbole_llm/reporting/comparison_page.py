"""A comparison of models as one HTML file."""

from collections.abc import Mapping, Sequence
from typing import Any

from recbole_llm.bridge.experiments.comparison import OURS as MODEL
from recbole_llm.bridge.experiments.comparison import SIGNIFICANT, Comparison, Row, about_tests, cells
from recbole_llm.reporting.document import document, figures, pairs, shown_settings, table, text
from recbole_llm.reporting.drawing import GREY, OURS, SECOND, Picture, Sheet, short, style

BUCKET_NAMES = {"head": "most popular third", "middle": "middle third", "tail": "least popular third"}


def comparison_page(comparison: Comparison, given: Mapping[str, Any], versions: Mapping[str, str], date: str) -> str:
    """The report of a comparison.

    Args:
        comparison: of :func:`recbole_llm.bridge.experiments.comparison.compare`.
        given: configuration values of all models; paths are left out.
        versions: of the packages.
        date: of the comparison.
    """
    done = [row for row in comparison.rows if not row.error]
    with style():
        pictures = [_quality(comparison, done), *_differences(comparison, done), *_popularity(comparison, done)]
        pictures += _seconds(done)
    header, body = cells(comparison)
    # a failed model's reason stands below the table
    whole = [row for row, of in zip(body, comparison.rows, strict=True) if not of.error]
    parts = [
        f'<p class="lead">{text(headline(comparison))}</p>',
        *([f"<p>{text(said)}</p>"] if (said := verdict(comparison)) else []),
        *table("Quality of the models", header, whole, MODEL),
        *[f"<p>{text(row.model)} failed: {text(row.error)}</p>" for row in comparison.rows if row.error],
        f"<p>{text(about_tests(comparison))}</p>",
        *figures([picture for picture in pictures if picture is not None]),
        *_protocol(comparison, given, versions),
    ]
    return document(f"{len(comparison.rows)} models on {comparison.dataset}", f"Comparison of {date}", parts)


# ---------------------------------------------------------------- in words


def headline(comparison: Comparison) -> str:
    """The one sentence: which model is best, and what ours or the next reaches."""
    done = [row for row in comparison.rows if not row.error]
    if not done:
        return "No model finished."
    best, metric = done[0], comparison.metric
    said = f"{best.model} is first with {_named(metric)} {_value(best, metric)}"
    others = [row for row in done[1:] if row.model == MODEL] or done[1:2]
    return said + "".join(f"; {row.model} reaches {_value(row, metric)}" for row in others) + "."


def verdict(comparison: Comparison) -> str:
    """How ours, or the first model, stands against the reference; empty where it was not tested."""
    tested = {row.model: row for row in comparison.rows if row.difference is not None and row.p is not None}
    row = tested.get(MODEL) or next(iter(tested.values()), None)
    if row is None or row.difference is None or row.p is None:
        return ""
    d, p = row.difference, row.p
    chance = "p below .0001" if p < 0.0001 else f"p {p:.4f}"
    span = f"{d.mean:+.4f}, 95% interval {d.low:+.4f} to {d.high:+.4f}, {chance}"
    if p >= SIGNIFICANT:
        return f"No clear difference between {row.model} and {comparison.reference} ({span})."
    better = "better" if d.mean > 0 else "worse"
    return f"{row.model} is {better} than {comparison.reference} ({span})."


def _named(metric: str) -> str:
    return metric.upper() if metric.startswith(("ndcg", "mrr", "map", "auc")) else metric.capitalize()


def _value(row: Row, metric: str) -> str:
    value = row.mean.get(metric)
    return "none" if value is None else f"{value:.4f}"


# ---------------------------------------------------------------- in pictures


def _colour(row: Row) -> str:
    return OURS if row.model == MODEL else SECOND


def _quality(comparison: Comparison, done: Sequence[Row]) -> Picture | None:
    rows = [row for row in done if comparison.metric in row.mean]
    if not rows:
        return None
    sheet = Sheet(0.75 + 0.3 * len(rows))
    for at, row in enumerate(rows):
        value, spread = row.mean[comparison.metric], row.spread[comparison.metric]
        sheet.dot(at, value, value - spread, value + spread, _colour(row), f"{value:.4f}")
    sheet.rows([short(row.model) for row in rows])
    _room(sheet, [row.mean[comparison.metric] + row.spread[comparison.metric] for row in rows])
    sheet.axes.set_xlabel(f"{_named(comparison.metric)} on the test split")
    first, *rest = rows
    title = f"{first.model} is best at {_named(comparison.metric)}"
    if rest:
        ahead = abs(first.mean[comparison.metric] - rest[0].mean[comparison.metric])
        title += f", {ahead:.4f} before {rest[0].model}"
    repeated = any(row.seeds > 1 for row in rows)
    note = "Lines are one standard deviation over the trainings." if repeated else "One training of each model."
    return Picture(title, sheet.svg("quality", title), note)


def _room(sheet: Sheet, ends: Sequence[float]) -> None:
    """Begin at 0 and leave room for the labels behind the dots."""
    sheet.axes.set_xlim(0, 1.3 * max(ends) or 1)


def _differences(comparison: Comparison, done: Sequence[Row]) -> list[Picture]:
    rows = [(row, row.difference) for row in done if row.difference is not None]
    if not rows:
        return []
    sheet = Sheet(0.75 + 0.3 * len(rows))
    sheet.axes.axvline(0, color=GREY, linewidth=1, linestyle="--")
    for at, (row, d) in enumerate(rows):
        differs = row.p is not None and row.p < SIGNIFICANT
        sheet.dot(at, d.mean, d.low, d.high, _colour(row))
        if not differs:  # hollow
            sheet.axes.plot([d.mean], [at], "o", color="none", markeredgecolor=_colour(row), markersize=9)
    sheet.rows([short(row.model) for row, _ in rows])
    sheet.axes.margins(x=0.1)
    sheet.axes.locator_params(axis="x", nbins=5)
    sheet.axes.set_xlabel(f"{_named(comparison.metric)}, difference from {short(comparison.reference)}")
    better = [row.model for row, d in rows if d.mean > 0 and row.p is not None and row.p < SIGNIFICANT]
    title = (
        f"{_list(better)} {'is' if len(better) == 1 else 'are'} proven better than {comparison.reference}"
        if better
        else f"No model is proven better than {comparison.reference}"
    )
    note = "Lines are 95% intervals over test users. A ring marks a difference that may be chance (p, corrected, from .05)."
    return [Picture(title, sheet.svg("difference", title), note)]


def _list(names: Sequence[str]) -> str:
    return names[0] if len(names) == 1 else f"{', '.join(names[:-1])} and {names[-1]}"


def _popularity(comparison: Comparison, done: Sequence[Row]) -> list[Picture]:
    """By bucket of popularity, ours and the two best others."""
    metric = comparison.metric
    having = [row for row in done if any(metric in of for of in row.by_popularity.values())]
    own = [row for row in having if row.model == MODEL]
    rows = [*own, *[row for row in having if row.model != MODEL][: 3 - len(own)]]
    buckets = [name for name in BUCKET_NAMES if rows and all(metric in row.by_popularity.get(name, {}) for row in rows)]
    if not buckets:
        return []
    sheet = Sheet(0.9 + (0.17 * len(rows) + 0.22) * len(buckets))
    colours = [_colour(row) if row.model == MODEL else (SECOND, GREY, GREY)[n - len(own)] for n, row in enumerate(rows)]
    for at, bucket in enumerate(buckets):
        for n, row in enumerate(rows):
            y = at + (n - (len(rows) - 1) / 2) * 0.22
            label = short(row.model) if at == 0 else None
            value = row.by_popularity[bucket][metric]
            sheet.axes.plot([value], [y], ("o", "s", "D")[n], color=colours[n], markersize=6, label=label)
    targets = [int(rows[0].by_popularity[name].get("targets", 0)) for name in buckets]
    sheet.rows([f"{BUCKET_NAMES[name]}\n{n:,} targets" for name, n in zip(buckets, targets, strict=True)])
    sheet.axes.set_xlim(left=0)
    sheet.axes.set_xlabel(f"{_named(metric)} of targets in that third")
    sheet.legend(len(rows))
    last = buckets[-1]
    best = max(rows, key=lambda row: row.by_popularity[last][metric])
    title = f"{best.model} finds most of the {BUCKET_NAMES[last]}"
    note = "Each third holds a third of the training interactions: few popular items, many rare ones."
    return [Picture(title, sheet.svg("popularity", title), note)]


def _seconds(done: Sequence[Row]) -> list[Picture]:
    rows = [row for row in done if row.seconds > 0]
    if not rows:
        return []
    sheet = Sheet(0.75 + 0.3 * len(rows))
    for at, row in enumerate(rows):
        sheet.dot(at, row.seconds, row.seconds, row.seconds, _colour(row), f"{row.seconds:,.1f} s")
    sheet.rows([short(row.model) for row in rows])
    _room(sheet, [row.seconds for row in rows])
    sheet.axes.set_xlabel("seconds of training, validations included")
    quick = min(rows, key=lambda row: row.seconds)
    title = f"{quick.model} trains fastest, in {quick.seconds:,.1f} s"
    return [Picture(title, sheet.svg("seconds", title), "By the clock of this machine, mean of the trainings.")]


# ---------------------------------------------------------------- how it was done


def _protocol(comparison: Comparison, given: Mapping[str, Any], versions: Mapping[str, str]) -> list[str]:
    splits = list(dict.fromkeys(outcome.split for outcome in comparison.outcomes if outcome.split))
    seeds = max((row.seeds for row in comparison.rows), default=0)
    lines = ["<h2>How it was done</h2>"]
    lines += [f"<p>{text(split[:1].upper() + split[1:])}, the same for all models.</p>" for split in splits]
    lines.append(
        f"<p>{seeds} training{'' if seeds == 1 else 's'} of each model; one of models that ignore the seed. Every model "
        "trains in a process of its own.</p>"
    )
    return [*lines, *pairs("Given to all models", shown_settings(given)), *pairs("Versions", versions)]
