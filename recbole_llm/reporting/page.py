"""A report as one HTML file: no script, no request to anywhere, everything that comes from data escaped.

The policy in its head forbids loading and running anything, should an escape ever be missing.
"""

import html
from collections.abc import Mapping, Sequence
from typing import Any

from recbole_llm.reporting import words
from recbole_llm.reporting.customers import Customer
from recbole_llm.reporting.plots import Picture

POLICY = "default-src 'none'; style-src 'unsafe-inline'; img-src data:; base-uri 'none'; form-action 'none'"
_STYLE = """
:root{color-scheme:light dark;--paper:#fff;--ink:#16181d;--grey:#5b616b;--faint:#d9dce1;--ours:#0b62c4;--second:#6d7480;
--third:#a3a9b3;--good:#0a7a45}
@media (prefers-color-scheme:dark){:root{--paper:#14161a;--ink:#eceef2;--grey:#a4abb6;--faint:#3a3f48;--ours:#6cb0ff;
--second:#9aa2ae;--third:#6b727d;--good:#5fd39b}}
*{box-sizing:border-box}
body{margin:0;overflow-wrap:anywhere;background:var(--paper);color:var(--ink);font:16px/1.5 system-ui,sans-serif}
main,header{max-width:1120px;margin:0 auto;padding:0 16px}
header{padding-top:28px}
h1{font-size:1.7rem;line-height:1.2;margin:0 0 4px}
h2{font-size:1.25rem;margin:44px 0 8px;padding-top:12px;border-top:1px solid var(--faint)}
h3{font-size:1rem;margin:0 0 4px}
p{max-width:72ch;margin:8px 0}
.lead{font-size:1.3rem;line-height:1.35;font-weight:600;max-width:44ch;margin:18px 0 8px}
.grey,figcaption{color:var(--grey);font-size:.9rem}
.grid{display:grid;grid-template-columns:repeat(auto-fit,minmax(min(100%,430px),1fr));gap:28px 32px;margin-top:16px}
figure{margin:0;min-width:0;break-inside:avoid}
svg{display:block;width:100%;height:auto;max-width:520px}
svg text{font-family:inherit!important}
.wide{overflow-x:auto}
table{border-collapse:collapse;overflow-wrap:normal;font-variant-numeric:tabular-nums;margin:10px 0}
th,td{text-align:right;padding:5px 12px 5px 0;border-bottom:1px solid var(--faint);vertical-align:top}
th:first-child,td:first-child{text-align:left}
th{font-weight:600;color:var(--grey);font-size:.9rem}
tr.own td{font-weight:600;color:var(--ours)}
.text td,.text th{text-align:left}
ol,ul{margin:6px 0;padding-left:1.4em}
.text td{overflow-wrap:anywhere}
td:not(:first-child){white-space:nowrap}
.text td:not(:first-child){white-space:normal}
tr.own td:first-child{white-space:nowrap}
.customer{break-inside:avoid;border:1px solid var(--faint);border-radius:8px;padding:12px 16px}
.hit{color:var(--good);font-weight:600}
footer{max-width:1120px;margin:40px auto;padding:0 16px;color:var(--grey);font-size:.9rem}
@media print{:root{--paper:#fff;--ink:#000;--grey:#444;--faint:#bbb;--ours:#0b4f9e;--second:#666;--third:#999;--good:#06602f}
body{font-size:11pt}h2{break-after:avoid}.grid{grid-template-columns:1fr 1fr}}
"""


def text(value: Any) -> str:
    """A value as text of HTML, in an element or a quoted attribute."""
    return html.escape(str(value), quote=True)


def page(
    record: Mapping[str, Any],
    pictures: Sequence[Picture],
    customers: Sequence[Customer],
    settings: Mapping[str, Any],
    versions: Mapping[str, str],
) -> str:
    """The report.

    Args:
        record: figures.
        pictures: of :func:`recbole_llm.reporting.plots.pictures`.
        customers: of :func:`recbole_llm.reporting.customers.sample_customers`; empty for none.
        settings: what was given to the run.
        versions: of the packages that made the report.
    """
    title = f"{record['model']} on {record['dataset']}"
    parts = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{text(title)}: report</title><style>{_STYLE}</style></head><body>",
        f"<header><h1>{text(title)}</h1>",
        f'<p class="grey">Report of {text(record["date"])}</p></header><main>',
        *_answer(record),
        "<h2>In pictures</h2>",
        '<div class="grid">',
        *map(_figure, pictures),
        "</div>",
        *_customers(record, customers),
        *_data(record),
        *_configuration(record, settings, versions),
        "</main><footer>Made by recbole-llm. This file loads nothing from anywhere.</footer></body></html>",
    ]
    return "\n".join(parts) + "\n"


def _answer(record: Mapping[str, Any]) -> list[str]:
    header, *rows = words.table(record)
    lines = [f'<p class="lead">{text(words.headline(record))}</p>', f"<p>{text(words.verdict(record))}</p>"]
    lines += ['<div class="wide" tabindex="0" role="region" aria-label="Quality of the models"><table><thead><tr>']
    lines += [f'<th scope="col">{text(cell) or "model"}</th>' for cell in header]
    lines += ["</tr></thead><tbody>"]
    for row in rows:
        own = ' class="own"' if row[0] == record["model"] else ""
        lines.append(f"<tr{own}>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>")
    lines += ["</tbody></table></div>", f"<p>{text(words.measured_in_words(record))}</p>", "<ul>"]
    lines += [
        f"<li>{text(line)}</li>" for line in [*words.baselines_in_words(record), *words.left_out_in_words(record)]
    ]
    return [*lines, "</ul>"]


def _figure(picture: Picture) -> str:
    note = f"<figcaption>{text(picture.note)}</figcaption>" if picture.note else ""
    return f"<figure><h3>{text(picture.title)}</h3>{picture.svg}{note}</figure>"


def _customers(record: Mapping[str, Any], customers: Sequence[Customer]) -> list[str]:
    if not customers:
        return []
    who = words.people(record)
    lines = [
        f"<h2>{len(customers)} {who}</h2>",
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
            lines.append(f"<li>{text(shown.title)} ({shown.chance:.1%}){mark}{why}</li>")
        lines.append("</ol></section>")
    return [*lines, "</div>"]


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
    for name, table in (("Given to the run", settings), ("Versions", versions)):
        if table:
            lines.append(f'<h3>{name}</h3><div class="wide" tabindex="0" role="region" aria-label="{name}">')
            lines.append('<table class="text"><tbody>')
            lines += [f"<tr><td>{text(key)}</td><td>{text(value)[:2000]}</td></tr>" for key, value in table.items()]
            lines.append("</tbody></table></div>")
    return lines
