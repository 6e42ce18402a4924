r"""Dot products of gathered rows, their sigmoid and their binary cross-entropy.

    s_p = <user[u_p], item[i_p]> + bias[i_p]
    l_p = y_p softplus(-s_p) + (1 - y_p) softplus(s_p)
    e_p = dl_p/ds_p = (1 - y_p) sigma(s_p) - y_p sigma(-s_p)

The forward is a sampled dense-dense product: rows are gathered a chunk at a time. The backward is a sparse-dense one,
see ``segment_sum``. No ``[P, D]`` tensor is stored.
"""

from collections.abc import Sequence
from functools import partial

import torch
from torch import Tensor
from torch.nn import functional

from recbole_llm_kernels.torch_ops import threads
from recbole_llm_kernels.torch_ops.segment_sum import accumulator, sort_segments, sum_segments, sum_values

GATHERED = 1 << 17  # elements gathered per operand and chunk: 2 x 512 KiB of float32; at 2**19 a third slower


class Rows:
    """Gathers rows of a matrix into a buffer of its own, in the accumulator's dtype.

    A fresh buffer a chunk would be fresh memory from the system: half of all time went into its page faults.
    """

    def __init__(self, matrix: Tensor, most: int) -> None:
        self.matrix = matrix
        self.buffer = matrix.new_empty(most, matrix.shape[1])
        dtype = accumulator(matrix.dtype)
        self.converted = self.buffer if dtype == matrix.dtype else torch.empty_like(self.buffer, dtype=dtype)

    def take(self, ids: Tensor) -> Tensor:
        """Rows ``ids``; the next call overwrites them."""
        rows = self.buffer[: len(ids)]
        torch.index_select(self.matrix, 0, ids, out=rows)
        return rows if self.converted is self.buffer else self.converted[: len(ids)].copy_(rows)


def gathered_dots(user: Tensor, item: Tensor, user_id: Tensor, item_id: Tensor) -> Tensor:
    """<user[u_p], item[i_p]>, ``[P]``, products and sums in float32 (float64)."""
    P, D = user_id.numel(), user.shape[1]
    dots = torch.empty(P, dtype=accumulator(user.dtype), device=user.device)
    chunk = max(1, GATHERED // D)

    def job(starts: range) -> None:
        users, items = Rows(user, min(chunk, P)), Rows(item, min(chunk, P))
        for lo in starts:
            part = slice(lo, min(lo + chunk, P))
            torch.sum(users.take(user_id[part]).mul_(items.take(item_id[part])), 1, out=dots[part])

    threads.run([partial(job, starts) for starts in threads.cut(range(0, P, chunk), user.device)])
    return dots


def _biased(dots: Tensor, item_id: Tensor, item_bias: Tensor | None) -> tuple[Tensor, Tensor | None]:
    """Logits, and the pairs whose item is outside the catalogue (None: no bias, so no such pair). Those get logit 0."""
    if item_bias is None:
        return dots, None
    bias = item_bias.index_select(0, item_id).to(dots.dtype)
    outside = bias == -torch.inf
    return torch.where(outside, 0, dots + bias), outside


def softplus(s: Tensor, out: Tensor | None = None) -> Tensor:
    """log(1 + exp(s)) to full relative precision; PyTorch's own turns into the identity at 20, early for float64."""
    return functional.softplus(s, threshold=40) if out is None else torch.ops.aten.softplus.out(s, 1, 40, out=out)


def pair_dot_fwd(user: Tensor, item: Tensor, user_id: Tensor, item_id: Tensor, item_bias: Tensor | None) -> Tensor:
    """Logits [P]; -inf outside the catalogue."""
    s, outside = _biased(gathered_dots(user, item, user_id, item_id), item_id, item_bias)
    return s if outside is None else s.masked_fill_(outside, -torch.inf)


def pair_sigmoid_fwd(
    user: Tensor, item: Tensor, user_id: Tensor, item_id: Tensor, item_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Probabilities [P] and their slopes dP/ds [P]; both 0 outside the catalogue."""
    s, outside = _biased(gathered_dots(user, item, user_id, item_id), item_id, item_bias)
    p = torch.sigmoid(s)
    slope = p * torch.sigmoid(-s)  # p * (1 - p) would be 0 from s = 17 on
    if outside is not None:
        p, slope = p.masked_fill_(outside, 0), slope.masked_fill_(outside, 0)
    return p, slope


def pair_bce_fwd(
    user: Tensor,
    item: Tensor,
    user_id: Tensor,
    item_id: Tensor,
    label: Tensor,
    item_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
) -> tuple[Tensor, Tensor]:
    """Reduced loss and the slopes d loss/ds [P], which hold ``weight`` and, for "mean", 1/P."""
    s, outside = _biased(gathered_dots(user, item, user_id, item_id), item_id, item_bias)
    y = label.to(s.dtype)
    loss = y * softplus(-s) + (1 - y) * softplus(s)
    slope = (1 - y) * torch.sigmoid(s) - y * torch.sigmoid(-s)
    if outside is not None:
        # a target that is not in the catalogue has no loss; on a CPU the caller has refused it
        loss = torch.where(outside, torch.where(y > 0, torch.nan, 0), loss)
        slope = slope.masked_fill_(outside, 0)
    return reduce_rows(loss, slope, weight, reduction)


def reduce_rows(rows: Tensor, slope: Tensor, weight: Tensor | None, reduction: str) -> tuple[Tensor, Tensor]:
    """Weight and reduce row losses; the slopes [R] or [R, W] get the same factors (``slope`` is overwritten)."""
    if weight is not None:
        weight = weight.to(rows.dtype)
        rows = rows * weight
        slope.mul_(weight if slope.ndim == 1 else weight[:, None])
    if reduction == "none":
        return rows, slope
    if reduction == "sum":
        return rows.sum(), slope
    return rows.sum() / len(rows), slope.div_(len(rows))


def pair_bwd(
    grad: Tensor,
    slope: Tensor | None,
    user: Tensor,
    item: Tensor,
    user_id: Tensor,
    item_id: Tensor,
    item_bias: Tensor | None,
    need: Sequence[bool],
) -> tuple[Tensor | None, Tensor | None, Tensor | None]:
    """Gradients of (user, item, item_bias) as far as in ``need``; ``grad`` is [] or [P], a missing ``slope`` is 1."""
    grad = grad.to(accumulator(user.dtype))
    value = grad.expand(user_id.shape) if slope is None else grad * slope
    live = None if item_bias is None else item_bias.index_select(0, item_id) != -torch.inf

    def of_users() -> Tensor | None:
        if not need[0]:
            return None
        return sum_segments(sort_segments(user_id, len(user), live), item_id, value, item, user.dtype)

    def of_items() -> tuple[Tensor | None, Tensor | None]:
        if not (need[1] or need[2]):
            return None, None
        by_item = sort_segments(item_id, len(item), live)
        vectors = sum_segments(by_item, user_id, value, user, item.dtype) if need[1] else None
        return vectors, None if item_bias is None or not need[2] else sum_values(by_item, value, item_bias.dtype)

    grad_user, (grad_item, grad_bias) = threads.both(of_users, of_items, user.device)
    return grad_user, grad_item, grad_bias
