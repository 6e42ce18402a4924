"""One style for every plot: the title is the finding, ours is coloured and the rest grey, dots with intervals, direct labels.

A :class:`Dots` plot has panels of rows; a row is a name with dots. A :class:`Curves` plot has lines of one panel. Colours
keep their contrast on white paper and in grey print; the same figures give the same bytes.
"""

import textwrap
from collections.abc import Sequence
from pathlib import Path
from typing import Any, NamedTuple

OURS, OTHER, DARK, LINE = "#1f6496", "#9aa5ad", "#33383c", "#c9ced2"
SHADES = ("#33383c", "#87929a", "#c0c8cd", "#b0893f", "#8a6fa8", "#5f9e8f", "#b5654f")
MARKS = "osD^vPX"
LEGEND = 3  # series from here on are named in a legend, fewer at their first dots
WIDTH = 9.0


class Dot(NamedTuple):
    """A value; ``low`` and ``high`` are the ends of its interval, where there is one."""

    value: float
    low: float | None = None
    high: float | None = None
    ours: bool = False
    series: str = ""  # several dots in a row: whose this is


class Row(NamedTuple):
    """A line of a panel."""

    name: str
    dots: list[Dot]


class Panel(NamedTuple):
    """Rows that share an axis."""

    title: str
    rows: list[Row]
    log: bool = False
    line: float | None = None  # a value to compare with
    unit: str = ""  # behind the labels


class Dots(NamedTuple):
    """A plot of panels one beside the other."""

    name: str  # of the file
    finding: str
    note: str  # what is shown: metric, protocol, interval
    panels: list[Panel]


class Curve(NamedTuple):
    """A line through points."""

    name: str
    x: list[float]
    y: list[float]
    ours: bool = False


class Curves(NamedTuple):
    """A plot of lines; ``diagonal`` where x and y are the same thing."""

    name: str
    finding: str
    note: str
    x_axis: str
    y_axis: str
    curves: list[Curve]
    diagonal: bool = False
    log_x: bool = False


Plot = Dots | Curves


def short(value: float) -> str:
    """A figure as a label: three significant digits, no needless zero before the point."""
    if value == 0:
        return "0"
    text = f"{value:,.0f}" if abs(value) >= 100 else f"{value:.3g}"
    return text.replace("0.", ".", 1) if text.startswith(("0.", "-0.")) else text


def draw(plot: Plot, folder: Path) -> Path:
    """Write a plot as SVG.

    Returns:
        The file.
    """
    import matplotlib

    matplotlib.use("Agg")
    import matplotlib.pyplot as plt

    plt.rcParams.update(
        {"svg.fonttype": "none", "svg.hashsalt": "recbole-llm", "font.size": 9, "text.color": DARK,
         "axes.edgecolor": LINE, "axes.labelcolor": DARK, "xtick.color": DARK, "ytick.color": DARK}
    )  # fmt: skip
    figure = _dots(plt, plot) if isinstance(plot, Dots) else _curves(plt, plot)
    folder.mkdir(parents=True, exist_ok=True)
    path = folder / f"{plot.name}.svg"
    figure.savefig(path, metadata={"Date": None, "Creator": None})
    plt.close(figure)
    return path


def _headed(figure: Any, plot: Plot, height: float) -> float:
    """Write finding and note above the axes; returns the share of the height that is left below.

    A finding that is wider than the figure takes several lines, and the figure becomes as much higher.
    """
    written = figure.text(0.012, 0, plot.finding, fontsize=12, fontweight="bold")
    room = 0.98 * figure.bbox.width / written.get_window_extent(figure.canvas.get_renderer()).width
    written.remove()
    lines = textwrap.wrap(plot.finding, int(room * len(plot.finding))) if room < 1 else [plot.finding]
    more = 0.22 * (len(lines) - 1)
    figure.set_figheight(height := height + more)
    figure.text(0.012, 1 - 0.08 / height, "\n".join(lines), fontsize=12, fontweight="bold", va="top", ha="left")
    figure.text(0.012, 1 - (0.33 + more) / height, plot.note, fontsize=8.5, color="#5c646a", va="top", ha="left")
    return 1 - (0.58 + more) / height


def _dots(plt: Any, plot: Dots) -> Any:
    most = max(len(panel.rows) for panel in plot.panels)
    dots = [dot for panel in plot.panels for row in panel.rows for dot in row.dots]
    series = list(dict.fromkeys(dot.series for dot in dots if not dot.ours))
    height = 1.25 + 0.27 * most + (0.4 if len(series) >= LEGEND else 0)
    figure, axes = plt.subplots(1, len(plot.panels), figsize=(WIDTH, height), squeeze=False)
    top = _headed(figure, plot, height)
    for axis, panel in zip(axes[0], plot.panels, strict=True):
        _panel(axis, panel, most, series)
    bottom = 0.0
    if len(series) >= LEGEND:
        handles = [plt.Line2D([], [], linestyle="", marker=MARKS[n % len(MARKS)], color=SHADES[n % len(SHADES)], label=name)
                   for n, name in enumerate(series)]  # fmt: skip
        figure.legend(handles=handles, loc="lower left", ncols=4, fontsize=8, frameon=False, handletextpad=0.1)
        bottom = 0.4 / height
    figure.tight_layout(rect=(0, bottom, 1, top), w_pad=1.5)
    return figure


def _panel(axis: Any, panel: Panel, most: int, series: list[str]) -> None:
    if panel.log:
        axis.set_xscale("log")
    if panel.line is not None:
        axis.axvline(panel.line, color=DARK, linewidth=0.8, zorder=1)
    labelled: set[str] = set()
    for place, row in enumerate(panel.rows):
        for dot in row.dots:
            number = series.index(dot.series) if len(series) > 1 and not dot.ours else -1
            colour = OURS if dot.ours else OTHER if number < 0 else SHADES[number % len(SHADES)]
            mark = "o" if number < 0 or len(series) < LEGEND else MARKS[number % len(MARKS)]
            if dot.low is not None and dot.high is not None:
                axis.plot(
                    [dot.low, dot.high], [place, place], color=colour, linewidth=2.2, solid_capstyle="round", zorder=2
                )
            axis.plot([dot.value], [place], mark, color=colour, markersize=5.5, zorder=3)
            if len(row.dots) == 1:
                end = dot.value if dot.high is None else dot.high
                axis.annotate(short(dot.value) + panel.unit, (end, place), textcoords="offset points", xytext=(7, 0),
                              ha="left", va="center", fontsize=7.5, fontweight="bold" if dot.ours else "normal")  # fmt: skip
            elif dot.series and len(series) < LEGEND and dot.series not in labelled:  # named once, at its first dot
                labelled.add(dot.series)
                axis.annotate(dot.series, (dot.value, place), textcoords="offset points", xytext=(0, 6), ha="center",
                              va="bottom", fontsize=7.5, color=colour, fontweight="bold" if dot.ours else "normal")  # fmt: skip
    _dress(axis, panel, most)


def _dress(axis: Any, panel: Panel, most: int) -> None:
    """Rows from the top, light grid, plain numbers."""
    axis.set_yticks(range(len(panel.rows)), [row.name for row in panel.rows])
    for tick, row in zip(axis.get_yticklabels(), panel.rows, strict=True):
        if len(row.dots) == 1 and row.dots[0].ours:
            tick.set(color=OURS, fontweight="bold")
    axis.set_ylim(most - 0.5, -0.8)
    axis.margins(x=0.16)
    axis.set_title(panel.title, fontsize=9, loc="left")
    axis.spines[["top", "right", "left"]].set_visible(False)
    axis.tick_params(axis="y", length=0)
    axis.grid(axis="x", color=LINE, linewidth=0.5)
    axis.set_axisbelow(True)
    if panel.log:
        from matplotlib.ticker import FuncFormatter, LogLocator, MaxNLocator, NullFormatter

        low, high = axis.get_xlim()
        subs = (1, 2, 5) if high / low < 50 else (1,)
        few = high / low < 5  # a logarithmic locator has no or many marks there
        axis.xaxis.set_major_locator(MaxNLocator(2) if few else LogLocator(base=10, subs=subs, numticks=12))
        axis.xaxis.set_major_formatter(FuncFormatter(lambda value, _: short(value)))
        axis.xaxis.set_minor_formatter(NullFormatter())
    else:
        axis.locator_params(axis="x", nbins=4)
        axis.xaxis.set_major_formatter(lambda value, _: short(value))


def _curves(plt: Any, plot: Curves) -> Any:
    height = 4.2
    figure, axis = plt.subplots(figsize=(WIDTH * 0.72, height))
    top = _headed(figure, plot, height)
    if plot.diagonal:
        end = max(max(max(c.x), max(c.y)) for c in plot.curves)
        axis.plot([0, end], [0, end], color=DARK, linewidth=0.8)
        axis.annotate("as stated", (0.5 * end, 0.5 * end), textcoords="offset points", xytext=(6, -9), fontsize=8)
    if plot.log_x:
        axis.set_xscale("log", base=2)
        axis.xaxis.set_major_formatter(lambda value, _: short(value))
    greys = [curve for curve in plot.curves if not curve.ours]
    for curve in plot.curves:
        colour = OURS if curve.ours else SHADES[greys.index(curve) % len(SHADES)]
        axis.plot(curve.x, curve.y, "-o", color=colour, markersize=4, linewidth=1.8, zorder=3 if curve.ours else 2)
        axis.annotate(curve.name, (curve.x[-1], curve.y[-1]), textcoords="offset points", xytext=(7, 0), fontsize=8,
                      color=colour, fontweight="bold" if curve.ours else "normal", va="center")  # fmt: skip
    axis.set_xlabel(plot.x_axis)
    axis.set_ylabel(plot.y_axis)
    axis.margins(x=0.3)
    axis.spines[["top", "right"]].set_visible(False)
    axis.grid(color=LINE, linewidth=0.5)
    axis.yaxis.set_major_formatter(lambda value, _: short(value))
    if not plot.log_x:
        axis.xaxis.set_major_formatter(lambda value, _: short(value))
        axis.set_xlim(left=0)
    figure.tight_layout(rect=(0, 0, 1, top))
    return figure


def percent(share: float) -> str:
    """``+12%``."""
    return f"{share:+.0%}"


def span(values: Sequence[float]) -> str:
    """``1.2 to 3.4``, or one figure."""
    low, high = short(min(values)), short(max(values))
    return low if low == high else f"{low} to {high}"
