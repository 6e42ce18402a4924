"""pool_rows on every backend against the float64 oracle: ragged, empty, repeated and long lists."""

import pytest
import torch
from ops_cases import (
    A_FEW,
    DEVICE,
    LOW,
    assert_within,
    eps,
    generator,
    ids,
    names,
    rows,
    skip_unsupported,
    sum_rows,
    upstream,
)

from recbole_llm_kernels import pool_rows, pool_rows_without_own, reference

# entries of each list: ragged with empty ones, at both ends; nothing but empty lists; no list
LISTS = [(0, 3, 0, 1, 33, 64, 0), (0, 0), ()]


def make(sizes, N, D, dtype, id_dtype=torch.int64):
    """Vectors, and lists whose entries repeat and are in no order; a weight is 0, as under dropout."""
    offsets = torch.tensor([0, *sizes]).cumsum(0).to(DEVICE, id_dtype)
    total = sum(sizes)
    weights = torch.rand(total, generator=generator(1)) - 0.3
    weights[::5] = 0
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    return rows(N, D, dtype, 2), offsets, ids(N, (total,), 3, id_dtype), weights.to(DEVICE, kept)


def check(backend, vectors, offsets, entry, weights):
    """Values and gradient within the error that rounding explains."""
    leaf, doubled = vectors.clone().requires_grad_(), vectors.double().requires_grad_()
    got = pool_rows(leaf, offsets, entry, weights, backend=backend)
    want = reference.pool_rows(doubled, offsets, entry, weights.double())
    assert got.dtype == vectors.dtype and got.shape == want.shape
    # on the torch backend the weights take part in the vectors' dtype
    unit = eps(vectors.dtype) if backend == "triton" else torch.finfo(vectors.dtype).eps
    row = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=DEVICE), offsets.diff().long())
    factor = weights.double().abs()[:, None]
    size = sum_rows(row, factor * vectors.double()[entry.long()].abs(), len(offsets) - 1)
    # PyTorch adds the terms of a list one after another
    some = A_FEW + (int(offsets.diff().max()) / 512 if len(entry) else 0)
    assert_within(got, want, some * unit * size, "pooled rows")
    grad = upstream(want.shape).to(vectors.dtype)
    (found,) = torch.autograd.grad(got, leaf, grad)
    (wanted,) = torch.autograd.grad(want, doubled, grad.double())
    size = sum_rows(entry, factor * grad.double().abs()[row], len(vectors))
    assert_within(found, wanted, A_FEW * eps(vectors.dtype) * size, "gradient")


@pytest.mark.parametrize("dtype", [torch.float32, *LOW, torch.float64], ids=names)
@pytest.mark.parametrize("sizes", LISTS, ids=str)
@pytest.mark.parametrize("D", [1, 20, 64, 200])
def test_pooled_rows(backend, sizes, D, dtype):
    skip_unsupported(backend, dtype)
    check(backend, *make(sizes, 30, D, dtype))


def test_ids_of_32_bits(backend):
    check(backend, *make(LISTS[0], 30, 12, torch.float32, torch.int32))


def test_a_long_list_and_a_hot_row(backend):
    """5,000 entries, four fifths of them one row: the errors of a sum grow far slower than its length."""
    vectors, offsets, entry, weights = make((5000, 0, 2), 30, 5, torch.float32)
    entry[::5], entry[1::5], entry[2::5], entry[3::5] = 7, 7, 7, 7
    check(backend, vectors, offsets, entry, weights.abs())


def test_what_an_empty_list_reads(backend):
    """Nothing: a table of NaN gives 0."""
    vectors = torch.full((3, 4), torch.nan, device=DEVICE)
    none = torch.zeros(0, dtype=torch.int64, device=DEVICE)
    got = pool_rows(vectors, torch.zeros(3, dtype=torch.int64, device=DEVICE), none, none.float(), backend=backend)
    assert torch.equal(got, torch.zeros(2, 4, device=DEVICE))


def test_bitwise_repeatable(backend):
    runs = []
    for _ in range(3):
        vectors, *lists = make((40, 0, 300), 9, 20, torch.float32)
        leaf = vectors.requires_grad_()
        value = pool_rows(leaf, *lists, backend=backend)
        runs.append([value.detach(), *torch.autograd.grad(value.square().sum(), leaf)])
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_rows_beyond_two_to_the_31_elements(backend):
    """Row 33,999,999 of 64 columns starts at element 2.2e9; a lazily mapped table costs no memory."""
    numpy = pytest.importorskip("numpy")
    n, D = 34_000_000, 64
    table = torch.from_numpy(numpy.zeros((n, D), dtype=numpy.int16)).view(torch.bfloat16)
    if DEVICE == "cuda":
        table = torch.zeros(n, D, dtype=torch.bfloat16, device=DEVICE)
    last = torch.tensor([n - 1, 33_554_432], device=DEVICE)
    table[last] = rows(2, D, torch.bfloat16, 1)
    offsets, ones = torch.tensor([0, 1, 2], device=DEVICE), torch.ones(2, device=DEVICE)
    assert torch.equal(pool_rows(table, offsets, last, ones, backend=backend), table[last])


def test_an_id_out_of_range(backend):
    """An error where PyTorch looks at ids; elsewhere its list alone is NaN, and nothing outside is read."""
    vectors, offsets, entry, weights = make((3, 2), 9, 5, torch.float32)
    entry[1] = 9
    if backend == "torch" and DEVICE == "cpu":
        with pytest.raises((RuntimeError, IndexError)):
            pool_rows(vectors, offsets, entry, weights, backend=backend)
        return
    if backend == "torch":
        pytest.skip("PyTorch's own operation asserts on the device")
    leaf = vectors.requires_grad_()
    got = pool_rows(leaf, offsets, entry, weights, backend=backend)
    assert got[0].isnan().all() and got[1].isfinite().all()
    (grad,) = torch.autograd.grad(got[1].sum(), leaf)
    assert grad.isfinite().all()


def test_a_second_derivative_is_refused(backend):
    vectors, *lists = make((3, 2), 9, 5, torch.float32)
    leaf = vectors.requires_grad_()
    value = pool_rows(leaf, *lists, backend=backend)
    (grad,) = torch.autograd.grad(value.square().sum(), leaf, create_graph=True)
    with pytest.raises(RuntimeError, match="once_differentiable"):
        grad.sum().backward()


def test_an_unknown_backend_is_named():
    vectors, *lists = make((3, 2), 9, 5, torch.float32)
    with pytest.raises(ValueError, match="backend must be one of auto, triton, torch, got 'cuda'"):
        pool_rows(vectors, *lists, backend="cuda")


def test_pairs_without_an_entry_pool_on_the_same_backend(monkeypatch):
    """The way of a GPU, taken on a CPU: sums of lists, less the own entry."""
    vectors, offsets, entry, weights = make((3, 4), 9, 5, torch.float64)
    of_pair, own_id = torch.tensor([0, 1, 1], device=DEVICE), entry[[0, 3, 4]]
    own, norm = weights[[0, 3, 4]], torch.tensor([1.0, 0.5, 2.0], dtype=torch.float64, device=DEVICE)
    total = reference.pool_rows(vectors, offsets, entry, weights)
    got = pool_rows_without_own(vectors, offsets, entry, weights, of_pair, own_id, own, norm)
    torch.testing.assert_close(got, norm[:, None] * (total[of_pair] - own[:, None] * vectors[own_id]))


def emulated(dtype, D):
    """Ragged lists over several steps of the loop, and a hot row."""
    vectors, offsets, entry, weights = make((0, 3, 70, 33), 13, D, dtype)
    entry[10:60] = 5
    check("triton", vectors, offsets, entry, weights)


EMULATED = {"pool_rows": emulated}
