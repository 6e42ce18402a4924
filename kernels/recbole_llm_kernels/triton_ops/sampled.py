r"""Binary cross-entropy of one positive against sampled negatives.

    s_bk = <user[u_b], item[i_bk]> + bias - log_q,  i_b0 the positive, i_b1.. the negatives
    l_b  = softplus(-s_b0) + neg_weight * sum over live k of softplus(s_bk)

Negatives of a row's own (``sampled_bce``): one gather of its items, kept in registers, serves the logits, the slopes and
the row's query gradient; the item gradient is a segmented sum over (item, row, slope). Bytes: B (K + 2) D s read,
4 B (K + 1 + D) written. Negatives shared by the batch (``shared_bce``): a small catalogue, in tiles. Nothing of shape
[B, K, D] or [B, M] is stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from recbole_llm_kernels.signatures import Sampled
from recbole_llm_kernels.triton_ops import tuning
from recbole_llm_kernels.triton_ops.catalog import Grads, row_scale, upstream_scale, weighted
from recbole_llm_kernels.triton_ops.math import sigmoid, softplus
from recbole_llm_kernels.triton_ops.pairs import launch_pairs, order_pairs
from recbole_llm_kernels.triton_ops.segment_sum import sort_by, sum_segments
from recbole_llm_kernels.triton_ops.tiles import Axis, Sums, tile_pass


@triton.jit(do_not_specialize=["B", "K", "n_users", "n_items"])
def _sampled_bce_fwd_kernel(
    user_ptr,  # [n_users, D]
    item_ptr,  # [n_items, D]
    user_id_ptr,  # [B]
    pos_id_ptr,  # [B]
    neg_id_ptr,  # [B, K]
    bias_ptr,  # [n_items] or None
    log_q_ptr,  # [n_items] or None
    valid_ptr,  # [B, K] bool or None
    scale_ptr,  # [B] fp32: factor of the row in the gradients
    loss_ptr,  # [B] out
    slope_ptr,  # [B, 1 + K] out, positive first
    grad_ptr,  # [B, D] out: gradient of the gathered query, or None
    B,
    K,
    n_users,
    n_items,
    neg_weight,
    D: tl.constexpr,
    BLOCK_B: tl.constexpr,
    BLOCK_K: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    d = tl.arange(0, BLOCK_D)
    live = b < B
    user_id = tl.load(user_id_ptr + b, mask=live, other=0).to(tl.int64)
    pos_id = tl.load(pos_id_ptr + b, mask=live, other=0).to(tl.int64)
    scale = tl.load(scale_ptr + b, mask=live, other=0.0)
    known = live & (user_id >= 0) & (user_id < n_users) & (pos_id >= 0) & (pos_id < n_items)
    query = tl.load(user_ptr + user_id[:, None] * D + d[None, :], mask=known[:, None] & (d < D)[None, :], other=0.0).to(
        tl.float32
    )

    inside = known
    shift = tl.zeros([BLOCK_B], dtype=tl.float32)
    if bias_ptr is not None:
        shift = tl.load(bias_ptr + pos_id, mask=known, other=0.0).to(tl.float32)
        inside = known & (shift != float("-inf"))
    if log_q_ptr is not None:
        shift -= tl.load(log_q_ptr + pos_id, mask=known, other=0.0).to(tl.float32)
    row = tl.load(item_ptr + pos_id[:, None] * D + d[None, :], mask=inside[:, None] & (d < D)[None, :], other=0.0).to(
        tl.float32
    )
    s = tl.where(inside, tl.sum(query * row, axis=1) + shift, 0.0)
    loss = tl.where(inside, softplus(-s), float("nan"))  # a positive that is not in the catalogue has no loss
    slope = tl.where(inside, -scale * sigmoid(-s), 0.0)
    width = tl.zeros([BLOCK_B], dtype=tl.int64) + (K + 1)
    tl.store(slope_ptr + b * width, slope, mask=live)
    acc = slope[:, None] * row

    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        at = b[:, None] * K + k[None, :]
        wanted = live[:, None] & (k < K)[None, :]
        neg_id = tl.load(neg_id_ptr + at, mask=wanted, other=0).to(tl.int64)
        in_range = (neg_id >= 0) & (neg_id < n_items)
        loss = tl.where(tl.min(((~wanted) | in_range).to(tl.int32), axis=1) == 1, loss, float("nan"))
        used = wanted & in_range & known[:, None] & (neg_id != pos_id[:, None])
        if valid_ptr is not None:
            used = used & (tl.load(valid_ptr + at, mask=wanted, other=0) != 0)
        shifts = tl.zeros([BLOCK_B, BLOCK_K], dtype=tl.float32)
        if bias_ptr is not None:
            shifts = tl.load(bias_ptr + neg_id, mask=used, other=0.0).to(tl.float32)
            used = used & (shifts != float("-inf"))
        if log_q_ptr is not None:
            shifts -= tl.load(log_q_ptr + neg_id, mask=used, other=0.0).to(tl.float32)
        rows = tl.load(
            item_ptr + neg_id[:, :, None] * D + d[None, None, :],
            mask=used[:, :, None] & (d < D)[None, None, :],
            other=0.0,
        ).to(tl.float32)
        s_neg = tl.where(used, tl.sum(query[:, None, :] * rows, axis=2) + shifts, 0.0)
        loss += neg_weight * tl.sum(tl.where(used, softplus(s_neg), 0.0), axis=1)
        e = tl.where(used, neg_weight * scale[:, None] * sigmoid(s_neg), 0.0)
        tl.store(slope_ptr + (b * width)[:, None] + 1 + k[None, :], e, mask=wanted)
        if grad_ptr is not None:
            acc += tl.sum(e[:, :, None] * rows, axis=1)

    tl.store(loss_ptr + b, tl.where(known, loss, float("nan")), mask=live)
    if grad_ptr is not None:
        tl.store(grad_ptr + b[:, None] * D + d[None, :], acc, mask=live[:, None] & (d < D)[None, :])


def sampled_bce_fwd(args: Sampled) -> tuple[Tensor, Tensor, Tensor | None]:
    """Reduced loss, slopes d loss/ds [B, 1 + K] (positive first) and the gathered queries' gradient [B, D].

    Slopes and query gradient hold ``weight``, ``neg_weight`` and, for "mean", 1/B. ``neg_id`` is [B, K].
    """
    user, item, item_bias, user_id, pos_id, neg_id, log_q, neg_valid, weight, neg_weight, reduction, need, _ = args
    (B, K), D = neg_id.shape, user.shape[1]
    scale = row_scale(weight, reduction, user, B)
    loss = torch.empty(B, dtype=torch.float32, device=user.device)
    slope = torch.empty(B, K + 1, dtype=torch.float32, device=user.device)
    grad_query = torch.empty(B, D, dtype=torch.float32, device=user.device) if need[0] else None
    if B:
        blocks = tuning.sampled(D, K, tuning.target(user.device))
        with torch.cuda.device_of(user):
            _sampled_bce_fwd_kernel[(triton.cdiv(B, blocks.BLOCK_B),)](
                user, item, user_id, pos_id, neg_id, item_bias, log_q, neg_valid, scale, loss, slope, grad_query,
                B, K, len(user), len(item), neg_weight, D,
                BLOCK_B=blocks.BLOCK_B, BLOCK_K=blocks.BLOCK_K, BLOCK_D=blocks.BLOCK_D,
                num_warps=blocks.num_warps, enable_fp_fusion=True,
            )  # fmt: skip
    return weighted(loss, weight, reduction), slope, grad_query


def sampled_bce_bwd(grad: Tensor, slope: Tensor, grad_query: Tensor | None, args: Sampled) -> Grads:
    """Gradients of (user, item, item_bias) in their dtypes from upstream ``grad``, [] or [B]."""
    user, item, item_bias, user_id, pos_id, neg_id, *_ = args
    need = args.need
    W = slope.shape[1]
    grad = grad.to(torch.float32).contiguous()
    grad_user = grad_item = grad_bias = None
    if need[0] and grad_query is not None:
        grad_user, _ = sum_segments(sort_by(sort_key(user_id, len(user))), len(user), None, None, grad, grad_query, 1,
                                    user.dtype, None)  # fmt: skip
    if need[1] or need[2]:
        ids = torch.cat([pos_id[:, None], neg_id], 1).view(-1)
        # a row without a user has no slopes, but its terms would still be read
        in_id = user_id.clamp(0, max(0, len(user) - 1))
        bias_dtype = item_bias.dtype if need[2] and item_bias is not None else None
        grad_item, grad_bias = sum_segments(
            sort_by(sort_key(ids, len(item))), len(item), in_id, slope.view(-1), grad, user, W,
            item.dtype if need[1] else None, bias_dtype,
        )  # fmt: skip
    return grad_user, grad_item, grad_bias


def sort_key(ids: Tensor, rows: int) -> Tensor:
    """Sort keys; an id out of range gets the number of rows."""
    key = ids.masked_fill((ids < 0) | (ids >= rows), rows)
    return key.int() if rows < 2**31 - 1 else key


def shared_bce_forms(reduction: str) -> tuple[bool, bool]:
    """Whether ``shared_bce_fwd`` forms the gradients of (queries, negatives); otherwise the backward does."""
    return True, False


def shared_bce_fwd(args: Sampled) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Reduced loss, slopes of the positives [B] and the gathered queries' gradient [B, D] without the upstream factor.

    Both hold ``weight``, ``neg_weight`` and, for "mean", 1/B. ``neg_id`` is [M], ``neg_valid`` [M] or [B, M].
    """
    user, item, item_bias, user_id, pos_id, _, log_q, _, weight, neg_weight, reduction, need, _ = args
    B = len(user_id)
    scale = row_scale(weight, reduction, user, B)
    positive, slope = launch_pairs("bce", user, item, user_id, pos_id, item_bias, log_q)
    assert slope is not None
    slope = slope * scale
    queries, negatives, valid, stray = axes(args, scale)
    sums = tile_pass(
        "bce", queries, negatives, valid=valid, neg_weight=neg_weight, want_value=True,
        grad_dtype=torch.float32 if need[0] else None,
    )  # fmt: skip
    assert sums.value is not None
    loss = (positive + sums.value).masked_fill(stray, torch.nan)
    grad_query = None
    if sums.grad is not None:
        rows = item.index_select(0, pos_id.clamp(0, max(0, len(item) - 1))).to(torch.float32)
        # a positive outside the catalogue has the slope 0, but its vector may hold anything
        grad_query = sums.grad + torch.where(slope[:, None] == 0, 0, slope[:, None] * rows)
    return weighted(loss, weight, reduction), slope, grad_query, None, None


def shared_bce_bwd(grad: Tensor, slope: Tensor, formed: Grads, args: Sampled) -> Grads:
    """Gradients of (user, item, item_bias) in their dtypes from upstream ``grad``, [] or [B]."""
    user, item, item_bias, user_id, pos_id, neg_id, _, _, weight, neg_weight, reduction, need, _ = args
    B, M, N = len(user_id), len(neg_id), len(item)
    grad = grad.to(torch.float32).contiguous()
    grad_user = grad_item = grad_bias = None
    if need[0] and formed[0] is not None:
        grad_user, _ = sum_segments(sort_by(sort_key(user_id, len(user))), len(user), None, None, grad, formed[0], 1,
                                    user.dtype, None)  # fmt: skip
    if need[1] or need[2]:
        scale = upstream_scale(grad, weight, reduction, user, B)
        queries, negatives, valid, _ = axes(args, scale)
        wanted = torch.float32 if need[1] else None, torch.float32 if need[2] and item_bias is not None else None
        sums = Sums(None, None, None, None)
        if M:
            sums = tile_pass(
                "bce", negatives, queries, valid=None if valid is None else valid.T, neg_weight=neg_weight,
                grad_dtype=wanted[0], bias_dtype=wanted[1],
            )  # fmt: skip
        _, by_pos = order_pairs(user_id, pos_id, item_bias, len(user), N, [False, True, True])
        assert by_pos is not None
        positive = sum_segments(by_pos, N, user_id, slope * grad, one(user), user, 1, *wanted)
        grad_item, grad_bias = add_up(positive, sums, args, wanted)
    return grad_user, grad_item, grad_bias


def add_up(
    positive: tuple[Tensor | None, Tensor | None],
    negatives: Sums,
    args: Sampled,
    wanted: tuple[torch.dtype | None, torch.dtype | None],
) -> tuple[Tensor | None, Tensor | None]:
    """Gradients of item and item_bias from those of the positives and the sums of the shared negatives [M, D] and [M]."""
    N, by_neg = len(args.item), sort_by(sort_key(args.neg_id, len(args.item)))
    grad_item = grad_bias = None
    if args.need[1]:
        of_items = None
        if negatives.grad is not None:
            of_items = sum_segments(by_neg, N, None, None, one(args.user), negatives.grad, 1, wanted[0], None)[0]
        grad_item = _add(positive[0], of_items, args.item.dtype)
    if args.need[2] and args.item_bias is not None:
        of_bias = None
        if negatives.bias is not None:
            source = negatives.bias[:, None]
            of_bias = sum_segments(by_neg, N, None, negatives.bias, one(args.user), source, 1, None, wanted[1])[1]
        grad_bias = _add(positive[1], of_bias, args.item_bias.dtype)
    return grad_item, grad_bias


def one(like: Tensor) -> Tensor:
    """Return the scalar 1 on the device of ``like``."""
    return torch.ones((), dtype=torch.float32, device=like.device)


def _add(a: Tensor | None, b: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if a is None else (a if b is None else a + b).to(dtype)


def axes(args: Sampled, scale: Tensor) -> tuple[Axis, Axis, Tensor | None, Tensor]:
    """Queries and negatives as the axes of a logit matrix, which entries count, and whether any id is out of range."""
    user, item, item_bias, user_id, pos_id, neg_id, log_q, neg_valid, *_ = args
    stray_user = (user_id < 0) | (user_id >= len(user))
    stray = (neg_id < 0) | (neg_id >= len(item))
    any_stray = stray_user.any() | stray.any()
    query_id, item_id = user_id.masked_fill(stray_user, 0), neg_id.masked_fill(stray, 0)
    shift = torch.zeros(len(neg_id), dtype=torch.float32, device=user.device)
    if item_bias is not None:
        shift = item_bias.index_select(0, item_id).to(torch.float32)
    if log_q is not None:
        shift = shift - log_q.index_select(0, item_id).to(torch.float32)
    if neg_valid is not None and neg_valid.ndim == 1:
        stray = stray | ~neg_valid
        neg_valid = None
    shift = shift.masked_fill(stray, -torch.inf)
    queries = Axis(user, ids=query_id, scale=scale, key=pos_id)
    return queries, Axis(item, ids=item_id, bias=shift, key=item_id), neg_valid, any_stray
