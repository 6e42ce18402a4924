"""segment_sum: the sums behind every gather's gradient."""

import pytest
import torch
from ops_cases import DEVICE, LOW, generator, ids, names, rows

from recbole_llm_kernels.torch_ops import segment_sum as torch_impl

# (terms, outputs, source rows, dim): repeats; a hot row longer than any piece; every row empty but one; no terms
SHAPES = [(500, 40, 30, 16), (5000, 3, 7, 5), (1500, 900, 4, 64), (0, 5, 3, 2), (3, 5, 1, 1)]


@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "P{}-R{}-S{}-D{}".format(*s))
@pytest.mark.parametrize("dtype", [torch.float32, *LOW, torch.float64], ids=names)
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=names)
def test_against_index_add(shape, dtype, id_dtype):
    P, n_out, n_in, D = shape
    out_id, in_id = ids(n_out, (P,), 0, id_dtype), ids(n_in, (P,), 1, id_dtype)
    accumulator = torch_impl.accumulator(dtype)
    value, source = torch.randn(P, generator=generator(2)).to(DEVICE, accumulator), rows(n_in, D, dtype, 3)
    got = torch_impl.segment_sum(out_id, in_id, value, source, n_out, dtype)
    terms = value.double()[:, None] * source.double()[in_id.long()]
    zero = torch.zeros(n_out, D, dtype=torch.float64, device=DEVICE)
    want, size = zero.index_add(0, out_id.long(), terms), zero.index_add(0, out_id.long(), terms.abs())
    bound = 4 * torch.finfo(accumulator).eps * size + torch.finfo(dtype).eps / 2 * want.abs()
    assert got.dtype == dtype and ((got.double() - want).abs() <= bound + torch.finfo(dtype).tiny).all()


def test_a_long_sum_does_not_drift():
    """100,000 equal terms: added one after another in float32 they are off by 1e-3."""
    P = 100_000
    zero = torch.zeros(P, dtype=torch.long)
    value = torch.full((P,), 0.1)
    total = torch_impl.segment_sum(zero, zero, value, torch.ones(1, 1), 1, torch.float32)
    assert abs(total.item() / (P * value[0].double().item()) - 1) < 2e-6
    segments = torch_impl.sort_segments(zero, 1)
    assert (
        abs(torch_impl.sum_values(segments, value, torch.float64).item() / (P * value[0].double().item()) - 1) < 1e-12
    )


def test_terms_that_are_not_live_are_left_out():
    out_id, value = torch.tensor([0, 1, 1, 2]), torch.tensor([1.0, torch.nan, 2.0, 3.0])
    segments = torch_impl.sort_segments(out_id, 3, torch.tensor([True, False, True, True]))
    source = torch.tensor([[1.0], [torch.nan], [10.0], [100.0]])
    got = torch_impl.sum_segments(segments, torch.arange(4), value, source, torch.float32)
    assert got[:, 0].tolist() == [1.0, 20.0, 300.0]
    assert torch_impl.sum_values(segments, value, torch.float32).tolist() == [1.0, 2.0, 3.0]


# (ids, bound): none; one pass; ids below two passes' limit, above it, and above what they can hold
@pytest.mark.parametrize(("P", "bound"), [(0, 5), (500, 40), (500, 1 << 16), (3000, 1 << 20), (40_000, 1 << 20)])
@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=names)
@pytest.mark.parametrize("numpy", [True, False], ids=["numpy", "no numpy"])
def test_ids_are_ordered_stably(P, bound, id_dtype, numpy, monkeypatch):
    from recbole_llm_kernels.torch_ops import radix

    if not numpy:
        monkeypatch.setattr(radix, "numpy", None)
    some = torch.randint(bound, (7,), generator=generator(0))  # many ties
    found = torch.cat([torch.randint(bound, (P,), generator=generator(1)), some[torch.randint(7, (P,))]]).to(id_dtype)
    found = found[torch.randperm(len(found), generator=generator(2))]
    order = radix.stable_order(found, bound)
    assert order.dtype == torch.int64
    assert order.tolist() == sorted(range(len(found)), key=found.tolist().__getitem__)


@pytest.mark.parametrize("dtype", [torch.float32, torch.float64], ids=names)
def test_pooling_has_the_gradient_of_embedding_bag(dtype):
    from recbole_llm_kernels import pool_rows

    vectors, weight = rows(40, 5, dtype, 0), torch.rand(700, generator=generator(1)).to(DEVICE, dtype)
    entry, begin = ids(40, (700,), 2, torch.int64), torch.tensor([0, 0, 3, 600, 700])
    one, two = (vectors.clone().requires_grad_() for _ in range(2))
    bag = torch.nn.functional.embedding_bag(
        entry, two, begin, mode="sum", per_sample_weights=weight, include_last_offset=True
    )
    pooled = pool_rows(one, begin, entry, weight)
    assert torch.equal(pooled, bag) and not pooled[0].any()
    upstream = rows(4, 5, dtype, 3)
    pooled.backward(upstream)
    bag.backward(upstream)
    torch.testing.assert_close(one.grad, two.grad)


def test_scaled_rows_have_the_gradients_of_the_chain():
    from recbole_llm_kernels.torch_ops.pool import scaled_rows

    leaves = [rows(9, 5, torch.float64, 0), torch.randn(5).double(), torch.tensor(0.7).double()]
    entry, upstream = ids(9, (30,), 1, torch.int64), rows(30, 5, torch.float64, 2)
    ours, chain = ([x.clone().requires_grad_() for x in leaves] for _ in range(2))
    got = scaled_rows(ours[0], entry, ours[1], ours[2])
    want = (chain[0][entry] + chain[1]) * chain[2]
    torch.testing.assert_close(got, want)
    got.backward(upstream)
    want.backward(upstream)
    for x, y in zip(ours, chain, strict=True):
        torch.testing.assert_close(x.grad, y.grad)


def test_pooling_without_an_entry_has_the_gradient_of_the_chain():
    from recbole_llm_kernels.torch_ops.pool import pool_without_own

    vectors, weight = rows(40, 5, torch.float64, 0), torch.rand(700, generator=generator(1)).double()
    entry, begin = ids(40, (700,), 2, torch.int64), torch.tensor([0, 0, 3, 600, 700])
    of_pair, own_id = torch.tensor([3, 1, 1, 2, 0]), torch.tensor([5, 5, 0, 39, 1])
    own, norm = torch.tensor([0.5, 0.0, 2.0, 1.0, 0.0]).double(), torch.tensor([1.0, 0.3, 0.0, 2.0, 1.0]).double()
    one, two = (vectors.clone().requires_grad_() for _ in range(2))
    bag = torch.nn.functional.embedding_bag(
        entry, two, begin, mode="sum", per_sample_weights=weight, include_last_offset=True
    )
    want = (bag[of_pair] - own[:, None] * two[own_id]) * norm[:, None]
    row = torch.repeat_interleave(begin.diff())
    got = pool_without_own(one, entry, begin, row, weight, of_pair, own_id, own, norm)
    torch.testing.assert_close(got, want)
    upstream = rows(5, 5, torch.float64, 3)
    got.backward(upstream)
    want.backward(upstream)
    torch.testing.assert_close(one.grad, two.grad)
