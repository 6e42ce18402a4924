r"""Gradients of vectors that are too wide to stand beside their sums: slopes by columns, from a workspace.

    G = P C * scale        P [R, C] slopes, C [C, D] columns

A pass over tiles leaves the slopes of a piece of the logit matrix in a workspace; a second kernel multiplies them by the
columns. So each logit is formed once, however wide the vectors are, and no sum has to be kept in registers over all of D.
Pieces hold at most about ENTRIES slopes of 4 bytes, which fit in the second-level cache of a data-centre card. Sums over
several pieces or parts of columns are kept in float32 and added in order: no atomics.

Beside bfloat16 rows a slope is two bfloat16 numbers in two planes, as in ``math.add_weighted_rows``, so that the product
reads both operands as they are; else it is one float32.
"""

import torch
import triton
import triton.language as tl

from recbole_llm_kernels.triton_ops import tuning
from recbole_llm_kernels.triton_ops.axes import Axis, load_rows

ENTRIES = 1 << 23  # slopes held at a time: 32 MiB
WIDTH = 4096  # columns of a piece, where there are as many: enough of them that their sum is seldom read and written
ALIGNED = tl.constexpr(64)  # the width of a piece is a multiple of it
PARTS = 4  # of a piece's columns, at most, each with sums of its own


@triton.jit
def store_slopes(ptr, plane, p, PRECISION: tl.constexpr):
    """Store slopes in float32, or as two bfloat16 numbers in planes ``plane`` elements apart, but one at "tf32"."""
    if ptr.dtype.element_ty == tl.bfloat16:
        if PRECISION == "tf32":
            tl.store(ptr, p.to(tl.bfloat16))
        else:
            # cut, not rounded: one instruction for three, and what is left is exact in float32
            high = (p.to(tl.int32, bitcast=True) & -65536).to(tl.float32, bitcast=True)
            tl.store(ptr, high.to(tl.bfloat16))
            tl.store(ptr + plane, (p - high).to(tl.bfloat16))
    else:
        tl.store(ptr, p)


# sizes change with every batch: specialised they would compile again and again; multiples of ALIGNED make wide loads
@triton.jit(do_not_specialize=["R", "C", "split", "first_row", "first_column", "plane", "width"])
def _slope_product_kernel(
    slope_ptr,  # [planes, rows of the piece, width]
    col_ptr,  # [n_cols, D]
    col_id_ptr,  # [C] or None: all of them in order
    col_bias_ptr,  # [C] or None; -inf: outside the catalogue
    row_scale_ptr,  # [R] or None; given with the last piece, whose sums are those of all
    sum_ptr,  # [parts, rows of the piece, D] fp32, or None: what the product is added to
    out_ptr,  # the same, or [R, D] from first_row on where there is one part
    R,  # rows of the piece
    C,  # where the piece's columns end
    split,  # columns per part divided by BLOCK_C
    first_row,
    first_column,
    plane,  # elements of a plane of slopes divided by ALIGNED
    width,  # divided by ALIGNED
    PLANES: tl.constexpr,
    D: tl.constexpr,
    BLOCK_R: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
    PRECISION: tl.constexpr,
):
    r = tl.program_id(0) * BLOCK_R + tl.arange(0, BLOCK_R)
    part = tl.program_id(1)
    d0 = tl.program_id(2) * BLOCK_D
    d = d0 + tl.arange(0, BLOCK_D)
    live = r < R
    at_part = part.to(tl.int64) * R * D
    place = r.to(tl.int64)[:, None] * D + d[None, :]
    mask = live[:, None] & (d < D)[None, :]
    acc = tl.zeros([BLOCK_R, BLOCK_D], dtype=tl.float32)
    if sum_ptr is not None:  # before the loop: behind it both would be in registers
        acc = tl.load(sum_ptr + at_part + place, mask=mask, other=0.0)
    slope_ptr += r.to(tl.int64)[:, None] * (width * ALIGNED)
    first = part * split * BLOCK_C
    last = tl.minimum(first + split * BLOCK_C, C - first_column)
    for start in range(first, last, BLOCK_C):
        at = start + tl.arange(0, BLOCK_C)
        c = first_column + at
        present = c < C
        if col_bias_ptr is not None:
            # what stands outside the catalogue may be NaN
            present = tl.load(col_bias_ptr + c, mask=present, other=float("-inf")) != float("-inf")
        col = c
        if col_id_ptr is not None:
            col = tl.load(col_id_ptr + c, mask=present, other=0)
        cols = load_rows(col_ptr, col, present, d0, D, BLOCK_D)
        # the pass has written whole blocks of columns: a mask of rows alone, which leaves the loads wide
        slopes = tl.load(slope_ptr + at[None, :], mask=live[:, None], other=0.0)
        if slopes.dtype == tl.bfloat16:
            acc = tl.dot(slopes, cols, acc)
            if PLANES == 2:
                rest = tl.load(slope_ptr + (plane * ALIGNED + at)[None, :], mask=live[:, None], other=0.0)
                acc = tl.dot(rest, cols, acc)
        else:
            # float16 would lose slopes below 6e-8; its rows are exact in TF32
            acc = tl.dot(slopes, cols.to(tl.float32), acc, input_precision=PRECISION)
    if row_scale_ptr is not None:
        acc *= tl.load(row_scale_ptr + first_row + r, mask=live, other=0.0)[:, None]
    tl.store(out_ptr + at_part + place, acc, mask=mask)


class Workspace:
    """Slopes of one piece of a logit matrix at a time, and the rows' gradients, which are whole after the last piece."""

    def __init__(
        self,
        rows: Axis,
        cols: Axis,
        dtype: torch.dtype,
        blocks: tuning.TileBlocks,
        precision: tuning.Precision,
        on: tuning.Target,
    ) -> None:
        R, C, (_, D) = rows.length, cols.length, rows.matrix.shape
        device, given = rows.matrix.device, rows.matrix.dtype
        self.rows, self.cols, self.precision = rows, cols, precision
        width = min(C, max(WIDTH, ENTRIES // (128 * max(1, triton.cdiv(R, 128)))))  # all rows, in whole blocks
        self.blocks = tuning.slope_product(D, given, precision.gradients, on, width < C)
        step = max(blocks.BLOCK_R, self.blocks.BLOCK_R)
        height = min(R, max(1, ENTRIES // max(width, 1) // step) * step)
        # a piece ends where a part of columns ends
        self.parts, self.split = tuning.column_splits(height, width, blocks, on, least=4)
        width = self.parts * self.split
        self.pieces = [
            (lo, min(lo + height, R), first, min(first + width, C))
            for lo in range(0, R, height)
            for first in range(0, max(C, 1), width)
        ]
        is_split = given == torch.bfloat16
        planes = 2 if is_split and precision.gradients != "tf32" else 1
        padded = triton.cdiv(height, step) * step
        self.entries = torch.empty(
            planes, padded, width, dtype=torch.bfloat16 if is_split else torch.float32, device=device
        )
        self.strides = tuple(x // ALIGNED.value for x in self.entries.stride()[:2])
        programs = triton.cdiv(height, self.blocks.BLOCK_R) * triton.cdiv(D, self.blocks.BLOCK_D)
        blocks_of_columns = max(1, triton.cdiv(width, self.blocks.BLOCK_C))
        wanted = 8 * on.processors // self.blocks.num_warps  # eight warps a multiprocessor
        parts = max(1, min(PARTS, wanted // programs, blocks_of_columns // 4))
        self.columns = triton.cdiv(blocks_of_columns, parts)  # of a part of the product, in blocks
        self.products = triton.cdiv(blocks_of_columns, self.columns)
        self.gradient = torch.empty(R, D, dtype=dtype, device=device)
        self.sums = None
        if self.products > 1 or (dtype != torch.float32 and width < C):
            self.sums = torch.empty(self.products * height * D, dtype=torch.float32, device=device)

    def multiply(self, first_row: int, last_row: int, first: int, last: int) -> None:
        """Add the product of the piece's slopes, which stand in the workspace, by its columns."""
        R, D, blocks = last_row - first_row, self.gradient.shape[1], self.blocks
        part = self.gradient[first_row:last_row]
        sums = part[None] if self.sums is None else self.sums[: self.products * R * D].view(self.products, R, D)
        is_last = last == self.cols.length
        out = part if is_last and self.products == 1 else sums
        with torch.cuda.device_of(self.gradient):
            _slope_product_kernel[(triton.cdiv(R, blocks.BLOCK_R), self.products, triton.cdiv(D, blocks.BLOCK_D))](
                self.entries, self.cols.matrix, self.cols.ids, self.cols.bias, self.rows.scale if is_last else None,
                sums if first > 0 else None, out, R, last, self.columns, first_row, first, *self.strides,
                len(self.entries), D, BLOCK_R=blocks.BLOCK_R, BLOCK_C=blocks.BLOCK_C, BLOCK_D=blocks.BLOCK_D,
                PRECISION=self.precision.gradients, num_warps=blocks.num_warps, num_stages=blocks.num_stages,
                enable_fp_fusion=True,
            )  # fmt: skip
        if is_last and self.products > 1:
            torch.sum(sums, 0, dtype=part.dtype, out=part) if part.dtype == torch.float32 else part.copy_(sums.sum(0))
