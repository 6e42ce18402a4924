"""A record in words and a small table: on the terminal, and in the model card of an export."""

import math
from collections.abc import Mapping, Sequence
from typing import Any

from recbole_llm.reporting.record import kept

Record = Mapping[str, Any]
BESTSELLERS = "bestsellers"


def unit(record: Record) -> str:
    """What an interaction is called: ``ratings`` where the data hold ratings, else ``purchases``."""
    return "ratings" if record["rated"] else "purchases"


def people(record: Record) -> str:
    """What users are called beside :func:`unit`."""
    return "users" if record["rated"] else "customers"


def counted(number: int, what: str) -> str:
    """A number with its plural noun, or the singular for 1.

    Example:
        >>> counted(1, "purchases"), counted(2000, "purchases")
        ('1 purchase', '2,000 purchases')
    """
    return f"{number:,} {what[:-1] if number == 1 else what}"


MOST_PLACES = 6  # of an end of an interval


def of_100(share: float) -> str:
    """A share as a number of 100, with a decimal place below ten."""
    text = f"{100 * share:.0f}" if abs(share) >= 0.0995 else f"{100 * share:.1f}"
    return text.removesuffix(".0") if float(text) else "0"


def span_of_100(low: float, high: float, unit: str = "", places: int | None = None) -> str:
    """Two ends of an interval of shares as numbers of 100, with more decimal places where it is narrower than one.

    Args:
        low: the lower end.
        high: the upper end.
        unit: behind each number, such as ``%``.
        places: decimal places, where two ends differ by them; ``None`` for those of :func:`of_100`.
    """
    width = 100 * (high - low)
    enough = math.ceil(-math.log10(width)) if width > 0 else 0
    usual = [places if places is not None else int(abs(end) < 0.0995) for end in (low, high)]
    if enough > min(usual):
        ends = [f"{100 * end:.{min(enough, MOST_PLACES)}f}" for end in (low, high)]
    else:
        ends = [of_100(end) if places is None else f"{100 * end:.{places}f}" for end in (low, high)]
    return f"{ends[0]}{unit} to {ends[1]}{unit}"


def headline(record: Record) -> str:
    """The one sentence: what the model finds, and what the baselines find."""
    own = record["models"][record["model"]]["found"]["value"]
    others = [
        f"{name} {'reach ' if name == BESTSELLERS else ''}{of_100(figures['found']['value'])}"
        for name, figures in record["models"].items()
        if name != record["model"]
    ]
    place = "ten" if record["k"] == 10 else str(record["k"])
    verb = "is" if of_100(own) == "1" else "are"
    return f"Of 100 held-out {unit(record)} {of_100(own)} {verb} in the first {place}; {', '.join(others)}."


def verdict(record: Record) -> str:
    """Whether the model is better than the best baseline, by the interval of the difference, and what to do where it is not."""
    lead, best = record["lead"], record["best_baseline"]
    span = f"{span_of_100(lead['low'], lead['high'])} of 100, 95% interval"
    if lead["low"] > 0:
        return f"Better than the best baseline, {best}, by {of_100(lead['value'])} ({span})."
    epochs = unfinished_epochs(record["history"])
    longer = f" It was best after its last epoch, {epochs}: train longer first, as with --epochs={10 * epochs}."
    if lead["high"] < 0:
        worse = f"Worse than {best} by {of_100(-lead['value'])} ({span})"
        choice = f"{best} is the better choice for these data."
        return f"{worse}.{longer} If that does not help, {choice}" if epochs else f"{worse}: {choice}"
    return f"No clear difference from {best} ({span}).{longer if epochs else ''}"


def best_validation(history: Mapping[str, Any]) -> int:
    """Return the index of the best entry of ``valid``.

    Args:
        history: of a record, with one epoch at least.
    """
    better = max if history.get("valid_metric_bigger", True) else min
    return better(range(len(history["valid"])), key=lambda at: history["valid"][at][1])


def unfinished_epochs(history: Mapping[str, Any]) -> int:
    """Return how many epochs were trained where more might help, else 0.

    They might where the number of epochs ended the training and its last validation was the best.

    Args:
        history: of a record.
    """
    valid, most = history.get("valid") or [], history.get("most_epochs") or 0
    if not valid or not most:
        return 0
    trained = int(max(len(history.get("loss") or []), valid[-1][0] + 1))
    return trained if trained >= most and best_validation(history) == len(valid) - 1 else 0


def table(record: Record) -> list[list[str]]:
    """Rows of cells, the header first: each model's figures."""
    k = record["k"]
    header = ["", f"of 100 {unit(record)}", "95% interval", f"{people(record)} with a hit", f"NDCG@{k}", "items shown"]
    rows = [header]
    for name, figures in record["models"].items():
        found = figures["found"]
        rows.append(
            [
                name,
                of_100(found["value"]),
                span_of_100(found["low"], found["high"]),
                f"{figures['users_with_a_hit']:.0%}",
                f"{figures['ndcg']:.3f}",
                f"{figures['items_shown']:,}",
            ]
        )
    return rows


def aligned(rows: Sequence[Sequence[str]]) -> list[str]:
    """Cells as lines of a table, the first column to the left, the others to the right."""
    widths = [max(map(len, column)) for column in zip(*rows, strict=True)]
    return [
        "  ".join(
            f"{cell:{'<' if n == 0 else '>'}{w}}" for n, (cell, w) in enumerate(zip(row, widths, strict=True))
        ).rstrip()
        for row in rows
    ]


def split_in_words(record: Record) -> str:
    """Which interactions were held out."""
    split, what = record["split"], unit(record)
    if split["files"]:
        return f"held out: the {what} of the data set's own test file"
    share = f"{split['shares'][-1]:.0%}" if split["shares"] and sum(split["shares"]) <= 1.001 else "a part"
    which = "the latest" if split["order"] == "TO" else "chosen at random"
    whose = f" of each {people(record)[:-1]}'s {what}" if split["by_user"] else f" of all {what}"
    return f"held out: {share}{whose}, {which}"


def measured_in_words(record: Record) -> str:
    """On whom and what the figures were measured."""
    on = record["measured"]
    some = "" if on["users"] == on["of"] else f" (of {on['of']:,}, evenly chosen)"
    return (
        f"Measured on {on['targets']:,} {unit(record)} of {on['users']:,} {people(record)}{some}; {split_in_words(record)}. "
        f"What they had before has no place in the first {record['k']}."
    )


def baselines_in_words(record: Record) -> list[str]:
    """What the baselines are, and which was not fitted."""
    lines = [f"{name}: {about}." for name, about in record["about"].items()]
    return lines + [f"{name} was not fitted: {why}." for name, why in record["not_fitted"].items()]


def order_in_words(record: Record) -> list[str]:
    """Whether the order of histories matters on these data, in one line; nothing where it was not measured."""
    order = record.get("order")
    if order is None:
        return []
    lost, k = order["lost"], record["k"]
    anew = "with every history shuffled and the solved blocks fitted anew"
    figures = f"NDCG@{k} {order['ordered']:.4f}, {order['shuffled']:.4f} {anew}"
    span = f"{span_of_100(lost['low'], lost['high'], '%', 0)}, 95% interval"
    if lost["low"] > 0:
        return [f"Order matters: {lost['value']:.0%} of NDCG@{k} is lost without it ({span}; {figures})."]
    return [f"Order tells nothing clear: {lost['value']:.0%} of NDCG@{k} is lost without it ({span}; {figures})."]


def left_out_in_words(record: Record) -> list[str]:
    """What nobody is shown, and whom the model knows little of."""
    left, data = record["left_out"], record["data"]
    own = record["models"][record["model"]]
    lines = [f"{own['items_shown']:,} of {data['items']:,} items are among somebody's first {record['k']}."]
    placed = left.get("items_placed_by_content")  # of a model that reads content
    if untouched := left["items_without_interactions"]:
        where = ""
        if hidden := left["items_that_cannot_be_shown"]:
            where = f"; {hidden:,} of them are never shown: they have no text or other content, or gained nothing on validation"
        elif placed:
            where = f"; {'they' if placed >= untouched else f'{placed:,} of them'} are placed by their content"
        lines.append(f"Items without a training interaction: {untouched:,}{where}.")
    if unread := left.get("items_not_read"):
        then = "" if placed is None else " and they are placed by their content"
        lines.append(
            f"Items of the .item file that no interaction names, and that were not read: {unread:,}; add item: [item_id] to "
            f"load_col{then}."
        )
    if left["users_without_history"]:
        what = "" if placed is None else "; they get what fits everybody"
        lines.append(
            f"{people(record).capitalize()} without a training interaction: {left['users_without_history']:,}{what}."
        )
    return lines


def answer(record: Record) -> list[str]:
    """The answer to "is it any good?", as lines for a terminal."""
    return [
        headline(record),
        verdict(record),
        "",
        *aligned(table(record)),
        "",
        measured_in_words(record),
        *order_in_words(record),
        *baselines_in_words(record),
        *left_out_in_words(record),
    ]


def card(record: Record) -> list[str]:
    """The section on quality of a model card, as lines of Markdown."""
    rows = [[_markdown(cell) for cell in row] for row in table(record)]
    lines = ["| " + " | ".join(row) + " |" for row in rows]
    lines.insert(1, "|" + "---|" * len(rows[0]))
    data = record["data"]
    return [
        "## Quality",
        "",
        _markdown(headline(record)),
        _markdown(verdict(record)),
        "",
        *lines,
        "",
        _markdown(measured_in_words(record)),
        *map(_markdown, order_in_words(record)),
        *map(_markdown, baselines_in_words(record)),
        *map(_markdown, left_out_in_words(record)),
        "",
        f"Data set {_markdown(record['dataset'])} as of {_markdown(record['date'])}: {data['interactions']:,} {unit(record)} "
        f"of {data['users']:,} {people(record)} and {data['items']:,} items; {data['training']:,} of them were fitted on for "
        "these figures.",
        "",
    ]


def quality_of(state: Mapping[str, Any]) -> list[str]:
    """The section on quality from the figures that a checkpoint holds, and why there is none where it holds none.

    Args:
        state: of :func:`recbole_llm.bridge.checkpoint.read_checkpoint`.
    """
    try:
        record = kept(state)
    except ValueError as error:
        return ["## Quality", "", f"Not told: {_markdown(str(error))}", ""]
    if record is None:
        return ["## Quality", "", "Not measured: the checkpoint holds no figures. `recbole-llm run` measures them.", ""]
    return card(record)


def _markdown(text: str) -> str:
    """A text that no character of it turns into markup."""
    text = text.replace("&", "&amp;").replace("<", "&lt;").replace(">", "&gt;")
    return "".join(f"\\{c}" if c in "\\`*_[]|#" else c for c in text)
