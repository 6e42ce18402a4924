"""Cached index tensors (row offsets, row of each entry) for a batch shape.

For small batches, creating them costs more than using them.
"""

from functools import lru_cache

import torch
from torch import Tensor

LARGEST = 1 << 16  # positions; larger ones are made each time, so that at most 16 MiB are kept


def starts(rows: int, width: int) -> Tensor:
    """Return where each row's ``width`` entries begin, and the end: ``[rows + 1]`` int64 on a CPU. Not to be written to."""
    return (_kept_starts if rows <= LARGEST else _make_starts)(rows, width)


def row_of_entry(rows: int, width: int) -> Tensor:
    """Return the row of each entry, ``[rows * width]`` int64 on a CPU. Not to be written to."""
    return (_kept_rows if rows * width <= LARGEST else _make_rows)(rows, width)


def _make_starts(rows: int, width: int) -> Tensor:
    with torch.inference_mode(False):  # what is made in that mode cannot be used outside it
        return torch.arange(rows + 1, device="cpu") * width


def _make_rows(rows: int, width: int) -> Tensor:
    with torch.inference_mode(False):
        return torch.arange(rows, device="cpu").repeat_interleave(width)


_kept_starts, _kept_rows = lru_cache(maxsize=16)(_make_starts), lru_cache(maxsize=16)(_make_rows)
