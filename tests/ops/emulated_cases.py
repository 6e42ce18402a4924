"""The PTX that Triton emits for sm_90, executed by an emulator, against the float64 oracle: what is run of each operator.

ptxas, timing, hardware rounding and the driver are not covered. Every launch is checked for accesses outside its
arguments, for reads of what nobody wrote and for races; results must stay within the bounds that hold on a card. Most
combinations are marked slow; ``benchmarks/emulate.py`` runs all of them and writes the table. A file for each dtype runs
its own, ``test_emulated_*.py``, so that workers share them; ``test_emulator.py`` is about the emulator itself.
"""

import importlib.util
import os
import sys
from contextlib import contextmanager
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets: nothing is compiled", allow_module_level=True)

import test_catalog
import test_pairs
import test_sampled
import test_topk
import torch
import triton
from ops_cases import emulated_operators

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

from ptx_emulator.launch import emulated

from recbole_llm_kernels.triton_ops import tuning

if triton.__version__.startswith("3.2."):
    pytest.skip("Triton 3.2 describes a launch in other words", allow_module_level=True)

MODES = {  # dtype and float32 precision
    "bfloat16": (torch.bfloat16, "highest"),
    "float16": (torch.float16, "highest"),
    "float32": (torch.float32, "highest"),
    "tf32x3": (torch.float32, "high"),
}
WIDTHS = (20, 64, 128, 384)


def pairs(dtype, D):
    """Few pairs, whose places are counted."""
    operands, ids = test_pairs.make(70, 9, 13, D, dtype, True)
    y = test_pairs.labels(ids[1], operands[2])
    options = dict(reduction="mean", weight=torch.rand(70))
    test_pairs.check("pair_bce", "triton", operands, ids, (y,), test_pairs.bce_sizes(y), **options)


def sorted_pairs(dtype, D, monkeypatch):
    """As many pairs as are sorted, over several chunks and a hot item."""
    monkeypatch.setattr(tuning, "COUNTED_PAIRS", 0)
    operands, ids = test_pairs.make(150, 9, 2, D, dtype, True)
    sigma = torch.sigmoid
    sizes = (lambda s: (sigma(s) * sigma(-s), sigma(s)), lambda s: (torch.ones_like(s), torch.ones_like(s)))
    for name, size in zip(("pair_sigmoid", "pair_dot"), sizes, strict=True):
        test_pairs.check(name, "triton", operands, ids, (), size)


def catalog(name, dtype, D, **options):
    """Two blocks of rows, ragged; several targets in one mark, a row without any."""
    shape = (70, 200, D, 9) if D <= 128 else (66, 100, D, 9)
    operands, targets = test_catalog.make(*shape, dtype)
    test_catalog.check(name, "triton", operands, targets, reduction="none", weight=torch.rand(shape[0]), **options)


def split_columns(dtype, D):
    """Columns in several parts; what stands outside the catalogue is NaN."""
    B, N = (10, 1100) if D <= 128 else (5, 600)
    (query, item, bias), targets = test_catalog.make(B, N, D, 40, dtype)
    item[bias == -torch.inf] = torch.nan
    loss, grads = [], []
    for vectors in (item, item.nan_to_num()):
        leaves = [x.clone().requires_grad_() for x in (query, vectors, bias)]
        loss.append(test_catalog.kernels.catalog_bce(*leaves[:2], *targets, item_bias=leaves[2], backend="triton"))
        grads.append(torch.autograd.grad(loss[-1], leaves))
    assert torch.equal(*loss) and all(torch.equal(a, b) for a, b in zip(*grads, strict=True))
    test_catalog.check("catalog_bce", "triton", (query, item.nan_to_num(), bias), targets)


def best(dtype, D):
    """Some groups wanted, by few queries and by more, and all of them; ties; fewer candidates than places."""
    for shape in ((5, 200, D, 3), (17, 200, D, 3), (3, 40, D, 39)):
        test_topk.test_ids_and_ties_are_exact("triton", shape, dtype)


def sampled(dtype, D, shared):
    operands, row_ids = test_sampled.make(40, 19, 7, 60, D, dtype, shared)
    options = test_sampled.everything(operands, 40, 19, shared, per_row=shared)
    test_sampled.check("triton", operands, row_ids, reduction="none", **options)


OPERATORS = {
    "pair_bce": pairs,
    "sorted pairs": sorted_pairs,
    "catalog_bce": lambda dtype, D: catalog("catalog_bce", dtype, D),
    "catalog_bce, weighted negatives": lambda dtype, D: catalog("catalog_bce", dtype, D, neg_weight=0.3),
    "catalog_bce, split columns": split_columns,
    "catalog_ce": lambda dtype, D: catalog("catalog_ce", dtype, D),
    "score_topk": best,
    "sampled_bce": lambda dtype, D: sampled(dtype, D, False),
    "sampled_bce, shared negatives": lambda dtype, D: sampled(dtype, D, True),
    **emulated_operators(),
}
FAST = [("bfloat16", 64, "pair_bce"), ("bfloat16", 20, "catalog_bce"), ("float32", 20, "score_topk"),
        ("float16", 20, "catalog_ce")]  # fmt: skip
EVERY = [
    # of losses "high" is "highest"
    (mode, D, name)
    for mode in MODES
    for D in WIDTHS
    for name in OPERATORS
    if mode != "tf32x3" or name == "score_topk"
]


def combinations(*modes):
    """The combinations of these modes as parameters ``mode``, ``D`` and ``name``, most of them slow."""
    chosen = [x for x in EVERY if x[0] in modes]
    marked = [pytest.param(*x, marks=[] if x in FAST else pytest.mark.slow) for x in chosen]
    return pytest.mark.parametrize(("mode", "D", "name"), marked)


@contextmanager
def precision(how):
    """``torch.set_float32_matmul_precision``, and what it was."""
    before = torch.get_float32_matmul_precision()
    torch.set_float32_matmul_precision(how)
    try:
        yield
    finally:
        torch.set_float32_matmul_precision(before)


def execute(mode, D, name, monkeypatch, record_property):
    """Run an operator in the emulator, and put its launches down."""
    dtype, how = MODES[mode]
    operator = OPERATORS[name]
    with precision(how), emulated() as emulator:
        operator(dtype, D, monkeypatch) if operator is sorted_pairs else operator(dtype, D)
    assert emulator.executed and not emulator.findings, emulator.findings
    for number, launch in enumerate(emulator.executed):
        programs = launch.grid[0] * (launch.grid[1] if len(launch.grid) > 1 else 1)
        record_property(f"launch {number}", (launch.label, programs, launch.steps, round(launch.seconds, 2)))
