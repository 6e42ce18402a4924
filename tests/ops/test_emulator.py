"""The emulator itself: products of tensor cores against float64, and eight mistakes in kernels, each of which it sees."""

import emulated_cases  # first of all: it skips where nothing is emulated

# isort: split
import re
import shutil
from pathlib import Path

import aot_report
import emulate
import pytest
import test_catalog
import torch
import triton
import triton.language as tl
from ops_cases import biases, eps, inside, row_lists, rows
from ptx_emulator.faults import FAULTS
from ptx_emulator.launch import emulated
from ptx_emulator.machine import Machine
from ptx_emulator.memory import GlobalMemory
from ptx_emulator.program import EmulationError, parse

# --- products of tensor cores


@triton.jit
def _product(a_ptr, b_ptr, out_ptr, K, M: tl.constexpr, N: tl.constexpr, BLOCK_K: tl.constexpr, HOW: tl.constexpr):
    m, n = tl.arange(0, M), tl.arange(0, N)
    sums = tl.zeros([M, N], dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        a = tl.load(a_ptr + m[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
        b = tl.load(b_ptr + n[:, None] * K + k[None, :], mask=(k < K)[None, :], other=0.0)
        sums = tl.dot(a, b.T, sums, input_precision=HOW)
    tl.store(out_ptr + m[:, None] * N + n[None, :], sums)


PRODUCTS = {  # dtype, precision of float32, the instruction, whether operands are rounded to what a product keeps of them
    "bfloat16": (torch.bfloat16, "ieee", "m16n8k16.row.col.f32.bf16", False),
    "float16": (torch.float16, "ieee", "m16n8k16.row.col.f32.f16", False),
    "tf32": (torch.float32, "tf32", "m16n8k8.row.col.f32.tf32", True),
    "tf32x3": (torch.float32, "tf32x3", "m16n8k8.row.col.f32.tf32", False),
}


@pytest.mark.parametrize("kind", PRODUCTS)
@pytest.mark.parametrize("warps", [2, 4])
def test_products_of_a_warp_are_exact_but_for_their_sums(kind, warps):
    """16 rows, as few as a product has: mma.sync, beside ragged columns, summed over two steps."""
    dtype, how, instruction, is_rounded = PRODUCTS[kind]
    a, b = (rows(n, 48, dtype, seed, 3.0) for seed, n in enumerate((16, 64)))
    if is_rounded:
        a, b = a.bfloat16().float(), b.bfloat16().float()
    got = torch.full((16, 64), torch.nan)
    values = dict(a_ptr=a, b_ptr=b, out_ptr=got, K=48, M=16, N=64, BLOCK_K=32, HOW=how)
    launch = aot_report.Recorded(_product, values, dict(num_warps=warps, num_stages=2))
    ptx = aot_report.compile_launch(launch, "sm_90").asm["ptx"]
    assert f"mma.sync.aligned.{instruction}" in ptx and "wgmma" not in ptx
    with emulated() as emulator:
        _product[(1,)](**values, **launch.options)
    assert len(emulator.executed) == 1 and not emulator.findings
    want, size = a.double() @ b.double().T, a.double().abs() @ b.double().abs().T
    # what three products in TF32 leave out is 2^-22 of each
    bound = (48 * eps(torch.float32) + 2.0**-21 * (kind == "tf32x3")) * size
    assert ((got.double() - want).abs() <= bound).all()


def test_a_product_that_half_a_warp_executes_is_reported():
    """The compiler makes none; written by hand."""
    ptx = """
        .visible .entry half(.param .u64 half_param_0) .reqntid 32 {
        .reg .b32 %r<10>; .reg .pred %p<2>; .reg .b32 %a;
        setp.lt.u32 %p1, %tid.x, 16;
        mov.b32 %a, 0;
        {}mma.sync.aligned.m16n8k16.row.col.f32.bf16.bf16.f32 {%r1, %r2, %r3, %r4}, {%a, %a, %a, %a}, {%a, %a}, {%a, %a, %a, %a};
        ret;
        $L__func_end0:
    """
    found = []
    for predicate in ("", "@%p1 "):
        program = parse(ptx.replace("{}", predicate))
        machine = Machine(program, GlobalMemory(lambda what: None), [0], (1, 1, 1), 0)
        machine.run((0, 0, 0))
        found.append(list(machine.findings))
    assert found == [[], ["a lane takes part in a product that it does not execute"]]


# --- eight mistakes

# what shows each: an access that ends the program, a finding, or a result beyond its bound
SHOWS = {
    "dropped mask": "load outside every argument",
    "missing barrier": "race: a product reads what another warp has stored, without a barrier",
    "wait moved": "or (of )?a copy that is not waited for",
    "wrong descriptor": "a product reads what nobody has written|beyond its bound|not the same infinities",
    "wrong stride": "beyond its bound|not the same infinities",
    "lost column": "beyond its bound|not the same infinities",
    "off-by-one split": "beyond its bound|not the same infinities",
    "wrong dtype": "beyond its bound|not the same infinities",
}


def ten_rows():
    """A loss over columns in two parts, ragged; bfloat16, D = 64."""
    bias = biases(600)
    operands = rows(10, 64, torch.bfloat16, 0, 3.0), rows(600, 64, torch.bfloat16, 1, 3.0), bias
    test_catalog.check("catalog_bce", "triton", operands, row_lists(10, 600, 30, 2, inside(bias)))


def test_eight_mistakes_are_named():
    assert len(FAULTS) == 8 and FAULTS.keys() == SHOWS.keys()


@pytest.mark.parametrize("name", [pytest.param(x, marks=[pytest.mark.slow] * bool(n)) for n, x in enumerate(FAULTS)])
def test_a_mistake_is_seen(name):
    shown = []
    with emulated(FAULTS[name]) as emulator:
        try:
            ten_rows()
        except (EmulationError, AssertionError) as error:
            shown.append(str(error))
    shown += emulator.findings
    assert any(re.search(SHOWS[name], x) for x in shown), shown


def test_without_a_mistake_nothing_is_seen():
    with emulated() as emulator:
        ten_rows()
    assert not emulator.findings
    assert (1, 2) in {x.grid[:2] for x in emulator.executed}  # both parts of the columns


# --- the table of what was executed


def test_a_row_is_run_again_when_what_it_ran_has_changed(tmp_path):
    """What stands in emulated_cases for one operator is no part of another's row."""
    row = {"operator": "score_topk", "mode": "bfloat16", "D": 64}
    for part in ("kernels/recbole_llm_kernels/triton_ops", "benchmarks/ptx_emulator", "tests/ops"):
        shutil.copytree(emulate.ROOT / part, tmp_path / part, ignore=shutil.ignore_patterns("__pycache__"))
    before = [emulate.source(x, tmp_path) for x in (row, row | {"operator": "pair_bce"})]
    assert before == [emulate.source(x) for x in (row, row | {"operator": "pair_bce"})]
    cases = tmp_path / "tests" / "ops" / "emulated_cases.py"
    cases.write_text(cases.read_text().replace("(5, 200, D, 3)", "(6, 200, D, 3)"))
    emulate.what_is_run.cache_clear()
    assert emulate.source(row, tmp_path) != before[0]
    assert emulate.source(row | {"operator": "pair_bce"}, tmp_path) == before[1]


def test_every_combination_is_in_one_file():
    """Each dtype has a file of its own; benchmarks/emulate.py runs all of them."""
    files = Path(__file__).parent.glob("test_emulated_*.py")
    modes = [
        mode
        for file in files
        for mode in re.findall(r'"(\w+)"', re.search(r"@combinations\((.*)\)", file.read_text())[1])
    ]
    assert sorted(modes) == sorted({mode for mode, _, _ in emulated_cases.EVERY})
