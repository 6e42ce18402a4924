"""Files to import and a reader of what was written; imported by the tests of this folder."""

import csv
import os
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]

HEADER = ["user", "item", "rating", "timestamp"]
ROWS = [
    ["u1", "i1", "5", "1700000000"],
    ["u1", "i2", "3", "1700000010"],
    ["u2", "i1", "4", "1700000005"],
    ["u3", "i3", "2", "1700000007"],
]
# texts that lose something with a careless reader or writer
ITEMS = [
    {"asin": "i1", "title": 'The "Big" Film', "brand": "A", "price": 3.5, "description": "two\nlines and a\ttab"},
    {"asin": "i2", "title": '"Quoted"', "brand": "A", "price": None, "description": "NA"},
    {"asin": "i4", "title": "Cold, and <b>bold</b> &amp; e\u0301", "brand": "B", "price": 12, "description": ""},
    {"asin": "i3", "title": "", "brand": "", "price": 1, "description": "  "},
]


def write_csv(path, header, rows, **style):
    with path.open("w", newline="", encoding="utf-8") as file:
        csv.writer(file, **style).writerows([header, *rows])
    return path


def read(folder, name="x", suffix="inter"):
    """The rows of an atomic file, header first, as lists of strings."""
    text = (Path(folder) / name / f"{name}.{suffix}").read_text(encoding="utf-8")
    assert text.endswith("\n")
    return [line.split("\t") for line in text[:-1].split("\n")]


def environment():
    """Variables for a fresh interpreter that imports this checkout."""
    return {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}"}
