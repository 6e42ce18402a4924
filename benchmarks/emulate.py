"""Executes the PTX of every kernel for sm_90 in the emulator, and writes what came of it.

    python benchmarks/emulate.py                    # everything that is not there yet, some twenty minutes of one core
    python benchmarks/emulate.py --minutes 5        # a piece of it: the next call goes on from there
    python benchmarks/emulate.py --mode bfloat16 --dim 64 --json none

The PTX for sm_90 is executed by an emulator; ptxas, timing, hardware rounding and the driver are not covered. What is run
are the tests of ``tests/ops/emulated_cases.py`` and the mistakes of ``tests/ops/test_emulator.py``: results against the
float64 oracle within the bounds that hold on a card, with every access checked. A row is run again when its operator's
kernels, launchers, block sizes or test have changed, or the emulator. Results: benchmarks/results/emulator.json and
emulator.md.
"""

import argparse
import ast
import functools
import hashlib
import json
import os
import re
import sys
import time
from collections.abc import Callable, Iterable
from pathlib import Path
from typing import Any

import aot_report
import numpy as np
import pytest
import timing
import torch
import triton

from recbole_llm_kernels.triton_ops import tuning

ROOT = timing.ROOT
OPS = ROOT / "tests" / "ops"
RESULT = ROOT / "benchmarks" / "results" / "emulator.json"
# launchers of the operators that emulated_cases.py holds, by how their names begin; others are named by their test file
MODULES = {
    "pair": "pairs",
    "sorted pairs": "pairs",
    "catalog": "catalog",
    "score_topk": "topk",
    "sampled_bce": "sampled",
}
MODES = {"bfloat16": (torch.bfloat16, "highest"), "float16": (torch.float16, "highest"),
         "float32": (torch.float32, "highest"), "tf32x3": (torch.float32, "high")}  # fmt: skip
LIMITS = (
    "The PTX for sm_90 was executed by an emulator; ptxas, timing, hardware rounding and the driver are not covered."
)
Row = dict[str, Any]


@functools.cache
def code(file: Path) -> str:
    """A file's code without comments, docstrings and imports, and without ``emulated``, which says where launches come from."""
    tree = ast.parse(file.read_text())
    for node in ast.walk(tree):
        body = getattr(node, "body", None)
        if isinstance(body, list):
            node.body = [x for x in body if not _is_beside(x)]  # type: ignore[attr-defined]
    return ast.dump(tree)


def _is_beside(node: ast.stmt) -> bool:
    if isinstance(node, (ast.Import, ast.ImportFrom)) or getattr(node, "name", "") == "emulated":
        return True
    return isinstance(node, ast.Expr) and isinstance(node.value, ast.Constant) and isinstance(node.value.value, str)


def needed(file: Path, found: dict[Path, None]) -> dict[Path, None]:
    """The file and what it imports of its folder, but ``tuning``, of which the block sizes count."""
    if file not in found and file.stem not in ("tuning", "__init__"):
        found[file] = None
        for name in re.findall(r"^from recbole_llm_kernels\.triton_ops\.(\w+) import", file.read_text(), re.M):
            needed(file.parent / f"{name}.py", found)
    return found


def source(row: Row, root: Path = ROOT) -> str:
    """Changes with what a row depends on: the operator's kernels and launchers, their block sizes, emulator and test."""
    operator = row.get("operator", "catalog_bce")
    ops = root / OPS.relative_to(ROOT)
    module = next((stem for name, stem in MODULES.items() if operator.startswith(name)), None)
    if module is None:
        named = re.compile(rf'^EMULATED = {{.*"{re.escape(operator)}"', re.M | re.S)
        module = next(x.stem.removeprefix("test_") for x in ops.glob("test_*.py") if named.search(x.read_text()))
    files = [*needed(root / "kernels" / "recbole_llm_kernels" / "triton_ops" / f"{module}.py", {}),
             *sorted((root / "benchmarks" / "ptx_emulator").glob("*.py")),
             ops / f"test_{module}.py"]  # fmt: skip
    digest = hashlib.sha256(b"".join(code(file).encode() for file in files))
    digest.update(what_is_run(ops / "emulated_cases.py", operator).encode())
    if "D" in row:
        dtype, how = MODES[row["mode"]]
        passes = any(file.stem == "tiles" for file in files)
        digest.update(repr(block_sizes(row["D"], dtype, how, passes)).encode())
    return digest.hexdigest()[:16]


@functools.cache
def what_is_run(file: Path, operator: str) -> str:
    """What ``OPERATORS`` of ``emulated_cases`` names for an operator, and the functions there that it calls."""
    tree = ast.parse(file.read_text())
    functions = {node.name: node for node in tree.body if isinstance(node, ast.FunctionDef)}
    tables = {ast.unparse(node.targets[0]): node.value for node in tree.body if isinstance(node, ast.Assign)}
    operators = tables["OPERATORS"]
    assert isinstance(operators, ast.Dict)
    of = {
        key.value: value
        for key, value in zip(operators.keys, operators.values, strict=True)
        if isinstance(key, ast.Constant)
    }
    if operator not in of:
        return ""  # its own test file says what is run
    names = [node.id for node in ast.walk(of[operator]) if isinstance(node, ast.Name)]
    return "".join(map(ast.dump, [of[operator], *(functions[name] for name in names if name in functions)]))


def block_sizes(D: int, dtype: torch.dtype, precision: str, passes: bool) -> list[Any]:
    """What ``tuning`` says on sm_90; ``passes``: those of passes over tiles too."""
    before, on = torch.get_float32_matmul_precision(), aot_report.ARCHS["sm_90"].on
    torch.set_float32_matmul_precision(precision)
    try:
        how = tuning.dot_precision(dtype, on), tuning.dot_precision(dtype, on, exact=True)
    finally:
        torch.set_float32_matmul_precision(before)
    tiles: list[Any] = [tuning.tiles(D, dtype, x.logits, on) for x in how]
    if passes:
        tiles += [tuning.tiles(D, dtype, how[1].logits, on, tuning.FEW_ROWS)]
        tiles += [tuning.slope_product(D, dtype, how[0].gradients, on, summed) for summed in (False, True)]
    return [how, tiles, tuning.pairs(D, dtype, on), tuning.segment_sum(D, dtype, on), tuning.sampled(D, 19, on),
            tuning.COUNTED_PAIRS]  # fmt: skip


class Runner:
    """A plugin of pytest that chooses what is run and keeps what came of it."""

    def __init__(
        self, known: Iterable[str], modes: list[str], dims: list[int], minutes: float, keep: Callable[[list[Row]], None]
    ) -> None:
        self.known, self.modes, self.dims, self.keep = set(known), modes, dims, keep
        self.stop = time.monotonic() + 60 * minutes
        self.rows: list[Row] = []
        self.asked: dict[str, Row] = {}
        self.sources: dict[str, str] = {}
        self.total = 0  # combinations there are, asked for or not

    def pytest_collection_modifyitems(self, items: list[Any]) -> None:
        """Keep the combinations and the mistakes that are asked for and not known."""
        for item in items:
            given = item.callspec.params if hasattr(item, "callspec") else {}
            if item.originalname == "test_against_the_oracle":
                self.total += 1
                if given["mode"] in self.modes and given["D"] in self.dims:
                    self.asked[item.nodeid] = {"operator": given["name"], "mode": given["mode"], "D": given["D"]}
            elif item.originalname == "test_a_mistake_is_seen":
                self.asked[item.nodeid] = {"mistake": given["name"]}
        chosen = [x for x in items if x.nodeid in self.asked and name_of(self.asked[x.nodeid]) not in self.known]
        # in the order of the widths asked for, so that what is there when time is up says something of every dtype
        # a case may change a block size while it runs: what it depends on is read before
        self.sources = {x.nodeid: source(self.asked[x.nodeid]) for x in chosen}
        items[:] = sorted(chosen, key=lambda x: self.dims.index(self.asked[x.nodeid].get("D", self.dims[0])))

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Put a row down."""
        if report.when == "call" or report.outcome == "failed":
            launches = [value for _, value in report.user_properties]
            facts = {"outcome": report.outcome}
            if launches:
                facts |= {"launches": len(launches), "programs": sum(x[1] for x in launches),
                          "instructions": sum(x[2] for x in launches)}  # fmt: skip
            if report.outcome == "failed":
                facts["error"] = str(report.longreprtext)[-500:]
            row = self.asked[report.nodeid]
            self.rows.append(row | facts | {"source": self.sources[report.nodeid]})
            self.keep(self.rows)
            print(f"{name_of(self.rows[-1])}: {report.outcome}, {report.duration:.1f} s", flush=True)

    @pytest.hookimpl(tryfirst=True)
    def pytest_runtest_protocol(self, item: Any) -> None:
        """End where time is up."""
        if time.monotonic() > self.stop:
            item.session.shouldstop = "time is up"


def name_of(row: Row) -> str:
    """What a row is about."""
    return f"mistake: {row['mistake']}" if "mistake" in row else f"{row['mode']}, D = {row['D']}: {row['operator']}"


def table(data: Row) -> str:
    """The results in Markdown."""
    lines = ["# Kernels executed without a card", "", LIMITS, ""]
    for version, result in sorted(data["triton"].items()):
        rows = result["rows"]
        runs, mistakes = ([r for r in rows if ("mistake" in r) == is_one] for is_one in (False, True))
        columns = sorted({(r["mode"], r["D"]) for r in runs}, key=lambda x: (x[0], x[1]))
        seen = sum(r["outcome"] == "passed" for r in mistakes)
        lines += [f"## Triton {version}, NumPy {result['numpy']}, PyTorch {result['torch']}", ""]
        lines += [
            f"{len(runs)} of {result['combinations']} combinations have been executed so far. "
            f"{sum(r['outcome'] == 'passed' for r in runs)} of them agree with float64 within their "
            f"bounds, with no access outside an argument, no read of what nobody wrote and no race: "
            f"{sum(r.get('launches', 0) for r in runs):,} launches, {sum(r.get('programs', 0) for r in runs):,} programs, "
            f"{sum(r.get('instructions', 0) for r in runs):,} instructions. {seen} of {len(mistakes)} mistakes made on "
            f"purpose were seen: {', '.join(r['mistake'] for r in mistakes if r['outcome'] == 'passed')}.",
            "",
        ]
        lines += ["| operator | " + " | ".join(f"{mode} {D}" for mode, D in columns) + " |"]
        lines += ["|---|" + "---|" * len(columns)]
        for operator in dict.fromkeys(r["operator"] for r in runs):
            of = {(r["mode"], r["D"]): r for r in runs if r["operator"] == operator}
            cells = (f"{of[c].get('instructions', 0):,}" if c in of and of[c]["outcome"] == "passed" else
                     of[c]["outcome"] if c in of else "" for c in columns)  # fmt: skip
            lines.append(f"| {operator} | " + " | ".join(cells) + " |")
        lines += [
            "",
            "Cells: instructions executed; empty: not executed so far. float32: losses by three products in TF32; "
            "score_topk without tensor cores, and at tf32x3 with them.",
            "",
        ]
    return "\n".join(lines)


def main(arguments: list[str] | None = None) -> int:
    """Run what is missing; 1: something failed; 3: time ran out first."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    modes, dims = list(MODES), [64, 20, 384, 128]
    parser.add_argument("--mode", nargs="+", choices=modes, default=modes)
    parser.add_argument("--dim", nargs="+", type=int, choices=dims, default=dims)
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; the next call goes on")
    parser.add_argument("--json", default=str(RESULT), help='result file; "none": no file')
    options = parser.parse_args(arguments)
    file = None if options.json == "none" else Path(options.json)
    data = json.loads(file.read_text()) if file and file.exists() else {"limits": LIMITS, "triton": {}}
    before = data["triton"].get(triton.__version__, {})
    known = [row for row in before.get("rows", ()) if row.get("source") == source(row)]

    def keep(rows: list[Row]) -> None:
        data["triton"][triton.__version__] = {
            "commit": timing.commit(), "numpy": np.__version__, "torch": torch.__version__,
            "combinations": runner.total, "rows": known + rows,
        }  # fmt: skip
        if file:
            file.write_text(dumped(data))
            file.with_suffix(".md").write_text(table(data))

    runner = Runner(map(name_of, known), options.mode, options.dim, options.minutes, keep)
    os.environ["CUDA_VISIBLE_DEVICES"] = ""
    files = [*sorted(OPS.glob("test_emulated_*.py")), OPS / "test_emulator.py"]
    pytest.main([*map(str, files), "-q", "-m", "slow or not slow", "-W", "ignore", "-p", "no:cacheprovider", "--no-header",
                 "--tb=short"], plugins=[runner])  # fmt: skip
    rows = known + runner.rows
    failed = [name_of(row) for row in rows if row["outcome"] != "passed"]
    missing = len(runner.asked) - len({name_of(row) for row in rows} & {name_of(x) for x in runner.asked.values()})
    print(f"{len(rows)} rows with Triton {triton.__version__}, {missing} still to do, failed: {failed or 'none'}")
    return 1 if failed else 3 if missing else 0


def dumped(data: Row) -> str:
    """JSON with a row on each line."""
    versions = []
    for version, result in sorted(data["triton"].items()):
        rows = ",\n".join(json.dumps(row) for row in result["rows"])
        facts = json.dumps({name: value for name, value in result.items() if name != "rows"})
        versions.append(f'{json.dumps(version)}: {facts[:-1]}, "rows": [\n{rows}\n]}}')
    return f'{{"limits": {json.dumps(data["limits"])}, "triton": {{\n' + ",\n".join(versions) + "\n}}\n"


if __name__ == "__main__":
    sys.exit(main())
