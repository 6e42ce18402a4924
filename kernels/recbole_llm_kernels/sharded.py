r"""A catalogue larger than one device: its rows are spread over the processes of a ``torch.distributed`` group.

Rank r holds the items from the sum of the shards before it on, ``item_r`` [N_r, D]; the N_r may differ. Queries and targets
are the same on every rank, and so are results. Each rank passes over its own shard; what crosses the network is

    catalog_bce   the loss, a number; the queries' gradient, B D
    catalog_ce    a maximum and a sum per row, the targets' logits; the queries' gradient:  Z_b = sum over r of Z_rb
    score_topk    k scores and ids of each row and rank

so that items, their gradients and their optimizer's state are never whole in one process. Results are those of the
functions of the same name in ``functional`` on the concatenated shards, to rounding.

Start the processes with ``torchrun``, or any launcher that ends in ``torch.distributed.init_process_group``. Every function
is a collective: all ranks of the group call it, in the same order. A part of the model that makes queries from items, such
as a history pooled from source vectors, is sharded alike: pool the items at hand and :func:`sum_over_ranks`.
"""

from itertools import accumulate
from typing import Any, NamedTuple

import torch
import torch.distributed as dist
from torch import Tensor

from recbole_llm_kernels import arguments, functional
from recbole_llm_kernels.checks import check_rows, disorder, rows_with, synchronising_checks, without_repeats
from recbole_llm_kernels.functional import TopK
from recbole_llm_kernels.registration import poisoned
from recbole_llm_kernels.torch_ops import catalog
from recbole_llm_kernels.torch_ops.topk import select

Group = Any  # dist.ProcessGroup, or None for the default one


class _SumOverRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        total = x.clone()
        dist.all_reduce(total, group=group)
        return total

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        return grad, None  # every rank differentiates the same total


class _CopyToRanks(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, x: Tensor, group: Group) -> Tensor:
        ctx.group = group
        return x.view_as(x)

    @staticmethod
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor, None]:
        grad = grad.contiguous().clone()
        dist.all_reduce(grad, group=ctx.group)
        return grad, None


def sum_over_ranks(x: Tensor, group: Group = None) -> Tensor:
    """The sum of every rank's ``x``; a rank's gradient is that of the sum.

    Args:
        x: any shape, the same on every rank.
        group: the process group; None for the default one.

    Returns:
        The sum, on every rank.
    """
    return _SumOverRanks.apply(x, group)


def copy_to_ranks(x: Tensor, group: Group = None) -> Tensor:
    """``x`` itself, which is equal on every rank; its gradient is the sum of every rank's.

    Args:
        x: any shape.
        group: the process group; None for the default one.

    Returns:
        ``x``.
    """
    return _CopyToRanks.apply(x, group)


class _Shard(NamedTuple):
    start: int  # of this rank's items in the catalogue
    stop: int
    total: int

    def own(self, offsets: Tensor, ids: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Which ids are in this shard [T] bool, and row lists of those, counted from the shard's first item."""
        here = (ids >= self.start) & (ids < self.stop)
        kept = torch.nn.functional.pad(here.cumsum(0), (1, 0))[offsets.long()]
        return here, kept.to(offsets.dtype), ids[here] - self.start


def _shard(item: Tensor, query: Tensor, ids: Tensor | None, k: int, group: Group) -> _Shard:
    """Where this rank's items lie; on the way every rank learns whether all were given the same shapes."""
    if not (dist.is_available() and dist.is_initialized()):
        raise ValueError(
            "a sharded catalogue needs a process group: start the script with torchrun and call "
            "torch.distributed.init_process_group, or use the function of the same name without shards"
        )
    ranks = dist.get_world_size(group)
    count = 0 if ids is None else len(ids)
    own = torch.tensor([len(item), len(query), query.shape[1], count, k], device=query.device)
    of_rank = [torch.empty_like(own) for _ in range(ranks)]
    dist.all_gather(of_rank, own, group=group)
    shapes = torch.stack(of_rank).tolist()
    if any(shape[1:] != shapes[0][1:] for shape in shapes):
        raise ValueError(
            "queries, targets and k must be the same on every rank, got [B, D, ids, k] = "
            f"{[shape[1:] for shape in shapes]}; gather the batch first, shard the items alone"
        )
    ends = list(accumulate(shape[0] for shape in shapes))
    rank = dist.get_rank(group)
    return _Shard(ends[rank] - shapes[rank][0], ends[rank], ends[-1])


def _row_lists(
    shard: _Shard, offsets_name: str, offsets: Tensor, ids_name: str, ids: Tensor
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Row lists with every id of a row once, and NaN for rows that are not in order, ``[B]``.

    They are the same on every rank, so all ranks raise or none.
    """
    stray, poison = (ids < 0) | (ids >= shard.total), None
    if not synchronising_checks(ids.device):
        poison = torch.where(rows_with(stray | disorder(offsets, ids)[1], offsets), torch.nan, 0.0)
    elif bool(stray.any()):
        raise IndexError(
            f"{ids_name} holds {int(stray.sum())} ids that are out of range; the shards together have {shard.total} items"
        )
    else:
        check_rows(offsets_name, offsets, ids_name, ids)
    return *without_repeats(offsets, ids), poison


def _check_targets(query: Tensor, local: Tensor, bias: Tensor | None, group: Group) -> None:
    """Raise on every rank where any would: a rank that raises alone leaves the others waiting."""
    if not synchronising_checks(query.device):
        return
    outside = torch.tensor(0 if bias is None else int((bias[local.long()] == -torch.inf).sum()), device=query.device)
    dist.all_reduce(outside, group=group)
    if int(outside):
        raise ValueError(
            f"target_ids holds {int(outside)} targets outside the catalogue (item_bias is -inf); leave them out of the "
            "targets, or give them a finite bias"
        )


def catalog_bce(
    query: Tensor,
    item: Tensor,
    target_offsets: Tensor,
    target_ids: Tensor,
    *,
    item_bias: Tensor | None = None,
    weight: Tensor | None = None,
    neg_weight: float = 1.0,
    reduction: str = "mean",
    group: Group = None,
    backend: str = "auto",
) -> Tensor:
    """:func:`recbole_llm_kernels.catalog_bce` of a sharded catalogue.

    Args:
        query: one vector per row, ``[B, D]``, equal on every rank.
        item: this rank's items, ``[N_r, D]``.
        target_offsets: where each row's targets begin in ``target_ids``, ``[B + 1]``.
        target_ids: the rows' positive items, numbered through all shards, ``[T]``.
        item_bias: bias of this rank's items, ``[N_r]``.
        weight: factor of every row's loss, ``[B]``.
        neg_weight: factor of the negatives' part.
        reduction: "mean" (over B), "sum" or "none".
        group: the process group; None for the default one.
        backend: "auto", "triton" or "torch".

    Returns:
        float32 loss in nats, equal on every rank: a scalar, or ``[B]`` for "none".

    Raises:
        ValueError: without a process group; where shapes differ between ranks; or as the unsharded function.
        IndexError: a target is out of range (CPU, or debug mode).
    """
    target_offsets, target_ids = arguments.row_lists("target_offsets", target_offsets, "target_ids", target_ids, query)
    shard = _shard(item, query, target_ids, 0, group)
    targets = _row_lists(shard, "target_offsets", target_offsets, "target_ids", target_ids)
    _, offsets, ids = shard.own(*targets[:2])
    _check_targets(query, ids, item_bias, group)
    own = functional.catalog_bce(
        copy_to_ranks(query, group),
        item,
        offsets,
        ids,
        item_bias=item_bias,
        weight=weight,
        neg_weight=neg_weight,
        reduction=reduction,
        backend=backend,
    )
    return poisoned(sum_over_ranks(own, group), targets[2])


class _CatalogCe(torch.autograd.Function):
    """Cross-entropy whose log Z and targets' logits are summed over ranks between the two halves of the forward."""

    @staticmethod
    def forward(
        ctx: Any,
        query: Tensor,
        item: Tensor,
        item_bias: Tensor | None,
        target_offsets: Tensor,
        here: Tensor,
        offsets: Tensor,
        ids: Tensor,
        weight: Tensor | None,
        reduction: str,
        group: Group,
    ) -> Tensor:
        peak, others, own_logits = catalog.ce_parts(query, item, offsets, ids, item_bias)
        highest = peak.clone()
        dist.all_reduce(highest, dist.ReduceOp.MAX, group=group)
        others = others * torch.exp(peak - highest)
        dist.all_reduce(others, group=group)
        logits = torch.zeros(here.shape, dtype=own_logits.dtype, device=here.device)
        logits[here] = own_logits
        dist.all_reduce(logits, group=group)
        rows, log_z, slope = catalog.ce_rows(highest, others, logits, target_offsets)
        ctx.save_for_backward(query, item, item_bias, target_offsets, offsets, ids, weight, log_z, slope[here])
        ctx.reduction, ctx.group = reduction, group
        return catalog.reduce_loss(rows, weight, reduction, query)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        query, item, item_bias, target_offsets, offsets, ids, weight, log_z, slope = ctx.saved_tensors
        need = list(ctx.needs_input_grad[:3])
        grads = catalog.catalog_ce_bwd(
            grad,
            query,
            item,
            offsets,
            ids,
            item_bias,
            weight,
            ctx.reduction,
            log_z,
            slope,
            (None, None, None),
            need,
            target_offsets.diff(),
        )
        if grads[0] is not None:
            dist.all_reduce(grads[0], group=ctx.group)
        return *grads, *(None,) * 7


def catalog_ce(
    query: Tensor,
    item: Tensor,
    target_offsets: Tensor,
    target_ids: Tensor,
    *,
    item_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    group: Group = None,
) -> Tensor:
    """:func:`recbole_llm_kernels.catalog_ce` of a sharded catalogue; it runs in PyTorch's operations on every device.

    Args:
        query: one vector per row, ``[B, D]``, equal on every rank.
        item: this rank's items, ``[N_r, D]``.
        target_offsets: where each row's targets begin in ``target_ids``, ``[B + 1]``.
        target_ids: the rows' positive items, numbered through all shards, ``[T]``.
        item_bias: bias of this rank's items, ``[N_r]``.
        weight: factor of every row's loss, ``[B]``.
        reduction: "mean" (over B), "sum" or "none".
        group: the process group; None for the default one.

    Returns:
        float32 loss in nats, equal on every rank: a scalar, or ``[B]`` for "none".

    Raises:
        ValueError: without a process group; where shapes differ between ranks; or as the unsharded function.
        IndexError: a target is out of range (CPU, or debug mode).
    """
    query, item, item_bias = arguments.matrices("query", query, item, item_bias)
    arguments.options(reduction, "torch")
    target_offsets, target_ids = arguments.row_lists("target_offsets", target_offsets, "target_ids", target_ids, query)
    weight = arguments.weights(weight, len(query), "one per row", query)
    shard = _shard(item, query, target_ids, 0, group)
    target_offsets, target_ids, poison = _row_lists(shard, "target_offsets", target_offsets, "target_ids", target_ids)
    here, offsets, ids = shard.own(target_offsets, target_ids)
    _check_targets(query, ids, item_bias, group)
    lists = (target_offsets, here, offsets, ids)
    return poisoned(_CatalogCe.apply(query, item, item_bias, *lists, weight, reduction, group), poison)


def score_topk(
    query: Tensor,
    item: Tensor,
    k: int,
    *,
    item_bias: Tensor | None = None,
    seen_offsets: Tensor | None = None,
    seen_ids: Tensor | None = None,
    group: Group = None,
    backend: str = "auto",
) -> TopK:
    """:func:`recbole_llm_kernels.score_topk` of a sharded catalogue, exactly: every shard's k best are merged.

    Args:
        query: one vector per row, ``[B, D]``, equal on every rank.
        item: this rank's items, ``[N_r, D]``.
        k: places per row; may exceed the number of items.
        item_bias: bias of this rank's items, ``[N_r]``.
        seen_offsets: where each row's seen items begin in ``seen_ids``, ``[B + 1]``; None: nothing is seen.
        seen_ids: items that get no place in the row, numbered through all shards.
        group: the process group; None for the default one.
        backend: "auto", "triton" or "torch".

    Returns:
        Scores and ids (through all shards), ``[B, k]`` each, equal on every rank; -inf and -1 where no candidate is left.

    Raises:
        ValueError: without a process group; where shapes differ between ranks; or as the unsharded function.
        IndexError: a seen id is out of range (CPU, or debug mode).
    """
    shard = _shard(item, query, seen_ids, k, group)
    seen: dict[str, Tensor] = {}
    poison = None
    if seen_offsets is not None and seen_ids is not None:
        seen_offsets, seen_ids, poison = _row_lists(shard, "seen_offsets", seen_offsets, "seen_ids", seen_ids)
        _, offsets, ids = shard.own(seen_offsets, seen_ids)
        seen = {"seen_offsets": offsets, "seen_ids": ids}
    own = functional.score_topk(query, item, k, item_bias=item_bias, backend=backend, **seen)
    ids = torch.where(own.ids < 0, shard.total, own.ids + shard.start)  # what is missing comes after every item
    scores_of, ids_of = ([torch.empty_like(x) for _ in range(dist.get_world_size(group))] for x in (own.scores, ids))
    dist.all_gather(scores_of, own.scores.contiguous(), group=group)
    dist.all_gather(ids_of, ids.contiguous(), group=group)
    scores, ids = select(torch.cat(scores_of, 1), torch.cat(ids_of, 1), k)
    if poison is not None:
        scores = scores + poison[:, None].to(scores.dtype)
    return TopK(scores, ids.masked_fill((scores == -torch.inf) | scores.isnan(), -1))
