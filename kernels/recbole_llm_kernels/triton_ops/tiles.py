r"""One pass over the tiles of a logit matrix: what the catalogue losses and shared negatives have in common.

    S = R C^T + bias        R [R, D] rows, C [C, D] columns

A program keeps a block of rows, walks its columns and holds the row's sums in registers; S is never stored. With
queries as rows a pass gives row losses and query gradients, with items as rows item and bias gradients: two passes, four
products, no atomics. Where rows are too few to fill the device, the columns are split and the parts are added in order.

Vectors wider than BLOCK_D (LLM embeddings) do not fit beside their sums in registers. There a pass forms each logit once,
over chunks of D, and leaves the slopes in a workspace of bounded size; ``slopes`` multiplies them by the columns.

A target is taken out inside its tile (see ``targets``): adding it as a negative and correcting later would lose a
confident target's loss and slope to cancellation. One logarithm serves the 64 columns of a tile: softplus(s) is
max(s, 0) + log1p(z) with z = exp(-|s|), and (1 + a)(1 + b) - 1 = a + b + ab keeps small z beside the 1.

Bytes: a block of rows once, the columns once per block of rows (from the second-level cache), the sums once; products:
2 R C D flops for S and 2 R C D for a gradient.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from recbole_llm_kernels.triton_ops import tuning
from recbole_llm_kernels.triton_ops.axes import Axis, load_rows
from recbole_llm_kernels.triton_ops.math import (
    add_weighted_rows,
    exp,
    log1p,
    one_plus_product,
    sigmoid_of,
)
from recbole_llm_kernels.triton_ops.slopes import Workspace, store_slopes
from recbole_llm_kernels.triton_ops.targets import TILE, Marks, mark_at_or_behind

MOST = 2**31 - 2**16  # rows or columns: their numbers, and those of a block that begins at the last, fit in int32
NO_TILE = tl.constexpr(2**31 - 1)  # behind every tile
LOWEST = tl.constexpr(-3.4028234663852886e38)  # not -inf: exp(-inf - -inf) is NaN


@triton.jit
def order_key(s):
    """An int32 that orders as s does: the first half of ``math.rank_key``."""
    bits = (s + 0.0).to(tl.int32, bitcast=True)  # -0.0 becomes 0.0
    return tl.where(bits < 0, bits ^ 0x7FFFFFFF, bits)


@triton.jit
def _marked(bit_ptr, mark, mark_tile, tile, c, MARKED: tl.constexpr):
    """Which columns c of ``tile`` are marked in each row; ``mark`` is the row's next entry, in the tile ``mark_tile``."""
    bits = tl.load(bit_ptr + mark, mask=mark_tile == tile, other=0)
    # of "c % MARKED" the compiler would take 16 signs in every tile, ahead of the branch
    return ((bits[:, None] >> (c - tile * MARKED).to(tl.int64)[None, :]) & 1) != 0


# sizes change with every batch: specialised on 1 and on multiples of 16 they would compile again and again
@triton.jit(do_not_specialize=["R", "C", "split", "first_block", "first_part", "plane", "slope_width", "width"])
def _tile_pass_kernel(  # noqa: C901 (branches of the compiler, not of the kernel)
    row_ptr,  # [n_rows, D]
    col_ptr,  # [n_cols, D]
    row_id_ptr,  # [R] rows of row_ptr, or None: all of them in order
    col_id_ptr,  # [C] the same for columns
    row_bias_ptr,  # [R] or None; -inf: outside the catalogue
    col_bias_ptr,  # [C] or None
    row_shift_ptr,  # [R] fp32 or None: "softmax", subtracted from s
    col_shift_ptr,  # [C] fp32 or None
    row_scale_ptr,  # [R] fp32 or None: factor of a row's gradient
    col_scale_ptr,  # [C] fp32 or None: factor of a column's slopes
    mark_start_ptr,  # [R] or None: a row's targets, as in targets.Marks
    mark_end_ptr,
    mark_tile_ptr,
    mark_bit_ptr,
    row_key_ptr,  # [R] or None: an entry is left out where its keys are equal
    col_key_ptr,  # [C]
    valid_ptr,  # or None: an entry is left out where False
    value_ptr,  # [splits, R] fp32 out, or None: losses; "exp_sum": largest s; "group_max": [R, groups] int32
    total_ptr,  # [splits, R] fp32 out: "exp_sum", sum of exp(s - largest)
    lost_ptr,  # [splits, R] fp32 in and out, or None: what rounding has cut off the losses
    grad_ptr,  # [splits, R, D] out, or None; D is at most BLOCK_D
    grad_bias_ptr,  # [splits, R] out, or None
    slope_ptr,  # [planes, rows, slope_width] out, or None: the slopes, from first_block and first_part on
    R,
    C,
    split,  # columns per split divided by MARKED, a multiple of BLOCK_C
    first_block,  # of rows
    first_part,  # of columns
    plane,  # elements of a plane of slopes divided by MARKED
    slope_width,  # divided by MARKED
    width,  # D once more: the compiler would unroll a loop whose length it knows, and keep its addresses in registers
    valid_row_stride,
    valid_col_stride,
    neg_weight,
    TERM: tl.constexpr,  # "bce", "softmax", "exp_sum" or "group_max"
    UNIT_WEIGHT: tl.constexpr,  # neg_weight is 1
    CONTINUES: tl.constexpr,  # losses and sums of slopes are added to what is there
    MARKED: tl.constexpr,  # columns of one mark
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    LOGIT_PRECISION: tl.constexpr,
    GRAD_PRECISION: tl.constexpr,
    FTZ: tl.constexpr,  # the instructions of CUDA for exponentials and reciprocals
):
    r = (tl.program_id(0) + first_block) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(1) + first_part
    live = r < R
    inside = live
    bias = tl.zeros([BLOCK_R], dtype=tl.float32)
    if row_bias_ptr is not None:
        bias = tl.load(row_bias_ptr + r, mask=live, other=float("-inf")).to(tl.float32)
        inside = bias != float("-inf")
    row = r
    if row_id_ptr is not None:
        row = tl.load(row_id_ptr + r, mask=live, other=0)
    shift = tl.zeros([BLOCK_R], dtype=tl.float32)
    if row_shift_ptr is not None:
        shift = tl.load(row_shift_ptr + r, mask=live, other=float("inf"))
    if row_key_ptr is not None:
        row_key = tl.load(row_key_ptr + r, mask=live, other=-1)
    # int64: behind the last column the product may pass 2**31; up to it, it does not
    first = (part.to(tl.int64) * split * MARKED).to(tl.int32)
    last = tl.minimum((part.to(tl.int64) + 1) * split * MARKED, C).to(tl.int32)
    if mark_start_ptr is not None:
        mark = tl.load(mark_start_ptr + r, mask=live, other=0).to(tl.int64)
        marks_end = tl.load(mark_end_ptr + r, mask=live, other=0)
        if part > 0:
            mark = mark_at_or_behind(mark_tile_ptr, mark, marks_end, first // MARKED, tl.max(marks_end - mark, axis=0))
        mark_tile = tl.load(mark_tile_ptr + mark, mask=mark < marks_end, other=NO_TILE)
        next_tile = tl.min(mark_tile, axis=0)
    if D <= BLOCK_D:
        rows = load_rows(row_ptr, row, inside, 0, D, BLOCK_D)

    acc = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    acc_bias = tl.zeros([BLOCK_R], dtype=tl.float32)
    loss = tl.zeros([BLOCK_R], dtype=tl.float32)
    lost = tl.zeros([BLOCK_R], dtype=tl.float32)  # what rounding has cut off ``loss``
    if CONTINUES:  # noqa: SIM102 (Triton 3.2 compiles what stands behind "and")
        if lost_ptr is not None:
            before = tl.program_id(1).to(tl.int64) * R + r
            loss = tl.load(value_ptr + before, mask=live, other=0.0)
            lost = tl.load(lost_ptr + before, mask=live, other=0.0)
    peak = tl.full([BLOCK_R], LOWEST, dtype=tl.float32)
    for c0 in range(first, last, BLOCK_C):
        c = c0 + tl.arange(0, BLOCK_C)
        present = c < last
        col_bias = tl.zeros([BLOCK_C], dtype=tl.float32)
        if col_bias_ptr is not None:
            col_bias = tl.load(col_bias_ptr + c, mask=present, other=float("-inf")).to(tl.float32)
            present = col_bias != float("-inf")
        col = c
        if col_id_ptr is not None:
            col = tl.load(col_id_ptr + c, mask=present, other=0)
        if D <= BLOCK_D:
            cols = load_rows(col_ptr, col, present, 0, D, BLOCK_D)
            s = tl.dot(rows, tl.trans(cols), input_precision=LOGIT_PRECISION)
        else:
            s = tl.zeros([BLOCK_R, BLOCK_C], dtype=tl.float32)
            for start in range(0, width, BLOCK_D):
                rows = load_rows(row_ptr, row, inside, start, D, BLOCK_D)
                cols = load_rows(col_ptr, col, present, start, D, BLOCK_D)
                s = tl.dot(rows, tl.trans(cols), s, input_precision=LOGIT_PRECISION)
        if row_bias_ptr is not None:
            s += bias[:, None]
        # outside the catalogue or behind the last column s is -inf: no loss, no slope
        s += tl.where(present, col_bias, float("-inf"))[None, :]
        if row_key_ptr is not None:
            col_key = tl.load(col_key_ptr + c, mask=present, other=-2)
            s = tl.where(row_key[:, None] == col_key[None, :], float("-inf"), s)
        if valid_ptr is not None:
            at = r.to(tl.int64)[:, None] * valid_row_stride + c.to(tl.int64)[None, :] * valid_col_stride
            valid = tl.load(valid_ptr + at, mask=live[:, None] & present[None, :], other=0)
            s = tl.where(valid != 0, s, float("-inf"))
        if mark_start_ptr is not None:
            # few tiles hold a target: the others skip all that marks cost
            has_marks = next_tile == c0 // MARKED
            if has_marks:
                marked = _marked(mark_bit_ptr, mark, mark_tile, next_tile, c, MARKED)
                s = tl.where(marked, -s if TERM == "bce" else float("-inf"), s)

        if TERM == "group_max":
            at = r.to(tl.int64) * ((C + BLOCK_C - 1) // BLOCK_C) + c0 // BLOCK_C
            tl.store(value_ptr + at, order_key(tl.max(s, axis=1)), mask=live)
        elif TERM == "exp_sum":
            higher = tl.maximum(peak, tl.max(s, axis=1))
            loss = loss * exp(peak - higher, FTZ) + tl.sum(exp(s - higher[:, None], FTZ), axis=1)
            peak = higher
        elif TERM == "softmax":
            if col_shift_ptr is not None:
                s -= tl.load(col_shift_ptr + c, mask=c < C, other=float("inf"))[None, :]
            p = exp(s - shift[:, None], FTZ)
        else:
            z = exp(-tl.abs(s), FTZ)
            if value_ptr is not None:
                q = tl.reduce(z, 1, one_plus_product)
                term = tl.sum(tl.maximum(s, 0.0), axis=1) + log1p(q)
                if not UNIT_WEIGHT:
                    term *= neg_weight
                    if mark_start_ptr is not None:  # noqa: SIM102 (one is known to the compiler)
                        if has_marks:  # the two kinds apart, so that neither is lost beside the other
                            marked = _marked(mark_bit_ptr, mark, mark_tile, next_tile, c, MARKED)
                            q = tl.reduce(tl.where(marked, 0.0, z), 1, one_plus_product)
                            term = neg_weight * (tl.sum(tl.where(marked, 0.0, tl.maximum(s, 0.0)), axis=1) + log1p(q))
                            q = tl.reduce(tl.where(marked, z, 0.0), 1, one_plus_product)
                            term += tl.sum(tl.where(marked, tl.maximum(s, 0.0), 0.0), axis=1) + log1p(q)
                term -= lost
                higher = loss + term
                lost = (higher - loss) - term
                loss = higher
            if grad_ptr is not None or grad_bias_ptr is not None or slope_ptr is not None:
                sigma = sigmoid_of(s, z, FTZ)
                p = sigma if UNIT_WEIGHT else neg_weight * sigma
                if mark_start_ptr is not None:  # noqa: SIM102 (one is known to the compiler)
                    if has_marks:
                        marked = _marked(mark_bit_ptr, mark, mark_tile, next_tile, c, MARKED)
                        p = tl.where(marked, -sigma, p)
        if grad_ptr is not None or grad_bias_ptr is not None or slope_ptr is not None:
            if col_scale_ptr is not None:
                p *= tl.load(col_scale_ptr + c, mask=c < C, other=0.0)[None, :]
            if grad_bias_ptr is not None:
                acc_bias += tl.sum(p, axis=1)
            if grad_ptr is not None:
                acc = add_weighted_rows(acc, p, cols, GRAD_PRECISION)
            if slope_ptr is not None:
                at = (r - first_block * BLOCK_R).to(tl.int64)[:, None] * (slope_width * MARKED)
                at += (c - first_part * split * MARKED)[None, :]
                store_slopes(slope_ptr + at, plane * MARKED, tl.where(inside[:, None], p, 0.0), GRAD_PRECISION)
        if mark_start_ptr is not None:
            is_last = has_marks  # of the tile's blocks: all of it where a block is the tile
            if BLOCK_C < MARKED:
                is_last = has_marks & ((c0 // BLOCK_C) % (MARKED // BLOCK_C) == MARKED // BLOCK_C - 1)
            if is_last:
                mark += mark_tile == c0 // MARKED
                mark_tile = tl.load(mark_tile_ptr + mark, mask=mark < marks_end, other=NO_TILE)
                next_tile = tl.min(mark_tile, axis=0)

    out = tl.program_id(1).to(tl.int64) * R + r
    # Triton 3.2 compiles what stands behind "is not None and" and a tensor's value: the tests are nested
    if TERM != "group_max" and value_ptr is not None:
        if TERM == "exp_sum":
            tl.store(value_ptr + out, peak, mask=live)
            tl.store(total_ptr + out, loss, mask=live)
        else:
            tl.store(value_ptr + out, loss, mask=live)
            if lost_ptr is not None:
                tl.store(lost_ptr + out, lost, mask=live)
    if row_scale_ptr is not None:
        scale = tl.load(row_scale_ptr + r, mask=live, other=0.0)
        acc *= scale[:, None]
        acc_bias *= scale
    if grad_ptr is not None:
        d = tl.arange(0, BLOCK_D)
        acc = tl.where(inside[:, None], acc, 0.0)
        tl.store(grad_ptr + out[:, None] * D + d[None, :], acc, mask=live[:, None] & (d < D)[None, :])
    if grad_bias_ptr is not None:
        acc_bias = tl.where(inside, acc_bias, 0.0)
        if CONTINUES:
            acc_bias += tl.load(grad_bias_ptr + out, mask=live, other=0.0)
        tl.store(grad_bias_ptr + out, acc_bias, mask=live)


class Sums(NamedTuple):
    """What a pass adds up for every row; None where not asked for."""

    value: (
        Tensor | None
    )  # [R] float32 losses; "exp_sum": [parts, R] largest s; "group_max": [R, groups] int32 order keys
    total: Tensor | None  # "exp_sum": [parts, R] sums of exp(s - largest)
    grad: Tensor | None  # [R, D]
    bias: Tensor | None  # [R]


def tile_pass(
    term: str,
    rows: Axis,
    cols: Axis,
    *,
    marks: Marks | None = None,
    valid: Tensor | None = None,
    neg_weight: float = 1.0,
    want_value: bool = False,
    grad_dtype: torch.dtype | None = None,
    bias_dtype: torch.dtype | None = None,
    bad: Tensor | None = None,
    weight: Tensor | None = None,
) -> Sums:
    """Sum over the columns for every row.

    Args:
        term: "bce": loss softplus(-s) at targets and neg_weight * softplus(s) elsewhere, and its slopes; "softmax": the
            slopes exp(s - shift), 0 at targets; "exp_sum": largest s and sum of exponentials, targets left out;
            "group_max": ``order_key`` of the largest s of every BLOCK_C columns, targets left out.
        rows: the rows.
        cols: the columns.
        marks: the rows' targets; None: there are none.
        valid: bool, [R, C] of any strides; False: the entry is left out.
        neg_weight: factor of every entry that is no target.
        want_value: whether losses (or exponentials) are wanted.
        grad_dtype: dtype of the sums of slope times column vector; None: not wanted.
        bias_dtype: dtype of the sums of slopes; None: not wanted.
        bad: bool, [R]; True: the row's loss is NaN, as is an infinite one. None: losses are left as they are.
        weight: [R], factor of the losses; only with ``bad``.
    """
    R, C, D = rows.length, cols.length, rows.matrix.shape[1]
    if max(R, C) > MOST:
        raise ValueError(
            f'the triton backend takes at most {MOST:,} rows and items, got {R:,} and {C:,}; use backend="torch"'
        )
    device = rows.matrix.device
    on = tuning.target(device)
    precision = tuning.dot_precision(rows.matrix.dtype, on, exact=term == "group_max")
    blocks = tuning.tiles(D, rows.matrix.dtype, precision.logits, on, R if term == "group_max" else None)
    slopes = None
    if grad_dtype is not None and blocks.BLOCK_D < D and R > 0:
        slopes = Workspace(rows, cols, grad_dtype, blocks, precision, on)
    if slopes is None:
        # nothing is added over the columns of "group_max": any number of parts will do
        most = 1 << 16 if term == "group_max" else 64
        pieces, (splits, split) = [(0, R, 0, C)], tuning.column_splits(R, C, blocks, on, most=most)
    else:
        pieces, splits, split = slopes.pieces, slopes.parts, slopes.split
    continued = pieces[0][3] < C

    def empty(wanted: bool, *shape: int, dtype: torch.dtype | None = None) -> Tensor | None:
        dtype = torch.float32 if dtype is None or splits > 1 or continued else dtype
        return torch.empty(splits, *shape, dtype=dtype, device=device) if wanted else None

    value, total, lost = empty(want_value, R), empty(term == "exp_sum", R), empty(want_value and continued, R)
    if term == "group_max":
        value = torch.empty(R, triton.cdiv(C, blocks.BLOCK_C), dtype=torch.int32, device=device)
    grad = empty(grad_dtype is not None and slopes is None, R, D, dtype=grad_dtype)
    bias = empty(bias_dtype is not None, R, dtype=bias_dtype)
    for first_row, last_row, first, last in pieces if R > 0 else ():
        with torch.cuda.device_of(rows.matrix):
            grid = triton.cdiv(last_row - first_row, blocks.BLOCK_R), max(1, triton.cdiv(last - first, split))
            _tile_pass_kernel[grid](
                rows.matrix, cols.matrix, rows.ids, cols.ids, rows.bias, cols.bias, rows.shift, cols.shift,
                rows.scale, cols.scale, *((None,) * 4 if marks is None else marks[:4]), rows.key, cols.key,
                valid, value, total, lost, grad, bias, None if slopes is None else slopes.entries,
                R, C, split // TILE, first_row // blocks.BLOCK_R, first // split,
                *((0, 0) if slopes is None else slopes.strides), D,
                *((0, 0) if valid is None else valid.stride()), neg_weight, term, neg_weight == 1, first > 0, TILE, D,
                BLOCK_R=blocks.BLOCK_R, BLOCK_C=blocks.BLOCK_C, BLOCK_D=blocks.BLOCK_D,
                LOGIT_PRECISION=precision.logits, GRAD_PRECISION=precision.gradients, FTZ=on.kind == "cuda",
                num_warps=blocks.num_warps, num_stages=blocks.num_stages, enable_fp_fusion=True,
            )  # fmt: skip
        if slopes is not None:
            slopes.multiply(first_row, last_row, first, last)
    if term in ("exp_sum", "group_max"):
        return Sums(value, total, None, None)
    sums = Sums(value, None, grad, bias)
    has_parts = (value is not None and bad is not None) or splits > 1 or continued
    if R > 0 and has_parts and any(x is not None for x in sums):
        sums = joined(sums, grad_dtype, bias_dtype, bad, weight)
    else:
        sums = Sums(*(x if x is None else x[0] for x in sums))
    return sums if slopes is None else sums._replace(grad=slopes.gradient)


@triton.jit(do_not_specialize=["R", "parts"])
def _join_parts_kernel(
    value_ptr,  # [parts, R] or None
    grad_ptr,  # [parts, R, D] or None
    bias_ptr,  # [parts, R] or None
    bad_ptr,  # [R] or None
    weight_ptr,  # [R] or None
    value_out_ptr,  # [R]
    grad_out_ptr,  # [R, D]
    bias_out_ptr,  # [R]
    R,
    parts,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    r = tl.program_id(0).to(tl.int64) * BLOCK_R + tl.arange(0, BLOCK_R)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    live = r < R
    mask = live[:, None] & (d < D)[None, :]
    place = r
    value = tl.zeros([BLOCK_R], dtype=tl.float32)
    bias = tl.zeros([BLOCK_R], dtype=tl.float32)
    grad = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    for _ in range(parts):
        if value_ptr is not None:
            value += tl.load(value_ptr + place, mask=live, other=0.0)
        if bias_ptr is not None:
            bias += tl.load(bias_ptr + place, mask=live, other=0.0).to(tl.float32)
        if grad_ptr is not None:
            grad += tl.load(grad_ptr + place[:, None] * D + d[None, :], mask=mask, other=0.0).to(tl.float32)
        place += R
    if value_ptr is not None:
        if bad_ptr is not None:
            # a target outside the catalogue has s = -inf; ids out of range or out of order have no place
            bad = (tl.load(bad_ptr + r, mask=live, other=0) != 0) | (tl.abs(value) == float("inf"))
            value = tl.where(bad, float("nan"), value)
        if weight_ptr is not None:
            value *= tl.load(weight_ptr + r, mask=live, other=0.0).to(tl.float32)
        if tl.program_id(1) == 0:
            tl.store(value_out_ptr + r, value, mask=live)
    if bias_ptr is not None:  # noqa: SIM102 (nested for Triton 3.2)
        if tl.program_id(1) == 0:
            tl.store(bias_out_ptr + r, bias, mask=live)
    if grad_ptr is not None:
        tl.store(grad_out_ptr + r[:, None] * D + d[None, :], grad, mask=mask)


def joined(
    sums: Sums,
    grad_dtype: torch.dtype | None,
    bias_dtype: torch.dtype | None,
    bad: Tensor | None,
    weight: Tensor | None,
) -> Sums:
    """Add the parts of the columns in order, in one launch; see ``tile_pass``."""
    value, _, grad, bias = sums
    parts, R = next(x for x in (value, grad, bias) if x is not None).shape[:2]

    def out(x: Tensor | None, dtype: torch.dtype | None) -> Tensor | None:
        return None if x is None else torch.empty(x.shape[1:], dtype=dtype, device=x.device)

    found = Sums(out(value, torch.float32), None, out(grad, grad_dtype), out(bias, bias_dtype))
    D = 1 if grad is None else grad.shape[2]
    # 2,048 elements, 16 a thread
    BLOCK_D = min(tuning.padded(D), 64)
    BLOCK_R = 2048 // BLOCK_D
    device = next(x for x in found if x is not None)
    with torch.cuda.device_of(device):
        _join_parts_kernel[(triton.cdiv(R, BLOCK_R), triton.cdiv(D, BLOCK_D))](
            value, grad, bias, bad, weight, found.value, found.grad, found.bias, R, parts, D,
            BLOCK_R=BLOCK_R, BLOCK_D=BLOCK_D, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return found
