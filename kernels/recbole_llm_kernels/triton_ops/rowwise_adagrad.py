r"""Row-wise Adagrad on the rows that a step touches.

    g_r      = sum over p with ids_p = r of grad_p
    state_r += |g_r|^2 / D
    w_r     -= lr g_r / (sqrt(state_r) + eps)

The terms are sorted by row and summed by chunks, see ``segment_sum``, each sum at the place of its row's first term; the
kernel here visits those places. Nothing is read back: places that begin no row are masked. Bytes: 2 P D s + 24 P for the
sums, 8 P D written and read between the launches, 2 U D s + 8 U for the U rows that are named.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from recbole_llm_kernels.triton_ops import tuning
from recbole_llm_kernels.triton_ops.sampled import one, sort_key
from recbole_llm_kernels.triton_ops.segment_sum import Sorted, sort_by, sum_segments


@triton.jit(do_not_specialize=["P", "n_rows"])
def _rowwise_adagrad_kernel(
    key_ptr,  # [P] ascending; n_rows: the term is left out
    sum_ptr,  # [P, D] fp32: at the first place of a key, the sum of its terms
    table_ptr,  # [n_rows, D] in and out
    state_ptr,  # [n_rows] fp32, in and out
    P,
    n_rows,
    lr,
    eps,
    D: tl.constexpr,
    BLOCK_P: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    p = tl.program_id(0).to(tl.int64) * BLOCK_P + tl.arange(0, BLOCK_P)
    key = tl.load(key_ptr + p, mask=p < P, other=n_rows).to(tl.int64)
    before = tl.load(key_ptr + p - 1, mask=(p > 0) & (p < P), other=-1).to(tl.int64)
    begins = (p < P) & (key < n_rows) & (key != before)
    square = tl.zeros([BLOCK_P], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = begins[:, None] & (d < D)[None, :]
        g = tl.load(sum_ptr + p[:, None] * D + d[None, :], mask=mask, other=0.0)
        square += tl.sum(g * g, axis=1)
    state = tl.load(state_ptr + key, mask=begins, other=0.0) + square / D
    tl.store(state_ptr + key, state, mask=begins)
    step = lr / (tl.sqrt(state) + eps)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        mask = begins[:, None] & (d < D)[None, :]
        g = tl.load(sum_ptr + p[:, None] * D + d[None, :], mask=mask, other=0.0)
        at = key[:, None] * D + d[None, :]
        w = tl.load(table_ptr + at, mask=mask, other=0.0).to(tl.float32)
        tl.store(table_ptr + at, w - step[:, None] * g, mask=mask)


def rowwise_adagrad(table: Tensor, state: Tensor, ids: Tensor, grad: Tensor, lr: float, eps: float) -> None:
    """Change ``table`` [N, D] and ``state`` [N] float32 in place by the terms ``grad`` [P, D] of the rows ``ids`` [P]."""
    P, (N, D) = len(ids), table.shape
    if P == 0 or N == 0:
        return
    key, order = sort_by(sort_key(ids, N))
    place = torch.searchsorted(key, key)  # of the first term of the same row
    sums, _ = sum_segments(Sorted(place, order), P, None, None, one(table), grad, 1, torch.float32, None)
    blocks = tuning.pairs(D, table.dtype, tuning.target(table.device))
    with torch.cuda.device_of(table):
        _rowwise_adagrad_kernel[(triton.cdiv(P, blocks.BLOCK_P),)](
            key, sums, table, state, P, N, lr, eps, D, BLOCK_P=blocks.BLOCK_P, BLOCK_D=blocks.BLOCK_D,
            num_warps=blocks.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
