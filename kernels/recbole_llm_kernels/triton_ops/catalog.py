r"""Losses of every query against the whole catalogue, whose ``[B, N]`` logits are never allocated.

    S = Q C^T + bias
    catalog_bce: l_b = sum over targets t of softplus(-s_bt) + neg_weight * sum over the others n of softplus(s_bn)
    catalog_ce:  l_b = sum over targets t of (log Z_b - s_bt),  Z_b = sum over n of exp(s_bn)

Passes over tiles, see ``tiles``. ``catalog_bce``: loss and query gradient in one, item and bias gradient in the other.
``catalog_ce`` needs Z first; its targets' logits and gradients go by pairs, and only the others by tiles.
"""

from collections.abc import Sequence

import torch
import triton
import triton.language as tl
from torch import Tensor

from recbole_llm_kernels.triton_ops.math import log1p
from recbole_llm_kernels.triton_ops.pairs import launch_pairs, order_pairs, reduce_rows
from recbole_llm_kernels.triton_ops.segment_sum import sum_segments
from recbole_llm_kernels.triton_ops.targets import mark, mark_transposed, rows_of
from recbole_llm_kernels.triton_ops.tiles import LOWEST, Axis, tile_pass

Needs = Sequence[bool]  # are the gradients of (query, item, item_bias) wanted
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def catalog_bce_forms(reduction: str) -> tuple[bool, bool]:
    """Whether ``catalog_bce_fwd`` forms the gradients of (query, item and bias); otherwise the backward does."""
    return True, False


def catalog_bce_fwd(
    query: Tensor,
    item: Tensor,
    target_offsets: Tensor,
    target_ids: Tensor,
    item_bias: Tensor | None,
    weight: Tensor | None,
    neg_weight: float,
    reduction: str,
    need: Needs,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Reduced loss and the query gradient in float32, which lacks only the upstream factor."""
    marks = mark(target_offsets, target_ids, len(item))
    sums = tile_pass(
        "bce",
        Axis(query, scale=row_scale(weight, reduction, query)),
        Axis(item, bias=item_bias),
        marks=marks,
        neg_weight=neg_weight,
        want_value=True,
        grad_dtype=torch.float32 if need[0] else None,
        bad=marks.bad,
        weight=weight,
    )
    assert sums.value is not None
    return reduce_rows(sums.value, reduction), sums.grad, None, None


def catalog_bce_bwd(
    grad: Tensor,
    query: Tensor,
    item: Tensor,
    target_offsets: Tensor,
    target_ids: Tensor,
    item_bias: Tensor | None,
    weight: Tensor | None,
    neg_weight: float,
    reduction: str,
    formed: Grads,
    need: Needs,
) -> Grads:
    """Gradients in the inputs' dtypes from upstream ``grad``, [] or [B], and the formed query gradient."""
    grad = grad.to(torch.float32)
    grad_query = grad_item = grad_bias = None
    if need[0] and formed[0] is not None:
        grad_query = torch.empty_like(query)
        torch.mul(formed[0], grad[:, None] if grad.ndim else grad, out=grad_query)
    if need[1] or need[2]:
        _, _, grad_item, grad_bias = tile_pass(
            "bce",
            Axis(item, bias=item_bias),
            Axis(query, scale=upstream_scale(grad, weight, reduction, query)),
            marks=mark_transposed(target_offsets, target_ids, len(item)),
            neg_weight=neg_weight,
            grad_dtype=item.dtype if need[1] else None,
            bias_dtype=item_bias.dtype if need[2] and item_bias is not None else None,
        )
    return grad_query, grad_item, grad_bias


def row_scale(weight: Tensor | None, reduction: str, query: Tensor, rows: int | None = None) -> Tensor:
    """Factor of each row in the reduced loss, ``[rows]`` float32."""
    rows = len(query) if rows is None else rows
    scale = 1 / max(1, rows) if reduction == "mean" else 1.0
    if weight is None:
        return torch.full((rows,), scale, dtype=torch.float32, device=query.device)
    return weight.to(torch.float32) * scale


def upstream_scale(
    grad: Tensor, weight: Tensor | None, reduction: str, query: Tensor, rows: int | None = None
) -> Tensor:
    """``row_scale`` times the upstream gradient, [] or [rows]."""
    if weight is None:  # one launch for two
        rows = len(query) if rows is None else rows
        return grad.expand(rows) * (1 / max(1, rows) if reduction == "mean" else 1.0)
    return row_scale(weight, reduction, query, rows) * grad


def weighted(rows: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    """Weight and reduce row losses."""
    return reduce_rows(rows if weight is None else rows * weight.to(rows.dtype), reduction)


def catalog_ce_forms(reduction: str) -> tuple[bool, bool]:
    """Whether ``catalog_ce_fwd`` forms the gradients of (query, item and bias); otherwise the backward does."""
    return False, False


@triton.jit
def _counted(id_ptr, t, begin, end):
    """Which of a row's targets count: the first of equal neighbours."""
    live = t < end
    id = tl.load(id_ptr + t, mask=live, other=0)
    return live & ((t == begin) | (id != tl.load(id_ptr + t - 1, mask=live & (t > begin), other=0)))


@triton.jit(do_not_specialize=["B", "splits"])
def _softmax_row_kernel(
    peak_ptr,  # [splits, B] largest logit of the others
    total_ptr,  # [splits, B] sum of exp(s - largest) of the others
    logit_ptr,  # [T] logits of the targets
    offset_ptr,  # [B + 1]
    id_ptr,  # [T]
    loss_ptr,  # [B] out
    shift_ptr,  # [B] out: log Z less the log of the number of targets, inf without any
    slope_ptr,  # [T] out: d loss / d logit of the targets
    B,
    splits,
    BLOCK_S: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    begin = tl.load(offset_ptr + b)
    end = tl.load(offset_ptr + b + 1)
    part = tl.arange(0, BLOCK_S)
    at = part.to(tl.int64) * B + b
    peaks = tl.load(peak_ptr + at, mask=part < splits, other=LOWEST)
    totals = tl.load(total_ptr + at, mask=part < splits, other=0.0)
    peak = tl.max(peaks, axis=0)
    for t0 in range(begin, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        peak = tl.maximum(peak, tl.max(tl.load(logit_ptr + t, mask=t < end, other=LOWEST), axis=0))
    others = tl.sum(totals * tl.exp(peaks - peak), axis=0)
    z_targets = 0.0
    count = 0.0
    for t0 in range(begin, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        counted = _counted(id_ptr, t, begin, end)
        z_targets += tl.sum(tl.exp(tl.load(logit_ptr + t, mask=counted, other=float("-inf")) - peak), axis=0)
        count += tl.sum(counted.to(tl.float32), axis=0)
    z = others + z_targets
    log_z = peak + tl.log(z)
    loss = 0.0
    for t0 in range(begin, end, BLOCK_T):
        t = t0 + tl.arange(0, BLOCK_T)
        live = t < end
        counted = _counted(id_ptr, t, begin, end)
        s = tl.load(logit_ptr + t, mask=live, other=0.0)
        e = tl.exp(s - peak)
        # Z without the target itself, as a sum: Z - e would lose it where the target is confident
        rest = others + (z_targets - e)
        value = tl.where(e > rest, log1p(rest / tl.where(e > rest, e, 1.0)), log_z - s)
        value = tl.where(s == float("-inf"), float("nan"), value)
        loss += tl.sum(tl.where(counted, value, 0.0), axis=0)
        tl.store(slope_ptr + t, tl.where(counted, ((count - 1.0) * e - rest) / z, 0.0), mask=live)
    tl.store(loss_ptr + b, loss)
    # an item that is no target has the slope count * exp(s - log Z); without targets it is 0, whatever log Z is
    tl.store(shift_ptr + b, tl.where(count > 0.0, log_z - tl.log(tl.maximum(count, 1.0)), float("inf")))


def catalog_ce_fwd(
    query: Tensor,
    item: Tensor,
    target_offsets: Tensor,
    target_ids: Tensor,
    item_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    need: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Reduced loss, shift [B], slopes of the targets' logits in their row's loss [T], and no gradients yet.

    An item that is no target has the slope exp(s - shift): shift is log Z less the log of the number of targets.
    """
    B, T = len(query), len(target_ids)
    marks = mark(target_offsets, target_ids, len(item))
    sums = tile_pass("exp_sum", Axis(query), Axis(item, bias=item_bias), marks=marks, want_value=True)
    assert sums.value is not None
    row = rows_of(target_offsets, T)
    logit, _ = launch_pairs("dot", query, item, row, target_ids, item_bias)
    loss = torch.empty(B, dtype=torch.float32, device=query.device)
    shift = torch.empty_like(loss)
    slope = torch.empty_like(logit)
    if B:
        splits = len(sums.value)
        with torch.cuda.device_of(query):
            _softmax_row_kernel[(B,)](
                sums.value, sums.total, logit, target_offsets, target_ids, loss, shift, slope, B, splits,
                BLOCK_S=triton.next_power_of_2(splits), BLOCK_T=128, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    assert marks.bad is not None
    return weighted(loss.masked_fill(marks.bad, torch.nan), weight, reduction), shift, slope, None, None, None


def catalog_ce_bwd(
    grad: Tensor,
    query: Tensor,
    item: Tensor,
    target_offsets: Tensor,
    target_ids: Tensor,
    item_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    shift: Tensor,
    target_slope: Tensor,
    formed: Grads,
    need: Needs,
) -> Grads:
    """Gradients in the inputs' dtypes from upstream ``grad``, [] or [B], and what the forward left."""
    B, N, T = len(query), len(item), len(target_ids)
    scale = upstream_scale(grad.to(torch.float32), weight, reduction, query)
    row = rows_of(target_offsets, T)
    by_row, by_item = order_pairs(row, target_ids, item_bias, B, N, need)
    value = target_slope * scale.index_select(0, row)
    one = torch.ones((), device=query.device)
    grad_query = grad_item = grad_bias = None
    if by_row is not None:
        marks = mark(target_offsets, target_ids, N)
        rows, cols = Axis(query, shift=shift, scale=scale), Axis(item, bias=item_bias)
        others = tile_pass("softmax", rows, cols, marks=marks, grad_dtype=torch.float32).grad
        targets, _ = sum_segments(by_row, B, target_ids, value, one, item, 1, torch.float32, None)
        grad_query = _sum(others, targets, query.dtype)
    if by_item is not None:
        marks = mark_transposed(target_offsets, target_ids, N, by_item)
        dtypes = torch.float32 if need[1] else None, torch.float32 if need[2] and item_bias is not None else None
        rows, cols = Axis(item, bias=item_bias), Axis(query, shift=shift, scale=scale)
        _, _, *parts = tile_pass("softmax", rows, cols, marks=marks, grad_dtype=dtypes[0], bias_dtype=dtypes[1])
        targets, target_bias = sum_segments(by_item, N, row, value, one, query, 1, *dtypes)
        grad_item = _sum(parts[0], targets, item.dtype)
        grad_bias = None if item_bias is None else _sum(parts[1], target_bias, item_bias.dtype)
    return grad_query, grad_item, grad_bias


def _sum(a: Tensor | None, b: Tensor | None, dtype: torch.dtype) -> Tensor | None:
    return None if a is None or b is None else (a + b).to(dtype)
