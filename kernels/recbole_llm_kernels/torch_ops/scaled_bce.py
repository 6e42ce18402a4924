r"""``sampled_bce`` of a scaled user vector, from its parts to their gradients, on a CPU.

    s_bk = scale * <x_b + offset, item[i_bk]> + bias[i_bk],   i_b0 the positive, i_b1.. the negatives
    l_b  = softplus(-s_b0) + neg_weight * sum over k >= 1 of softplus(s_bk)

x_b is a row of its own or a row of a table of users. A batch of 2,048 pairs is so little arithmetic that a chain of
operations takes longer than their work: here scale and offset act on the logits and the slopes, ``[B, 1 + K]``, nothing of
``[B, K, D]`` is gathered, and the gradient of items is one sum of the users' rows; that of users first adds the terms of a row.
"""

from typing import Any

import torch
from torch import Tensor

from recbole_llm_kernels.torch_ops import threads
from recbole_llm_kernels.torch_ops.pairs import softplus
from recbole_llm_kernels.torch_ops.positions import row_of_entry
from recbole_llm_kernels.torch_ops.sampled import sampled_dots
from recbole_llm_kernels.torch_ops.segment_sum import sort_segments, sum_rows, sum_segments, sum_stretches


class _ScaledSampledBCE(torch.autograd.Function):
    @staticmethod
    def forward(
        ctx: Any,
        user: Tensor,
        offset: Tensor | None,
        log_scale: Tensor,
        item: Tensor,
        item_bias: Tensor,
        user_id: Tensor | None,
        item_id: Tensor,
        neg_weight: float,
    ) -> Tensor:
        B, W = item_id.shape
        entry, scale = item_id.view(-1), log_scale.exp()
        bias = item_bias.index_select(0, entry)  # checks the ids
        query = user if user_id is None else user.index_select(0, user_id)
        if offset is not None:
            query = query + offset if user_id is None else query.add_(offset)
        scaled = sampled_dots(query, item, entry).mul_(scale)
        s = bias.add_(scaled).view(B, W)
        s[:, 0].neg_()
        loss, slope = softplus(s), s.sigmoid_()
        slope[:, 0].neg_()
        if neg_weight != 1:
            loss[:, 1:] *= neg_weight
            slope[:, 1:] *= neg_weight
        ctx.save_for_backward(user, item, item_bias, user_id, item_id, query, scale, scaled, slope)
        ctx.has_offset = offset is not None
        return loss.sum(dtype=torch.float64).div_(B).to(user.dtype)

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        user, item, item_bias, user_id, item_id, query, scale, scaled, slope = ctx.saved_tensors
        B, W = item_id.shape
        entry = item_id.view(-1)
        slope = slope.mul(grad.item() / max(B, 1)).view(-1)
        value = slope * scale

        def of_users() -> tuple[Tensor, Tensor | None]:
            of_rows = sum_stretches(W, entry, value, item)
            of_offset = of_rows.sum(0) if ctx.has_offset else None
            if user_id is not None:  # a row's sum is all that its user needs of it
                of_rows = sum_rows(user_id, of_rows, len(user))
            return of_rows, of_offset

        def of_items() -> tuple[Tensor, Tensor]:
            by_item = sort_segments(entry, len(item))
            grad_item = sum_segments(by_item, row_of_entry(B, W), value, query, item.dtype)
            return grad_item, torch.bincount(entry, slope.double(), len(item)).to(item_bias.dtype)

        (grad_user, grad_offset), (grad_item, grad_bias) = threads.both(of_users, of_items, user.device)
        return grad_user, grad_offset, torch.dot(slope, scaled), grad_item, grad_bias, None, None, None


def scaled_sampled_bce(
    user: Tensor,
    offset: Tensor | None,
    log_scale: Tensor,
    item: Tensor,
    item_bias: Tensor,
    user_id: Tensor | None,
    item_id: Tensor,
    neg_weight: float = 1.0,
) -> Tensor:
    """Mean of the row losses, float32 (float64), differentiable in all tensors but the ids.

    Args:
        user: a vector for each row, ``[B, D]``, or with ``user_id`` a table, ``[U, D]``; float32 or float64 on a CPU.
        offset: added to every user's vector, ``[D]``.
        log_scale: logarithm of the scale, ``[]``.
        item: items, ``[N, D]``, N >= 1 + K.
        item_bias: ``[N]``, finite for every item that occurs.
        user_id: rows of ``user``, ``[B]`` int64; None: row b is the b-th.
        item_id: rows of ``item``, ``[B, 1 + K]`` int64, contiguous: the positive, then negatives that all count.
        neg_weight: factor of the negatives' part.

    Raises:
        IndexError: if an id is out of range.
        RuntimeError: if this build of PyTorch lacks ``sampled_addmm`` (``sampled.has_sampled_dots``).
    """
    return _ScaledSampledBCE.apply(user, offset, log_scale, item, item_bias, user_id, item_id, neg_weight)
