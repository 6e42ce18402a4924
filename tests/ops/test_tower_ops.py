"""What a tower computes beside the scores, through its public functions: values and gradients of the plain operations."""

import pytest
import torch
import torch.nn.functional as F
from ops_cases import DEVICE, eps, generator, ids, names, rows

from recbole_llm_kernels import (
    fuses_scaled_bce,
    pool_rows,
    pool_rows_without_own,
    sampled_bce,
    scaled_rows,
    scaled_sampled_bce,
)
from recbole_llm_kernels.torch_ops.sampled import has_sampled_dots

DTYPES = [torch.float32, torch.float64]
# entries of each list: ragged with empty ones; a list longer than any piece of a sum; nothing but empty lists; no list
LISTS = [(3, 0, 1, 40, 0, 7), (5000, 0, 2), (0, 0, 0), ()]


def lists_of(sizes, n, seed=0):
    """Offsets, and ids with repeats, unsorted."""
    offsets = torch.tensor([0, *sizes]).cumsum(0).to(DEVICE)
    return offsets, ids(n, (sum(sizes),), seed)


def numbers(size, seed, dtype=torch.float32):
    return (torch.rand(size, generator=generator(seed)) - 0.3).to(DEVICE, dtype)


def plain_pool(vectors, offsets, entry, weights):
    """One row for each list, entry by entry."""
    out = [
        (vectors[entry[begin:end]] * weights[begin:end, None]).sum(0)
        for begin, end in zip(offsets.tolist(), offsets.tolist()[1:], strict=False)
    ]
    return torch.stack(out) if out else vectors[:0]


def assert_alike(ours, plain, leaves, function, oracle):
    """Values and gradients of a function against those of plain operations in float64."""
    mine = [x.detach().clone().requires_grad_() for x in leaves]
    truth = [x.detach().double().clone().requires_grad_() for x in leaves]
    got, want = function(*mine, *ours), oracle(*truth, *plain)
    assert got.dtype == leaves[0].dtype and got.shape == want.shape
    some = 100 * eps(got.dtype)
    largest = max(float(want.detach().abs().max()), 1.0) if want.numel() else 0.0
    torch.testing.assert_close(got.double(), want, rtol=some, atol=some * largest)
    upstream = torch.randn(want.shape, generator=generator(9)).to(DEVICE)
    wanted = torch.autograd.grad(want, truth, upstream.double())
    for found, true in zip(torch.autograd.grad(got, mine, upstream.to(got.dtype)), wanted, strict=True):
        assert found.dtype == got.dtype
        torch.testing.assert_close(found.double(), true, rtol=some, atol=some * max(float(true.abs().max()), 1))


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("sizes", LISTS, ids=str)
def test_pooled_rows(sizes, dtype):
    offsets, entry = lists_of(sizes, 30)
    weights = numbers(len(entry), 1, dtype)
    assert_alike(
        (offsets, entry, weights),
        (offsets, entry, weights.double()),
        [rows(30, 5, dtype, 2)],
        pool_rows,
        plain_pool,
    )


def test_pooled_rows_of_low_precision_keep_its_dtype():
    offsets, entry = lists_of((3, 0, 4), 30)
    table, weights = rows(30, 5, torch.bfloat16, 2), numbers(7, 1)
    got = pool_rows(table, offsets, entry, weights)
    assert got.dtype == torch.bfloat16 and not got[1].any()
    want = plain_pool(table.float(), offsets, entry, weights)
    torch.testing.assert_close(got.float(), want, rtol=0.03, atol=0.03)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("row_is_known", [True, False])
@pytest.mark.parametrize("sizes", [*LISTS[:3], (9,)], ids=str)
@pytest.mark.parametrize("pairs", [0, 1, 60])
def test_pooled_rows_without_an_entry(pairs, sizes, row_is_known, dtype):
    offsets, entry = lists_of(sizes, 30)
    weights = numbers(len(entry), 1, dtype)
    of_pair, own_id = ids(len(sizes), (pairs,), 3), ids(30, (pairs,), 4)
    own, norm = numbers(pairs, 5, dtype), numbers(pairs, 6, dtype)
    own[::3] = 0  # not in its list
    norm[::4] = 0  # nothing left of it
    row = torch.repeat_interleave(torch.arange(len(sizes)), torch.tensor(sizes)).to(DEVICE) if row_is_known else None

    def oracle(vectors):
        total = plain_pool(vectors, offsets, entry, weights.double())[of_pair]
        return norm.double()[:, None] * (total - own.double()[:, None] * vectors[own_id])

    arguments = (offsets, entry, weights, of_pair, own_id, own, norm, row)
    assert_alike(arguments, (), [rows(30, 5, dtype, 2)], pool_rows_without_own, oracle)


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("count", [0, 1, 500])
def test_scaled_rows(count, dtype):
    entry = ids(9, (count,), 0)
    leaves = [rows(9, 5, dtype, 1), rows(1, 5, dtype, 2)[0], torch.tensor(-0.7, dtype=dtype, device=DEVICE)]

    def function(table, offset, scale):
        return scaled_rows(table, entry, offset, scale)

    assert_alike((), (), leaves, function, lambda table, offset, scale: scale * (table[entry] + offset))


# ---------------------------------------------------------------- the loss from the parts of a query


def batch(users, items, count, negatives):
    """Ids [B] and [B, 1 + K]; rows whose negatives repeat, and none that is its row's positive."""
    user_id, positive = ids(users, (count,), 4), ids(items, (count,), 5)
    step = ids(items, (count, negatives), 6, low=1)
    return user_id, torch.cat([positive[:, None], (positive[:, None] + step) % items], 1).contiguous()


def plain_bce(user, offset, log_scale, item, bias, user_id, item_id, neg_weight):
    query = user if user_id is None else user[user_id]
    query = (query if offset is None else query + offset) * log_scale.exp()
    s = (query[:, None] * item[item_id]).sum(2) + bias[item_id]
    return (F.softplus(-s[:, 0]) + neg_weight * F.softplus(s[:, 1:]).sum(1)).mean()


def leaves_of(users, items, dim, dtype):
    values = rows(users, dim, dtype, 0), rows(1, dim, dtype, 1)[0], torch.tensor(0.4), rows(items, dim, dtype, 2)
    return [x.to(DEVICE, dtype) for x in (*values, torch.randn(items, generator=generator(3)))]


# (users, items, dim, rows, negatives); the last: more entries in a row than there are items
SHAPES = [(20, 12, 5, 300, 3), (7, 9, 16, 1, 1), (30, 6, 4, 30, 9)]


@pytest.mark.parametrize("dtype", DTYPES, ids=names)
@pytest.mark.parametrize("shape", SHAPES, ids=str)
@pytest.mark.parametrize("neg_weight", [1.0, 0.3])
@pytest.mark.parametrize("table", [True, False], ids=["table", "rows"])
@pytest.mark.parametrize("has_offset", [True, False], ids=["offset", "no offset"])
def test_the_loss_from_the_parts_of_a_query(shape, dtype, neg_weight, table, has_offset):
    users, items, dim, count, negatives = shape
    user_id, item_id = batch(users, items, count, negatives)
    user, offset, *others = leaves_of(users if table else count, items, dim, dtype)
    chosen = user_id if table else None

    def of(function):
        if has_offset:
            return lambda u, o, scale, i, b: function(u, o, scale, i, b, chosen, item_id, neg_weight)
        return lambda u, scale, i, b: function(u, None, scale, i, b, chosen, item_id, neg_weight)

    leaves = [user, offset, *others] if has_offset else [user, *others]
    assert_alike((), (), leaves, of(scaled_sampled_bce), of(plain_bce))


def test_one_pass_and_the_general_path_agree(monkeypatch):
    if not fuses_scaled_bce(DEVICE):
        pytest.skip("nothing is fused here")
    user_id, item_id = batch(20, 12, 300, 3)

    def both():
        leaves = [x.requires_grad_() for x in leaves_of(20, 12, 5, torch.float64)]
        loss = scaled_sampled_bce(*leaves, user_id, item_id, 0.3)
        return loss.detach(), torch.autograd.grad(loss, leaves)

    loss, gradients = both()
    taken = []

    def general(*args, **options):
        taken.append(options["neg_weight"])
        return sampled_bce(*args, **options)

    monkeypatch.setattr("recbole_llm_kernels.tower_ops.fuses_scaled_bce", lambda *args: False)
    monkeypatch.setattr("recbole_llm_kernels.tower_ops.sampled_bce", general)
    other, expected = both()
    assert taken == [0.3]
    torch.testing.assert_close(loss, other, rtol=1e-10, atol=0)
    for one, two in zip(gradients, expected, strict=True):
        torch.testing.assert_close(one, two, rtol=1e-8, atol=1e-12)


def test_where_it_is_one_pass():
    on_cpu = has_sampled_dots()
    for backend in ("auto", "torch"):
        assert fuses_scaled_bce("cpu", backend) == on_cpu
        assert fuses_scaled_bce(torch.device("cpu"), backend) == on_cpu
    assert not fuses_scaled_bce("cpu", "triton")
    assert not fuses_scaled_bce("cuda") and not fuses_scaled_bce(torch.device("cuda", 0))
    with torch.autocast("cpu", dtype=torch.bfloat16):
        assert not fuses_scaled_bce("cpu")


def test_an_id_out_of_range_is_an_error():
    user, offset, scale, item, bias = leaves_of(5, 9, 4, torch.float32)
    if DEVICE == "cpu":
        with pytest.raises((IndexError, RuntimeError)):
            scaled_sampled_bce(user, offset, scale, item, bias, torch.tensor([5]), torch.tensor([[1, 2]]))
        with pytest.raises((IndexError, RuntimeError)):
            scaled_sampled_bce(user, offset, scale, item, bias, torch.tensor([4]), torch.tensor([[9, 2]]))
