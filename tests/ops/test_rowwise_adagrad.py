"""Row-wise Adagrad on touched rows: the same step as from the dense gradient, and no other row is changed."""

import copy

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
)

from recbole_llm_kernels import RowwiseAdagrad, reference, rowwise_adagrad_
from recbole_llm_kernels import optim as optim_module

# (terms, rows, width): over several chunks; every row hot; one row; wider than a block; no term
SHAPES = [(150, 40, 20), (300, 3, 64), (70, 1, 5), (90, 500, 200), (0, 4, 8)]


def make(P, N, D, dtype, id_dtype=torch.int64):
    kept = torch.float64 if dtype == torch.float64 else torch.float32
    state = torch.rand(N, generator=generator(3), dtype=kept)
    state[::3] = 0  # rows that were never touched
    return rows(N, D, dtype, 0), state.to(DEVICE), ids(N, (P,), 1, id_dtype), rows(P, D, dtype, 2)


def check(backend, table, state, row, grad, lr=0.3):
    """A relative error of a step is that of its row's sum, and half of that of the state beside it."""
    want, want_state = reference.rowwise_adagrad(table.double(), state.double(), row, grad.double(), lr=lr)
    got, got_state = table.clone(), state.clone()
    assert rowwise_adagrad_(got, got_state, row, grad, lr=lr, backend=backend) is None
    unit = eps(table.dtype)
    size = sum_rows(row, grad.double().abs(), len(table))
    exact = sum_rows(row, grad.double(), len(table))
    assert_within(got_state, want_state, A_FEW * unit * (size.square().mean(1) + want_state), "state")
    slack = A_FEW * unit * size.square().mean(1) / want_state.clamp(min=1e-30)
    step = lr / want_state.sqrt().add(1e-10)[:, None]
    bound = (
        step * (A_FEW * unit * size + exact.abs() * (slack[:, None] + A_FEW * unit)) + 2 * unit * table.double().abs()
    )
    assert_within(got, want, bound, "table")
    untouched = torch.ones(len(table), dtype=torch.bool, device=DEVICE)
    untouched[row.long()] = False
    assert torch.equal(got[untouched], table[untouched]) and torch.equal(got_state[untouched], state[untouched])


@pytest.mark.parametrize("dtype", [torch.float32, *LOW, torch.float64], ids=names)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
def test_a_step(backend, shape, dtype):
    skip_unsupported(backend, dtype)
    check(backend, *make(*shape, dtype))


def test_terms_in_float32_of_a_bfloat16_table(backend):
    table, state, row, grad = make(150, 40, 20, torch.bfloat16, torch.int32)
    check(backend, table, state, row, grad.float() * 1.01)


def test_an_untouched_row_is_not_read(backend):
    table, state, row, grad = make(50, 40, 8, torch.float32)
    row = row % 20
    table[20:], state[20:] = torch.nan, torch.nan
    rowwise_adagrad_(table, state, row, grad, lr=0.1, backend=backend)
    assert table[:20].isfinite().all() and table[20:].isnan().all()


def test_bitwise_repeatable(backend):
    runs = []
    for _ in range(3):
        table, state, row, grad = make(300, 3, 64, torch.float32)
        rowwise_adagrad_(table, state, row, grad, lr=0.1, backend=backend)
        runs.append((table, state))
    assert all(torch.equal(a, b) for run in runs[1:] for a, b in zip(run, runs[0], strict=True))


def test_an_id_out_of_range(backend, monkeypatch):
    """An error where ids are looked at; elsewhere the term alone is left out."""
    table, state, row, grad = make(50, 40, 8, torch.float32)
    wrong = row.clone()
    wrong[7], wrong[20] = 40, -1
    monkeypatch.setenv("RECBOLE_LLM_KERNELS_DEBUG", "1")
    with pytest.raises(IndexError, match="ids holds -1, but its matrix has 40 rows.*2 of 50 ids are out of range"):
        rowwise_adagrad_(table, state, wrong, grad, lr=0.1, backend=backend)
    monkeypatch.setattr(optim_module, "synchronising_checks", lambda device: False)
    runs = []
    kept = (wrong >= 0) & (wrong < 40)
    for chosen, terms in ((wrong, grad), (row[kept], grad[kept])):
        one, sums = table.clone(), state.clone()
        rowwise_adagrad_(one, sums, chosen, terms, lr=0.1, backend=backend)
        runs.append((one, sums))
    for got, want in zip(*runs, strict=True):
        torch.testing.assert_close(got, want, rtol=1e-6, atol=1e-6)


def test_the_optimizer_on_sparse_and_dense_gradients(backend):
    """Five steps of a model of a sparse table, a matrix, a vector and a scalar, against the rule on dense gradients."""
    torch.manual_seed(0)
    table = torch.nn.Embedding(30, 6, sparse=True, device=DEVICE)
    dense = [torch.randn(6, 4), torch.randn(4), torch.tensor(0.3)]
    dense = [x.to(DEVICE).requires_grad_() for x in dense]
    ours = RowwiseAdagrad([table.weight, *dense], lr=0.1, backend=backend)
    twins = [x.detach().double().clone().requires_grad_() for x in (table.weight, *dense)]
    sums = [torch.zeros(x.shape[:1], dtype=torch.float64, device=DEVICE) for x in twins]
    untouched = table.weight.detach().clone()
    seen = set()

    def loss(vectors, matrix, vector, scalar, chosen):
        return (
            ((vectors[chosen] if vectors is not table else vectors(chosen)) @ matrix + vector)
            .mul(scalar)
            .square()
            .mean()
        )

    for number in range(5):
        chosen = ids(20, (13,), number)
        seen |= set(chosen.tolist())
        ours.zero_grad()
        loss(table, *dense, chosen).backward()
        assert table.weight.grad.is_sparse
        ours.step()
        grads = torch.autograd.grad(loss(*twins, chosen), twins)
        with torch.no_grad():
            for x, g, s in zip(twins, grads, sums, strict=True):
                s += g.square().flatten(1).mean(1) if g.ndim > 1 else g.square()
                x -= (
                    0.1 * g / (s.sqrt() + 1e-10).view(-1, *[1] * (g.ndim - 1))
                    if g.ndim
                    else 0.1 * g / (s.sqrt() + 1e-10)
                )
    for got, want in zip((table.weight, *dense), twins, strict=True):
        torch.testing.assert_close(got.double(), want, rtol=1e-4, atol=1e-5)
    others = [r for r in range(30) if r not in seen]
    assert len(others) >= 10 and torch.equal(table.weight[others], untouched[others])


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
def test_the_state_is_one_number_a_row_and_comes_back(backend, dtype):
    table = torch.nn.Embedding(30, 6, sparse=True, device=DEVICE, dtype=dtype)

    def step(optimizer, seed):
        optimizer.zero_grad()
        table(ids(30, (9,), seed)).square().sum().backward()
        optimizer.step()

    first = RowwiseAdagrad(table.parameters(), lr=0.1, backend=backend)
    step(first, 1)
    assert first.state[table.weight]["sum"].shape == (30,)
    kept, weight = copy.deepcopy(first.state_dict()), table.weight.detach().clone()
    step(first, 2)
    want = table.weight.detach().clone()
    with torch.no_grad():
        table.weight.copy_(weight)
    again = RowwiseAdagrad(table.parameters(), lr=0.5, backend=backend)
    again.load_state_dict(kept)
    step(again, 2)
    assert torch.equal(table.weight, want) and again.param_groups[0]["lr"] == 0.1


MISTAKES = {
    "lr must be a finite number greater than 0, got 0": lambda t, s, r, g: rowwise_adagrad_(t, s, r, g, lr=0),
    "eps must be a finite number of at least 0, got -1": lambda t, s, r, g: rowwise_adagrad_(t, s, r, g, lr=1, eps=-1),
    r"state must be torch.float32 of shape \(40,\), got torch.float64": lambda t, s, r, g: rowwise_adagrad_(
        t, s.double(), r, g, lr=1
    ),
    r"grad must be torch.float32 or torch.float32 of shape \(50, 8\), one row per id": lambda t, s, r, g: (
        rowwise_adagrad_(t, s, r, g[1:], lr=1)
    ),
    "table and state are changed in place and must be contiguous": lambda t, s, r, g: rowwise_adagrad_(
        t.T.contiguous().T, s, r, g, lr=1
    ),
    "ids must be int32 or int64, got torch.float32": lambda t, s, r, g: rowwise_adagrad_(t, s, r.float(), g, lr=1),
    "lr must be a finite number greater than 0, got nan": lambda t, s, r, g: RowwiseAdagrad([t], lr=float("nan")),
    "backend must be one of auto, triton, torch, got 'gpu'": lambda t, s, r, g: RowwiseAdagrad([t], backend="gpu"),
}


@pytest.mark.parametrize("message", MISTAKES)
def test_mistakes_are_named(message):
    with pytest.raises(ValueError, match=message):
        MISTAKES[message](*make(50, 40, 8, torch.float32))


def emulated(dtype, D):
    check("triton", *make(90, 25, D, dtype))


EMULATED = {"rowwise_adagrad": emulated}
