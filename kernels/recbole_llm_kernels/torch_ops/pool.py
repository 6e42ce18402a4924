r"""Rows of tables as a tower needs them on a CPU, with gradients that order ids by counting.

    pool         out[b] = sum over e in [offsets_b, offsets_b+1) of weight_e * vectors[ids_e]
    pool_without_own  out[p] = norm_p * (the pooled row of list l_p - own_p * vectors[i_p])
    scaled_rows  out[b] = scale * (table[ids_b] + offset)

PyTorch's ``embedding_bag`` computes the first; its gradient compares ids to sort them, which took longer than all sums.
The others are chains of its operations, whose gradients pass over [B, D] several times and scatter into whole tables.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from recbole_llm_kernels.torch_ops.segment_sum import segment_sum


def pool_fwd(vectors: Tensor, offsets: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Pooled rows ``[B, D]`` in the dtype of ``vectors``; an empty list gives 0."""
    given = weights.to(vectors.dtype)
    offsets = offsets.to(ids.dtype)
    return embedding_bag(ids, vectors, offsets, mode="sum", per_sample_weights=given, include_last_offset=True)


def pool_bwd(grad: Tensor, offsets: Tensor, ids: Tensor, weights: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Gradient of ``vectors``, ``[rows, D]`` in ``dtype``, from upstream ``grad`` [B, D]."""
    lists = torch.arange(len(offsets) - 1, device=ids.device)
    row = torch.repeat_interleave(lists, offsets.diff(), output_size=len(ids))
    return segment_sum(ids, row, weights, grad.contiguous(), rows, dtype)


class _PoolWithoutOwn(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        vectors: Tensor,
        ids: Tensor,
        offsets: Tensor,
        row: Tensor,
        weight: Tensor,
        of_pair: Tensor,
        own_id: Tensor,
        own: Tensor,
        norm: Tensor,
    ) -> Tensor:
        total = embedding_bag(
            ids, vectors, offsets, mode="sum", per_sample_weights=weight.to(vectors.dtype), include_last_offset=True
        )
        ctx.save_for_backward(ids, row, weight, of_pair, own_id, own, norm)
        ctx.lists = len(offsets) - 1
        ctx.shape, ctx.dtype = vectors.shape, vectors.dtype
        out = total.index_select(0, of_pair)
        return out.addcmul_(vectors.index_select(0, own_id), own[:, None], value=-1).mul_(norm[:, None])

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, row, weight, of_pair, own_id, own, norm = ctx.saved_tensors
        grad = grad * norm[:, None]
        lists, pairs = ctx.lists, torch.arange(len(of_pair), device=ids.device)
        of_list = segment_sum(of_pair, pairs, torch.ones_like(norm), grad, lists, grad.dtype)
        # one sum for both: entries of the lists first, then what each pair takes out
        out_id, in_id = torch.cat([ids, own_id]), torch.cat([row, pairs + lists])
        value, source = torch.cat([weight, -own]), torch.cat([of_list, grad])
        return segment_sum(out_id, in_id, value, source, ctx.shape[0], ctx.dtype), *(None,) * 8


def pool_without_own(
    vectors: Tensor,
    ids: Tensor,
    offsets: Tensor,
    row: Tensor,
    weight: Tensor,
    of_pair: Tensor,
    own_id: Tensor,
    own: Tensor,
    norm: Tensor,
) -> Tensor:
    """For each pair, the pooled row of a list without one of its entries, differentiable in ``vectors``.

    Args:
        vectors: ``[N, D]``.
        ids: rows of ``vectors``, ``[E]`` int64.
        offsets: where each list begins in ``ids``, ``[L + 1]`` int64.
        row: the list of each entry, ``[E]`` int64.
        weight: factor of each entry, ``[E]``.
        of_pair: the list of each pair, ``[P]`` int64.
        own_id: the row of ``vectors`` that each pair leaves out, ``[P]`` int64.
        own: its weight in the list, ``[P]``; 0 where it is not there.
        norm: factor of each pair's row, ``[P]``.

    Returns:
        ``[P, D]``.
    """
    return _PoolWithoutOwn.apply(vectors, ids, offsets, row, weight, of_pair, own_id, own, norm)


class _ScaledRows(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, table: Tensor, ids: Tensor, offset: Tensor, scale: Tensor) -> Tensor:
        out = table.index_select(0, ids).add_(offset).mul_(scale)
        ctx.save_for_backward(ids, scale, out)
        ctx.rows, ctx.dtype = len(table), table.dtype
        return out

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, scale, out = ctx.saved_tensors
        grad = grad.contiguous()
        row = torch.arange(len(ids), device=ids.device)
        of_table = segment_sum(ids, row, scale.expand(len(ids)), grad, ctx.rows, ctx.dtype)
        return of_table, None, grad.sum(0) * scale, torch.dot(grad.view(-1), out.view(-1)) / scale


def scaled_rows(table: Tensor, ids: Tensor, offset: Tensor, scale: Tensor) -> Tensor:
    """``scale * (table[ids] + offset)``, differentiable in all but ``ids``.

    Args:
        table: ``[N, D]``.
        ids: rows of ``table``, ``[B]`` int64.
        offset: added to every row, ``[D]``.
        scale: a factor other than 0, ``[]``.

    Returns:
        ``[B, D]``.
    """
    return _ScaledRows.apply(table, ids, offset, scale)
