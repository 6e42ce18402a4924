r"""Weighted sums of rows by CSR lists, with a gradient that orders ids by counting.

    out[b] = sum over e in [offsets_b, offsets_b+1) of weight_e * vectors[ids_e]

PyTorch's ``embedding_bag`` computes the same; its gradient compares ids to sort them, which took longer than all sums.
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
