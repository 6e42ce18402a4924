"""Run the notebooks of examples/ and store their outputs.

    python docs/generator/notebooks.py                # every notebook, with the default encoder, in a fresh folder each

A cell is Python without magics. What it prints, and the value of its last expression, are its output. No Jupyter is needed.
"""

import ast
import contextlib
import io
import json
import os
import sys
import tempfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def cells(path: Path) -> Iterator[dict[str, Any]]:
    """The code cells of a notebook."""
    yield from (cell for cell in json.loads(path.read_text(encoding="utf-8"))["cells"] if cell["cell_type"] == "code")


def run_cell(source: str, names: dict[str, Any], where: str) -> str:
    """Run a cell; give what it printed and the text of its last expression.

    Args:
        source: Python.
        names: the notebook's names, which it changes.
        where: for messages.
    """
    tree = ast.parse(source, where)
    last = tree.body.pop() if tree.body and isinstance(tree.body[-1], ast.Expr) else None
    said = io.StringIO()
    with contextlib.redirect_stdout(said):
        exec(compile(tree, where, "exec"), names)
        if last is not None:
            value = eval(compile(ast.Expression(last.value), where, "eval"), names)
            if value is not None:
                print(value)
    return said.getvalue()


def store(path: Path) -> None:
    """Run a notebook in the working directory and write it with its outputs."""
    book = json.loads(path.read_text(encoding="utf-8"))
    names: dict[str, Any] = {"__name__": "__main__"}
    number = 0
    for cell in book["cells"]:
        if cell["cell_type"] != "code":
            continue
        number += 1
        said = run_cell("".join(cell["source"]), names, f"{path.name}, cell {number}")
        lines = said.splitlines(keepends=True)
        cell["execution_count"] = number
        cell["outputs"] = [{"name": "stdout", "output_type": "stream", "text": lines}] if lines else []
    path.write_text(json.dumps(book, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def main() -> None:
    """Run those that are named, or all."""
    sys.path[:0] = [str(ROOT), str(ROOT / "kernels")]
    chosen = sys.argv[1:] or sorted(path.name for path in EXAMPLES.glob("*.ipynb"))
    sys.argv = sys.argv[:1]  # RecBole reads it
    for name in chosen:
        with tempfile.TemporaryDirectory() as folder, contextlib.chdir(folder):
            store(EXAMPLES / name)
        print(f"{name}: outputs stored", file=sys.stderr)


if __name__ == "__main__":
    os.environ.setdefault("HF_HUB_OFFLINE", "1")
    main()
