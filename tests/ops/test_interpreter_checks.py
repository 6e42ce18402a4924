"""The checks of the interpreter against seeded faults: nine that the stock interpreter forgives.

Run, as ``test_triton_interpreted.py``, where TRITON_INTERPRET=1 is set before Python starts.
"""

import os
import sys
from pathlib import Path

import pytest
import torch

if os.environ.get("TRITON_INTERPRET") != "1":
    pytest.skip("TRITON_INTERPRET=1 is not set", allow_module_level=True)

sys.path.insert(0, str(Path(__file__).parents[1]))

import interpreter_checks
import triton
import triton.language as tl

interpreter_checks.install()


@pytest.fixture(autouse=True)
def programs_in_any_order():
    with interpreter_checks.program_order(11):
        yield


@triton.jit
def _sum_rows(x, out, N, MASK: tl.constexpr, OTHER: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.program_id(0)
    n = tl.arange(0, BLOCK)
    if not MASK:
        v = tl.load(x + row * N + n)
    elif OTHER:
        v = tl.load(x + row * N + n, mask=n < N, other=0.0)
    else:
        v = tl.load(x + row * N + n, mask=n < N)
    tl.store(out + row, tl.sum(v, axis=0))


def test_a_lane_outside_the_view_is_caught():
    """The rows of a slice go on in its storage: right memory, wrong view."""
    storage = torch.ones(4, 6)
    out = torch.empty(2)
    _sum_rows[(2,)](storage[:2], out, 6, True, True, BLOCK=8)
    assert out.tolist() == [6, 6]
    with pytest.raises(Exception, match="load: 2 lanes of program . outside every argument"):
        _sum_rows[(2,)](storage[:2], out, 6, False, True, BLOCK=8)


def test_a_store_outside_the_view_is_caught():
    with pytest.raises(Exception, match="store: 1 lanes of program . outside every argument"):
        _sum_rows[(2,)](torch.ones(2, 6), torch.empty(4)[:1], 6, True, True, BLOCK=8)


def test_an_undefined_lane_is_caught():
    out = torch.empty(2)
    _sum_rows[(2,)](torch.ones(2, 6), out, 6, True, False, BLOCK=8)
    assert out.isnan().all()


@triton.jit
def _copy(x, out, STEP: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    tl.store(out + tl.program_id(0) * STEP + n, tl.load(x + n))


def test_two_programs_that_store_to_one_address_are_caught():
    x, out = torch.ones(8), torch.empty(16)
    _copy[(2,)](x, out, 8, BLOCK=8)
    with pytest.raises(RuntimeError, match="race: programs . and . store to one address"):
        _copy[(2,)](x, out, 7, BLOCK=8)


def test_a_program_that_loads_what_another_stores_is_caught():
    x = torch.ones(16)
    with pytest.raises(RuntimeError, match="race: program . loads what program . stores"):
        _copy[(2,)](x, x, 8, BLOCK=8)


@triton.jit
def _turn(x, BARRIER: tl.constexpr, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    tl.store(x + n, tl.load(x + n) + 1)  # in place: a lane's own element
    if BARRIER:
        tl.debug_barrier()
    tl.store(x + BLOCK + n, tl.load(x + BLOCK - 1 - n))


def test_a_program_that_loads_what_it_has_stored_is_caught():
    x = torch.arange(16.0)
    _turn[(1,)](x, True, BLOCK=8)
    assert torch.equal(x, torch.cat([torch.arange(1.0, 9), torch.arange(8.0, 0, -1)]))
    with pytest.raises(RuntimeError, match="race: program 0 loads what it has stored, without a barrier"):
        _turn[(1,)](x, False, BLOCK=8)


@triton.jit
def _scatter(index, out, BLOCK: tl.constexpr):
    n = tl.arange(0, BLOCK)
    tl.store(out + tl.load(index + n), n)


def test_two_lanes_on_one_address_are_caught():
    out = torch.zeros(8, dtype=torch.int32)
    _scatter[(1,)](torch.arange(8), out, BLOCK=8)
    with pytest.raises(RuntimeError, match="race: two lanes of program 0 store to one address"):
        _scatter[(1,)](torch.tensor([0, 1, 2, 3, 4, 5, 6, 6]), out, BLOCK=8)


@triton.jit
def _row_start(table, index, out, D: tl.constexpr, WIDE: tl.constexpr):
    row = tl.load(index)
    if WIDE:
        row = row.to(tl.int64)
    tl.store(out, tl.load(table + row * D))


def test_an_offset_beyond_int32_is_caught():
    """A lazily mapped table of 4.4 GB costs no memory."""
    numpy = pytest.importorskip("numpy")
    table = torch.from_numpy(numpy.zeros((34_000_000, 64), dtype=numpy.int16))
    table[33_999_999, 0] = 5
    index, out = torch.tensor([33_999_999], dtype=torch.int32), torch.zeros(1, dtype=torch.int16)
    _row_start[(1,)](table, index, out, 64, True)
    assert out.item() == 5
    with numpy.errstate(over="ignore"), pytest.raises(Exception, match="outside every argument"):
        _row_start[(1,)](table, index, out, 64, False)


@triton.jit
def _add_up(x, out):
    tl.atomic_add(out, tl.load(x + tl.program_id(0)))


def test_a_sum_in_program_order_is_caught():
    x, sums = torch.randn(200, generator=torch.Generator().manual_seed(0)), set()
    for seed in range(5):
        out = torch.zeros(1)
        with interpreter_checks.program_order(seed):
            _add_up[(200,)](x, out)
        sums.add(out.item())
    assert len(sums) > 1


def test_bfloat16_rounds_to_nearest_even_and_multiplies():
    """What ``install`` repairs."""

    x = torch.randn(16, 16, generator=torch.Generator().manual_seed(0))
    rounded, product = torch.empty(16, 16, dtype=torch.bfloat16), torch.empty(16, 16)
    _round_and_multiply[(1,)](x, rounded, product)
    assert torch.equal(rounded, x.bfloat16())
    torch.testing.assert_close(product, x.bfloat16().float() @ x.bfloat16().float())


@triton.jit
def _round_and_multiply(x, rounded, product):
    at = tl.arange(0, 16)[:, None] * 16 + tl.arange(0, 16)[None, :]
    v = tl.load(x + at).to(tl.bfloat16)
    tl.store(rounded + at, v)
    tl.store(product + at, tl.dot(v, v))
