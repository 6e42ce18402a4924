"""Draw the pictures of README.md, kernels/README.md and the documentation from committed result files.

    python docs/generator/pictures.py

The same result files give the same bytes. A test compares them with the committed pictures.
"""

import json
from pathlib import Path
from typing import Any
from xml.sax.saxutils import escape

ROOT = Path(__file__).resolve().parents[2]
RESULTS = ROOT / "benchmarks" / "results"
OURS, OTHERS, INK, FAINT = "#1f6f9f", "#b4bec7", "#1c2b36", "#5c6b77"
FONT = "system-ui, -apple-system, Segoe UI, Helvetica, Arial, sans-serif"
# operator and shape in kernel_speed.json -> its name in the picture and in the table
KERNELS: list[tuple[str, dict[str, Any], str]] = [
    ("pair_bce", {"P": 65536, "n": 100_000, "D": 64}, "pair_bce, 65,536 pairs"),
    ("pair_bce", {"P": 65536, "n": 100_000, "D": 64, "ids": "zipf"}, "pair_bce, the same with Zipf ids"),
    ("sampled_bce", {"B": 4096, "K": 64, "n": 100_000, "D": 64}, "sampled_bce, 4,096 rows x 64 negatives"),
    ("catalog_bce", {"B": 2048, "N": 200_000, "D": 64}, "catalog_bce, 2,048 x 200,000"),
    ("catalog_ce", {"B": 2048, "N": 200_000, "D": 64}, "catalog_ce, 2,048 x 200,000"),
    ("score_topk", {"B": 1024, "N": 100_000, "D": 64, "k": 50}, "score_topk, 1,024 x 100,000"),
    ("score_topk", {"B": 256, "N": 1_000_000, "D": 64, "k": 50}, "score_topk, 256 x 1,000,000"),
]
DATASETS = ("ml-100k", "amazon-office", "ml-1m-text")
SPLITS = 3
MODELS = ("LLMTwoTower", "EASE", "ADMMSLIM", "SLIMElastic", "ItemKNN", "BPR", "Pop")  # those that all three have


def text(
    x: float, y: float, words: str, *, size: int = 13, fill: str = INK, anchor: str = "start", bold: bool = False
) -> str:
    """One line of text in SVG."""
    weight = ' font-weight="600"' if bold else ""
    return f'<text x="{x:g}" y="{y:g}" font-size="{size}" fill="{fill}" text-anchor="{anchor}"{weight}>{escape(words)}</text>'


def drawing(width: int, height: int, label: str, shapes: list[str]) -> str:
    """A whole SVG file."""
    head = (
        f'<svg xmlns="http://www.w3.org/2000/svg" viewBox="0 0 {width} {height}" role="img" '
        f'aria-label="{escape(label)}" font-family="{FONT}">'
    )
    return "\n".join([head, f'<rect width="{width}" height="{height}" fill="#ffffff"/>', *shapes, "</svg>", ""])


def kernel_entries(threads: int) -> list[tuple[str, dict[str, Any]]]:
    """Name in the picture and entry of kernel_speed.json, in the order of ``KERNELS``."""
    entries = json.loads((RESULTS / "kernel_speed.json").read_text())["entries"]
    found = {(e["operator"], json.dumps(e["shape"]), e["threads"]): e for e in entries if e["dtype"] == "float32"}
    return [(name, found[operator, json.dumps(shape), threads]) for operator, shape, name in KERNELS]


def kernel_rows() -> list[tuple[str, float, float, float, float]]:
    """Name, speed-up on one thread and on two, memory factor, memory factor beyond the gradients; all against eager."""
    rows = []
    for (name, one), (_, two) in zip(kernel_entries(1), kernel_entries(2), strict=True):
        eager = one["variants"]["eager"]
        less = eager["ours_takes_less_memory_by"]
        rows.append(
            (
                name,
                eager["ours_is_faster_by"],
                two["variants"]["eager"]["ours_is_faster_by"],
                less["allocated"],
                less["allocated beyond the result"],
            )
        )
    return rows


def kernel_table() -> list[str]:
    """The same as rows of a Markdown table."""
    factor = lambda value: f"{value:.1f}x" if value < 10 else f"{value:.0f}x"  # noqa: E731
    return [
        f"| `{name.partition(',')[0]}`{''.join(name.partition(',')[1:])} | {' | '.join(map(factor, values))} |"
        for name, *values in kernel_rows()
    ]


def kernel_picture() -> str:
    """Bars of the speed-up over eager PyTorch on one thread, with the share of its memory beside them."""
    rows = kernel_rows()
    machine = kernel_entries(1)[0][1]["machine"]
    slowest, fastest = min(row[1] for row in rows), max(row[1] for row in rows)
    title = f"{slowest:.1f} to {fastest:.1f} times as fast as eager PyTorch, in a part of its memory"
    left, right, top, step = 290, 650, 84, 34
    scale = (right - left) / fastest
    shapes = [
        text(20, 32, title, size=17, bold=True),
        text(20, 54, f"{machine['cpu']}, one thread, float32, D = 64; losses: forward and backward", fill=FAINT),
        text(right + 70, 74, "memory", size=12, fill=FAINT),
    ]
    for at, (name, speed, _, less, _) in enumerate(rows):
        y = top + step * at
        shapes += [
            text(left - 10, y + 15, name, anchor="end"),
            f'<rect x="{left}" y="{y}" width="{scale * speed:.1f}" height="20" fill="{OURS}"/>',
            text(left + scale * speed + 6, y + 15, f"{speed:.1f}x", bold=True),
            text(right + 70, y + 15, f"1/{less:.3g}" if less < 10 else f"1/{less:.0f}"),
        ]
    bottom = top + step * len(rows)
    one = f"{left + scale:.1f}"
    shapes += [
        f'<line x1="{one}" y1="{top - 6}" x2="{one}" y2="{bottom - 8}" stroke="{INK}" stroke-dasharray="3 3"/>',
        text(left + scale, bottom + 6, "eager PyTorch = 1", size=12, fill=FAINT, anchor="middle"),
    ]
    return drawing(800, bottom + 20, title, shapes)


def quality(dataset: str, number: int = 0) -> dict[str, tuple[float, float]]:
    """Test NDCG@10 on a split by model: mean and standard deviation over trainings.

    Pop counts interactions here, as in every command of ours, and SLIMElastic on amazon-office has the grid of its own.
    """
    split = json.loads((RESULTS / f"quality-{dataset}.json").read_text())["splits"][number]
    found = {row["model"]: (row["mean"]["ndcg@10"], row["spread"]["ndcg@10"]) for row in split["rows"]}
    if "pop_by_interactions" in split:
        found["Pop"] = (split["pop_by_interactions"]["ndcg@10"], 0.0)
    own_grid = RESULTS / f"quality-{dataset}-slim.json"
    if own_grid.exists():
        rows = json.loads(own_grid.read_text())["splits"][number]["rows"]
        (row,) = (row for row in rows if row["model"] == "SLIMElastic")
        found["SLIMElastic"] = (row["mean"]["ndcg@10"], row["spread"]["ndcg@10"])
    return found


def quality_picture() -> str:
    """A dot for each model with its standard deviation over trainings, ours coloured, a panel for each data set."""
    figures = {dataset: quality(dataset) for dataset in DATASETS}
    every = [quality(dataset, number) for dataset in DATASETS for number in range(SPLITS)]
    gains = [f["LLMTwoTower"][0] / max(v for m, (v, _) in f.items() if m != "LLMTwoTower") - 1 for f in every]
    title = f"{min(gains):.0%} to {max(gains):.0%} above the best tuned stock model of RecBole, on three splits each"
    left, width, gap, top, step = 132, 190, 40, 104, 28
    shapes = [
        text(20, 32, title, size=17, bold=True),
        text(
            20,
            54,
            "NDCG@10 on the test part of the first split, random 8:1:1 by user; bars: standard deviation over trainings",
            fill=FAINT,
        ),
    ]
    for column, (dataset, found) in enumerate(figures.items()):
        x0 = left + column * (width + gap)
        scale = (width - 46) / max(value + spread for value, spread in found.values())
        shapes.append(text(x0, 84, dataset, bold=True))
        for at, model in enumerate(MODELS):
            y, (value, spread) = top + step * at, found[model]
            ours = model == "LLMTwoTower"
            colour = OURS if ours else OTHERS
            if column == 0:
                shapes.append(text(left - 12, y + 5, model, anchor="end", bold=ours))
            low, high, dot = (f"{x0 + scale * v:.1f}" for v in (value - spread, value + spread, value))
            shapes += [
                f'<line x1="{x0}" y1="{y}" x2="{x0 + width - 46}" y2="{y}" stroke="#eef1f3"/>',
                f'<line x1="{low}" y1="{y}" x2="{high}" y2="{y}" stroke="{colour}" stroke-width="3"/>',
                f'<circle cx="{dot}" cy="{y}" r="5" fill="{colour}"/>',
                text(x0 + scale * value + 9, y + 5, f"{value:.4f}"[1:], size=12, bold=ours),
            ]
    return drawing(left + 3 * width + 2 * gap + 20, top + step * len(MODELS), title, shapes)


PICTURES = {"kernels/speed.svg": kernel_picture, "docs/quality.svg": quality_picture}


def main() -> None:
    """Write every picture."""
    for name, draw in PICTURES.items():
        (ROOT / name).write_text(draw())


if __name__ == "__main__":
    main()
