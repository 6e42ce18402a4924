r"""Sums of weighted rows by segment: the gradient of a gather.

    out[r] = sum over p with key_p = r of factor_{p/W} value_p source[in_id_{p/W}]

Terms are sorted by key and cut into chunks of equal length, whatever the segments, so a hot row costs no more than the
rest. A segment inside a chunk is written at once; one that crosses chunks leaves a partial sum in each, and its first
chunk adds them up. Every sum has a fixed order: no atomics, bitwise repeatable. Nothing of shape [P, D] is stored.

Bytes: 2 P D s (rows read, at most as much written) + 24 P; beside it 8 D ceil(P / CHUNK) of partial sums.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from recbole_llm_kernels.triton_ops import tuning


class Sorted(NamedTuple):
    """Terms in the order of the output row they belong to."""

    key: Tensor  # [P] ascending, int32 or int64; the number of output rows or above: the term is left out
    order: Tensor  # [P] the terms in that order


def sort_by(key: Tensor) -> Sorted:
    """Terms by ``key`` [P]; equal keys keep their order."""
    return Sorted(*torch.sort(key, stable=True))


@triton.jit(do_not_specialize=["P", "n_out"])
def _chunk_sum_kernel(
    key_ptr,  # [P] ascending; n_out and above: not summed
    order_ptr,  # [P] the terms in that order
    in_id_ptr,  # [P / W] rows of source, or None: p / W itself
    value_ptr,  # [P] fp32, or None: 1
    factor_ptr,  # [P / W] or [] fp32
    source_ptr,  # [n_in, D]
    out_ptr,  # [n_out, D] out, or None
    out_value_ptr,  # [n_out] out: sums of the values alone, or None
    head_ptr,  # [chunks, D + 1] fp32 out: sum of a chunk's first segment where that began before the chunk
    tail_ptr,  # [chunks, D + 1] fp32 out: sum of its last segment where that goes on behind it
    P,
    n_out,
    W: tl.constexpr,  # no division where it is 1; negatives per row, so it does not change from batch to batch
    D: tl.constexpr,
    FACTOR_PER_ROW: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_C: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64) * BLOCK_C + tl.arange(0, BLOCK_C)
    d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
    first = chunk * CHUNK
    before = tl.load(key_ptr + first - 1, mask=(first > 0) & (first < P), other=-1)
    key = tl.load(key_ptr + first, mask=first < P, other=n_out)
    in_head = before == key
    acc = tl.zeros([BLOCK_C, BLOCK_D], dtype=tl.float32)
    total = tl.zeros([BLOCK_C], dtype=tl.float32)
    for j in range(CHUNK):
        p = first + j
        used = (p < P) & (key < n_out)
        after = tl.load(key_ptr + p + 1, mask=p + 1 < P, other=n_out)
        term = tl.load(order_ptr + p, mask=used, other=0)
        row = term // W
        v = tl.load(factor_ptr + row * FACTOR_PER_ROW, mask=used, other=0.0)
        if value_ptr is not None:
            v = v * tl.load(value_ptr + term, mask=used, other=0.0)
        v = tl.where(used, v, 0.0)
        ends = used & (after != key)
        goes_on = used & (after == key) & (j == CHUNK - 1)
        whole = ends & ~in_head
        into_head = (ends | goes_on) & in_head
        into_tail = goes_on & ~in_head
        if out_ptr is not None:
            if in_id_ptr is not None:
                row = tl.load(in_id_ptr + row, mask=used, other=0).to(tl.int64)
            at = used[:, None] & (d < D)[None, :]
            x = tl.load(source_ptr + row[:, None] * D + d[None, :], mask=at, other=0.0)
            acc += v[:, None] * x.to(tl.float32)
            out = out_ptr + key.to(tl.int64)[:, None] * D + d[None, :]
            tl.store(out, acc, mask=whole[:, None] & at)
            part = chunk[:, None] * (D + 1) + d[None, :]
            tl.store(head_ptr + part, acc, mask=into_head[:, None] & at)
            tl.store(tail_ptr + part, acc, mask=into_tail[:, None] & at)
            acc = tl.where(ends[:, None], 0.0, acc)
        if out_value_ptr is not None:
            total += v
            if tl.program_id(1) == 0:
                tl.store(out_value_ptr + key, total, mask=whole)
                tl.store(head_ptr + chunk * (D + 1) + D, total, mask=into_head)
                tl.store(tail_ptr + chunk * (D + 1) + D, total, mask=into_tail)
            total = tl.where(ends, 0.0, total)
        in_head = in_head & ~ends
        key = after


@triton.jit(do_not_specialize=["P", "n_out"])
def _join_chunks_kernel(
    key_ptr,  # [P] ascending
    out_ptr,  # [n_out, D] out, or None
    out_value_ptr,  # [n_out] out, or None
    head_ptr,  # [chunks, D + 1] fp32
    tail_ptr,  # [chunks, D + 1] fp32
    P,
    n_out,
    D: tl.constexpr,
    CHUNK: tl.constexpr,
    BLOCK_G: tl.constexpr,
    BLOCK_D: tl.constexpr,
):
    chunk = tl.program_id(0).to(tl.int64)
    first = chunk * CHUNK
    last = first + CHUNK - 1
    key = tl.load(key_ptr + last, mask=last < P, other=n_out)
    after = tl.load(key_ptr + last + 1, mask=last + 1 < P, other=n_out)
    start = tl.load(key_ptr + first)
    before = tl.load(key_ptr + first - 1, mask=first > 0, other=-1)
    if (key < n_out) & (after == key) & ((start != key) | (before != key)):
        # the segment begins in this chunk and goes on behind it
        d = tl.program_id(1) * BLOCK_D + tl.arange(0, BLOCK_D)
        if out_ptr is not None:
            acc = tl.load(tail_ptr + chunk * (D + 1) + d, mask=d < D, other=0.0)
        if out_value_ptr is not None:
            total = tl.load(tail_ptr + chunk * (D + 1) + D)
        following = chunk + 1 + tl.arange(0, BLOCK_G)
        more = tl.full([], 1, tl.int32)
        while more > 0:
            at = following * CHUNK
            same = tl.load(key_ptr + at, mask=at < P, other=n_out) == key
            if out_ptr is not None:
                mask = same[:, None] & (d < D)[None, :]
                head = tl.load(head_ptr + following[:, None] * (D + 1) + d[None, :], mask=mask, other=0.0)
                acc += tl.sum(head, axis=0)
            if out_value_ptr is not None:
                total += tl.sum(tl.load(head_ptr + following * (D + 1) + D, mask=same, other=0.0), axis=0)
            following += BLOCK_G
            more = tl.min(same.to(tl.int32), axis=0)
        if out_ptr is not None:
            tl.store(out_ptr + key.to(tl.int64) * D + d, acc, mask=d < D)
        if out_value_ptr is not None:  # noqa: SIM102
            if tl.program_id(1) == 0:  # nested for Triton 3.2
                tl.store(out_value_ptr + key, total)


def sum_segments(
    by: Sorted,
    n_out: int,
    in_id: Tensor | None,
    value: Tensor | None,
    factor: Tensor,
    source: Tensor,
    width: int,
    dtype: torch.dtype | None,
    value_dtype: torch.dtype | None,
) -> tuple[Tensor | None, Tensor | None]:
    """Sums of rows ``[n_out, D]`` in ``dtype`` and of values ``[n_out]`` in ``value_dtype``; a None dtype: not wanted.

    Args:
        by: the terms by output row.
        n_out: rows of the result.
        in_id: rows of ``source``, ``[P / width]``; None: term p takes row p / width.
        value: factors of the terms, ``[P]`` float32; None: all 1.
        factor: factors of ``width`` terms in turn, ``[P / width]`` or ``[]``, float32.
        source: ``[n_in, D]``.
        width: W of the formula.
        dtype: of the row sums.
        value_dtype: of the value sums.
    """
    key, order = by
    P, D = key.numel(), source.shape[1]
    out = None if dtype is None else torch.zeros(n_out, D, dtype=dtype, device=source.device)
    out_value = None if value_dtype is None else torch.zeros(n_out, dtype=value_dtype, device=source.device)
    if P == 0 or n_out == 0 or (out is None and out_value is None):
        return out, out_value
    blocks = tuning.segment_sum(D, source.dtype, tuning.target(source.device))
    chunks = triton.cdiv(P, blocks.CHUNK)
    head = torch.empty(2, chunks, D + 1, dtype=torch.float32, device=source.device)
    columns = triton.cdiv(D, blocks.BLOCK_D) if out is not None else 1
    with torch.cuda.device_of(source):
        _chunk_sum_kernel[(triton.cdiv(chunks, blocks.BLOCK_C), columns)](
            key, order, in_id, value, factor, source, out, out_value, head[0], head[1],
            P, n_out, width, D, factor.ndim > 0,
            CHUNK=blocks.CHUNK, BLOCK_C=blocks.BLOCK_C, BLOCK_D=blocks.BLOCK_D,
            num_warps=blocks.num_warps, enable_fp_fusion=True,
        )  # fmt: skip
        _join_chunks_kernel[(chunks, columns)](
            key, out, out_value, head[0], head[1], P, n_out, D,
            CHUNK=blocks.CHUNK, BLOCK_G=16, BLOCK_D=blocks.BLOCK_D, num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return out, out_value


def segment_sum(out_id: Tensor, in_id: Tensor, value: Tensor, source: Tensor, n_out: int, dtype: torch.dtype) -> Tensor:
    """``[n_out, D]``: sum over p with out_id_p = r of value_p * source[in_id_p], accumulated in float32."""
    one = torch.ones((), device=source.device)
    out, _ = sum_segments(sort_by(out_id), n_out, in_id, value, one, source, 1, dtype, None)
    assert out is not None
    return out
