r"""Weighted sums of the rows that ragged lists name: pooled histories.

    out[b] = sum over e in [offsets_b, offsets_{b+1}) of weight_e vectors[ids_e]

A program holds one list's sum in registers and loads BLOCK_E rows at a time, so that as many loads are in flight. One
launch, nothing is filled before it. Bytes: E (D s + 12) read, B D s written. The gradient is a segmented sum over
(id, list, weight), see ``segment_sum``. Nothing of shape [E, D] is stored. A list is one program's work: one that is far
longer than the others is waited for.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from recbole_llm_kernels.triton_ops import tuning
from recbole_llm_kernels.triton_ops.segment_sum import sort_by, sum_segments
from recbole_llm_kernels.triton_ops.targets import rows_of


@triton.jit(do_not_specialize=["N"])
def _pool_kernel(
    vector_ptr,  # [N, D]
    offset_ptr,  # [B + 1]
    id_ptr,  # [E]
    weight_ptr,  # [E]
    out_ptr,  # [B, D] out
    N,
    D: tl.constexpr,
    BLOCK_E: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    begin = tl.load(offset_ptr + b).to(tl.int64)
    end = tl.load(offset_ptr + b + 1).to(tl.int64)
    acc = tl.zeros([BLOCK_D], dtype=tl.float32)
    strays = 0
    for first in range(begin, end, BLOCK_E):
        e = first + tl.arange(0, BLOCK_E)
        live = e < end
        row = tl.load(id_ptr + e, mask=live, other=0).to(tl.int64)
        known = live & (row >= 0) & (row < N)
        strays += tl.sum((live & ~known).to(tl.int32), axis=0)
        weight = tl.load(weight_ptr + e, mask=known, other=0.0).to(tl.float32)
        # int64 row offsets: id * D passes 2**31 at 33.5M rows of D = 64
        at = row[:, None] * D + d[None, :]
        rows = tl.load(vector_ptr + at, mask=known[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        acc += tl.sum(weight[:, None] * rows, axis=0)
    acc = tl.where(strays > 0, float("nan"), acc)
    tl.store(out_ptr + b * D + d, acc, mask=d < D)


def pool_fwd(vectors: Tensor, offsets: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Pooled rows ``[B, D]`` in the dtype of ``vectors``; a list with an id out of range is NaN."""
    B, D = len(offsets) - 1, vectors.shape[1]
    out = torch.empty(B, D, dtype=vectors.dtype, device=vectors.device)
    if B:
        # 2,048 elements a step, 16 a thread: 32 rows of 64 columns are in flight at once
        BLOCK_D = min(tuning.padded(D), 128)
        with torch.cuda.device_of(vectors):
            _pool_kernel[(B, triton.cdiv(D, BLOCK_D))](
                vectors, offsets, ids, weights, out, len(vectors), D,
                BLOCK_E=2048 // BLOCK_D, BLOCK_D=BLOCK_D, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip
    return out


def pool_bwd(grad: Tensor, offsets: Tensor, ids: Tensor, weights: Tensor, rows: int, dtype: torch.dtype) -> Tensor:
    """Gradient of ``vectors``, ``[rows, D]`` in ``dtype``, from upstream ``grad`` [B, D]."""
    key = ids.masked_fill((ids < 0) | (ids >= rows), rows)
    one = torch.ones((), dtype=torch.float32, device=grad.device)
    row, value = rows_of(offsets, len(ids)), weights.to(torch.float32)
    out, _ = sum_segments(sort_by(key), rows, row, value, one, grad.contiguous(), 1, dtype, None)
    assert out is not None
    return out
