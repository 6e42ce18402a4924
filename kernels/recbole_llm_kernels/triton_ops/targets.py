"""Positive entries of a logit matrix, as each row's list of tiles that hold any, with a bit per column.

A kernel that walks a row's tiles in ascending order takes at most one entry per tile, however many targets the tile
holds: no search, one branch for all rows of a block, and a row that targets everything costs no more than one that
targets little.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from recbole_llm_kernels.checks import disorder, mask_ids, rows_with

TILE = 64  # columns per entry: the bits of an int64


class Marks(NamedTuple):
    """Entries of all rows, row by row; within a row tiles ascend."""

    offsets: Tensor  # [rows + 1] int64, where each row's entries begin
    tiles: Tensor  # [T] int32, an entry's columns divided by TILE
    bits: Tensor  # [T] int64, bit c: column TILE * tile + c is marked
    bad: (
        Tensor | None
    )  # [rows] bool: a column of the row is out of range, and left out, or smaller than the one before it


def mark(offsets: Tensor, columns: Tensor, n_columns: int) -> Marks:
    """Marks of row lists: ``columns[offsets[b]:offsets[b + 1]]`` belong to row b and ascend; equal neighbours count once.

    Nothing is read back: the T entries of the result are an upper bound, those behind the last one are never visited.
    """
    again, falls = disorder(offsets, columns)
    inside, stray = mask_ids(columns.long(), n_columns)
    return _entries(offsets, inside, again | stray)._replace(bad=rows_with(falls | stray, offsets))


def mark_transposed(offsets: Tensor, columns: Tensor, n_columns: int) -> Marks:
    """Marks of the transposed matrix: rows are the columns of ``mark``."""
    row = rows_of(offsets, len(columns))
    key = torch.where((columns < 0) | (columns >= n_columns), n_columns, columns)
    key, order = torch.sort(key, stable=True)
    ends = torch.searchsorted(key, torch.arange(n_columns + 1, dtype=key.dtype, device=key.device))
    row = row[order].long()
    return _entries(ends, row, disorder(ends, row)[0])


def _entries(offsets: Tensor, columns: Tensor, left_out: Tensor) -> Marks:
    """An entry for every run of a row's columns in one tile; columns that are left out set no bit."""
    total, tile = len(columns), columns // TILE
    is_new = torch.zeros(total + 1, dtype=torch.bool, device=columns.device)
    is_new[1:total] = tile[1:] != tile[:-1]
    is_new.index_fill_(0, offsets.long(), True)
    entry = is_new.cumsum(0) - 1  # of every column, and behind them the number of entries
    bit = torch.ones_like(columns).bitwise_left_shift_(columns % TILE).masked_fill_(left_out, 0)
    tiles = torch.zeros(total, dtype=torch.int32, device=columns.device)
    bits = torch.zeros(total, dtype=torch.int64, device=columns.device)
    place = entry[:total]
    tiles.scatter_(0, place, tile.int())  # all columns of an entry write the same tile
    bits.scatter_add_(0, place, bit)  # integers: the order of the sum does not matter
    return Marks(entry[offsets.long()], tiles, bits, None)


def rows_of(offsets: Tensor, total: int) -> Tensor:
    """The row of every entry of row lists, ``[total]``; no synchronisation."""
    place = torch.arange(total, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets[1:], place, right=True).clamp_(max=max(0, len(offsets) - 2))
