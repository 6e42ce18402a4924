"""Activation checkpointing: the forward runs again in the backward, and the gradients are the same, bit for bit."""

import pytest
import torch
from ops_cases import generator, ids, rows
from test_contract import OPERATORS, Case
from test_scaled_bce import batch, leaves
from torch.utils.checkpoint import checkpoint

from recbole_llm_kernels import pool_rows
from recbole_llm_kernels.torch_ops.pool import pool_without_own, scaled_rows
from recbole_llm_kernels.torch_ops.sampled import has_sampled_dots
from recbole_llm_kernels.torch_ops.scaled_bce import scaled_sampled_bce


def gradients(call, operands, scale):
    """Value and gradients of a weighted sum of ``call`` at ``scale`` times the matrices."""
    value = call(*(x * scale for x in operands[:2]), operands[2])
    return [value.detach(), *torch.autograd.grad((value * value.detach().cos()).sum(), operands)]


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors recomputed", "reentrant"])
@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_under_checkpointing(backend, name, reentrant):
    """A checkpoint that ends in the operator, and one that goes on behind it, as a layer would."""
    case = Case()
    call = case.calls(backend)[name]
    operands = case.fresh()
    want = gradients(call, operands, 1.5)

    def checkpointed(*inputs):
        return checkpoint(call, *inputs, use_reentrant=reentrant)

    if reentrant:  # torch.autograd.grad is refused there
        value = checkpointed(*(x * 1.5 for x in operands[:2]), operands[2])
        (value * value.detach().cos()).sum().backward()
        got = [value.detach(), *(x.grad for x in operands)]
    else:
        got = gradients(checkpointed, operands, 1.5)
    assert all(torch.equal(a, b) for a, b in zip(got, want, strict=True))


@pytest.mark.parametrize("name", OPERATORS)
def test_gradients_of_one_operand_under_checkpointing(backend, name):
    """What is recomputed saves as many tensors as before, whatever gradients are wanted."""
    case = Case()
    call = case.calls(backend)[name]
    for wanted in range(3):
        operands = [x.detach().clone().requires_grad_(n == wanted) for n, x in enumerate(case.leaves)]
        (want,) = torch.autograd.grad(call(*operands).sum(), operands[wanted])
        value = checkpoint(call, *operands, use_reentrant=False)
        (got,) = torch.autograd.grad(value.sum(), operands[wanted])
        assert torch.equal(got, want)


def of_a_cpu():
    """Name -> function and operands of what a CPU has beside the operators."""
    table, weights = rows(30, 6, torch.float32, 0).cpu(), torch.rand(40, generator=generator(3))
    entries, starts = ids(30, (40,), 4).cpu(), torch.arange(0, 41, 5)
    owner = torch.arange(8).repeat_interleave(5)
    calls = {
        "pool": (lambda v: pool_rows(v, starts, entries, weights), [table]),
        "pool_without_own": (
            lambda v: pool_without_own(v, entries, starts, owner, weights, owner[::3], entries[::3], weights[::3], weights[:14]),
            [table],
        ),
        "scaled_rows": (lambda t, o, s: scaled_rows(t, entries, o, s), [table, table[0] + 1, torch.tensor(1.3)]),
    }  # fmt: skip
    if has_sampled_dots():
        tensors, user_id, item_id = leaves(20, 12, 5, torch.float32), *batch(20, 12, 70, 3)
        calls["scaled_sampled_bce"] = (lambda *x: scaled_sampled_bce(*x, user_id, item_id, 0.3), tensors)
    return calls


@pytest.mark.parametrize("reentrant", [False, True], ids=["saved tensors recomputed", "reentrant"])
@pytest.mark.parametrize("name", of_a_cpu())
def test_what_a_cpu_has_beside_them(name, reentrant):
    call, operands = of_a_cpu()[name]
    runs = []
    for function in (call, lambda *x: checkpoint(call, *x, use_reentrant=reentrant)):
        fresh = [x.detach().clone().requires_grad_() for x in operands]
        value = function(*fresh)
        (value * value.detach().cos()).sum().backward()
        runs.append([value, *(x.grad for x in fresh)])
    assert all(torch.equal(a, b) for a, b in zip(*runs, strict=True))
