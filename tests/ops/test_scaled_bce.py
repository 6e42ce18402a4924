"""sampled_bce of a scaled user vector: loss and gradients against the float64 oracle."""

import pytest
import torch
from ops_cases import generator, ids, rows

from recbole_llm_kernels import reference
from recbole_llm_kernels.torch_ops.sampled import has_sampled_dots
from recbole_llm_kernels.torch_ops.scaled_bce import scaled_sampled_bce

pytestmark = pytest.mark.skipif(not has_sampled_dots(), reason="this PyTorch has no sampled_addmm on a CPU")


def leaves(users, items, dim, dtype, scale=1.0):
    """User table, offset, log scale, item table, item bias."""
    offset, bias = torch.randn(dim, generator=generator(2)) * 0.1, torch.randn(items, generator=generator(3))
    values = rows(users, dim, dtype, 0, scale), offset, torch.tensor(0.4), rows(items, dim, dtype, 1, scale), bias
    return [x.detach().to(dtype).cpu().requires_grad_() for x in values]


def oracle(tensors, user_id, item_id, neg_weight):
    user, offset, log_scale, item, bias = tensors
    query = (user + offset) * log_scale.exp()
    options = {"item_bias": bias, "neg_weight": neg_weight}
    return reference.sampled_bce(query, item, user_id, item_id[:, 0], item_id[:, 1:], **options)


def batch(users, items, rows_, negatives):
    """Ids [B] and [B, 1 + K]; no negative is its row's positive; user and item 1 occur in most rows."""
    user_id, positive = ids(users, (rows_,), 4).cpu(), ids(items, (rows_,), 5).cpu()
    user_id[: rows_ * 3 // 4], positive[rows_ // 8 :: 2] = 1, 1
    step = ids(items, (rows_, negatives), 6, low=1).cpu()
    return user_id, torch.cat([positive[:, None], (positive[:, None] + step) % items], 1)


# (users, items, dim, rows, negatives): sums longer than a piece; a table much larger than the batch; one row
@pytest.mark.parametrize("shape", [(20, 12, 5, 700, 3), (3000, 2000, 64, 40, 1), (2, 2, 1, 1, 1)], ids=str)
@pytest.mark.parametrize("neg_weight", [1.0, 0.3])
@pytest.mark.parametrize("dtype", [torch.float64, torch.float32], ids=str)
def test_against_the_oracle(shape, neg_weight, dtype):
    users, items, dim, *size = shape
    ours = leaves(users, items, dim, dtype)
    truth = [x.detach().double().requires_grad_() for x in ours]
    user_id, item_id = batch(users, items, *size)
    got, want = scaled_sampled_bce(*ours, user_id, item_id, neg_weight), oracle(truth, user_id, item_id, neg_weight)
    assert got.dtype == dtype
    torch.testing.assert_close(got.double(), want, rtol=50 * torch.finfo(dtype).eps, atol=0)
    (3 * got).backward()
    (3 * want).backward()
    for x, y in zip(ours, truth, strict=True):
        assert x.grad.dtype == dtype and x.grad.shape == y.grad.shape
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-4, atol=50 * torch.finfo(dtype).eps)


@pytest.mark.parametrize("has_offset", [True, False], ids=["offset", "no offset"])
def test_rows_of_their_own(has_offset):
    user, offset, *others = leaves(60, 9, 7, torch.float64)
    given, whole = ([x.detach().clone().requires_grad_() for x in (user, offset, *others)] for _ in range(2))
    _, item_id = batch(60, 9, 60, 2)
    got = scaled_sampled_bce(given[0], given[1] if has_offset else None, *given[2:], None, item_id, 0.3)
    want = oracle([whole[0], whole[1] * has_offset, *whole[2:]], torch.arange(60), item_id, 0.3)
    torch.testing.assert_close(got, want)
    got.backward()
    want.backward()
    for x, y in zip(given, whole, strict=True):
        torch.testing.assert_close(torch.zeros_like(y) if x.grad is None else x.grad, y.grad)


def test_confident_pairs_keep_relative_precision():
    """Logits about +40 and -40: 1 - sigmoid(40) would be 0."""
    table = torch.full((1, 1), 1.0), torch.zeros(1), torch.tensor(0.0), torch.tensor([[40.0], [-40.0]]), torch.zeros(2)
    ours = [x.requires_grad_() for x in table]
    truth = [x.detach().double().requires_grad_() for x in table]
    user_id, item_id = torch.zeros(1, dtype=torch.int64), torch.tensor([[0, 1]])
    got, want = scaled_sampled_bce(*ours, user_id, item_id), oracle(truth, user_id, item_id, 1.0)
    got.backward()
    want.backward()
    assert want.item() > 0
    torch.testing.assert_close(got.double(), want, rtol=1e-5, atol=0)
    for x, y in zip(ours, truth, strict=True):
        torch.testing.assert_close(x.grad.double(), y.grad, rtol=1e-5, atol=0)


# (users, items, rows, negatives): a user in every row of a large batch; rows of many negatives
@pytest.mark.parametrize("shape", [(4, 50, 40_000, 2), (150, 2000, 150, 1500)], ids=str)
def test_long_sums_are_cut(shape):
    """Added one after another, their terms would be off by more than 1e-6 of the largest."""
    users, items, rows_, negatives = shape
    ours = leaves(users, items, 16, torch.float32)
    truth = [x.detach().double().requires_grad_() for x in ours]
    user_id = torch.arange(rows_) if users == rows_ else torch.ones(rows_, dtype=torch.int64)
    item_id = torch.stack([torch.randperm(items, generator=generator(n))[: 1 + negatives] for n in range(150)])
    item_id = item_id[torch.arange(rows_) % 150]
    scaled_sampled_bce(*ours, user_id, item_id).backward()
    oracle(truth, user_id, item_id, 1.0).backward()
    for x, y in zip(ours[:2], truth[:2], strict=True):  # users and their offset
        assert (x.grad - y.grad).abs().max() <= 5e-7 * y.grad.abs().max()


def test_repeats_bit_for_bit():
    def gradients():
        tensors = leaves(50, 30, 16, torch.float32)
        loss = scaled_sampled_bce(*tensors, *batch(50, 30, 900, 2))
        loss.backward()
        return [loss.detach(), *(x.grad for x in tensors)]

    assert all(torch.equal(x, y) for x, y in zip(gradients(), gradients(), strict=True))


@pytest.mark.parametrize("user, item", [(20, 3), (3, 12), (-1, 3), (3, -1)])
def test_an_id_out_of_range_is_an_error(user, item):
    user_id, item_id = torch.tensor([1, user]), torch.tensor([[1, 2], [2, item]])
    with pytest.raises((IndexError, RuntimeError)):
        scaled_sampled_bce(*leaves(20, 12, 4, torch.float32), user_id, item_id)
