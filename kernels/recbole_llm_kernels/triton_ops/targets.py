"""Positive entries of a logit matrix, as each row's list of tiles that hold any, with a bit per column.

A kernel that walks a row's tiles in ascending order takes at most one entry per tile, however many targets the tile
holds: no search, no branch, and a row that targets everything costs no more than one that targets little.
"""

from typing import NamedTuple

import torch
from torch import Tensor

TILE = 64  # columns per entry: the bits of an int64


class Marks(NamedTuple):
    """Entries of all rows, row by row; within a row tiles ascend."""

    offsets: Tensor  # [rows + 1] int64, where each row's entries begin
    tiles: Tensor  # [T] int32, an entry's columns divided by TILE
    bits: Tensor  # [T] int64, bit c: column TILE * tile + c is marked
    stray: Tensor  # [] bool: some column is out of range, and left out


def mark(offsets: Tensor, columns: Tensor, n_columns: int) -> Marks:
    """Marks of row lists: ``columns[offsets[b]:offsets[b + 1]]``, ascending and unique, belong to row b.

    Nothing is read back: the T entries of the result are an upper bound, those behind the last one are never visited.
    """
    total = len(columns)
    columns = columns.long()
    stray = (columns < 0) | (columns >= n_columns)
    columns = columns.masked_fill(stray, 0)
    row = rows_of(offsets, total)
    key = row * (n_columns // TILE + 1) + columns // TILE
    starts = torch.ones(total + 1, dtype=torch.int64, device=columns.device)
    starts[0] = 0
    starts[1:total] = key[1:] != key[:-1]
    entry = starts.cumsum(0)  # of every target, and behind them the number of entries
    bit = torch.ones_like(columns).bitwise_left_shift_(columns % TILE).masked_fill_(stray, 0)
    tiles = torch.zeros(total, dtype=torch.int32, device=columns.device)
    bits = torch.zeros(total, dtype=torch.int64, device=columns.device)
    place = entry[:total]
    tiles.scatter_(0, place, (columns // TILE).int())  # all targets of an entry write the same tile
    bits.scatter_add_(0, place, bit)  # integers: the order of the sum does not matter
    return Marks(entry[offsets.long()], tiles, bits, stray.any())


def mark_transposed(offsets: Tensor, columns: Tensor, n_columns: int) -> Marks:
    """Marks of the transposed matrix: rows are the columns of ``mark``."""
    row = rows_of(offsets, len(columns))
    key = torch.where((columns < 0) | (columns >= n_columns), n_columns, columns)
    key, order = torch.sort(key, stable=True)
    ends = torch.searchsorted(key, torch.arange(n_columns + 1, dtype=key.dtype, device=key.device))
    return mark(ends, row[order], len(offsets) - 1)


def rows_of(offsets: Tensor, total: int) -> Tensor:
    """The row of every entry of row lists, ``[total]``; no synchronisation."""
    place = torch.arange(total, dtype=offsets.dtype, device=offsets.device)
    return torch.searchsorted(offsets[1:], place, right=True).clamp_(max=max(0, len(offsets) - 2))
