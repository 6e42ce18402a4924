"""Inputs, and the error that rounding explains.

Truth is the float64 oracle on the rounded inputs. A float32 dot product is good to a few eps <|q|, |w|>, whatever the
order of its sum; write delta_s for that. A slope sigma(+-s) or softmax(s) then has the relative error delta_s, a loss
term too, and a gradient, sum of slope times row, the absolute error sum |slope| |row| (delta_s + a few eps), plus one
rounding to the result's dtype. These bounds hold on trained catalogues, where slopes are tiny and eager PyTorch itself
is poor; an implementation within them is nowhere worse than eager by more than the bound.
"""

import importlib
import os
from importlib.util import find_spec
from pathlib import Path

import pytest
import torch

from recbole_llm_kernels import reference

CUDA = torch.cuda.is_available()
DEVICE = "cuda" if CUDA else "cpu"
HAS_TRITON_OPS = find_spec("triton") is not None and find_spec("recbole_llm_kernels.triton_ops.pairs") is not None
BACKENDS = ["torch"]
if HAS_TRITON_OPS and (CUDA or os.environ.get("TRITON_INTERPRET") == "1"):
    BACKENDS.append("triton")


def operator_tests():
    """Test files of operators that say what the emulator and the interpreter run of them, by ``EMULATED``."""
    return [file for file in sorted(Path(__file__).parent.glob("test_*.py")) if "\nEMULATED = {" in file.read_text()]


def emulated_operators():
    """What can be executed anywhere: name -> function of (dtype, D)."""
    found = {}
    for file in operator_tests():
        found |= importlib.import_module(file.stem).EMULATED
    return found


def raw_calls_of_operators(case, backend):
    """Registered operators with arguments, from the test files that have any."""
    for file in operator_tests():
        yield from getattr(importlib.import_module(file.stem), "raw_calls", lambda *_: ())(case, backend)


LOW = [torch.bfloat16, torch.float16]
REDUCTIONS = ["mean", "sum", "none"]
A_FEW = 4


def names(x):
    """Short ids for parametrised tests."""
    return str(x).replace("torch.", "") if isinstance(x, torch.dtype) else None


def skip_unsupported(backend, dtype):
    """float64 runs on the torch backend only."""
    if backend == "triton" and dtype == torch.float64:
        pytest.skip("the triton backend computes in float32")


def eps(dtype):
    """Spacing of the dtype that sums are kept in."""
    return torch.finfo(torch.float64 if dtype == torch.float64 else torch.float32).eps


def generator(seed=0):
    return torch.Generator().manual_seed(seed)


def rows(n, D, dtype, seed, scale=1.0):
    """Random vectors whose dot products have a standard deviation of about ``scale``."""
    return (torch.randn(n, D, generator=generator(seed)) * (scale / D**0.5) ** 0.5).to(DEVICE, dtype)


def ids(high, shape, seed, dtype=torch.int64, low=0):
    return torch.randint(low, high, shape, generator=generator(seed)).to(DEVICE, dtype)


def biases(N, dtype=torch.float32, outside=0.1, seed=5):
    """Order-one biases, a share of them -inf; item 0 always outside."""
    bias = torch.randn(N, generator=generator(seed)).to(dtype)
    gone = torch.rand(N, generator=generator(seed + 1)) < outside
    gone[0] = outside > 0 and N > 1
    return bias.masked_fill_(gone, -torch.inf).to(DEVICE)


def inside(bias):
    return (bias != -torch.inf).nonzero()[:, 0]


def row_lists(B, N, most, seed, allowed=None, dtype=torch.int64):
    """Per row 0 to ``most`` ids, ascending and unique, as offsets and ids; the first row is empty."""
    allowed = torch.arange(N) if allowed is None else allowed.cpu()
    g = generator(seed)
    counts = torch.randint(0, min(most, len(allowed)) + 1, (B,), generator=g)
    counts[:1] = 0
    lists = [allowed[torch.randperm(len(allowed), generator=g)[:c]].sort().values for c in counts.tolist()]
    offsets = torch.cat([torch.zeros(1, dtype=torch.int64), counts.cumsum(0)])
    values = torch.cat(lists) if lists else torch.empty(0)
    return offsets.to(DEVICE, dtype), values.to(DEVICE, dtype)


def upstream(shape, seed=9):
    """An upstream gradient that is not one, of both signs."""
    return (torch.rand(shape, generator=generator(seed)) - 0.3).to(DEVICE)


def differentiate(function, differentiable, args, grad, **options):
    """Value and gradients of ``function(*differentiable[:2], *args, item_bias=differentiable[2], **options)``."""
    leaves = [None if x is None else x.detach().clone().requires_grad_() for x in differentiable]
    value = function(*leaves[:2], *args, item_bias=leaves[2], **options)
    wanted = [x for x in leaves if x is not None]
    got = iter(torch.autograd.grad(value, wanted, grad.to(value.dtype)))
    return value.detach(), [None if x is None else next(got) for x in leaves]


def truth(name, differentiable, args, grad, **options):
    """The same from the float64 oracle."""
    doubled = [None if x is None else x.double() for x in differentiable]
    return differentiate(getattr(reference, name), doubled, args, grad, **options)


def assert_within(got, want, bound, what):
    """|got - want| <= bound elementwise, plus one rounding to got's dtype; equal where ``want`` is infinite."""
    limits = torch.finfo(got.dtype)
    bound = bound + limits.eps / 2 * want.abs() + (limits.smallest_normal if got.dtype in LOW else 0)
    finite = want.isfinite()
    assert torch.equal(got.double()[~finite], want[~finite]), f"{what}: not the same infinities"
    error = torch.where(finite, (got.double() - want).abs(), 0)
    # what is smaller than the smallest normal number may be flushed to zero
    excess = torch.where(finite, error - bound - torch.finfo(torch.float32).tiny, -1)
    assert not error.isnan().any() and (excess <= 0).all(), (
        f"{what}: error {error.flatten()[excess.argmax()]:.3e} beyond its bound by {excess.max():.3e} "
        f"at {excess.argmax()} of {tuple(excess.shape)}"
    )


def sum_rows(index, values, n):
    """``[n, ...]`` sums of ``values`` by ``index``, in float64."""
    return values.new_zeros(n, *values.shape[1:]).index_add_(0, index.long(), values)
