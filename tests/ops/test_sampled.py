"""sampled_bce, with negatives of each row's own and shared by the batch, against the float64 oracle."""

import pytest
import torch
from ops_cases import (
    A_FEW,
    DEVICE,
    LOW,
    REDUCTIONS,
    assert_within,
    biases,
    differentiate,
    eps,
    generator,
    ids,
    inside,
    names,
    rows,
    skip_unsupported,
    sum_rows,
    truth,
    upstream,
)

import recbole_llm_kernels as kernels
from recbole_llm_kernels import reference

# (rows, negatives, users, items, dim): one tile; ragged; a long hot item; one negative; no rows
OWN = [(64, 16, 50, 300, 64), (333, 7, 37, 211, 60), (700, 3, 5, 2, 3), (129, 1, 40, 40, 200), (0, 4, 3, 3, 8)]
# shared negatives reach over several tiles (256 x 1024) in both directions, ragged
SHARED = [(64, 100, 50, 300, 64), (300, 1500, 37, 900, 60), (1, 1, 1, 2, 3), (0, 4, 3, 3, 8), (5, 0, 3, 3, 8)]


def make(B, K, n_users, n_items, D, dtype, shared, scale=3.0, id_dtype=torch.int64):
    operands = rows(n_users, D, dtype, 0, scale), rows(n_items, D, dtype, 1, scale), biases(n_items)
    allowed = inside(operands[2])
    pos = allowed[ids(len(allowed), (B,), 2)].to(id_dtype)
    neg = ids(n_items, (K,) if shared else (B, K), 3, id_dtype)
    if neg.numel() and B:
        neg.view(-1)[0] = pos[0]  # an accidental hit
    return operands, (ids(n_users, (B,), 4, id_dtype), pos, neg)


def everything(operands, B, K, shared, per_row=False):
    """Options that use every feature."""
    g = generator(7)
    shape = (B, K) if per_row or not shared else (K,)
    return dict(
        weight=torch.rand(B, generator=g).to(DEVICE),
        neg_weight=0.3,
        log_q=torch.randn(len(operands[1]), generator=g).to(DEVICE),
        neg_valid=(torch.rand(shape, generator=g) < 0.8).to(DEVICE),
    )


def check(backend, operands, row_ids, **options):
    user, item, bias = operands
    user_id, pos, neg = (x.long() for x in row_ids)
    B = len(user_id)
    reduction = options.get("reduction", "mean")
    grad = upstream((B,) if reduction == "none" else ())
    got, grads = differentiate(kernels.sampled_bce, operands, row_ids, grad, backend=backend, **options)
    want, wanted = truth("sampled_bce", operands, row_ids, grad, **options)

    every = torch.cat([pos[:, None], neg.expand(B, -1)], 1)
    u, i, b = user.double()[user_id], item.double()[every], bias.double()[every]
    q = options.get("log_q")
    q = torch.zeros_like(b) if q is None else q.double()[every]
    live = (b != -torch.inf) & ((every != pos[:, None]) | (torch.arange(every.shape[1], device=DEVICE) == 0))
    if (valid := options.get("neg_valid")) is not None:
        live[:, 1:] &= valid
    s = torch.where(live, (i @ u[:, :, None])[:, :, 0] + b - q, 0)
    size = torch.where(live, (i.abs() @ u.abs()[:, :, None])[:, :, 0] + b.abs() + q.abs() + 1, 0)
    s[:, 0] = -s[:, 0]
    factor = torch.ones_like(s) * (1 if options.get("weight") is None else options["weight"].double()[:, None])
    factor[:, 1:] *= options.get("neg_weight", 1.0)
    if reduction == "mean":
        factor /= B
    spread = A_FEW * eps(user.dtype) * size * torch.sigmoid(s) * factor
    rounding = A_FEW * eps(user.dtype) * torch.where(live, -torch.nn.functional.logsigmoid(-s), 0) * factor
    value_bound = (spread + rounding).sum(1)
    assert_within(got, want, value_bound if reduction == "none" else value_bound.sum(), "loss")
    spread = spread * (grad.double().abs()[:, None] if reduction == "none" else grad.double().abs())
    flat = spread.reshape(-1)[:, None]
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
    check(backend, operands, row_ids, reduction=reduction, **everything(operands, 300, 40, shared))


def test_shared_negatives_with_a_mask_per_row(backend):
    operands, row_ids = make(300, 1100, 30, 200, 24, torch.float32, True)
    check(backend, operands, row_ids, reduction="none", **everything(operands, 300, 1100, True, per_row=True))


@pytest.mark.parametrize("D", [1, 3, 60, 64, 100, 128, 200, 256, 512])
@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_every_width(backend, shared, D):
    operands, row_ids = make(70, 5, 20, 30, D, torch.float32, shared, id_dtype=torch.int32)
    check(backend, operands, row_ids, reduction="mean")


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_confident_rows_keep_relative_precision(backend, shared):
    """A positive at s and a negative at -s, for s over [-90, 90]: neither loss nor slopes round to zero."""
    s = torch.arange(-90, 90.01, 0.05, device=DEVICE)
    user = s[:, None].clone().requires_grad_()
    item = torch.tensor([[1.0], [-1.0]], device=DEVICE, requires_grad=True)
    number, zero = torch.arange(len(s), device=DEVICE), torch.zeros(len(s), dtype=torch.long, device=DEVICE)
    neg = torch.ones(1, dtype=torch.long, device=DEVICE) if shared else zero[:, None] + 1
    loss = kernels.sampled_bce(user, item, number, zero, neg, reduction="none", backend=backend)
    (slope,) = torch.autograd.grad(loss.sum(), user)
    d, tiny = s.double(), torch.finfo(torch.float32).tiny
    torch.testing.assert_close(loss.double(), -2 * torch.nn.functional.logsigmoid(d), rtol=1e-5, atol=tiny)
    torch.testing.assert_close(slope[:, 0].double(), -2 * torch.sigmoid(-d), rtol=1e-5, atol=2 * tiny)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_no_live_negative_leaves_the_positive(backend, shared):
    """All negatives are accidental hits, invalid or outside the catalogue, the last with NaN in their vectors."""
    user, item = rows(3, 8, torch.float32, 0), rows(4, 8, torch.float32, 1)
    item[2] = torch.nan
    bias = torch.tensor([0.1, 0.2, -torch.inf, 0.3], device=DEVICE)
    pos = torch.tensor([0, 0, 0], device=DEVICE)
    neg, valid = torch.tensor([0, 2, 3], device=DEVICE), torch.tensor([True, True, False], device=DEVICE)
    if not shared:
        neg, valid = neg.expand(3, 3), valid.expand(3, 3)
    leaves = [x.clone().requires_grad_() for x in (user, item, bias)]
    number = torch.arange(3, device=DEVICE)
    options = dict(neg_valid=valid, reduction="none", backend=backend)
    loss = kernels.sampled_bce(*leaves[:2], number, pos, neg, item_bias=leaves[2], **options)
    alone = kernels.pair_bce(*leaves[:2], number, pos, torch.ones(3), item_bias=leaves[2], reduction="none")
    torch.testing.assert_close(loss, alone)
    got, want = (torch.autograd.grad(x.sum(), leaves) for x in (loss, alone))
    for g, w in zip(got, want, strict=True):
        torch.testing.assert_close(g, w)
    assert (got[1][1:] == 0).all() and (got[2][1:] == 0).all()


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_ids_beyond_two_to_the_31_elements(backend, shared):
    """Row 33,999,999 of 64 columns starts at element 2.2e9; a lazily mapped table costs no memory."""
    numpy = pytest.importorskip("numpy")
    n, D = 34_000_000, 64
    table = torch.from_numpy(numpy.zeros((n, D), dtype=numpy.int16)).view(torch.bfloat16)
    if DEVICE == "cuda":
        table = torch.zeros(n, D, dtype=torch.bfloat16, device=DEVICE)
    last = torch.tensor([n - 1, n - 2, 33_554_432, 5], device=DEVICE)
    table[last] = rows(4, D, torch.bfloat16, 1)
    user, number = rows(4, D, torch.bfloat16, 0), torch.arange(4, device=DEVICE)
    small = torch.tensor([1, 2, 3, 0], device=DEVICE) if shared else number[None].repeat(4, 1).roll(1, 1)
    got = kernels.sampled_bce(user, table, number, last, last[small], backend=backend)
    want = reference.sampled_bce(user.double(), table[last].double(), number, number, small)
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=1e-6)


@pytest.mark.parametrize("shared", [False, True], ids=["own", "shared"])
def test_gradcheck(shared):
    operands, (user_id, pos, neg) = make(9, 5, 4, 7, 6, torch.float64, shared)
    options = {k: v.double() if torch.is_tensor(v) and v.is_floating_point() else v
               for k, v in everything(operands, 9, 5, shared).items()}  # fmt: skip
    mask = operands[2] == -torch.inf
    leaves = [x.double().masked_fill(mask, 0) if x.ndim == 1 else x for x in operands]

    def call(u, i, b):
        b = torch.where(mask, -torch.inf, b)
        return kernels.sampled_bce(u, i, user_id, pos, neg, item_bias=b, reduction="none", **options)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in leaves])
