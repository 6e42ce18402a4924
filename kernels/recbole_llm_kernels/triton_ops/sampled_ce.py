r"""Softmax cross-entropy of one positive against sampled negatives: sampled softmax.

    s_bk = <user[u_b], item[i_bk]> + bias - log_q,  i_b0 the positive, i_b1.. the negatives
    l_b  = softplus(n_b - s_b0),  n_b = log sum over live k of exp(s_bk)

Negatives of a row's own (``sampled_ce``): one gather of its items serves the logits, the running sum of exponentials and
the row's query gradient, which is scaled once the sum is known; logits wait in the slopes' memory for the same. Bytes:
B (K + 2) D s read, 4 B (2 K + 1 + D) written. Negatives shared by the batch (``shared_ce``): a small catalogue, in tiles.
Nothing of shape [B, K, D] or [B, M] is stored.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from recbole_llm_kernels.signatures import Sampled
from recbole_llm_kernels.triton_ops import tuning
from recbole_llm_kernels.triton_ops.catalog import Grads, row_scale, upstream_scale, weighted
from recbole_llm_kernels.triton_ops.math import log1p, sigmoid
from recbole_llm_kernels.triton_ops.pairs import launch_pairs, order_pairs
from recbole_llm_kernels.triton_ops.sampled import add_up, axes, one, sampled_bce_bwd, sort_key
from recbole_llm_kernels.triton_ops.segment_sum import sort_by, sum_segments
from recbole_llm_kernels.triton_ops.tiles import LOWEST, Sums, tile_pass

sampled_ce_bwd = sampled_bce_bwd  # from slopes and the gathered queries' gradient on, nothing differs


@triton.jit(do_not_specialize=["B", "K", "n_users", "n_items"])
def _sampled_ce_fwd_kernel(
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
    slope_ptr,  # [B, 1 + K] out, positive first; logits in between
    grad_ptr,  # [B, D] out: gradient of the gathered query, or None
    B,
    K,
    n_users,
    n_items,
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
    in_order = tl.full([BLOCK_B], 1, dtype=tl.int32)
    width = tl.zeros([BLOCK_B], dtype=tl.int64) + (K + 1)

    acc = tl.zeros([BLOCK_B, BLOCK_D], dtype=tl.float32)  # sum of exp(s_k - peak) rows_k
    total = tl.zeros([BLOCK_B], dtype=tl.float32)  # sum of exp(s_k - peak)
    peak = tl.full([BLOCK_B], LOWEST, dtype=tl.float32)
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        at = b[:, None] * K + k[None, :]
        wanted = live[:, None] & (k < K)[None, :]
        neg_id = tl.load(neg_id_ptr + at, mask=wanted, other=0).to(tl.int64)
        in_range = (neg_id >= 0) & (neg_id < n_items)
        in_order = tl.minimum(in_order, tl.min(((~wanted) | in_range).to(tl.int32), axis=1))
        used = wanted & in_range & inside[:, None] & (neg_id != pos_id[:, None])
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
        s_neg = tl.where(used, tl.sum(query[:, None, :] * rows, axis=2) + shifts, float("-inf"))
        higher = tl.maximum(peak, tl.max(s_neg, axis=1))
        fade, e = tl.exp(peak - higher), tl.exp(s_neg - higher[:, None])
        total = total * fade + tl.sum(e, axis=1)
        if grad_ptr is not None:
            acc = acc * fade[:, None] + tl.sum(e[:, :, None] * rows, axis=1)
        peak = higher
        tl.store(slope_ptr + (b * width)[:, None] + 1 + k[None, :], s_neg, mask=wanted)

    some = total > 0.0
    x = tl.where(some, peak + tl.log(tl.where(some, total, 1.0)) - s, float("-inf"))
    loss = tl.where(inside & (in_order == 1), tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x))), float("nan"))
    tl.store(loss_ptr + b, loss, mask=live)
    scale = tl.load(scale_ptr + b, mask=live, other=0.0)
    share = tl.where(some & inside, scale * sigmoid(x), 0.0)
    tl.store(slope_ptr + b * width, -share, mask=live)
    factor = share / tl.where(some, total, 1.0)
    if grad_ptr is not None:
        acc = acc * factor[:, None] - share[:, None] * row
        tl.store(grad_ptr + b[:, None] * D + d[None, :], acc, mask=live[:, None] & (d < D)[None, :])
    tl.debug_barrier()  # the logits were stored by other threads of this program
    for start in range(0, K, BLOCK_K):
        k = start + tl.arange(0, BLOCK_K)
        wanted = live[:, None] & (k < K)[None, :]
        place = slope_ptr + (b * width)[:, None] + 1 + k[None, :]
        e = tl.exp(tl.load(place, mask=wanted, other=float("-inf")) - peak[:, None])
        tl.store(place, e * factor[:, None], mask=wanted)


def sampled_ce_fwd(args: Sampled) -> tuple[Tensor, Tensor, Tensor | None]:
    """Reduced loss, slopes d loss/ds [B, 1 + K] (positive first) and the gathered queries' gradient [B, D].

    Slopes and query gradient hold ``weight`` and, for "mean", 1/B. ``neg_id`` is [B, K].
    """
    user, item, item_bias, user_id, pos_id, neg_id, log_q, neg_valid, weight, _, reduction, need, _ = args
    (B, K), D = neg_id.shape, user.shape[1]
    scale = row_scale(weight, reduction, user, B)
    loss = torch.empty(B, dtype=torch.float32, device=user.device)
    slope = torch.empty(B, K + 1, dtype=torch.float32, device=user.device)
    grad_query = torch.empty(B, D, dtype=torch.float32, device=user.device) if need[0] else None
    if B:
        blocks = tuning.sampled(D, K, tuning.target(user.device))
        with torch.cuda.device_of(user):
            _sampled_ce_fwd_kernel[(triton.cdiv(B, blocks.BLOCK_B),)](
                user, item, user_id, pos_id, neg_id, item_bias, log_q, neg_valid, scale, loss, slope, grad_query,
                B, K, len(user), len(item), D,
                BLOCK_B=blocks.BLOCK_B, BLOCK_K=blocks.BLOCK_K, BLOCK_D=blocks.BLOCK_D,
                num_warps=blocks.num_warps, enable_fp_fusion=True,
            )  # fmt: skip
    return weighted(loss, weight, reduction), slope, grad_query


@triton.jit(do_not_specialize=["B", "splits"])
def _join_softmax_kernel(
    peak_ptr,  # [splits, B] largest logit of the negatives
    total_ptr,  # [splits, B] sum of exp(s - largest)
    logit_ptr,  # [B] logits of the positives, -inf outside the catalogue, NaN where an id is out of range
    scale_ptr,  # [B] fp32: factor of the row in the gradients
    loss_ptr,  # [B] out
    slope_ptr,  # [B] out: of the positives
    log_z_ptr,  # [B] out
    B,
    splits,
    BLOCK_S: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    part = tl.arange(0, BLOCK_S)
    at = part.to(tl.int64) * B + b
    peaks = tl.load(peak_ptr + at, mask=part < splits, other=LOWEST)
    totals = tl.load(total_ptr + at, mask=part < splits, other=0.0)
    peak = tl.max(peaks, axis=0)
    total = tl.sum(totals * tl.exp(peaks - peak), axis=0)
    s = tl.load(logit_ptr + b)
    inside = (s == s) & (s != float("-inf"))
    s = tl.where(inside, s, 0.0)
    some = total > 0.0
    x = tl.where(some, peak + tl.log(tl.where(some, total, 1.0)) - s, float("-inf"))
    loss = tl.maximum(x, 0.0) + log1p(tl.exp(-tl.abs(x)))
    tl.store(loss_ptr + b, tl.where(inside, loss, float("nan")))
    tl.store(slope_ptr + b, tl.where(inside & some, -sigmoid(x) * tl.load(scale_ptr + b), 0.0))
    # an infinite Z leaves a row without a usable positive without slopes
    tl.store(log_z_ptr + b, tl.where(inside, s + loss, float("inf")))


def shared_ce_fwd(args: Sampled) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced loss, slopes of the positives [B] with ``weight`` and, for "mean", 1/B, and log Z [B].

    ``neg_id`` is [M], ``neg_valid`` [M] or [B, M].
    """
    user, item, item_bias, user_id, pos_id, _, log_q, _, weight, _, reduction, _, _ = args
    B = len(user_id)
    scale = row_scale(weight, reduction, user, B)
    queries, negatives, valid, stray = axes(args, scale)
    sums = tile_pass("exp_sum", queries._replace(scale=None), negatives, valid=valid, want_value=True)
    assert sums.value is not None
    logit, _ = launch_pairs("dot", user, item, user_id, pos_id, item_bias, log_q)
    loss, slope, log_z = (torch.empty(B, dtype=torch.float32, device=user.device) for _ in range(3))
    if B:
        splits = len(sums.value)
        with torch.cuda.device_of(user):
            _join_softmax_kernel[(B,)](
                sums.value, sums.total, logit, scale, loss, slope, log_z, B, splits,
                BLOCK_S=triton.next_power_of_2(splits), num_warps=1, enable_fp_fusion=True,
            )  # fmt: skip
    return weighted(loss.masked_fill(stray, torch.nan), weight, reduction), slope, log_z


def shared_ce_bwd(grad: Tensor, slope: Tensor, log_z: Tensor, args: Sampled) -> Grads:
    """Gradients of (user, item, item_bias) in their dtypes from upstream ``grad``, [] or [B], and what the forward left."""
    user, item, item_bias, user_id, pos_id, neg_id, _, _, weight, _, reduction, need, _ = args
    B, M, N = len(user_id), len(neg_id), len(item)
    grad = grad.to(torch.float32).contiguous()
    scale = upstream_scale(grad, weight, reduction, user, B)
    queries, negatives, valid, _ = axes(args, scale)
    queries = queries._replace(shift=log_z)
    slope = slope * grad
    grad_user = grad_item = grad_bias = None
    if need[0]:
        sums = tile_pass("softmax", queries, negatives, valid=valid, grad_dtype=torch.float32)
        assert sums.grad is not None
        rows = item.index_select(0, pos_id.clamp(0, max(0, N - 1))).to(torch.float32)
        # a positive outside the catalogue has the slope 0, but its vector may hold anything
        grad_query = sums.grad + torch.where(slope[:, None] == 0, 0, slope[:, None] * rows)
        by_user = sort_by(sort_key(user_id, len(user)))
        grad_user, _ = sum_segments(by_user, len(user), None, None, one(user), grad_query, 1, user.dtype, None)
    if need[1] or need[2]:
        wanted = torch.float32 if need[1] else None, torch.float32 if need[2] and item_bias is not None else None
        sums = Sums(None, None, None, None)
        if M:
            by_column = None if valid is None else valid.T
            sums = tile_pass("softmax", negatives, queries, valid=by_column, grad_dtype=wanted[0], bias_dtype=wanted[1])
        _, by_pos = order_pairs(user_id, pos_id, item_bias, len(user), N, [False, True, True])
        assert by_pos is not None
        positive = sum_segments(by_pos, N, user_id, slope, one(user), user, 1, *wanted)
        grad_item, grad_bias = add_up(positive, sums, args, wanted)
    return grad_user, grad_item, grad_bias
