"""``compare`` as a table of a paper: booktabs, the best in bold, the second underlined, a dagger where ours is proven better."""

import re
from collections.abc import Mapping, Sequence

from recbole_llm.bridge.experiments.comparison import SIGNIFICANT, Comparison, Row, about_tests
from recbole_llm.bridge.register import registered_models

_CAPITALS = ("ndcg", "mrr", "map", "auc", "gauc", "rmse", "mae")
_LARGER = ("hit", "map", "mrr", "ndcg", "precision", "recall", "auc", "gauc", "itemcoverage", "shannonentropy")
_SMALLER = ("rmse", "mae", "logloss")
_ESCAPES = {
    "\\": r"\textbackslash{}",
    "~": r"\textasciitilde{}",
    "^": r"\textasciicircum{}",
    "<": r"\textless{}",
    ">": r"\textgreater{}",
    **{character: f"\\{character}" for character in "&%$#_{}"},
}


def as_latex(comparison: Comparison) -> str:
    r"""A ``table`` that needs ``\usepackage{booktabs}``; failed models are named in a comment.

    Stock models come first, those of this program last. A dagger marks one of this program's that is better than the reference
    in ``comparison.metric``, p < 0.05.
    """
    rows = [row for row in comparison.rows if not row.error]
    names = next((list(row.mean) for row in rows), [])
    marks = {name: _first_and_second(rows, name) for name in names}
    ours = set(registered_models())
    groups = [
        [_line(comparison, row, names, marks) for row in rows if row.model not in ours],
        [_line(comparison, row, names, marks) for row in rows if row.model in ours],
    ]
    failed = [f"% {row.model} failed: {' '.join(row.error.split())}" for row in comparison.rows if row.error]
    return "\n".join(
        [
            f"% needs \\usepackage{{booktabs}}. {about_tests(comparison)}",
            *failed,
            booktabs(["Model", *map(_shown_name, names)], groups, _caption(comparison, rows), comparison.dataset),
        ]
    )


def booktabs(header: Sequence[str], groups: Sequence[Sequence[Sequence[str]]], caption: str, label: str) -> str:
    r"""Format a ``table`` that needs ``\usepackage{booktabs}``.

    Args:
        header: plain text of each column, left for the first, centred for the others.
        groups: rows of LaTeX cells, with a rule between groups; empty groups are left out.
        caption: LaTeX.
        label: plain text.
    """
    body = ["\n".join(" & ".join(cells) + r" \\" for cells in group) for group in groups if group]
    return "\n".join(
        [
            r"\begin{table}[t]",
            r"\centering",
            rf"\caption{{{caption}}}",
            rf"\label{{tab:{re.sub(r'[^A-Za-z0-9-]+', '-', label)}}}",
            rf"\begin{{tabular}}{{l{'c' * (len(header) - 1)}}}",
            r"\toprule",
            " & ".join(map(escaped, header)) + r" \\",
            r"\midrule",
            "\n\\midrule\n".join(body),
            r"\bottomrule",
            r"\end{tabular}",
            r"\end{table}",
        ]
    )


def _shown_name(metric: str) -> str:
    name, at, k = metric.partition("@")
    return (name.upper() if name in _CAPITALS else name.capitalize()) + at + k


def _first_and_second(rows: list[Row], metric: str) -> tuple[float | None, float | None]:
    """The best and the second-best mean; ``None`` where it is not said which is better."""
    name = metric.partition("@")[0]
    if name not in (*_LARGER, *_SMALLER):
        return None, None
    values = sorted({round(row.mean[metric], 4) for row in rows if metric in row.mean}, reverse=name in _LARGER)
    return (values[0] if values else None), (values[1] if len(values) > 1 else None)


def _line(
    comparison: Comparison, row: Row, names: list[str], marks: Mapping[str, tuple[float | None, float | None]]
) -> list[str]:
    cells = [escaped(row.model)]
    for name in names:
        if name not in row.mean:
            cells.append("--")
            continue
        value, (first, second) = round(row.mean[name], 4), marks[name]
        text = f"{value:.4f}"
        if value == first:
            text = rf"\textbf{{{text}}}"
        elif value == second:
            text = rf"\underline{{{text}}}"
        if name == comparison.metric and _is_better(row):
            text += r"$^{\dagger}$"
        if row.seeds > 1:
            text += rf" $\pm$ {row.spread[name]:.4f}"
        cells.append(text)
    return cells


def _is_better(row: Row) -> bool:
    return (
        row.model in registered_models()
        and row.difference is not None
        and row.difference.mean > 0
        and row.p is not None
        and row.p < SIGNIFICANT
    )


def _caption(comparison: Comparison, rows: list[Row]) -> str:
    seeds = max((row.seeds for row in rows), default=0)
    split = next((outcome.split for outcome in comparison.outcomes if outcome.split), "")
    over = "one seed" if seeds <= 1 else rf"mean $\pm$ standard deviation over {seeds} seeds"
    about = f" ({escaped(split)})" if split else ""
    text = f"Test results on {escaped(comparison.dataset)}{about}, {over}. Best in bold, second underlined."
    if any(_is_better(row) for row in rows):
        stock = comparison.reference not in registered_models()
        against = f"the best baseline, {comparison.reference}," if stock else comparison.reference
        text += (
            rf" $\dagger$: better than {escaped(against)} in {escaped(_shown_name(comparison.metric))}, paired bootstrap over "
            f"users, $p < {SIGNIFICANT:g}$ after Holm's correction."
        )
    return text


def escaped(text: str) -> str:
    """Write plain text so that LaTeX prints it as it is."""
    return "".join(_ESCAPES.get(character, character) for character in text)
