"""The operators beside what they replace, at one shape each: calls to time, a check against the float64 oracle, floors.

"eager" is how the field writes it, "eager best" the fastest way found to write it in eager PyTorch. Losses are timed
forward and backward, with dense gradients for both matrices. ``kernel_speed.py`` measures.
"""

from collections.abc import Callable
from typing import Any

import torch
import torch.nn.functional as functional
from case_parts import Case, Shape, agreement, competitors, compiled, generator, ids, leaf, relative, step, tried
from torch import Tensor

import recbole_llm_kernels as kernels
from recbole_llm_kernels import reference

FULL: list[tuple[str, Shape]] = [
    ("pair_bce", dict(P=65536, n=100_000, D=64)),
    ("sampled_bce", dict(B=4096, K=64, n=100_000, D=64)),
    ("score_topk", dict(B=1024, N=100_000, D=64, k=50)),
    ("score_topk", dict(B=256, N=1_000_000, D=64, k=50)),
    ("catalog_bce", dict(B=2048, N=200_000, D=64)),
    ("catalog_ce", dict(B=2048, N=200_000, D=64)),
    ("pair_bce", dict(P=65536, n=100_000, D=64, ids="zipf")),
    ("pair_bce", dict(P=65536, n=1_000_000, D=64)),
    ("pair_bce", dict(P=2048, n=10_000, D=64)),
    ("sampled_bce", dict(B=4096, K=64, n=100_000, D=64, ids="zipf")),
    ("sampled_bce", dict(B=16384, K=4, n=100_000, D=64)),
    ("sampled_ce", dict(B=4096, K=64, n=100_000, D=64)),
    ("sampled_ce", dict(B=4096, M=4096, n=100_000, D=64)),
    ("rowwise_adagrad", dict(P=65536, n=1_000_000, D=64)),
    ("rowwise_adagrad", dict(P=65536, n=1_000_000, D=64, ids="zipf")),
    ("pool_rows", dict(B=2048, E=131_072, n=100_000, D=64)),
    ("score_topk", dict(B=4096, N=10_000, D=64, k=20)),
    ("catalog_bce", dict(B=2048, N=50_000, D=64)),
    ("catalog_bce", dict(B=1024, N=60_000, D=64)),
    ("catalog_bce", dict(B=1024, N=50_000, D=128)),
    ("catalog_bce", dict(B=943, N=1683, D=64)),
    ("catalog_ce", dict(B=2048, N=50_000, D=64)),
    ("catalog_ce", dict(B=943, N=1683, D=64)),
]
QUICK: list[tuple[str, Shape]] = [
    ("pair_bce", dict(P=4096, n=5000, D=32)),
    ("sampled_bce", dict(B=512, K=8, n=5000, D=32)),
    ("sampled_ce", dict(B=512, K=8, n=5000, D=32)),
    ("rowwise_adagrad", dict(P=4096, n=5000, D=32)),
    ("pool_rows", dict(B=512, E=4096, n=5000, D=32)),
    ("catalog_bce", dict(B=128, N=6000, D=32)),
    ("catalog_ce", dict(B=128, N=6000, D=32)),
    ("score_topk", dict(B=128, N=20_000, D=32, k=10)),
]
CARD: list[tuple[str, Shape]] = [  # what the acceptance on a card times, the most important first
    ("catalog_bce", dict(B=2048, N=1_000_000, D=64)),
    ("catalog_bce", dict(B=2048, N=200_000, D=128)),
    ("catalog_ce", dict(B=2048, N=1_000_000, D=64)),
    ("score_topk", dict(B=1024, N=1_000_000, D=64, k=50)),
    ("pair_bce", dict(P=65536, n=1_000_000, D=64)),
    ("sampled_ce", dict(B=4096, K=64, n=1_000_000, D=64)),
    ("pool_rows", dict(B=2048, E=131_072, n=1_000_000, D=64)),
    ("rowwise_adagrad", dict(P=65536, n=1_000_000, D=64)),
]


def calls(data: Any, library: Any = kernels, **options: Any) -> dict[str, Callable[..., Tensor]]:
    """Every differentiable operator on ``data``, as a function of (user or query, item, bias).

    Contract tests, the ahead-of-time report and the acceptance on a card take their operators from here.

    Args:
        data: ``user_id``, ``pos``, ``label`` [B], ``neg`` [B, K], ``shared`` [M], ``targets`` (offsets and ids of B rows).
        library: the kernels, or their oracles.
        **options: of every call.
    """

    def of(name: str, *args: Tensor) -> Callable[..., Tensor]:
        return lambda u, i, b: getattr(library, name)(u, i, *args, item_bias=b, **options)

    return {
        "pair_dot": of("pair_dot", data.user_id, data.pos),
        "pair_sigmoid": of("pair_sigmoid", data.user_id, data.pos),
        "pair_bce": of("pair_bce", data.user_id, data.pos, data.label),
        "sampled_bce": of("sampled_bce", data.user_id, data.pos, data.neg),
        "shared_bce": of("sampled_bce", data.user_id, data.pos, data.shared),
        "sampled_ce": of("sampled_ce", data.user_id, data.pos, data.neg),
        "shared_ce": of("sampled_ce", data.user_id, data.pos, data.shared),
        "catalog_bce": of("catalog_bce", *data.targets),
        "catalog_ce": of("catalog_ce", *data.targets),
    }


def steps(data: Any, user: Tensor, item: Tensor, bias: Tensor, **options: Any) -> dict[str, Callable[[], list[Tensor]]]:
    """What else there is, as functions without arguments that return all results, gradients included."""
    offsets, entries = data.targets
    weights = torch.linspace(-1, 1, len(entries), device=entries.device)

    def pool_rows() -> list[Tensor]:
        leaf = item.detach().clone().requires_grad_()
        value = kernels.pool_rows(leaf, offsets, entries, weights, **options)
        return [value.detach(), *torch.autograd.grad(value, leaf, torch.ones_like(value))]

    def score_topk() -> list[Tensor]:
        return list(
            kernels.score_topk(user, item, 10, item_bias=bias, seen_offsets=offsets, seen_ids=entries, **options)
        )

    def rowwise_adagrad() -> list[Tensor]:
        table, state = item.detach().clone(), torch.linspace(0, 1, len(item), device=item.device)
        kernels.rowwise_adagrad_(table, state, data.pos, user.detach(), lr=0.1, **options)
        return [table, state]

    return {"pool_rows": pool_rows, "score_topk": score_topk, "rowwise_adagrad": rowwise_adagrad}


def work(P: int, B: int, N: int, K: int, D: int, s: int, counted: int) -> dict[str, tuple[float, float, float]]:
    """Bytes, flops and exponentials of every Triton kernel, for its floor in the ahead-of-time report.

    Args:
        P: pairs, and touched rows of an optimizer's step.
        B: rows.
        N: items.
        K: negatives of a row; a fourth of the entries of a pooled history.
        D: width of the vectors.
        s: bytes of an element.
        counted: pairs whose places are counted.
    """
    tables = (B + N) * D * s
    slope_products = (4 if s == 2 else 2) * B * N * D
    products = 2 * B * N * D + slope_products
    return {
        "pair_fwd": (2 * P * D * s + 28 * P, 0, P),
        "sort_key": (24 * P, 0, 0),
        "rank": (48 * counted, 0, 0),
        "chunk_sum": (2 * P * D * s + 24 * P, 0, 0),
        "join_chunks": (P // 32 * D * 4, 0, 0),
        "tile_pass[bce]": (tables + N * D * s, products, B * N),
        "tile_pass[softmax]": (tables + N * D * s, products, B * N),
        "tile_pass[exp_sum]": (tables, 2 * B * N * D, B * N),
        "tile_pass[group_max]": (tables + 4 * B * N // 64, 2 * B * N * D, 0),
        "mark": (36 * P + 16 * N, 0, 0),
        "join_parts": (17 * 4 * B * (D + 1), 0, 0),
        "select": (4 * B * N // 64 + 80 * B, 0, 0),
        "tile_pass[bce], slopes": (tables + 4 * B * N, 2 * B * N * D, B * N),
        "tile_pass[softmax], slopes": (tables + 4 * B * N, 2 * B * N * D, B * N),
        "slope_product": (tables + N * D * s + 4 * B * N, slope_products, 0),
        "softmax_row": (16 * P, 0, 2 * P),
        "sampled_bce_fwd": (B * (K + 2) * D * s + 4 * B * (K + D), 0, B * K),
        "sampled_ce_fwd": (B * (K + 2) * D * s + 4 * B * (2 * K + D), 0, 2 * B * K),
        "join_softmax": (8 * 64 * B, 0, 64 * B),
        "pool": (4 * K * B * (D * s + 12) + B * D * s, 0, 0),
        "rowwise_adagrad": (8 * P * D + 2 * P * D * s + 16 * P, 0, 0),
        "group_score": (B * 10 * 64 * (D * s + 8), 0, 0),
    }


def pair_bce(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    """P pairs from tables of n users and n items."""
    P, n, D = shape["P"], shape["n"], shape["D"]
    user, item = leaf(n, D, 0.1, 0, device, dtype), leaf(n, D, 0.1, 1, device, dtype)
    u, i = ids(n, (P,), "uniform", 2, device), ids(n, (P,), shape.get("ids", "uniform"), 3, device)
    y = torch.randint(2, (P,), generator=generator(5)).to(device, torch.float32)

    def eager() -> Tensor:
        s = (functional.embedding(u, user) * functional.embedding(i, item)).sum(-1)
        return functional.binary_cross_entropy_with_logits(s, y.to(s.dtype))

    def best() -> Tensor:
        rows = functional.embedding(u, user)[:, None, :], functional.embedding(i, item)[:, :, None]
        s = torch.bmm(*rows).view(-1)
        return functional.binary_cross_entropy_with_logits(s, y.to(s.dtype))

    def ours() -> Tensor:
        return kernels.pair_bce(user, item, u, i, y)

    def check() -> dict[str, float]:
        def oracle(a: Tensor, b: Tensor) -> Tensor:
            loss = reference.pair_bce(a, b, u, i, y.double())
            loss.backward()
            return loss

        errors = agreement(step(ours, user, item), (user, item), oracle)
        with torch.no_grad():
            errors["loss"] = relative(ours(), reference.pair_bce(user.double(), item.double(), u, i, y.double()))
        return errors

    size = user.element_size()
    touched = len(u.unique()) + len(i.unique())
    variants = {"eager": eager, "eager best": best, "torch.compile": compiled(eager), "ours": ours}
    moved = touched * D * size + 20 * P + 2 * n * D * size
    return Case({k: step(v, user, item) for k, v in variants.items()}, check, moved, 6 * P * D, (user, item), {})


def sampled_bce(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    """B rows with K negatives of their own, tables of n rows."""
    B, K, n, D = shape["B"], shape["K"], shape["n"], shape["D"]
    user, item = leaf(n, D, 0.1, 0, device, dtype), leaf(n, D, 0.1, 1, device, dtype)
    law = shape.get("ids", "uniform")
    u, pos, neg = ids(n, (B,), "uniform", 2, device), ids(n, (B,), law, 3, device), ids(n, (B, K), law, 5, device)
    neg = torch.where(neg == pos[:, None], (neg + 1) % n, neg)  # eager has no mask for accidental hits

    def logits() -> tuple[Tensor, Tensor]:
        q = functional.embedding(u, user)
        s = (q * functional.embedding(pos, item)).sum(-1)
        return s, (functional.embedding(neg, item) @ q[:, :, None])[:, :, 0]

    def eager() -> Tensor:
        s, t = logits()
        every = torch.cat([s[:, None], t], 1)
        y = torch.zeros_like(every)
        y[:, 0] = 1
        return functional.binary_cross_entropy_with_logits(every, y, reduction="sum") / B

    def best() -> Tensor:
        s, t = logits()
        return (functional.softplus(-s).sum() + functional.softplus(t).sum()) / B

    def ours() -> Tensor:
        return kernels.sampled_bce(user, item, u, pos, neg)

    def check() -> dict[str, float]:
        def oracle(a: Tensor, b: Tensor) -> None:
            for part in torch.arange(B, device=device).split(512):
                (reference.sampled_bce(a, b, u[part], pos[part], neg[part], reduction="sum") / B).backward()

        return agreement(step(ours, user, item), (user, item), oracle)  # type: ignore[arg-type]

    size = user.element_size()
    touched = len(u.unique()) + len(torch.cat([pos, neg.view(-1)]).unique())
    variants = {"eager": eager, "eager best": best, "torch.compile": compiled(best), "ours": ours}
    moved = touched * D * size + 12 * B * (K + 1) + 2 * n * D * size
    return Case(
        {k: step(v, user, item) for k, v in variants.items()}, check, moved, 6 * B * (K + 1) * D, (user, item), {}
    )


def sampled_ce(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    """B rows with K negatives of their own, or, with M, as many shared by the batch; tables of n rows."""
    B, n, D = shape["B"], shape["n"], shape["D"]
    user, item = leaf(n, D, 0.3, 0, device, dtype), leaf(n, D, 0.3, 1, device, dtype)
    u, pos = ids(n, (B,), "uniform", 2, device), ids(n // 2, (B,), "uniform", 3, device)
    # no accidental hits, for which eager has no mask
    neg = n // 2 + ids(n // 2, (B, shape["K"]) if "K" in shape else (shape["M"],), "uniform", 5, device)
    first = torch.zeros(B, dtype=torch.long, device=device)

    def eager() -> Tensor:
        q, rows = functional.embedding(u, user), functional.embedding(neg, item)
        s = (q * functional.embedding(pos, item)).sum(-1)
        t = q @ rows.T if neg.ndim == 1 else (rows @ q[:, :, None])[:, :, 0]
        return functional.cross_entropy(torch.cat([s[:, None], t], 1), first)

    def ours() -> Tensor:
        return kernels.sampled_ce(user, item, u, pos, neg)

    def check() -> dict[str, float]:
        def oracle(a: Tensor, b: Tensor) -> None:
            for lo in range(0, B, 64):
                part = slice(lo, lo + 64)
                own = neg[part] if neg.ndim == 2 else neg
                (reference.sampled_ce(a, b, u[part], pos[part], own, reduction="sum") / B).backward()

        return agreement(step(ours, user, item), (user, item), oracle)  # type: ignore[arg-type]

    size, pairs = user.element_size(), B * (1 + neg.shape[-1])
    touched = len(u.unique()) + len(torch.cat([pos, neg.view(-1)]).unique())
    variants = {"eager": eager, "torch.compile": compiled(eager), "ours": ours}
    moved = touched * D * size + (12 * pairs if neg.ndim == 2 else 0) + 2 * n * D * size
    return Case({k: step(v, user, item) for k, v in variants.items()}, check, moved, 6 * pairs * D, (user, item), {})


def pool_rows(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    """B histories of E entries in all, lengths from 1 on as they come, from a table of n rows."""
    B, E, n, D = shape["B"], shape["E"], shape["n"], shape["D"]
    table, entries = leaf(n, D, 0.3, 0, device, dtype), ids(n, (E,), "zipf", 1, device)
    edges = torch.randperm(E - 1, generator=generator(2))[: B - 1].sort().values + 1
    offsets = torch.cat([torch.zeros(1, dtype=torch.long), edges, torch.tensor([E])]).to(device)
    weights = torch.rand(E, generator=generator(3)).to(device)
    upstream = torch.rand(B, D, generator=generator(4)).to(device, dtype)

    def eager() -> Tensor:
        given = weights.to(dtype)
        bag = functional.embedding_bag(
            entries, table, offsets, mode="sum", per_sample_weights=given, include_last_offset=True
        )
        return (bag * upstream).sum()

    def ours() -> Tensor:
        return (kernels.pool_rows(table, offsets, entries, weights) * upstream).sum()

    def check() -> dict[str, float]:
        def oracle(a: Tensor) -> None:
            (reference.pool_rows(a, offsets, entries, weights.double()) * upstream.double()).sum().backward()

        return agreement(step(ours, table), (table,), oracle)  # type: ignore[arg-type]

    size = table.element_size()
    moved = len(entries.unique()) * D * size + 2 * B * D * size + 24 * E + n * D * size
    variants = {"eager": eager, "torch.compile": compiled(eager), "ours": ours}
    return Case({k: step(v, table) for k, v in variants.items()}, check, moved, 4 * E * D, (table,), {})


def rowwise_adagrad(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    """A step of the optimizer on P terms of a table of n rows, from a sparse gradient; Adam and Adagrad from a dense one."""
    P, n, D = shape["P"], shape["n"], shape["D"]
    rows, terms = ids(n, (P,), shape.get("ids", "uniform"), 1, device), leaf(P, D, 0.1, 2, device, dtype).detach()
    tables = {name: leaf(n, D, 0.1, 0, device, dtype) for name in ("ours", "eager", "dense Adagrad")}
    dense = torch.zeros(n, D, dtype=dtype, device=device).index_add_(0, rows, terms)
    sparse = torch.sparse_coo_tensor(rows[None], terms, (n, D), check_invariants=False)
    optimizers: dict[str, torch.optim.Optimizer] = {
        "eager": torch.optim.Adam([tables["eager"]], fused=True),
        "dense Adagrad": torch.optim.Adagrad([tables["dense Adagrad"]]),
        "ours": kernels.RowwiseAdagrad([tables["ours"]], lr=0.01),
    }
    for name, table in tables.items():
        table.grad = sparse if name == "ours" else dense

    def check() -> dict[str, float]:
        table, state = leaf(n, D, 0.1, 0, device, dtype).detach(), torch.rand(n, generator=generator(3)).to(device)
        want = reference.rowwise_adagrad(table.double(), state.double(), rows, terms.double(), lr=0.01)
        kernels.rowwise_adagrad_(table, state, rows, terms, lr=0.01)
        pairs = zip(("table", "state"), (table, state), want, strict=True)
        return {name: float((x - y).abs().max() / y.abs().max()) for name, x, y in pairs}

    touched, size = len(rows.unique()), terms.element_size()
    moved = P * D * size + 2 * touched * D * size + 16 * P
    return Case({name: x.step for name, x in optimizers.items()}, check, moved, 6 * P * D, (), {})


def _catalog(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, N, D = shape["B"], shape["N"], shape["D"]
    query, item = leaf(B, D, 0.3, 0, device, dtype), leaf(N, D, 0.3, 1, device, dtype)
    return query, item, torch.arange(B + 1, device=device), ids(N, (B,), "uniform", 2, device)


def _catalog_case(
    name: str,
    shape: Shape,
    variants: dict[str, Callable[[], Tensor]],
    data: tuple[Tensor, ...],
    unavailable: dict[str, str],
) -> Case:
    query, item, _, target = data
    (B, D), N, size = query.shape, len(item), query.element_size()

    def check() -> dict[str, float]:
        def oracle(q: Tensor, w: Tensor) -> None:
            for lo in range(0, B, 16):
                part = slice(lo, min(lo + 16, B))
                rows = torch.arange(part.stop - lo + 1, device=q.device)
                (getattr(reference, name)(q[part], w, rows, target[part], reduction="sum") / B).backward()

        return agreement(step(variants["ours"], query, item), (query, item), oracle)  # type: ignore[arg-type]

    steps = {k: step(v, query, item) for k, v in variants.items()}
    return Case(steps, check, 2 * (B + N) * D * size, 6 * B * N * D, (query, item), unavailable)


def catalog_bce(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    """B queries against N items, one target each."""
    query, item, offsets, target = data = _catalog(shape, device, dtype)
    B = len(query)

    def eager() -> Tensor:
        s = query @ item.T
        y = torch.zeros_like(s).scatter_(1, target[:, None], 1.0)
        return functional.binary_cross_entropy_with_logits(s, y, reduction="sum") / B

    def best() -> Tensor:
        s = query @ item.T
        return (functional.softplus(s).sum() - s.gather(1, target[:, None]).sum()) / B

    def ours() -> Tensor:
        return kernels.catalog_bce(query, item, offsets, target)

    variants = {"eager": eager, "eager best": best, "torch.compile": compiled(best), "ours": ours}
    return _catalog_case("catalog_bce", shape, variants, data, {})


def catalog_ce(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    """B queries against N items, one target each."""
    query, item, offsets, target = data = _catalog(shape, device, dtype)

    def eager() -> Tensor:
        return functional.cross_entropy(query @ item.T, target)

    def ours() -> Tensor:
        return kernels.catalog_ce(query, item, offsets, target)

    variants: dict[str, Callable[[], Tensor]] = {"eager": eager, "torch.compile": compiled(eager), "ours": ours}
    unavailable = {}
    if hasattr(functional, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions

        def chunked(rows: int | None) -> Callable[[], Tensor]:
            chosen = options() if rows is None else options(batch_chunk_size=rows, chunking_method=None)
            return lambda: functional.linear_cross_entropy(query, item, target, options=chosen)

        variants["linear_cross_entropy default"] = chunked(None)
        for rows in (64, 256):
            variants[f"linear_cross_entropy {rows} rows"] = chunked(rows)
    else:
        unavailable["linear_cross_entropy"] = f"PyTorch {torch.__version__} has none"
    for name, competitor in competitors().items():
        call = tried(competitor, device, dtype)
        if isinstance(call, str):
            unavailable[name] = call
        else:
            variants[name] = lambda call=call: call(query, item, target)  # type: ignore[misc]
    return _catalog_case("catalog_ce", shape, variants, data, unavailable)


def score_topk(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    """RecBole's full-sort evaluation: B users, N items, 100 seen items and 5 positives each; hits of the k best."""
    B, N, D, k = shape["B"], shape["N"], shape["D"], shape["k"]
    query, item = (leaf(n, D, 1.0, s, device, dtype).detach() for n, s in ((B, 0), (N, 1)))
    user = torch.arange(B, device=device)
    history = user.repeat_interleave(100), torch.randint(1, N, (100 * B,), generator=generator(2)).to(device)
    positive = user.repeat_interleave(5), torch.randint(1, N, (5 * B,), generator=generator(3)).to(device)
    seen = torch.unique(history[0] * N + history[1])
    offsets = torch.searchsorted(seen, torch.arange(B + 1, device=device) * N)
    seen = seen % N
    bias = torch.zeros(N, device=device)
    bias[0] = -torch.inf  # [PAD]

    def hits(best: Tensor) -> tuple[Tensor, Tensor]:
        key = torch.unique(positive[0] * N + positive[1])
        asked = (user[:, None] * N + best).view(-1)
        place = torch.searchsorted(key, asked).clamp_(max=len(key) - 1)
        return (key[place] == asked).view(B, k).int(), torch.bincount(key // N, minlength=B)[:, None]

    def masked() -> Tensor:
        s = query @ item.T
        s[:, 0] = -torch.inf
        s[history] = -torch.inf
        return torch.topk(s, k, dim=-1).indices

    def recbole() -> tuple[Tensor, Tensor]:
        # recbole 1.2.1: trainer.py:537-560 (_full_sort_batch_eval), evaluator/collector.py:144-160
        best = masked()
        matrix = torch.zeros(B, N, dtype=torch.int, device=device)
        matrix[positive] = 1
        return torch.gather(matrix, 1, best), matrix.sum(1, keepdim=True)

    def ours() -> tuple[Tensor, Tensor]:
        top = kernels.score_topk(query, item, k, item_bias=bias, seen_offsets=offsets, seen_ids=seen)
        return hits(top.ids)

    def check() -> dict[str, float]:
        some = min(B, 16)
        part = slice(0, int(offsets[some]))
        options = dict(item_bias=bias.double(), seen_offsets=offsets[: some + 1], seen_ids=seen[part])
        want, _ = reference.score_topk(query[:some].double(), item.double(), k, **options)
        got = kernels.score_topk(query, item, k, item_bias=bias, seen_offsets=offsets, seen_ids=seen)
        exact = torch.stack([item[got.ids[b]].double() @ query[b].double() for b in range(some)])
        return {
            "scores": float(((got.scores[:some].double() - exact).abs() / exact.abs()).max()),
            "best scores": float(((want - exact).abs() / want.abs()).max()),
        }

    variants: dict[str, Callable[[], object]] = {"eager": recbole, "eager best": lambda: hits(masked()), "ours": ours}
    return Case(variants, check, (B + N) * D * query.element_size() + 12 * B * k, 2 * B * N * D, (), {})


CASES = (pair_bce, sampled_bce, sampled_ce, pool_rows, rowwise_adagrad, catalog_bce, catalog_ce, score_topk)
OPERATORS = {f.__name__: f for f in CASES}
