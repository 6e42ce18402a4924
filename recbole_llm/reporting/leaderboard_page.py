"""The canonical table as one HTML file."""

from collections.abc import Mapping, Sequence
from typing import Any

from recbole_llm.bridge.experiments.leave_one_out import OURS as MODEL
from recbole_llm.reporting.document import document, figures, pairs, shown_settings, table, text
from recbole_llm.reporting.drawing import GREY, OURS, SECOND, Picture, Sheet, short, style
from recbole_llm.reporting.leaderboard import (
    ABOUT,
    ABOUT_GROUPS,
    MEASURED,
    PUBLISHED,
    Json,
    detail_cells,
    details_header,
    measured_cells,
    published_cells,
    title_of,
)
from recbole_llm.reporting.published import Published

METRIC = "ndcg@10"
OF_95 = 1.96  # standard errors


def leaderboard_page(name: str, found: Mapping[str, Any], given: Mapping[str, Any], date: str) -> str:
    """The report of a table.

    Args:
        name: of the table.
        found: of :func:`recbole_llm.reporting.leaderboard.as_json`.
        given: configuration values of our row; paths are left out.
        date: of the table.
    """
    measured = list(found["measured"])
    rows = [row for row in measured if row["chosen_by"] == "masked"] or measured
    cited = [Published(**row) for row in found["published"]]
    own = next((measured_cells(row)[0] for row in rows if row["name"] == MODEL), "")
    with style():
        drawn = [_measured(rows), *_published(rows, cited, name), _seconds(rows)]
    parts = [
        f'<p class="lead">{text(headline(rows))}</p>',
        *([f"<p>{text(said)}</p>"] if (said := verdict(rows)) else []),
        *table("Rows measured here", MEASURED, [measured_cells(row) for row in measured], own),
        f"<p>{text(ABOUT)}</p>",
        *figures(drawn),
        *table(
            "Where rows are good, and what they cost", details_header(measured), [detail_cells(row) for row in measured]
        ),
        f"<p>{text(ABOUT_GROUPS)}</p>",
        *(f"<p>Left out: {text(row)}. {text(why)}</p>" for row, why in found["left_out"].items()),
        *_published_table(cited, name),
        "<h2>How it was done</h2>",
        "<p>A user's last item is the test, the one before it the validation; histories at test hold every item before the last. "
        "Every item is ranked. Masked: items of the history have no place. Unmasked: they have one. Validation makes every "
        "choice.</p>",
        *pairs("Given to the run", shown_settings(given)),
        *pairs("Versions", found["versions"]),
    ]
    return document(title_of(name, found), f"Table of {date}", parts)


def _value(row: Json, rule: str = "masked") -> float:
    return float(row["figures"][rule][METRIC])


def headline(rows: Sequence[Json]) -> str:
    """The one sentence: who is first, and what ours or the next reaches."""
    first, *rest = sorted(rows, key=_value, reverse=True)
    others = [row for row in rest if row["name"] == MODEL] or rest[:1]
    said = f"{first['name']} is first of the rows measured here with NDCG@10 {_value(first):.4f}"
    return said + "".join(f"; {row['name']} reaches {_value(row):.4f}" for row in others) + "."


def verdict(rows: Sequence[Json]) -> str:
    """How ours stands against the best other row; empty where it was not tested."""
    tested = [row for row in rows if "difference" in row]
    if not tested:
        return ""
    best = max(tested, key=_value)
    d = best["difference"][best["chosen_by"]]
    span = f"{d['mean']:+.4f}, 95% interval {d['low']:+.4f} to {d['high']:+.4f}"
    if d["low"] > 0:
        return f"{MODEL} is better than {best['name']}, the best other row ({span})."
    if d["high"] < 0:
        return f"{MODEL} is worse than {best['name']}, the best other row ({span})."
    return f"No clear difference between {MODEL} and {best['name']}, the best other row ({span})."


def _measured(rows: Sequence[Json]) -> Picture:
    ordered = sorted(rows, key=_value, reverse=True)
    sheet = Sheet(0.75 + 0.3 * len(ordered))
    for at, row in enumerate(ordered):
        value, error = _value(row), OF_95 * row["standard_error"]["masked"]
        sheet.dot(at, value, value - error, value + error, _colour(row), f"{value:.4f}")
    sheet.rows([short(row["name"]) for row in ordered])
    _from_zero(sheet, [_value(row) + OF_95 * row["standard_error"]["masked"] for row in ordered])
    sheet.axes.set_xlabel("NDCG@10, masked")
    title = f"{ordered[0]['name']} is first of {len(ordered)} rows measured here"
    return Picture(title, sheet.svg("measured", title), "Lines are 95% intervals over users.")


def _colour(row: Json) -> str:
    return OURS if row["name"] == MODEL else SECOND


def _from_zero(sheet: Sheet, ends: Sequence[float]) -> None:
    sheet.axes.set_xlim(0, 1.3 * max(ends) or 1)


def _published(rows: Sequence[Json], cited: Sequence[Published], name: str) -> list[Picture]:
    """Published figures beside ours under the rule that each follows."""
    own = next((row for row in rows if row["name"] == MODEL), None)
    if own is None or not cited:
        return []
    under = {True: _value(own), False: _value(own, "unmasked")}
    ordered = sorted(cited, key=lambda each: -each.ndcg[name])
    sheet = Sheet(0.9 + 0.3 * len(ordered))
    for at, each in enumerate(ordered):
        value = each.ndcg[name]
        if each.masked is not None:
            sheet.axes.plot([under[each.masked]], [at], "|", color=OURS, markersize=12, markeredgewidth=2)
        sheet.dot(at, value, value, value, SECOND if each.masked is not None else GREY, f"{value:.4f}")
    sheet.rows([short(each.method) for each in ordered])
    _from_zero(sheet, [each.ndcg[name] for each in ordered] + list(under.values()))
    sheet.axes.set_xlabel("NDCG@10 as published")
    told = [each for each in ordered if each.masked is not None]
    above = sum(under[bool(each.masked)] > each.ndcg[name] for each in told)
    title = f"Ours is above {above} of {len(told)} published figures that state their rule"
    note = "Dots are published figures, blue marks ours under the same rule; a source that does not tell its rule has none."
    return [Picture(title, sheet.svg("published", title), note)]


def _seconds(rows: Sequence[Json]) -> Picture:
    ordered = sorted(rows, key=_value, reverse=True)
    sheet = Sheet(0.75 + 0.3 * len(ordered))
    for at, row in enumerate(ordered):
        seconds = row["cpu_seconds"]
        sheet.dot(at, seconds, seconds, seconds, _colour(row), f"{seconds:,.1f} s")
    sheet.rows([short(row["name"]) for row in ordered])
    _from_zero(sheet, [row["cpu_seconds"] for row in ordered])
    sheet.axes.set_xlabel("processor seconds of training")
    quick = min(ordered, key=lambda row: row["cpu_seconds"])
    title = f"{quick['name']} trains with least, {quick['cpu_seconds']:,.1f} processor seconds"
    return Picture(
        title, sheet.svg("seconds", title), "From making the model to the end of its training, mean of the trainings."
    )


def _published_table(cited: Sequence[Published], name: str) -> list[str]:
    if not cited:
        return []
    rows = [published_cells(each, name) for each in cited]
    return ["<h2>Published</h2>", *table("Published rows", PUBLISHED, rows)]
