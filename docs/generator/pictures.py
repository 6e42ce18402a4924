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
# names of models whose order is that of the picture's rows
DATASETS = (("ml-100k", 2020), ("amazon-office", 2020), ("ml-1m-text", 2020))


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
    left, right, top, step = 268, 640, 84, 34
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


PICTURES = {"kernels/speed.svg": kernel_picture}


def main() -> None:
    """Write every picture."""
    for name, draw in PICTURES.items():
        (ROOT / name).write_text(draw())


if __name__ == "__main__":
    main()
