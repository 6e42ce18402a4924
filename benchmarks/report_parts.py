"""What the parts of the report are made of: tables, figures as text, facts of a machine, plots to draw."""

from collections.abc import Iterable, Sequence
from typing import Any, NamedTuple

from report_plots import Plot

Json = dict[str, Any]


class Section(NamedTuple):
    """What one file becomes."""

    lines: list[str]
    plots: list[Plot]


def number(x: object) -> str:
    """Three significant digits; what is no number as it is."""
    if isinstance(x, bool) or not isinstance(x, int | float):
        return "" if x is None else str(x)
    if isinstance(x, int):
        return f"{x:,}"
    return f"{x:,.0f}" if abs(x) >= 100 else f"{x:.3g}"


def table(head: Sequence[str], rows: Iterable[Sequence[object]]) -> list[str]:
    """A Markdown table; a bar in a cell is escaped."""
    lines = ["| " + " | ".join(head) + " |", "|" + "---|" * len(head)]
    for row in rows:
        lines.append("| " + " | ".join(number(cell).replace("|", "\\|") for cell in row) + " |")
    return [*lines, ""]


def records(rows: Json) -> list[str]:
    """A table of {name: {field: number or text}}; fields that hold more than one value are left out."""
    flat = {name: {k: v for k, v in row.items() if not isinstance(v, dict | list)} for name, row in rows.items()}
    fields = list(dict.fromkeys(field for row in flat.values() for field in row))
    return table(["", *fields], [[name, *(row.get(f) for f in fields)] for name, row in flat.items()])


def facts(data: Json) -> list[str]:
    """Machine, versions and commit, as far as a file holds them."""
    machine, found = data.get("machine"), []
    if isinstance(machine, dict):
        found += [str(machine[k]) for k in ("device", "cpu", "processor", "platform") if machine.get(k)]
        found += [f"{machine['cores']} cores"] if "cores" in machine else []
    elif machine:
        found.append(str(machine))
    versions = data.get("versions") or (machine.get("versions") if isinstance(machine, dict) else None) or {}
    found += [f"{name} {version}" for name, version in versions.items() if version]
    commit = data.get("commit") or (machine.get("commit") if isinstance(machine, dict) else None)
    found += [f"commit {commit[:10]}{'+changes' if commit.endswith('+changes') else ''}"] if commit else []
    return ["Measured on: " + ", ".join(found) + ".", ""] if found else []
