"""Positive entries of a logit matrix, as each row's list of tiles that hold any, with a bit per column.

A kernel that walks a row's tiles in ascending order takes at most one entry per tile, however many targets the tile
holds: no search, one branch for all rows of a block, and a row that targets everything costs no more than one that
targets little. One launch makes the lists of all rows.
"""

from typing import NamedTuple

import torch
import triton
import triton.language as tl
from torch import Tensor

from recbole_llm_kernels.triton_ops.pairs import order_pairs
from recbole_llm_kernels.triton_ops.segment_sum import Sorted

TILE = 64  # columns per entry: the bits of an int64


class Marks(NamedTuple):
    """Entries of all rows; within a row tiles ascend. What stands between the rows' entries is not set."""

    starts: Tensor  # [rows] integers, where each row's entries begin
    ends: Tensor  # [rows] int64, where they end
    tiles: Tensor  # [T] int32, an entry's columns divided by TILE
    bits: Tensor  # [T] int64, bit c: column TILE * tile + c is marked
    # [rows] bool: a column of the row is out of range, and left out, or smaller than the one before it
    bad: Tensor | None


@triton.jit
def mark_at_or_behind(tile_ptr, low, high, tile, width):
    """First of the ascending entries low to high that is at ``tile`` or behind it; width: the most that high - low is."""
    while width > 0:
        middle = (low + high) // 2
        found = tl.load(tile_ptr + middle, mask=low < high, other=0)
        is_before = (low < high) & (found < tile)
        high = tl.where((low < high) & ~is_before, middle, high)
        low = tl.where(is_before, middle + 1, low)
        width = width // 2
    return low


@triton.jit
def _column(column_ptr, list_ptr, t, there, lists):
    """Column of entry t; with ``list_ptr`` it is the list that holds the pair ``column_ptr[t]``."""
    column = tl.load(column_ptr + t, mask=there, other=0).to(tl.int64)
    if list_ptr is not None:
        low = tl.zeros_like(column)
        column = mark_at_or_behind(list_ptr + 1, low, tl.where(there, low + lists, low), column + 1, lists)
    return column


@triton.jit(do_not_specialize=["rows", "n_columns", "total", "lists"])
def _mark_kernel(
    offset_ptr,  # [rows + 1]; None: rows are those of key_ptr
    key_ptr,  # [T] rows in ascending order, or None
    column_ptr,  # [T] columns of the rows; with list_ptr: pairs
    list_ptr,  # [lists + 1] or None: where the lists begin that hold the pairs; a pair's list is its column
    start_ptr,  # [rows] int64 out, or None
    end_ptr,  # [rows] int64 out
    tile_ptr,  # [T] int32 out
    bit_ptr,  # [T] int64 out
    bad_ptr,  # [rows] bool out, or None
    rows,
    n_columns,
    total,
    lists,
    MARKED: tl.constexpr,  # columns of one mark
    BLOCK_B: tl.constexpr,
    BLOCK_T: tl.constexpr,
):
    b = tl.program_id(0).to(tl.int64) * BLOCK_B + tl.arange(0, BLOCK_B)
    live = b < rows
    if key_ptr is None:
        begin = tl.load(offset_ptr + b, mask=live, other=0).to(tl.int64)
        end = tl.load(offset_ptr + b + 1, mask=live, other=0).to(tl.int64)
    else:
        low = tl.zeros([BLOCK_B], dtype=tl.int64)
        high = tl.where(live, low + total, low)
        begin = mark_at_or_behind(key_ptr, low, high, b, total)
        end = mark_at_or_behind(key_ptr, begin, high, b + 1, total)
    count = tl.zeros([BLOCK_B], dtype=tl.int64)  # entries so far
    carried = tl.zeros([BLOCK_B], dtype=tl.int64)  # bits of the tile that the last column stands in
    carried_tile = tl.full([BLOCK_B], -1, dtype=tl.int64)
    bad = tl.zeros([BLOCK_B], dtype=tl.int32)
    place = tl.arange(0, BLOCK_T)
    for t0 in range(0, tl.max(end - begin, axis=0), BLOCK_T):
        t = begin[:, None] + t0 + place[None, :]
        there = t < end[:, None]
        has_before, has_after = there & (t > begin[:, None]), t + 1 < end[:, None]
        column = _column(column_ptr, list_ptr, t, there, lists)
        before = _column(column_ptr, list_ptr, t - 1, has_before, lists)
        after = _column(column_ptr, list_ptr, t + 1, has_after, lists)
        inside = there & (column >= 0) & (column < n_columns)
        again = has_before & (before == column)
        bad = tl.maximum(bad, tl.max(((there & ~inside) | (has_before & (before > column))).to(tl.int32), axis=1))
        tile = column // MARKED
        is_first = there & ~(has_before & (before // MARKED == tile))
        is_last = there & ~(has_after & (after // MARKED == tile))
        one = tl.full([BLOCK_B, BLOCK_T], 1, dtype=tl.int64)
        bit = tl.where(inside & ~again, one << (column % MARKED), 0)
        # each bit of a tile is set once: the sum is the union
        same = there[:, None, :] & (tile[:, :, None] == tile[:, None, :])
        bits = tl.sum(tl.where(same, bit[:, None, :], 0), axis=2)
        bits += tl.where((tile == carried_tile[:, None]) & (t0 > 0), carried[:, None], 0)
        rank = tl.sum((is_first[:, None, :] & (place[None, None, :] <= place[None, :, None])).to(tl.int32), axis=2)
        at = begin[:, None] + count[:, None] + rank - 1
        tl.store(tile_ptr + at, tile.to(tl.int32), mask=is_last)
        tl.store(bit_ptr + at, bits, mask=is_last)
        count += tl.sum(is_first.to(tl.int64), axis=1)
        is_end = place == BLOCK_T - 1
        carried = tl.sum(tl.where(is_end[None, :], bits, 0), axis=1)
        carried_tile = tl.sum(tl.where(is_end[None, :], tile, 0), axis=1)
    if start_ptr is not None:
        tl.store(start_ptr + b, begin, mask=live)
    tl.store(end_ptr + b, begin + count, mask=live)
    if bad_ptr is not None:
        tl.store(bad_ptr + b, bad != 0, mask=live)


def mark(offsets: Tensor, columns: Tensor, n_columns: int) -> Marks:
    """Marks of row lists: ``columns[offsets[b]:offsets[b + 1]]`` belong to row b and ascend; equal neighbours count once."""
    rows = max(0, len(offsets) - 1)
    ends = torch.empty(rows, dtype=torch.int64, device=columns.device)
    marks = Marks(offsets[:rows], ends, *_entries(columns), torch.empty_like(ends, dtype=torch.bool))
    _launch(rows, n_columns, offsets, None, columns, None, None, *marks[1:])
    return marks


def mark_transposed(offsets: Tensor, columns: Tensor, n_columns: int, by: Sorted | None = None) -> Marks:
    """Marks of the transposed matrix: rows are the columns of ``mark``; ``by``: the entries by column, if they are known."""
    if by is None:
        _, by = order_pairs(columns, columns, None, n_columns, n_columns, [False, True, False])
        assert by is not None
    starts = torch.empty(n_columns, dtype=torch.int64, device=columns.device)
    marks = Marks(starts, torch.empty_like(starts), *_entries(columns), None)
    _launch(n_columns, max(0, len(offsets) - 1), None, by.key, by.order, offsets, *marks)
    return marks


def _entries(columns: Tensor) -> tuple[Tensor, Tensor]:
    return torch.empty_like(columns, dtype=torch.int32), torch.empty_like(columns, dtype=torch.int64)


def _launch(rows: int, n_columns: int, offsets: Tensor | None, key: Tensor | None, columns: Tensor, lists: Tensor | None,
            *out: Tensor | None) -> None:  # fmt: skip
    if rows:
        with torch.cuda.device_of(columns):
            _mark_kernel[(triton.cdiv(rows, 8),)](
                offsets, key, columns, lists, *out, rows, n_columns, len(columns),
                0 if lists is None else len(lists) - 1, TILE, BLOCK_B=8, BLOCK_T=16, num_warps=4, enable_fp_fusion=True,
            )  # fmt: skip


def rows_of(offsets: Tensor, total: int) -> Tensor:
    """The row of every entry of row lists, ``[total]``; no synchronisation."""
    place = torch.arange(total, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets[1:], place, right=True).clamp_(max=max(0, len(offsets) - 2))
