r"""Rows of tables as a tower needs them on a CPU, with gradients that order ids by counting.

    pool         out[b] = sum over e in [offsets_b, offsets_b+1) of weight_e * vectors[ids_e]
    scaled_rows  out[b] = scale * (table[ids_b] + offset)

PyTorch's ``embedding_bag`` computes the first; its gradient compares ids to sort them, which took longer than all sums.
The second is a chain of four of its operations, whose gradients pass over [B, D] six times.
"""

from typing import Any

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from recbole_llm_kernels.torch_ops.segment_sum import segment_sum


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, ids: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
        ctx.save_for_backward(ids, offsets, weight)
        ctx.shape, ctx.dtype = vectors.shape, vectors.dtype
        given = weight.to(vectors.dtype)
        return embedding_bag(ids, vectors, offsets, mode="sum", per_sample_weights=given, include_last_offset=True)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        ids, offsets, weight = ctx.saved_tensors
        rows = torch.arange(len(offsets) - 1, device=ids.device)
        row = torch.repeat_interleave(rows, offsets.diff(), output_size=len(ids))
        return segment_sum(ids, row, weight, grad.contiguous(), ctx.shape[0], ctx.dtype), None, None, None


def pool(vectors: Tensor, ids: Tensor, offsets: Tensor, weight: Tensor) -> Tensor:
    """Pooled rows, differentiable in ``vectors``.

    Args:
        vectors: ``[N, D]``.
        ids: rows of ``vectors``, ``[E]`` int64.
        offsets: where each list begins in ``ids``, ``[B + 1]`` int64.
        weight: float32 factor of each entry (float64 with float64 vectors), ``[E]``.

    Returns:
        ``[B, D]`` in the dtype of ``vectors``; an empty list gives 0.
    """
    return _Pool.apply(vectors, ids, offsets, weight)


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
