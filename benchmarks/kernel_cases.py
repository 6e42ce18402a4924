"""The operators beside what they replace, at one shape each: calls to time, a check against the float64 oracle, floors.

"eager" is how the field writes it, "eager best" the fastest way found to write it in eager PyTorch. Losses are timed
forward and backward, with dense gradients for both matrices. ``kernel_speed.py`` measures.
"""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
import torch.nn.functional as functional
from torch import Tensor

import recbole_llm_kernels as kernels
from recbole_llm_kernels import reference

Shape = dict[str, Any]


class Case(NamedTuple):
    """One operator at one shape."""

    variants: dict[str, Callable[[], object]]  # "ours", the baselines, and competitors
    check: Callable[[], dict[str, float]]  # largest relative errors against the oracle
    bytes: float  # each distinct row once, each gradient once
    flops: float
    leaves: tuple[Tensor, ...]  # their gradients are the result; none: the result is small
    unavailable: dict[str, str]  # competitors that cannot run here, and why


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(n: int, shape: tuple[int, ...], law: str, seed: int, device: str) -> Tensor:
    """Uniform ids, or Zipf ids: the r-th most popular is drawn in proportion to 1 / r."""
    if law == "zipf":
        flat = torch.multinomial(
            1 / torch.arange(1, n + 1.0), int(torch.tensor(shape).prod()), True, generator=generator(seed)
        )
        return torch.randperm(n, generator=generator(seed + 1))[flat].view(shape).to(device)
    return torch.randint(n, shape, generator=generator(seed)).to(device)


def leaf(n: int, D: int, scale: float, seed: int, device: str, dtype: torch.dtype) -> Tensor:
    return (torch.randn(n, D, generator=generator(seed)) * scale).to(device, dtype).requires_grad_()


def step(loss: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], object]:
    """Forward and backward of ``loss``, with fresh gradients as after ``zero_grad(set_to_none=True)``."""

    def run() -> None:
        for x in leaves:
            x.grad = None
        loss().backward()

    return run


def compiled(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return torch.compile(loss, fullgraph=True)


def agreement(
    ours: Callable[[], object], leaves: tuple[Tensor, ...], oracle: Callable[..., Tensor]
) -> dict[str, float]:
    """Largest errors of the gradients, in units of the largest gradient."""
    ours()
    doubled = [x.detach().double().requires_grad_() for x in leaves]
    oracle(*doubled)
    return {
        f"gradient_{number}": float((x.grad.double() - d.grad).abs().max() / d.grad.abs().max())
        for number, (x, d) in enumerate(zip(leaves, doubled, strict=True))
    }


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).abs() / want.detach().abs())


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


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def competitors() -> dict[str, Callable[[], Loss]]:
    """Public fused cross-entropies of (query, item, target)."""

    def liger() -> Loss:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss()
        return lambda query, item, target: loss(item, query, target)

    def cut(**options: Any) -> Loss:
        from cut_cross_entropy import linear_cross_entropy

        return lambda query, item, target: linear_cross_entropy(query, item, target, **options)

    return {
        "Liger-Kernel": liger,
        "cut-cross-entropy": cut,
        "cut-cross-entropy exact": lambda: cut(filter_eps=None),
        "cut-cross-entropy torch_compile": lambda: cut(impl="torch_compile"),
    }


def tried(competitor: Callable[[], Loss], device: str, dtype: torch.dtype) -> Loss | str:
    """The call, or why it cannot run here, found out on a tiny catalogue."""
    try:
        call = competitor()
        query, item = (leaf(n, 32, 0.1, n, device, dtype) for n in (8, 300))
        call(query, item, torch.arange(8, device=device)).backward()
    except ImportError as error:
        return f"not installed: {error}"
    except Exception as error:  # whatever a foreign package raises is the reason
        return f"does not run on {device}: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return call


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


OPERATORS = {f.__name__: f for f in (pair_bce, sampled_bce, catalog_bce, catalog_ce, score_topk)}
