"""The frame of a report: one HTML file, no script, no request to anywhere, everything that comes from data escaped.

The policy in its head forbids loading and running anything, should an escape ever be missing.
"""

import html
from collections.abc import Iterable, Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_llm.atomic import atomic_path
from recbole_llm.bridge.checkpoint_settings import TAKEN
from recbole_llm.reporting.drawing import Picture

MOST_CHARACTERS = 2000  # of a value
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
.item{width:40px;height:56px;object-fit:contain;vertical-align:middle;margin:2px 10px 2px 0;border-radius:3px}
.hit{color:var(--good);font-weight:600}
footer{max-width:1120px;margin:40px auto;padding:0 16px;color:var(--grey);font-size:.9rem}
@media print{:root{--paper:#fff;--ink:#000;--grey:#444;--faint:#bbb;--ours:#0b4f9e;--second:#666;--third:#999;--good:#06602f}
body{font-size:11pt}h2{break-after:avoid}.grid{grid-template-columns:1fr 1fr}}
"""


def text(value: Any) -> str:
    """A value as text of HTML, in an element or a quoted attribute."""
    return html.escape(str(value), quote=True)


def document(title: str, subtitle: str, parts: Iterable[str]) -> str:
    """A whole file.

    Args:
        title: its heading, as text.
        subtitle: the line below, as text.
        parts: what stands below, as HTML.
    """
    lines = [
        "<!doctype html>",
        '<html lang="en"><head><meta charset="utf-8">',
        f'<meta http-equiv="Content-Security-Policy" content="{POLICY}">',
        '<meta name="viewport" content="width=device-width,initial-scale=1">',
        f"<title>{text(title)}: report</title><style>{_STYLE}</style></head><body>",
        f"<header><h1>{text(title)}</h1>",
        f'<p class="grey">{text(subtitle)}</p></header><main>',
        *parts,
        "</main><footer>Made by recbole-llm. This file loads nothing from anywhere.</footer></body></html>",
    ]
    return "\n".join(lines) + "\n"


def figures(pictures: Sequence[Picture]) -> list[str]:
    """Pictures with their titles, beside each other where there is room."""
    if not pictures:
        return []
    return ["<h2>In pictures</h2>", '<div class="grid">', *map(_figure, pictures), "</div>"]


def _figure(picture: Picture) -> str:
    note = f"<figcaption>{text(picture.note)}</figcaption>" if picture.note else ""
    return f"<figure><h3>{text(picture.title)}</h3>{picture.svg}{note}</figure>"


def table(name: str, header: Sequence[str], rows: Sequence[Sequence[str]], own: str = "") -> list[str]:
    """A table that scrolls sideways where it is wider than the page.

    Args:
        name: what it holds, for who cannot see it.
        header: cells of the first line, as text.
        rows: lines of cells, as text.
        own: the first cell of the line that stands out.
    """
    lines = [f'<div class="wide" tabindex="0" role="region" aria-label="{text(name)}"><table><thead><tr>']
    lines += [f'<th scope="col">{text(cell)}</th>' for cell in header]
    lines += ["</tr></thead><tbody>"]
    for row in rows:
        mark = ' class="own"' if own and row[0] == own else ""
        lines.append(f"<tr{mark}>" + "".join(f"<td>{text(cell)}</td>" for cell in row) + "</tr>")
    return [*lines, "</tbody></table></div>"]


def pairs(name: str, values: Mapping[str, Any]) -> list[str]:
    """Names with their values under a heading; nothing where there are none."""
    if not values:
        return []
    lines = [f'<h3>{text(name)}</h3><div class="wide" tabindex="0" role="region" aria-label="{text(name)}">']
    lines.append('<table class="text"><tbody>')
    lines += [f"<tr><td>{text(key)}</td><td>{text(_shortened(str(value)))}</td></tr>" for key, value in values.items()]
    return [*lines, "</tbody></table></div>"]


def _shortened(value: str) -> str:
    """A value of at most ``MOST_CHARACTERS``, and how many are left out."""
    left = len(value) - MOST_CHARACTERS
    return value if left <= 0 else f"{value[:MOST_CHARACTERS]} … and {left:,} more characters"


def shown_settings(given: Mapping[str, Any]) -> dict[str, str]:
    """Settings of a run without its paths, of an encoder's the last part.

    A report is passed on, and the name of a home folder is that of its owner.
    """
    told = {str(key): str(value) for key, value in given.items() if key in TAKEN}
    shown = {key: value if value.strip() else repr(value) for key, value in told.items()}  # a tab is seen
    encoder = shown.get("encoder", "")
    return shown | ({"encoder": Path(encoder).name} if encoder.count("/") > 1 or encoder.startswith((".", "~")) else {})


def write(content: str, output: str | Path) -> int:
    """Write a file whole or not at all; gives its size in bytes."""
    target = Path(output)
    target.parent.mkdir(parents=True, exist_ok=True)
    encoded = content.encode("utf-8", "replace")
    with atomic_path(target) as temporary:
        temporary.write_bytes(encoded)
    return len(encoded)
