"""Drawing pictures as SVG that takes its colours from the page: readable in dark, in light and on paper.

matplotlib draws with stand-in colours, which are replaced by CSS variables; texts stay texts. Every picture has a title that says
what it shows and a description for who cannot see it.
"""

import html
import io
import re
from contextlib import AbstractContextManager
from dataclasses import dataclass
from typing import Any

WIDTH = 4.3  # inches; a phone of 390 px shows it nearly at its own size
INK, GREY, FAINT, OURS, SECOND, THIRD = (f"#0{n}0{n}0{n}" for n in range(1, 7))
_VARIABLES = {
    INK: "var(--ink)",
    GREY: "var(--grey)",
    FAINT: "var(--faint)",
    OURS: "var(--ours)",
    SECOND: "var(--second)",
    THIRD: "var(--third)",
}
_STYLE: Any = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": INK,
    "text.parse_math": False,
    "axes.labelcolor": INK,
    "axes.edgecolor": FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "axes.formatter.useoffset": False,
    "xtick.color": GREY,
    "ytick.color": GREY,
    "xtick.labelcolor": INK,
    "ytick.labelcolor": INK,
}
_LONGEST = 20  # characters of a model's name
MARKERS = ("o", "s", "D", "^", "v")


@dataclass(frozen=True)
class Picture:
    """A picture with its words.

    Attributes:
        title: what it shows, in a sentence.
        svg: an ``<svg>`` element.
        note: how to read it.
    """

    title: str
    svg: str
    note: str


def require_matplotlib() -> None:
    """Raise where pictures cannot be drawn.

    Raises:
        ValueError: if matplotlib is not installed; names the extra.
    """
    try:
        import matplotlib  # noqa: F401
    except ModuleNotFoundError as error:
        raise ValueError(
            "The report's pictures need matplotlib: pip install -e '.[report]' in the checkout."
        ) from error


def style() -> AbstractContextManager[None]:
    """The style of the pictures, in force while the context lasts."""
    from matplotlib import rc_context

    return rc_context(_STYLE)


class Sheet:
    """A figure with one pair of axes in the report's style.

    Args:
        height: in inches.
    """

    def __init__(self, height: float) -> None:
        from matplotlib.figure import Figure

        self.figure = Figure(figsize=(WIDTH, height), layout="constrained")
        self.axes = self.figure.add_subplot()
        self.axes.grid(axis="x", color=FAINT, linewidth=0.6)
        self.axes.set_axisbelow(True)

    def whole_numbers(self) -> None:
        """Mark whole numbers alone on the x axis."""
        locator: Any = self.axes.xaxis.get_major_locator()
        locator.set_params(integer=True)

    def logarithmic(self) -> None:
        """Make the x axis logarithmic, its marks plain numbers."""
        from matplotlib.ticker import FuncFormatter, NullFormatter

        self.axes.set_xscale("log")
        self.axes.xaxis.set_major_formatter(FuncFormatter(lambda value, _: f"{value:g}"))
        self.axes.xaxis.set_minor_formatter(NullFormatter())

    def rows(self, labels: list[str]) -> None:
        """Name the rows 0, 1, ... from the top."""
        self.axes.set_yticks(range(len(labels)), labels)
        self.axes.set_ylim(len(labels) - 0.5, -0.5)

    def dot(self, row: float, value: float, low: float, high: float, colour: str, label: str = "") -> None:
        """Draw a value with its interval and, behind it, its label."""
        self.axes.plot([low, high], [row, row], color=colour, linewidth=2.2, solid_capstyle="round")
        self.axes.plot([value], [row], "o", color=colour, markersize=7)
        self.axes.annotate(label, (high, row), xytext=(6, 0), textcoords="offset points", va="center", color=INK)

    def legend(self, columns: int) -> None:
        """A legend above the axes."""
        self.figure.legend(loc="outside upper left", ncols=columns, frameon=False, handletextpad=0.2, columnspacing=1.2)

    def svg(self, name: str, description: str) -> str:
        """The figure as an element whose ids begin with ``name``."""
        from matplotlib import rc_context

        out = io.StringIO()
        with rc_context({"svg.hashsalt": name}):
            self.figure.patch.set_alpha(0)
            self.axes.patch.set_alpha(0)
            self.figure.savefig(
                out, format="svg", metadata={"Date": None, "Creator": None, "Format": None, "Type": None}
            )
        text = out.getvalue()
        text = text[text.index("<svg") :]
        text = re.sub(r"<metadata>.*?</metadata>", "", text, flags=re.DOTALL)
        text = re.sub(r' id="', f' id="{name}-', text)
        text = re.sub(r"(url\(#|href=\"#)", rf"\g<1>{name}-", text)
        for colour, variable in _VARIABLES.items():
            text = text.replace(colour, variable)
        start = f'<svg role="img" aria-label="{html.escape(description, quote=True)}" '
        return re.sub(r'<svg (height="[^"]*" |width="[^"]*" )?', lambda found: start, text, count=1).strip()


def short(name: str) -> str:
    """A model's name as long as a picture has room for."""
    return name if len(name) <= _LONGEST else name[: _LONGEST - 1] + "…"
