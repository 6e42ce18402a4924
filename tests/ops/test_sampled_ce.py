"""sampled_ce, with negatives of each row's own, shared by the batch and in the batch, against the float64 oracle."""

import pytest
import torch
from ops_cases import (
    A_FEW,
    DEVICE,
    LOW,
    REDUCTIONS,
    assert_within,
    differentiate,
    eps,
    ids,
    names,
    row_lists,
    rows,
    skip_unsupported,
    sum_rows,
    truth,
    upstream,
)
from test_sampled import OWN, SHARED, everything, make

import recbole_llm_kernels as kernels
from recbole_llm_kernels import ops, reference


def options_of(operands, B, K, shared, per_row=False):
    return {k: v for k, v in everything(operands, B, K, shared, per_row).items() if k != "neg_weight"}


def check(backend, operands, row_ids, **options):
    """Loss and gradients within the error that rounding explains: a slope p is good to 2 p max delta_s."""
    user, item, bias = operands
    user_id, pos, neg = (x.long() for x in row_ids)
    B = len(user_id)
    reduction = options.get("reduction", "mean")
    grad = upstream((B,) if reduction == "none" else ())
    got, grads = differentiate(kernels.sampled_ce, operands, row_ids, grad, backend=backend, **options)
    want, wanted = truth("sampled_ce", operands, row_ids, grad, **options)

    every = torch.cat([pos[:, None], neg.expand(B, -1)], 1)
    u, i, b = user.double()[user_id], item.double()[every], bias.double()[every]
    q = options.get("log_q")
    q = torch.zeros_like(b) if q is None else q.double()[every]
    live = (b != -torch.inf) & ((every != pos[:, None]) | (torch.arange(every.shape[1], device=DEVICE) == 0))
    if (valid := options.get("neg_valid")) is not None:
        live[:, 1:] &= valid
    s = torch.where(live, (i @ u[:, :, None])[:, :, 0] + b - q, -torch.inf)
    size = torch.where(live, (i.abs() @ u.abs()[:, :, None])[:, :, 0] + b.abs() + q.abs() + 1, 0)
    p = s.softmax(1)
    p[:, 0] = torch.where(live, s, -torch.inf)[:, 1:].logsumexp(1).sub(s[:, 0]).sigmoid() if s.shape[1] > 1 else 0
    factor = torch.ones(B, device=DEVICE) if options.get("weight") is None else options["weight"].double()
    factor = factor / B if reduction == "mean" else factor
    delta = A_FEW * eps(user.dtype) * size.amax(1) if size.numel() else torch.zeros(B, device=DEVICE)
    spread = 2 * p * (delta * factor)[:, None]
    rounding = A_FEW * eps(user.dtype) * (s.logsumexp(1) - s[:, 0]) * factor
    value_bound = spread.sum(1) + rounding
    assert_within(got, want, value_bound if reduction == "none" else value_bound.sum(), "loss")
    spread = spread * (grad.double().abs()[:, None] if reduction == "none" else grad.double().abs())
    flat = spread.reshape(-1)[:, None]
    i = torch.where(live[:, :, None], i, 0)
    by_user = sum_rows(user_id, (spread[:, :, None] * i.abs()).sum(1), len(user))
    assert_within(grads[0], wanted[0], by_user, "user gradient")
    every, terms = every.reshape(-1), flat * u.abs().repeat_interleave(s.shape[1], 0)
    assert_within(grads[1], wanted[1], sum_rows(every, terms, len(item)), "item gradient")
    assert_within(grads[2], wanted[2], sum_rows(every, flat[:, 0], len(item)), "bias gradient")


@pytest.mark.parametrize("dtype", [torch.float32, *LOW, torch.float64], ids=names)
@pytest.mark.parametrize("shape", OWN, ids=lambda s: "B{}-K{}-U{}-I{}-D{}".format(*s))
def test_own_negatives(backend, shape, dtype):
    skip_unsupported(backend, dtype)
    check(backend, *make(*shape, dtype, False), reduction="none")


@pytest.mark.parametrize("dtype", [torch.float32, *LOW, torch.float64], ids=names)
@pytest.mark.parametrize("shape", SHARED, ids=lambda s: "B{}-M{}-U{}-I{}-D{}".format(*s))
def test_shared_negatives(backend, shape, dtype):
    skip_unsupported(backend, dtype)
    check(backend, *make(*shape, dtype, True), reduction="sum")


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_every_feature_at_once(backend, shared, reduction):
    operands, row_ids = make(300, 40, 30, 200, 24, torch.float32, shared)
    check(backend, operands, row_ids, reduction=reduction, **options_of(operands, 300, 40, shared))


def test_shared_negatives_with_a_mask_per_row(backend):
    operands, row_ids = make(300, 1100, 30, 200, 24, torch.float32, True)
    check(backend, operands, row_ids, reduction="none", **options_of(operands, 300, 1100, True, per_row=True))


@pytest.mark.parametrize("D", [1, 3, 64, 100, 200, 512])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_every_width(backend, shared, D):
    operands, row_ids = make(70, 5, 20, 30, D, torch.float32, shared, id_dtype=torch.int32)
    check(backend, operands, row_ids, reduction="mean")


def test_negatives_in_the_batch(backend):
    """Every other row's positive; neither a row's own item, which the batch holds again, nor one that its user likes."""
    operands, (user_id, pos, _) = make(90, 1, 30, 25, 12, torch.float32, True)
    offsets, liked = row_lists(90, 25, 9, 4)
    valid = kernels.valid_negatives(pos, offsets, liked)
    hot = reference._multi_hot(offsets, liked, 90, 25)
    assert torch.equal(valid, ~hot[:, pos]) and 0 < valid.float().mean() < 1
    log_q = (torch.bincount(pos, minlength=25) / 90 + 1e-6).log()
    check(backend, operands, (user_id, pos, pos), reduction="none", log_q=log_q, neg_valid=valid)


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=names)
def test_which_negatives_are_valid(id_dtype):
    """Of each row's own list alone, whatever the neighbours' lists hold; empty lists, first and last entries."""
    offsets, liked = row_lists(40, 30, 12, 3, dtype=id_dtype)
    own, hot = ids(30, (40, 7), 5, id_dtype), reference._multi_hot(offsets, liked, 40, 30)
    assert torch.equal(kernels.valid_negatives(own, offsets, liked), ~hot.gather(1, own.long()))
    every = torch.arange(30, dtype=id_dtype, device=DEVICE)
    assert torch.equal(kernels.valid_negatives(every, offsets, liked), ~hot)
    assert kernels.valid_negatives(every, offsets * 0, liked[:0]).all()
    with pytest.raises(
        ValueError, match=r"offsets must have one entry per row of neg_id and one more, got 40 for \(40, 7\)"
    ):
        kernels.valid_negatives(own, offsets[1:], liked)
    with pytest.raises(ValueError, match="neg_id must be int32 or int64, got torch.float32"):
        kernels.valid_negatives(own.float(), offsets, liked)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_confident_rows_keep_relative_precision(backend, shared):
    """A positive at s and a negative at -s, for s over [-45, 45]: neither loss nor slopes round to zero."""
    s = torch.arange(-45, 45.01, 0.05, device=DEVICE)
    user = s[:, None].clone().requires_grad_()
    item = torch.tensor([[1.0], [-1.0]], device=DEVICE, requires_grad=True)
    number, zero = torch.arange(len(s), device=DEVICE), torch.zeros(len(s), dtype=torch.long, device=DEVICE)
    neg = torch.ones(1, dtype=torch.long, device=DEVICE) if shared else zero[:, None] + 1
    loss = kernels.sampled_ce(user, item, number, zero, neg, reduction="none", backend=backend)
    (slope,) = torch.autograd.grad(loss.sum(), user)
    d, tiny = s.double(), torch.finfo(torch.float32).tiny
    torch.testing.assert_close(loss.double(), -torch.nn.functional.logsigmoid(2 * d), rtol=3e-5, atol=tiny)
    torch.testing.assert_close(slope[:, 0].double(), -2 * torch.sigmoid(-2 * d), rtol=3e-5, atol=2 * tiny)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_no_live_negative_is_no_loss(backend, shared):
    """All negatives are accidental hits, invalid or outside the catalogue, the last with NaN in their vectors."""
    user, item = rows(3, 8, torch.float32, 0), rows(4, 8, torch.float32, 1)
    item[2] = torch.nan
    bias = torch.tensor([0.1, 0.2, -torch.inf, 0.3], device=DEVICE)
    pos = torch.tensor([0, 0, 0], device=DEVICE)
    neg, valid = torch.tensor([0, 2, 3], device=DEVICE), torch.tensor([True, True, False], device=DEVICE)
    if not shared:
        neg, valid = neg.expand(3, 3), valid.expand(3, 3)
    leaves = [x.clone().requires_grad_() for x in (user, item, bias)]
    options = dict(neg_valid=valid, reduction="none", backend=backend)
    loss = kernels.sampled_ce(*leaves[:2], torch.arange(3, device=DEVICE), pos, neg, item_bias=leaves[2], **options)
    assert torch.equal(loss, torch.zeros_like(loss))
    assert not any(g.any() for g in torch.autograd.grad(loss.sum(), leaves))


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_gradcheck(shared):
    operands, (user_id, pos, neg) = make(9, 5, 4, 7, 6, torch.float64, shared)
    options = {k: v.double() if v.is_floating_point() else v for k, v in options_of(operands, 9, 5, shared).items()}
    mask = operands[2] == -torch.inf
    leaves = [x.double().masked_fill(mask, 0) if x.ndim == 1 else x for x in operands]

    def call(u, i, b):
        b = torch.where(mask, -torch.inf, b)
        return kernels.sampled_ce(u, i, user_id, pos, neg, item_bias=b, reduction="none", **options)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in leaves])


def emulated(dtype, D, shared):
    operands, row_ids = make(40, 19, 7, 60, D, dtype, shared)
    check("triton", operands, row_ids, reduction="none", **options_of(operands, 40, 19, shared, per_row=shared))


def raw_calls(case, backend):
    """Every registered operator with arguments that exercise it."""
    user, item, bias = case.fresh()
    own, shared = case.neg, case.shared
    weight, valid = torch.rand(len(user), device=DEVICE), torch.rand(own.shape, device=DEVICE) < 0.8
    log_q, row_ids = torch.randn(len(item), device=DEVICE), (case.user_id, case.pos)
    for reduction in ("mean", "none"):
        tail = (1.0, reduction, [True, True, True], backend)
        yield ops.sampled_ce, (user, item, bias, *row_ids, own, log_q, valid, weight, *tail)
        yield ops.shared_ce, (user, item, bias, *row_ids, shared, log_q, None, weight, *tail)


EMULATED = {
    "sampled_ce": lambda dtype, D: emulated(dtype, D, False),
    "sampled_ce, shared negatives": lambda dtype, D: emulated(dtype, D, True),
}
