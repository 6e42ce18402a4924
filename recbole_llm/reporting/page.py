"""The report of a trained model as one HTML file."""

from base64 import b64encode
from collections.abc import Mapping, Sequence
from typing import Any

from recbole_llm.reporting import words
from recbole_llm.reporting.customers import Customer
from recbole_llm.reporting.document import document, figures, pairs, table, text
from recbole_llm.reporting.drawing import Picture


def page(
    record: Mapping[str, Any],
    pictures: Sequence[Picture],
    customers: Sequence[Customer],
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
    more: Sequence[str] = (),
) -> str:
    """The report.

    Args:
        record: figures.
        pictures: of :func:`recbole_llm.reporting.plots.pictures`.
        customers: of :func:`recbole_llm.reporting.customers.sample_customers`; empty for none.
        settings: what was given to the run.
        versions: of the packages that made the report.
        more: further parts as lines of HTML, behind the customers.
    """
    title = f"{record['model']} on {record['dataset']}"
    parts = [
        *_answer(record),
        *figures(pictures),
        *_customers(record, customers),
        *more,
        *_data(record),
        *_configuration(record, settings, versions),
    ]
    return document(title, f"Report of {record['date']}", parts)


def _answer(record: Mapping[str, Any]) -> list[str]:
    header, *rows = words.table(record)
    lines = [f'<p class="lead">{text(words.headline(record))}</p>', f"<p>{text(words.verdict(record))}</p>"]
    lines += table("Quality of the models", ["model", *header[1:]], rows, record["model"])
    lines += [f"<p>{text(words.measured_in_words(record))}</p>", "<ul>"]
    lines += [
        f"<li>{text(line)}</li>"
        for line in [*words.order_in_words(record), *words.baselines_in_words(record), *words.left_out_in_words(record)]
    ]
    return [*lines, "</ul>"]


def _customers(record: Mapping[str, Any], customers: Sequence[Customer]) -> list[str]:
    if not customers:
        return []
    who = words.people(record)
    lines = [
        f"<h2>{words.counted(len(customers), who)}</h2>",
        "<p>From the shortest known history to the longest, under numbers of this report. What was held out and is found is "
        'marked <span class="hit">✓</span>. Histories of real persons are personal data, without a name too.</p>',
        '<div class="grid">',
    ]
    for number, customer in enumerate(customers, 1):
        more = f" and {customer.left:,} more" if customer.left else ""
        had = ", ".join(map(text, customer.history)) or "nothing"
        hits = sum(shown.hit for shown in customer.shown)
        lines += [
            f'<section class="customer"><h3>{who[:-1].capitalize()} {number}</h3>',
            f'<p class="grey">Had: {had}{more}.</p>',
            f"<p>{hits} of {customer.held_out} held-out {words.unit(record)} in the first {record['k']}:</p><ol>",
        ]
        for shown in customer.shown:
            mark = ' <span class="hit">✓ held out</span>' if shown.hit else ""
            why = f' <span class="grey">for {", ".join(map(text, shown.reasons))}</span>' if shown.reasons else ""
            lines.append(f"<li>{_picture(shown.picture)}{text(shown.title)} ({shown.chance:.1%}){mark}{why}</li>")
        lines.append("</ol></section>")
    return [*lines, "</div>"]


def _picture(data: bytes | None) -> str:
    """A small picture beside a title, which says what it shows; nothing for an item without one."""
    if data is None:
        return ""
    return f'<img class="item" alt="" src="data:image/jpeg;base64,{b64encode(data).decode()}">'


def _data(record: Mapping[str, Any]) -> list[str]:
    data, what, who = record["data"], words.unit(record), words.people(record)
    rows = [
        (who, data["users"]),
        ("items", data["items"]),
        (what, data["interactions"]),
        (f"{what} fitted on", data["training"]),
        (f"{what} held out for the test", data["test"]),
        (f"{what} for each of the {who}", round(data["interactions"] / max(data["users"], 1), 1)),
        *(
            (f"items in the {_BUCKETS[name]}", part["items"])
            for name, part in record["popularity"].items()
            if name in _BUCKETS
        ),
    ]
    lines = ["<h2>Data</h2>", f"<p>{text(words.split_in_words(record).capitalize())}.</p>", "<table><tbody>"]
    lines += [f"<tr><td>{text(name)}</td><td>{value:,}</td></tr>" for name, value in rows]
    return [*lines, "</tbody></table>"]


_BUCKETS = {
    "head": "most popular third of the interactions",
    "middle": "middle third",
    "tail": "least popular third",
    "cold": "group without interactions",
}


def _configuration(record: Mapping[str, Any], settings: Mapping[str, Any], versions: Mapping[str, str]) -> list[str]:
    lines = ["<h2>Configuration and versions</h2>"]
    for part, result in record["metrics"].items():
        figures = ", ".join(f"{name} {value:.4f}" for name, value in result.items())
        lines.append(f"<p>RecBole's metrics, {text(part)}: {text(figures)}.</p>")
    stages = record["history"].get("stages") or []
    if stages:
        took = ", ".join(f"{each['stage']} {each['seconds']:.1f} s" for each in stages)
        lines.append(f"<p>Stages: {text(took)}.</p>")
    return [*lines, *pairs("Given to the run", settings), *pairs("Versions", versions)]
