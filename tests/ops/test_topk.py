"""score_topk: exact ids wherever scores are exact, and within a rounding of the scores elsewhere."""

import pytest
import torch
from ops_cases import A_FEW, DEVICE, biases, eps, generator, names, row_lists, rows, skip_unsupported

import recbole_llm_kernels as kernels
from recbole_llm_kernels import reference

# (rows, items, dim, k): one block; ragged; k of one; k near N; many items; so many that scores are computed again; k
# beyond N; no rows; no items
SHAPES = [(64, 500, 64, 10), (70, 1234, 60, 7), (3, 40, 3, 1), (9, 50, 8, 49), (5, 70_001, 4, 20),
          (40, 300_007, 4, 20), (4, 6, 8, 20),
          (0, 6, 8, 2), (2, 0, 8, 3)]  # fmt: skip


def integers(n, D, seed, dtype=torch.float32):
    """Small whole numbers: dot products are exact in every dtype, and equal scores are common."""
    return torch.randint(-2, 3, (n, D), generator=generator(seed)).to(DEVICE, dtype)


def seen_lists(B, N, most, seed=4):
    return row_lists(B, N, most, seed) if N else row_lists(B, 1, 0, seed)


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16, torch.float64], ids=names)
@pytest.mark.parametrize("shape", SHAPES, ids=lambda s: "B{}-N{}-D{}-k{}".format(*s))
def test_ids_and_ties_are_exact(backend, shape, dtype):
    skip_unsupported(backend, dtype)
    B, N, D, k = shape
    query, item, bias = (
        integers(B, D, 0, dtype),
        integers(N, D, 1, dtype),
        biases(N).round() if N else torch.zeros(0, device=DEVICE),
    )
    offsets, seen = seen_lists(B, N, 30)
    got = kernels.score_topk(query, item, k, item_bias=bias, seen_offsets=offsets, seen_ids=seen, backend=backend)
    options = dict(item_bias=bias.double(), seen_offsets=offsets, seen_ids=seen)
    scores, ids = reference.score_topk(query.double(), item.double(), k, **options)
    assert torch.equal(got.ids, ids)
    assert torch.equal(got.scores.double(), scores)


@pytest.mark.parametrize("D", [1, 3, 60, 64, 100, 128, 200, 256, 512])
def test_every_width(backend, D):
    test_ids_and_ties_are_exact(backend, (6, 300, D, 5), torch.float32)


@pytest.mark.parametrize("N", [300, 9000])
def test_strides_repeats_and_autocast_change_nothing(backend, N):
    """Transposed matrices and strided ids give the same bits, and so does a second call; autocast rounds the matrices."""
    query, item, bias = rows(9, 24, torch.float32, 0), rows(N, 24, torch.float32, 1), biases(N)
    offsets, seen = seen_lists(9, N, 30)
    options = dict(item_bias=bias, seen_offsets=offsets, seen_ids=seen)
    got = kernels.score_topk(query, item, 5, **options, backend=backend)
    wide = dict(item_bias=bias.repeat_interleave(2)[::2], seen_offsets=offsets.repeat_interleave(2)[::2],
                seen_ids=seen.repeat_interleave(2)[::2])  # fmt: skip
    strided = kernels.score_topk(query.T.contiguous().T, item.T.contiguous().T, 5, **wide, backend=backend)
    for again in (strided, kernels.score_topk(query, item, 5, **options, backend=backend)):
        assert all(torch.equal(a, b) for a, b in zip(got, again, strict=True))
    with torch.autocast(DEVICE, dtype=torch.bfloat16):
        cast = kernels.score_topk(query, item, 5, **options, backend=backend)
    rounded = kernels.score_topk(query.bfloat16(), item.bfloat16(), 5, **options, backend=backend)
    assert cast.scores.dtype == torch.float32 and all(torch.equal(a, b) for a, b in zip(cast, rounded, strict=True))


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16, torch.float16], ids=names)
@pytest.mark.parametrize("N", [300, 40_000, 300_000])
def test_scores_are_right_and_no_better_item_is_left_out(backend, dtype, N):
    B, D, k = 33, 48, 20
    query, item, bias = rows(B, D, dtype, 0, 3.0), rows(N, D, dtype, 1, 3.0), biases(N)
    offsets, seen = seen_lists(B, N, 50)
    got = kernels.score_topk(query, item, k, item_bias=bias, seen_offsets=offsets, seen_ids=seen, backend=backend)
    every, order = reference.score_topk(
        query.double(), item.double(), N, item_bias=bias.double(), seen_offsets=offsets, seen_ids=seen
    )
    exact = torch.full((B, N + 1), -torch.inf, dtype=torch.float64, device=DEVICE)
    exact.scatter_(1, order.remainder(N + 1), every)  # id -1, no candidate, goes to the spare column
    size = query.double().abs() @ item.double().abs().T
    tolerance = A_FEW * eps(dtype) * (size.amax(1, keepdim=True) + 3)
    mine = exact.gather(1, got.ids)
    assert ((got.scores.double() - mine).abs() <= tolerance).all()
    assert (got.scores.diff(dim=1) <= 0).all()
    assert ((every[:, :k] - mine).abs() <= tolerance).all()  # the k-th best score is no worse than the true one


def test_rows_with_fewer_candidates_are_filled(backend):
    """A row that has seen everything, one with two items left, one with none of its two in the catalogue."""
    query, item = integers(3, 4, 0), integers(5, 4, 1)
    bias = torch.tensor([0.0, 0.0, 0.0, -torch.inf, -torch.inf], device=DEVICE)
    offsets = torch.tensor([0, 5, 6, 9], device=DEVICE)
    seen = torch.tensor([0, 1, 2, 3, 4, 1, 0, 1, 2], device=DEVICE)
    got = kernels.score_topk(query, item, 3, item_bias=bias, seen_offsets=offsets, seen_ids=seen, backend=backend)
    assert (got.ids[[0, 2]] == -1).all() and (got.scores[[0, 2]] == -torch.inf).all()
    assert set(got.ids[1, :2].tolist()) == {0, 2} and got.ids[1, 2] == -1 and got.scores[1, 2] == -torch.inf


@pytest.mark.parametrize("N", [50_001, 70_001], ids=["scores kept", "scores computed anew"])
def test_columns_left_over_from_the_groups_take_part(backend, N):
    query, item = torch.ones(2, 3, device=DEVICE), rows(N, 3, torch.float32, 1)
    item[N - 1] = 100.0
    best = (item @ query[0]).topk(5).indices
    assert kernels.score_topk(query, item, 5, backend=backend).ids.tolist() == [best.tolist()] * 2
    assert best[0] == N - 1


def test_equal_items_are_ordered_by_id(backend):
    """Thousands of equal scores on both sides of the k-th place, as cold items with one text have."""
    query = torch.ones(3, 2, device=DEVICE)
    item = torch.zeros(50_000, 2, device=DEVICE)
    item[[7, 40_000, 49_999]] = 1.0
    got = kernels.score_topk(query, item, 10, backend=backend)
    assert got.ids.tolist() == [[7, 40_000, 49_999, 0, 1, 2, 3, 4, 5, 6]] * 3
    everything = kernels.score_topk(query, item[:20], 30, backend=backend)
    assert everything.ids.tolist() == [[7, *range(7), *range(8, 20), *[-1] * 10]] * 3


def test_one_tie_at_the_last_place(backend):
    """No two scores are equal but the k-th and the next: the row still comes in descending order."""
    item = torch.tensor([[1.0], [7.0], [3.0], [9.0], [3.0], [5.0], [0.0], [2.0]], device=DEVICE)
    got = kernels.score_topk(torch.ones(1, 1, device=DEVICE), item, 4, backend=backend)
    assert got.scores.tolist() == [[9, 7, 5, 3]] and got.ids.tolist() == [[3, 1, 5, 2]]


def test_vectors_outside_the_catalogue_may_hold_anything(backend):
    query, item = rows(4, 8, torch.float32, 0), rows(100, 8, torch.float32, 1)
    bias = biases(100)
    clean = kernels.score_topk(query, item, 100, item_bias=bias, backend=backend)
    item[bias == -torch.inf] = torch.nan
    dirty = kernels.score_topk(query, item, 100, item_bias=bias, backend=backend)
    assert torch.equal(clean.ids, dirty.ids) and torch.equal(clean.scores, dirty.scores)


def test_not_differentiable(backend):
    query, item = rows(2, 8, torch.float32, 0).requires_grad_(), rows(9, 8, torch.float32, 1)
    assert not kernels.score_topk(query, item, 2, backend=backend).scores.requires_grad


@pytest.mark.parametrize("id_dtype", [torch.int32, torch.int64], ids=names)
def test_result_types(backend, id_dtype):
    query, item = rows(2, 8, torch.bfloat16, 0), rows(9, 8, torch.bfloat16, 1)
    offsets, seen = row_lists(2, 9, 3, 4, dtype=id_dtype)
    got = kernels.score_topk(query, item, 2, seen_offsets=offsets, seen_ids=seen, backend=backend)
    assert (got.scores.dtype, got.ids.dtype) == (torch.float32, torch.int64)
