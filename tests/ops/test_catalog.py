"""catalog_bce and catalog_ce against the float64 oracle, on fresh and on trained-like catalogues."""

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
    inside,
    names,
    row_lists,
    rows,
    skip_unsupported,
    truth,
    upstream,
)

import recbole_llm_kernels as kernels

# (rows, items, dim, most targets of a row): one tile; ragged over several tiles of 256 x 1024, more items than rows and
# more rows than items; a row that targets everything; wide; one; no rows
SHAPES = [(64, 200, 64, 5), (300, 2100, 60, 9), (600, 130, 16, 4), (7, 5, 3, 5), (20, 90, 200, 3), (1, 1, 1, 1),
          (0, 5, 8, 2)]  # fmt: skip
LOSSES = ["catalog_bce", "catalog_ce"]


def make(B, N, D, most, dtype, bias=True, scale=3.0, id_dtype=torch.int64):
    item_bias = biases(N) if bias else None
    operands = rows(B, D, dtype, 0, scale), rows(N, D, dtype, 1, scale), item_bias
    return operands, row_lists(B, N, most, 2, inside(item_bias) if bias else None, id_dtype)


def trained(B, N, D, dtype):
    """A catalogue after training: targets near s = +14, all others near s = -12."""
    classes = torch.arange(N) % D
    item = torch.eye(D)[classes] * 26**0.5 + torch.randn(N, D, generator=generator(1)) * 0.02
    query = torch.eye(D)[torch.arange(B) % D] * 26**0.5 + torch.randn(B, D, generator=generator(2)) * 0.02
    lists = [(classes == b % D).nonzero()[:, 0] for b in range(B)]
    offsets = torch.tensor([0, *[len(x) for x in lists]]).cumsum(0)
    operands = query.to(DEVICE, dtype), item.to(DEVICE, dtype), torch.full((N,), -12.0, device=DEVICE)
    return operands, (offsets.to(DEVICE), torch.cat(lists).to(DEVICE))


def dense(operands, targets):
    """float64 logits, their size term by term, the targets' and the catalogue's masks."""
    query, item, bias = operands
    b = torch.zeros(len(item), dtype=torch.float64, device=DEVICE) if bias is None else bias.double()
    hot = torch.zeros(len(query), len(item), dtype=torch.bool, device=DEVICE)
    row = torch.repeat_interleave(torch.arange(len(query), device=DEVICE), targets[0].diff().long())
    hot[row, targets[1].long()] = True
    live = b != -torch.inf
    s = torch.where(live, query.double() @ item.double().T + b, 0)
    size = torch.where(live, query.double().abs() @ item.double().abs().T + b.abs() + 1, 0)
    return s, size, hot, live


def bce_spread(s, size, hot, live, neg_weight):
    """Terms of a row's loss, and how far rounding may move them and their slopes."""
    margin = torch.where(hot, s, -s)
    factor = torch.where(hot, 1.0, neg_weight) * live
    slope = torch.sigmoid(-margin) * factor
    return slope * size, -torch.nn.functional.logsigmoid(margin) * factor


def ce_spread(s, size, hot, live, _):
    """The same for softmax: log Z moves by the largest delta of the row's terms, weighted as they are in Z."""
    p = torch.where(live, s, -torch.inf).softmax(1).nan_to_num()
    count = hot.sum(1, keepdim=True)
    move = size + (p * size).sum(1, keepdim=True)
    others = torch.where(hot, 0, p).sum(1, keepdim=True) + torch.where(hot, p, 0).sum(1, keepdim=True) - p
    # slope of a target: (T - 1) p - (1 - p); of another item: T p
    slope = torch.where(hot, (count - 1) * p + others, count * p)
    log_p = torch.where(live, s, -torch.inf).log_softmax(1)
    loss = torch.where(hot, -log_p, 0).nan_to_num()
    # a confident target's loss is about 1 - p, and moves in proportion
    return slope * move, loss + torch.where(hot, others.clamp(max=1) * move, 0)


def check(name, backend, operands, targets, **options):
    query, item, _ = operands
    reduction = options.get("reduction", "mean")
    grad = upstream((len(query),) if reduction == "none" else ())
    got, grads = differentiate(getattr(kernels, name), operands, targets, grad, backend=backend, **options)
    want, wanted = truth(name, operands, targets, grad, **options)

    s, size, hot, live = dense(operands, targets)
    spread = bce_spread if name == "catalog_bce" else ce_spread
    spread, terms = spread(s, size, hot, live, options.get("neg_weight", 1.0))
    weight = options.get("weight")
    factor = torch.ones(len(query), dtype=torch.float64, device=DEVICE) if weight is None else weight.double()
    if reduction == "mean":
        factor = factor / len(query)
    few = A_FEW * eps(query.dtype)
    value_bound = few * (spread + terms).sum(1) * factor
    assert_within(got, want, value_bound if reduction == "none" else value_bound.sum(), f"{name} loss")
    spread = few * spread * (factor * grad.double().abs())[:, None]
    assert_within(grads[0], wanted[0], spread @ item.double().abs(), f"{name} query gradient")
    assert_within(grads[1], wanted[1], spread.T @ query.double().abs(), f"{name} item gradient")
    if operands[2] is not None:
        assert_within(grads[2], wanted[2], spread.sum(0), f"{name} bias gradient")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("dtype", [torch.float32, *LOW, torch.float64], ids=names)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-N{}-D{}-T{}".format(*s))
def test_against_the_oracle(backend, name, shape, dtype):
    skip_unsupported(backend, dtype)
    check(name, backend, *make(*shape, dtype), reduction="sum")


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=names)
def test_reductions_weights_and_negative_weight(backend, name, reduction, id_dtype):
    operands, targets = make(300, 1100, 24, 6, torch.float32, id_dtype=id_dtype)
    options = dict(weight=torch.rand(300, generator=generator(7)).to(DEVICE), reduction=reduction)
    if name == "catalog_bce":
        options["neg_weight"] = 0.3
    check(name, backend, operands, targets, **options)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("D", [1, 3, 60, 64, 100, 128, 200, 256, 512])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=names)
def test_every_width_without_bias(backend, name, D, dtype):
    check(name, backend, *make(40, 70, D, 4, dtype, bias=False), reduction="none")


def test_only_positives(backend):
    """neg_weight 0: the others give neither loss nor gradient."""
    check("catalog_bce", backend, *make(40, 70, 8, 4, torch.float32), neg_weight=0.0)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["sum", "none"])
@pytest.mark.parametrize("dtype", [torch.float32, *LOW], ids=names)
def test_trained_catalogue(backend, name, reduction, dtype):
    """Where dense eager BCE loses a target's loss and slope: softplus(-14) beside hundreds of softplus(-12)."""
    check(name, backend, *trained(70, 640, 64, dtype), reduction=reduction)


@pytest.mark.parametrize("name", LOSSES)
def test_confident_rows_keep_relative_precision(backend, name):
    """A target at s and another item at -s, for s over [-90, 90]."""
    s = torch.arange(-45 if name == "catalog_ce" else -90, 90.01, 0.05, device=DEVICE)
    query = s[:, None].clone().requires_grad_()
    item = torch.tensor([[1.0], [-1.0]], device=DEVICE)
    offsets, target = torch.arange(len(s) + 1, device=DEVICE), torch.zeros(len(s), dtype=torch.long, device=DEVICE)
    loss = getattr(kernels, name)(query, item, offsets, target, reduction="none", backend=backend)
    (slope,) = torch.autograd.grad(loss.sum(), query)
    d, tiny = s.double() * (2 if name == "catalog_ce" else 1), torch.finfo(torch.float32).tiny
    factor = 1 if name == "catalog_ce" else 2
    torch.testing.assert_close(loss.double(), -factor * torch.nn.functional.logsigmoid(d), rtol=1e-5, atol=tiny)
    torch.testing.assert_close(slope[:, 0].double(), -2 * torch.sigmoid(-d), rtol=1e-5, atol=2 * tiny)


@pytest.mark.parametrize("offset", [1e4, -1e4])
def test_a_common_offset_leaves_softmax_alone(backend, offset):
    """Logits of +-10,000: exp must not see them. Their own rounding, 1e-3, is all the error there may be."""
    (query, item, _), targets = make(50, 300, 16, 4, torch.float32, bias=False)
    check("catalog_ce", backend, (query, item, torch.full((300,), offset, device=DEVICE)), targets)


@pytest.mark.parametrize("name", LOSSES)
def test_items_outside_the_catalogue_have_no_part_whatever_they_hold(backend, name):
    """As if the catalogue held the other items alone, though the outsiders' vectors are NaN."""
    (query, item, bias), (offsets, target) = make(30, 200, 12, 5, torch.float32)
    inner = inside(bias)
    item[bias == -torch.inf] = torch.nan
    number = torch.full((200,), -1, device=DEVICE)
    number[inner] = torch.arange(len(inner), device=DEVICE)
    function, grad = getattr(kernels, name), torch.ones((), device=DEVICE)
    whole, got = differentiate(function, (query, item, bias), (offsets, target), grad, backend=backend)
    small = (query, item[inner], bias[inner])
    part, want = differentiate(function, small, (offsets, number[target]), grad, backend=backend)
    torch.testing.assert_close(whole, part, rtol=1e-6, atol=0)
    torch.testing.assert_close(got[0], want[0], rtol=1e-5, atol=1e-6)
    for g, w in zip(got[1:], want[1:], strict=True):
        torch.testing.assert_close(g[inner], w, rtol=1e-5, atol=1e-6)
        assert (g[bias == -torch.inf] == 0).all()


@pytest.mark.parametrize("name", LOSSES)
def test_nothing_in_the_catalogue(backend, name):
    query, item = rows(3, 4, torch.float32, 0), rows(5, 4, torch.float32, 1)
    bias, offsets = torch.full((5,), -torch.inf, device=DEVICE), torch.zeros(4, dtype=torch.long, device=DEVICE)
    none, grad = torch.empty(0, dtype=torch.long, device=DEVICE), torch.ones((), device=DEVICE)
    loss, grads = differentiate(getattr(kernels, name), (query, item, bias), (offsets, none), grad, backend=backend)
    assert loss == 0 and all((g == 0).all() for g in grads)


def test_softmax_is_cross_entropy_with_a_multi_hot_target(backend):
    (query, item, _), (offsets, target) = make(30, 50, 8, 4, torch.float32, bias=False)
    hot = torch.zeros(30, 50, device=DEVICE)
    hot[torch.repeat_interleave(torch.arange(30, device=DEVICE), offsets.diff()), target] = 1
    want = torch.nn.functional.cross_entropy(query @ item.T, hot)
    torch.testing.assert_close(kernels.catalog_ce(query, item, offsets, target, backend=backend), want)


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", REDUCTIONS)
def test_gradcheck(name, reduction):
    operands, targets = make(6, 9, 5, 3, torch.float64)
    mask = operands[2] == -torch.inf
    leaves = [x.double().masked_fill(mask, 0) if x.ndim == 1 else x for x in operands]
    options = dict(weight=torch.rand(6, generator=generator(3)).double(), reduction=reduction)

    def call(q, i, b):
        return getattr(kernels, name)(q, i, *targets, item_bias=torch.where(mask, -torch.inf, b), **options)

    assert torch.autograd.gradcheck(call, [x.requires_grad_() for x in leaves])
