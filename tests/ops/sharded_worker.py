"""One process of a sharded catalogue, started by torchrun: compares every function with the unsharded one."""

import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT / "kernels"), str(Path(__file__).parent)]

import torch  # noqa: E402
import torch.distributed as dist  # noqa: E402

from recbole_llm_kernels import backends, catalog_bce, catalog_ce, ops, score_topk, sharded  # noqa: E402

B, N, D = 13, 57, 6
CUTS = {1: [0, N], 2: [0, 40, N], 3: [0, 1, 30, N]}  # uneven; a shard of one item


def case(dtype, seed=0):
    """Queries, items, biases, targets and seen items; row 3 has no target, row 4 hardly anything else."""
    g = torch.Generator().manual_seed(seed)
    query, item = (torch.randn(n, D, generator=g, dtype=torch.float64).to(dtype) for n in (B, N))
    item[1] = 8 * query[0]  # a confident target
    bias = torch.randn(N, generator=g, dtype=torch.float64).to(dtype)
    bias[[0, 31]] = -torch.inf
    hot = torch.rand(B, N, generator=g) < 0.2
    hot[3], hot[4], hot[0, 1] = False, True, True
    hot[:, [0, 31]] = False
    offsets = torch.nn.functional.pad(hot.sum(1).cumsum(0), (1, 0))
    return query, item, bias, offsets, hot.nonzero()[:, 1]


def own(part, x):
    return x[part[0] : part[1]].clone()


def losses(part):
    for name in ("catalog_bce", "catalog_ce"):
        for dtype, tolerance in ((torch.float64, 1e-12), (torch.float32, 2e-5)):
            for reduction in ("mean", "sum", "none"):
                query, item, bias, offsets, ids = case(dtype)
                weight = torch.rand(B, generator=torch.Generator().manual_seed(1)).to(dtype)
                options = {"weight": weight, "reduction": reduction}
                if name == "catalog_bce":
                    options["neg_weight"] = 0.7
                whole = [x.clone().requires_grad_() for x in (query, item, bias)]
                want = {"catalog_bce": catalog_bce, "catalog_ce": catalog_ce}[name](
                    *whole[:2], offsets, ids, item_bias=whole[2], **options
                )
                mine = [x.requires_grad_() for x in (query.clone(), own(part, item), own(part, bias))]
                got = getattr(sharded, name)(*mine[:2], offsets, ids, item_bias=mine[2], **options)
                close = {"rtol": tolerance, "atol": tolerance}
                torch.testing.assert_close(got, want, **close)
                upstream = torch.linspace(0.5, 2, B).to(dtype) if reduction == "none" else None
                want.backward(upstream)
                got.backward(upstream)
                torch.testing.assert_close(mine[0].grad, whole[0].grad, **close)
                torch.testing.assert_close(mine[1].grad, own(part, whole[1].grad), **close)
                torch.testing.assert_close(mine[2].grad, own(part, whole[2].grad), **close)


def ranking(part):
    query, item, bias, offsets, ids = case(torch.float32)
    item, query = item.round(), query.round()  # whole numbers tie
    bias = bias.round()
    for k in (1, 5, N, N + 9):
        want = score_topk(query, item, k, item_bias=bias, seen_offsets=offsets, seen_ids=ids)
        got = sharded.score_topk(
            query, own(part, item), k, item_bias=own(part, bias), seen_offsets=offsets, seen_ids=ids
        )
        assert torch.equal(got.scores, want.scores) and torch.equal(got.ids, want.ids)
    torch.testing.assert_close(
        sharded.score_topk(query, own(part, item), 3).scores, score_topk(query, item, 3).scores, rtol=0, atol=0
    )


def training(part):
    """Adam on pooled histories whose source vectors are sharded too: what one process gets, a shard of it each."""
    query, item, bias, offsets, ids = case(torch.float64)
    row = torch.repeat_interleave(torch.arange(B), offsets.diff())

    def pool(source, first):
        here = (ids >= first) & (ids < first + len(source))
        return torch.zeros(B, D, dtype=source.dtype).index_add(0, row[here], source[ids[here] - first])

    def fit(item, source, bias, first, loss, sum_up):
        parameters = [x.clone().requires_grad_() for x in (item, source, query)]
        optimizer = torch.optim.Adam(parameters, lr=0.05)
        for _ in range(4):
            optimizer.zero_grad()
            user = sum_up(pool(parameters[1], first)) + parameters[2]
            loss(user, parameters[0], offsets, ids, item_bias=bias).backward()
            optimizer.step()
        state = [optimizer.state[x]["exp_avg_sq"] for x in parameters]
        return [x.detach() for x in parameters] + state

    source = item.flip(0)
    for name, whole_loss in (("catalog_bce", catalog_bce), ("catalog_ce", catalog_ce)):
        want = fit(item, source, bias, 0, whole_loss, lambda x: x)
        got = fit(
            own(part, item), own(part, source), own(part, bias), part[0], getattr(sharded, name), sharded.sum_over_ranks
        )
        for place, (x, y) in enumerate(zip(got, want, strict=True)):
            expected = y if place % 3 == 2 else own(part, y)
            assert x.shape == expected.shape  # items, source vectors and their optimizer's state: this shard's rows
            torch.testing.assert_close(x, expected, rtol=1e-9, atol=1e-9)


def repeats(part):
    """A target or a seen item that is named again counts once."""
    query, item, bias, offsets, ids = case(torch.float64)
    counts = torch.where(torch.arange(len(ids)) % 2 == 0, 3, 1)
    again = torch.nn.functional.pad(counts.cumsum(0), (1, 0))[offsets], ids.repeat_interleave(counts)
    mine = [x.requires_grad_() for x in (query, own(part, item), own(part, bias))]
    for name in ("catalog_bce", "catalog_ce"):
        call = getattr(sharded, name)
        once, twice = (call(*mine[:2], *lists, item_bias=mine[2]) for lists in ((offsets, ids), again))
        for a, b in zip(torch.autograd.grad(once, mine), torch.autograd.grad(twice, mine), strict=True):
            torch.testing.assert_close(a, b, rtol=1e-12, atol=1e-12)
        torch.testing.assert_close(once, twice, rtol=1e-12, atol=0)
    options = [dict(zip(("seen_offsets", "seen_ids"), x, strict=True)) for x in ((offsets, ids), again)]
    once, twice = (sharded.score_topk(query, mine[1], 5, item_bias=mine[2], **o) for o in options)
    assert torch.equal(once.ids, twice.ids) and torch.equal(once.scores, twice.scores)


def disorder(part):
    """Where nothing is looked at first, as on a GPU: NaN for rows whose ids descend or are out of range."""
    query, item, _, offsets, ids = case(torch.float64)
    wrong = ids.clone()
    first, second = wrong[offsets[5] : offsets[6]].flip(0), int(offsets[8])
    assert len(first) > 1 and int(offsets[9]) > second
    wrong[offsets[5] : offsets[6]], wrong[second] = first, N + 3
    looks, modules = sharded.synchronising_checks, (backends, ops, sharded)
    for module in modules:
        module.synchronising_checks = lambda device: False
    try:
        for name in ("catalog_bce", "catalog_ce"):
            lost = getattr(sharded, name)(query, own(part, item), offsets, wrong, reduction="none")
            assert lost.isnan().nonzero()[:, 0].tolist() == [5, 8], (name, lost)
        got = sharded.score_topk(query, own(part, item), 5, seen_offsets=offsets, seen_ids=wrong)
    finally:
        for module in modules:
            module.synchronising_checks = looks
    want = sharded.score_topk(query, own(part, item), 5, seen_offsets=offsets, seen_ids=ids)
    for row in range(B):
        if row in (5, 8):
            assert got.scores[row].isnan().all() and (got.ids[row] == -1).all()
        else:
            assert torch.equal(got.ids[row], want.ids[row]) and torch.equal(got.scores[row], want.scores[row])


def mistakes(part):
    query, item, bias, offsets, ids = case(torch.float32)
    mine = own(part, item)

    def refused(kind, words, **changes):
        call = {"target_offsets": offsets, "target_ids": ids} | changes
        for name in ("catalog_bce", "catalog_ce"):
            try:
                getattr(sharded, name)(query, mine, **call)
            except kind as error:
                assert words in str(error), error
            else:
                raise AssertionError(f"{name} accepted it")

    last = ids.clone()
    last[-1] = N
    refused(IndexError, "out of range", target_ids=last)
    refused(ValueError, "target_ids must ascend within a row", target_ids=ids.flip(0))
    inside = own(part, bias)
    outside = torch.tensor([31])
    refused(
        ValueError,
        "outside the catalogue",
        target_offsets=torch.tensor([0] + [1] * B),
        target_ids=outside,
        item_bias=inside,
    )
    rows = B if dist.get_rank() else B - 1
    if dist.get_world_size() > 1:
        try:
            sharded.score_topk(query[:rows], mine, 3)
        except ValueError as error:
            assert "the same on every rank" in str(error)
        else:
            raise AssertionError("queries of different ranks may differ")


if __name__ == "__main__":
    torch.set_num_threads(1)
    dist.init_process_group("gloo")
    cuts = CUTS[dist.get_world_size()]
    part = (cuts[dist.get_rank()], cuts[dist.get_rank() + 1])
    for check in (losses, ranking, training, repeats, disorder, mistakes):
        check(part)
        if not dist.get_rank():  # a rank that fails ends the whole run
            print(check.__name__, "passed", flush=True)
    dist.destroy_process_group()
