r"""Row-wise Adagrad on the rows that a step touches.

    g_r      = sum over p with ids_p = r of grad_p
    state_r += |g_r|^2 / D
    w_r     -= lr g_r / (sqrt(state_r) + eps)

The terms are ordered by row and summed first, so that a row that is named twice takes one step, as from a dense gradient.
What is visited are the P terms and the rows they name: nothing of [N] or [N, D] is read, written or allocated.
"""

import torch
from torch import Tensor

from recbole_llm_kernels.torch_ops.radix import stable_order
from recbole_llm_kernels.torch_ops.segment_sum import Segments, accumulator, sum_segments


def rowwise_adagrad(table: Tensor, state: Tensor, ids: Tensor, grad: Tensor, lr: float, eps: float) -> None:
    """Change ``table`` [N, D] and ``state`` [N] in place by the terms ``grad`` [P, D] of the rows ``ids`` [P]."""
    if not len(ids):
        return
    rows, sums = summed(ids, grad, len(table))
    squares = torch.linalg.vector_norm(sums, dim=1).square_().div_(max(table.shape[1], 1))
    state.index_add_(0, rows, squares.to(state.dtype))
    step = -lr / state.index_select(0, rows).to(sums.dtype).sqrt_().add_(eps)
    change = sums * step[:, None]
    if table.dtype == sums.dtype:
        table.index_add_(0, rows, change)
    else:  # rounded once, from the float32 sum
        table.index_copy_(0, rows, table.index_select(0, rows).to(sums.dtype).add_(change).to(table.dtype))


def summed(ids: Tensor, grad: Tensor, n_rows: int) -> tuple[Tensor, Tensor]:
    """The rows that ``ids`` name, ascending, [U], and the sums of their terms in float32 (float64), [U, D]."""
    dtype = accumulator(grad.dtype)
    order = stable_order(ids, n_rows)
    key = ids.index_select(0, order).long()
    first = torch.ones_like(key, dtype=torch.bool)
    torch.ne(key[1:], key[:-1], out=first[1:])
    place = first.nonzero()[:, 0]
    if len(place) == len(key):
        return key, grad.to(dtype).index_select(0, order)
    offsets = torch.cat([place, place.new_tensor([len(key)])])
    value = torch.ones(len(key), dtype=dtype, device=key.device)
    return key.index_select(0, place), sum_segments(Segments(None, offsets), order, value, grad, dtype)
