"""Row lists of targets and of seen items: equal neighbours count once; a descending pair is an error, or NaN on a GPU."""

import pytest
import torch
from ops_cases import DEVICE, biases, inside, row_lists, rows

import recbole_llm_kernels as kernels
from recbole_llm_kernels import backends, checks, ops, sharded

LOSSES = ["catalog_bce", "catalog_ce"]
ROWS, ITEMS, DIM = 9, 150, 12


@pytest.fixture
def as_on_a_gpu(monkeypatch):
    """Nothing looks at ids first."""
    for module in (backends, ops, sharded):
        monkeypatch.setattr(module, "synchronising_checks", lambda device: False)


def operands():
    bias = biases(ITEMS, seed=3)
    leaves = [rows(ROWS, DIM, torch.float32, 0), rows(ITEMS, DIM, torch.float32, 1), bias]
    return [x.requires_grad_() for x in leaves], row_lists(ROWS, ITEMS, 70, 4, inside(bias))


def repeated(offsets, ids, times=3):
    """The same lists with every second id ``times`` times: runs that cross every block of a kernel."""
    counts = torch.where(torch.arange(len(ids), device=DEVICE) % 2 == 0, times, 1)
    edges = torch.nn.functional.pad(counts.cumsum(0), (1, 0))
    return edges[offsets], ids.repeat_interleave(counts)


def fallen(offsets, ids, row):
    """The same lists with the ids of ``row`` in descending order."""
    assert offsets[row + 1] - offsets[row] > 1
    ids = ids.clone()
    ids[offsets[row] : offsets[row + 1]] = ids[offsets[row] : offsets[row + 1]].flip(0)
    return offsets, ids


def differentiated(name, leaves, lists, backend, **options):
    loss = getattr(kernels, name)(*leaves[:2], *lists, item_bias=leaves[2], backend=backend, **options)
    return [loss.detach(), *torch.autograd.grad(loss.sum(), leaves)]


@pytest.mark.parametrize("name", LOSSES)
@pytest.mark.parametrize("reduction", ["mean", "none"])
@pytest.mark.parametrize("is_looked_at", [True, False], ids=["checked", "not checked"])
def test_a_repeated_target_counts_once(backend, name, reduction, is_looked_at, request):
    if not is_looked_at:
        request.getfixturevalue("as_on_a_gpu")
    leaves, lists = operands()
    want = differentiated(name, leaves, lists, backend, reduction=reduction)
    got = differentiated(name, leaves, repeated(*lists), backend, reduction=reduction)
    for a, b in zip(got, want, strict=True):
        torch.testing.assert_close(a, b, rtol=2e-6, atol=2e-6 * b.abs().max().item())
    assert want[0].isfinite().all() and not torch.equal(repeated(*lists)[1], lists[1])


@pytest.mark.parametrize("is_looked_at", [True, False], ids=["checked", "not checked"])
def test_a_repeated_seen_item_counts_once(backend, is_looked_at, request):
    if not is_looked_at:
        request.getfixturevalue("as_on_a_gpu")
    N = 3000 if backend == "triton" and DEVICE == "cpu" else 50_000  # groups in both; the interpreter is slow
    query, item = rows(ROWS, DIM, torch.float32, 0), rows(N, DIM, torch.float32, 1)
    best = kernels.score_topk(query, item, 50, backend=backend).ids
    lists = torch.arange(ROWS + 1, device=DEVICE) * 25, best[:, ::2].sort(1).values.flatten()
    found = [
        kernels.score_topk(query, item, 20, seen_offsets=offsets, seen_ids=ids, backend=backend)
        for offsets, ids in (lists, repeated(*lists))
    ]
    assert torch.equal(found[0].ids, found[1].ids) and torch.equal(found[0].scores, found[1].scores)
    assert torch.equal(found[0].ids, best[:, 1:41:2])


@pytest.mark.parametrize("name", LOSSES)
def test_descending_targets_are_an_error(backend, name, monkeypatch):
    monkeypatch.setenv("RECBOLE_LLM_KERNELS_DEBUG", "1")
    leaves, lists = operands()
    with pytest.raises(ValueError, match=r"target_ids must ascend within a row, but entries \d+ and \d+ are .*sort"):
        differentiated(name, leaves, fallen(*lists, 4), backend)


def test_descending_seen_items_are_an_error(backend, monkeypatch):
    monkeypatch.setenv("RECBOLE_LLM_KERNELS_DEBUG", "1")
    leaves, lists = operands()
    offsets, ids = fallen(*lists, 4)
    with pytest.raises(ValueError, match=r"seen_ids must ascend within a row"):
        kernels.score_topk(*leaves[:2], 5, seen_offsets=offsets, seen_ids=ids, backend=backend)


@pytest.mark.parametrize("name", LOSSES)
def test_descending_targets_are_nan_where_nothing_is_looked_at(backend, name, as_on_a_gpu):
    """The row's loss, and so the batch's; the others are as they were, bit for bit."""
    leaves, lists = operands()
    want = differentiated(name, leaves, lists, backend, reduction="none")[0]
    got = differentiated(name, leaves, fallen(*lists, 4), backend, reduction="none")[0]
    assert got.isnan().nonzero()[:, 0].tolist() == [4]
    got[4] = want[4]
    assert torch.equal(got, want)
    assert differentiated(name, leaves, fallen(*lists, 4), backend, reduction="mean")[0].isnan()


def test_an_item_that_comes_back_is_nan_too(backend, as_on_a_gpu):
    """[3, 7, 3]: no neighbours are equal, and the item would count twice."""
    leaves, _ = operands()
    lists = torch.tensor([0, *[3] * ROWS], device=DEVICE), torch.tensor([30, 70, 30], device=DEVICE)
    for name in LOSSES:
        lost = differentiated(name, [x.nan_to_num(neginf=0.0) for x in leaves], lists, backend, reduction="none")[0]
        assert lost.isnan().tolist() == [True] + [False] * (ROWS - 1)


def test_rows_with_descending_seen_items_have_no_candidates(backend, as_on_a_gpu):
    leaves, lists = operands()
    options = [dict(zip(("seen_offsets", "seen_ids"), x, strict=True)) for x in (lists, fallen(*lists, 4))]
    want, got = (kernels.score_topk(*leaves[:2], 5, **o, backend=backend) for o in options)
    assert got.scores[4].isnan().all() and (got.ids[4] == -1).all()
    others = [row for row in range(ROWS) if row != 4]
    assert torch.equal(got.scores[others], want.scores[others]) and torch.equal(got.ids[others], want.ids[others])


def test_disorder_is_found_within_rows_alone():
    offsets, ids = torch.tensor([0, 0, 3, 4, 7, 7]), torch.tensor([5, 5, 9, 9, 2, 1, 1])
    again, falls = checks.disorder(offsets, ids)
    assert again.tolist() == [False, True, False, False, False, False, True]
    assert falls.tolist() == [False, False, False, False, False, True, False]
    kept = checks.without_repeats(offsets, ids)
    assert [x.tolist() for x in kept] == [[0, 0, 2, 3, 5, 5], [5, 9, 9, 2, 1]]
    assert checks.rows_with(falls, offsets).tolist() == [False, False, False, True, False]
    nothing = torch.empty(0, dtype=torch.int64)
    assert all(len(x) == 0 for x in checks.disorder(torch.zeros(3, dtype=torch.int64), nothing))
