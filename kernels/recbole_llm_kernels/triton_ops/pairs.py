r"""Dot products of gathered rows, their sigmoid and their binary cross-entropy.

    s_p = <user[u_p], item[i_p]> + bias[i_p]
    l_p = y_p softplus(-s_p) + (1 - y_p) softplus(s_p)
    e_p = dl_p/ds_p = (1 - y_p) sigma(s_p) - y_p sigma(-s_p)

The forward is a sampled dense-dense product: each gathered row is read once and l and e are written, 2 P D s + 20 P
bytes (s bytes per element). The backward is a sparse-dense one, see ``segment_sum``. No ``[P, D]`` tensor is stored.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from recbole_llm_kernels.triton_ops import tuning
from recbole_llm_kernels.triton_ops.math import sigmoid, softplus
from recbole_llm_kernels.triton_ops.segment_sum import Sorted, sort_by, sum_segments


@triton.jit(do_not_specialize=["P", "n_users", "n_items"])
def _pair_fwd_kernel(
    user_ptr,  # [n_users, D]
    item_ptr,  # [n_items, D]
    user_id_ptr,  # [P], or None: 0, 1, 2, ...
    item_id_ptr,  # [P]
    bias_ptr,  # [n_items] or None
    shift_ptr,  # [n_items] or None: subtracted from the logits
    label_ptr,  # [P], or None: all 1
    weight_ptr,  # [P] or None
    value_ptr,  # [P] fp32, out: s, sigma(s) or l
    slope_ptr,  # [P] fp32, out, or None: derivative of the value
    P,
    n_users,
    n_items,
    scale,  # factor of the slopes
    VALUE: tl.constexpr,  # "dot", "sigmoid" or "bce"
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    live = p < P
    user_id = tl.load(user_id_ptr + p, mask=live, other=0).to(tl.int64)
    item_id = tl.load(item_id_ptr + p, mask=live, other=0).to(tl.int64)
    known = (user_id >= 0) & (user_id < n_users) & (item_id >= 0) & (item_id < n_items)
    read = live & known
    inside = read
    s = tl.zeros([BLOCK_P], dtype=tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + item_id, mask=read, other=0.0).to(tl.float32)
        inside = read & (bias != float("-inf"))
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = inside[:, None] & (d < D)[None, :]
        # int64 row offsets: id * D passes 2**31 at 33.5M rows of D = 64
        u = tl.load(user_ptr + user_id[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        i = tl.load(item_ptr + item_id[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        s += tl.sum(u * i, axis=1)
    if bias_ptr is not None:
        s += tl.where(inside, bias, 0.0)
    if shift_ptr is not None:
        s -= tl.load(shift_ptr + item_id, mask=inside, other=0.0).to(tl.float32)

    if VALUE == "dot":
        value = tl.where(inside, s, float("-inf"))
    elif VALUE == "sigmoid":
        value = tl.where(inside, sigmoid(s), 0.0)
        # not p (1 - p): 1 - p is 0 from s = 17 on
        tl.store(slope_ptr + p, value * sigmoid(-s), mask=live)
    else:
        y = tl.full([BLOCK_P], 1.0, tl.float32)
        if label_ptr is not None:
            y = tl.load(label_ptr + p, mask=live, other=0).to(tl.float32)
        w = tl.full([BLOCK_P], 1.0, tl.float32)
        if weight_ptr is not None:
            w = tl.load(weight_ptr + p, mask=live, other=0.0).to(tl.float32)
        value = y * softplus(-s) + (1.0 - y) * softplus(s)
        # a target that is not in the catalogue has no loss
        value = w * tl.where(inside, value, tl.where(y > 0, float("nan"), 0.0))
        # not sigma(s) - y: a confident positive cancels to zero
        slope = (1.0 - y) * sigmoid(s) - y * sigmoid(-s)
        tl.store(slope_ptr + p, tl.where(inside, scale * w * slope, 0.0), mask=live)
    tl.store(value_ptr + p, tl.where(known, value, float("nan")), mask=live)


@triton.jit
def _rows_of_pairs(p, live, user_id_ptr, item_id_ptr, bias_ptr, n_users, n_items):
    """Rows of the pairs in both gradients; a pair without a gradient gets the number of rows."""
    user_id = tl.load(user_id_ptr + p, mask=live, other=0).to(tl.int64)
    item_id = tl.load(item_id_ptr + p, mask=live, other=0).to(tl.int64)
    used = (user_id >= 0) & (user_id < n_users) & (item_id >= 0) & (item_id < n_items)
    if bias_ptr is not None:
        used = used & (tl.load(bias_ptr + item_id, mask=live & used, other=0.0) != float("-inf"))
    return tl.where(used, user_id, n_users), tl.where(used, item_id, n_items)


@triton.jit(do_not_specialize=["P", "n_users", "n_items"])
def _sort_key_kernel(
    user_id_ptr,  # [P]
    item_id_ptr,  # [P]
    bias_ptr,  # [n_items] or None
    user_key_ptr,  # [P] out, or None
    item_key_ptr,  # [P] out, or None
    P,
    n_users,
    n_items,
    BLOCK_P: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    live = p < P
    user_key, item_key = _rows_of_pairs(p, live, user_id_ptr, item_id_ptr, bias_ptr, n_users, n_items)
    if user_key_ptr is not None:
        tl.store(user_key_ptr + p, user_key, mask=live)
    if item_key_ptr is not None:
        tl.store(item_key_ptr + p, item_key, mask=live)


@triton.jit(do_not_specialize=["P", "n_users", "n_items"])
def _rank_kernel(
    user_id_ptr,  # [P]
    item_id_ptr,  # [P]
    bias_ptr,  # [n_items] or None
    sorted_ptr,  # [2, 2, P] int64 out: keys and order by user, keys and order by item
    P,
    n_users,
    n_items,
    BLOCK_P: tl.constexpr,
    BLOCK_Q: tl.constexpr,
):
    """A pair's place is the number of pairs before it: P^2 comparisons in one launch, where a sort takes several."""
    side = tl.program_id(1).to(tl.int64)
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    live = p < P
    user_key, item_key = _rows_of_pairs(p, live, user_id_ptr, item_id_ptr, bias_ptr, n_users, n_items)
    key = tl.where(side == 0, user_key, item_key)
    place = tl.zeros([BLOCK_P], dtype=tl.int32)
    for start in range(0, P, BLOCK_Q):
        q = start + tl.arange(0, BLOCK_Q)
        by_user, by_item = _rows_of_pairs(q, q < P, user_id_ptr, item_id_ptr, bias_ptr, n_users, n_items)
        other = tl.where(side == 0, by_user, by_item)[None, :]
        before = (other < key[:, None]) | ((other == key[:, None]) & (q[None, :] < p[:, None]))
        place += tl.sum((before & (q < P)[None, :]).to(tl.int32), axis=1)
    at = sorted_ptr + 2 * side * P + place
    tl.store(at, key, mask=live)
    tl.store(at + P, p, mask=live)


def launch_pairs(
    value: str,
    user: Tensor,
    item: Tensor,
    user_id: Tensor,
    item_id: Tensor,
    item_bias: Tensor | None,
    shift: Tensor | None = None,
    label: Tensor | None = None,
    weight: Tensor | None = None,
    scale: float = 1.0,
) -> tuple[Tensor, Tensor | None]:
    """Values and slopes of the pairs, ``[P]`` float32 each; "dot" has no slopes."""
    P, D = user_id.numel(), user.shape[1]
    out = torch.empty(P, dtype=torch.float32, device=user.device)
    slope = None if value == "dot" else torch.empty_like(out)
    if P:
        blocks = tuning.pairs(D, user.dtype, tuning.target(user.device))
        with torch.cuda.device_of(user):  # Triton launches on the current device, not on the tensors'
            _pair_fwd_kernel[(triton.cdiv(P, blocks.BLOCK_P),)](
                user, item, user_id, item_id, item_bias, shift, label, weight, out, slope,
                P, len(user), len(item), scale, value, D, BLOCK_P=blocks.BLOCK_P, BLOCK_D=blocks.BLOCK_D,
                num_warps=blocks.num_warps, enable_fp_fusion=True,
            )  # fmt: skip
    return out, slope


def order_pairs(
    user_id: Tensor, item_id: Tensor, item_bias: Tensor | None, n_users: int, n_items: int, need: Sequence[bool]
) -> tuple[Sorted | None, Sorted | None]:
    """Pairs by user and by item, as far as a gradient is wanted; pairs without one come last."""
    P, wanted = user_id.numel(), (need[0], need[1] or need[2])
    if not any(wanted):
        return None, None
    if P <= tuning.COUNTED_PAIRS:
        found = torch.empty(2, 2, P, dtype=torch.int64, device=user_id.device)
        if P:
            with torch.cuda.device_of(user_id):
                _rank_kernel[(triton.cdiv(P, 32), 2)](
                    user_id, item_id, item_bias, found, P, n_users, n_items,
                    BLOCK_P=32, BLOCK_Q=128, num_warps=4, enable_fp_fusion=True,
                )  # fmt: skip
        by_user, by_item = (Sorted(*side) if want else None for side, want in zip(found, wanted, strict=True))
        return by_user, by_item

    def empty(rows: int) -> Tensor:
        # half the sort's traffic
        return torch.empty(P, dtype=torch.int32 if rows < 2**31 - 1 else torch.int64, device=user_id.device)

    user_key = empty(n_users) if wanted[0] else None
    item_key = empty(n_items) if wanted[1] else None
    with torch.cuda.device_of(user_id):
        _sort_key_kernel[(triton.cdiv(P, 1024),)](
            user_id, item_id, item_bias, user_key, item_key, P, n_users, n_items,
            BLOCK_P=1024, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return None if user_key is None else sort_by(user_key), None if item_key is None else sort_by(item_key)


def pair_dot_fwd(user: Tensor, item: Tensor, user_id: Tensor, item_id: Tensor, item_bias: Tensor | None) -> Tensor:
    """Logits [P]; -inf outside the catalogue, NaN where an id is out of range."""
    return launch_pairs("dot", user, item, user_id, item_id, item_bias)[0]


def pair_sigmoid_fwd(
    user: Tensor, item: Tensor, user_id: Tensor, item_id: Tensor, item_bias: Tensor | None
) -> tuple[Tensor, Tensor]:
    """Probabilities [P] and their slopes dP/ds [P]; both 0 outside the catalogue."""
    p, slope = launch_pairs("sigmoid", user, item, user_id, item_id, item_bias)
    assert slope is not None
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
    scale = 1 / max(1, user_id.numel()) if reduction == "mean" else 1.0
    loss, slope = launch_pairs("bce", user, item, user_id, item_id, item_bias, None, label, weight, scale)
    assert slope is not None
    return reduce_rows(loss, reduction), slope


def reduce_rows(rows: Tensor, reduction: str) -> Tensor:
    """Reduce weighted row losses; the mean of no rows is NaN."""
    return rows if reduction == "none" else rows.mean() if reduction == "mean" else rows.sum()


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
    grad = grad.to(torch.float32).contiguous()
    by_user, by_item = order_pairs(user_id, item_id, item_bias, len(user), len(item), need)
    grad_user = grad_item = grad_bias = None
    if by_user is not None:
        grad_user, _ = sum_segments(by_user, len(user), item_id, slope, grad, item, 1, user.dtype, None)
    if by_item is not None:
        bias_dtype = item_bias.dtype if need[2] and item_bias is not None else None
        item_dtype = item.dtype if need[1] else None
        grad_item, grad_bias = sum_segments(by_item, len(item), user_id, slope, grad, user, 1, item_dtype, bias_dtype)
    return grad_user, grad_item, grad_bias
