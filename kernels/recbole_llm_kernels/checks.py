"""Checks that look at ids: they read memory, so on a GPU they run only with RECBOLE_LLM_KERNELS_DEBUG=1.

Elsewhere ids are made safe without a look: an access out of range is masked and the loss becomes NaN.
"""

import os

import torch
from torch import Tensor


def synchronising_checks(device: torch.device) -> bool:
    """Whether ids on ``device`` are checked and errors raised: always on a CPU, elsewhere in debug mode."""
    return device.type == "cpu" or os.environ.get("RECBOLE_LLM_KERNELS_DEBUG", "") == "1"


def check_ids(name: str, ids: Tensor, rows: int) -> None:
    """Raise IndexError where an id is outside ``[0, rows)``."""
    if ids.numel() == 0:
        return
    low, high = (int(x) for x in torch.aminmax(ids))
    if low < 0 or high >= rows:
        bad = low if low < 0 else high
        count = int(((ids < 0) | (ids >= rows)).sum())
        raise IndexError(
            f"{name} holds {bad}, but its matrix has {rows} rows (valid ids: 0 to {rows - 1}); "
            f"{count} of {ids.numel()} ids are out of range"
        )


def check_inside(name: str, ids: Tensor, item_bias: Tensor | None) -> None:
    """Raise ValueError where a target is an item outside the catalogue."""
    if item_bias is None or ids.numel() == 0:
        return
    outside = item_bias[ids.long()] == -torch.inf
    if bool(outside.any()):
        example = int(ids[outside][0])
        raise ValueError(
            f"{name} holds {int(outside.sum())} targets outside the catalogue (item_bias is -inf), "
            f"for example item {example}; leave them out of the targets, or give them a finite bias"
        )


def check_rows(offsets_name: str, offsets: Tensor, ids_name: str, ids: Tensor) -> bool:
    """Raise ValueError unless the offsets rise from 0 to the number of ids and no row's ids descend.

    Returns:
        Whether some row names an id more than once.
    """
    first, last = int(offsets[0]), int(offsets[-1])
    if first != 0 or last != ids.numel():
        raise ValueError(
            f"{offsets_name} must run from 0 to the {ids.numel()} entries of {ids_name}, got {first} to {last}"
        )
    steps = offsets.diff()
    if bool((steps < 0).any()):
        raise ValueError(f"{offsets_name} must not decrease, but it does at row {int((steps < 0).nonzero()[0, 0])}")
    again, falls = disorder(offsets, ids)
    if bool(falls.any()):
        place = int(falls.nonzero()[0, 0])
        raise ValueError(
            f"{ids_name} must ascend within a row, but entries {place - 1} and {place} are "
            f"{int(ids[place - 1])} and {int(ids[place])}; sort the ids of each row"
        )
    return bool(again.any())


def disorder(offsets: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Where an id equals the one before it in its row, and where it is smaller: [T] bool each; no synchronisation."""
    starts = torch.zeros(len(ids) + 1, dtype=torch.bool, device=ids.device).index_fill_(0, offsets.long(), True)
    inner, step = ~starts[: len(ids)], ids.diff(prepend=ids[:1])
    return inner & (step == 0), inner & (step < 0)


def rows_with(flags: Tensor, offsets: Tensor) -> Tensor:
    """Which rows hold an entry whose flag is set, [B] bool; no synchronisation."""
    return torch.nn.functional.pad(flags.cumsum(0), (1, 0))[offsets.long()].diff() > 0


def without_repeats(offsets: Tensor, ids: Tensor) -> tuple[Tensor, Tensor]:
    """The same row lists with equal neighbours once; reads memory, as the number of ids that are left is not known."""
    kept = ~disorder(offsets, ids)[0]
    return torch.nn.functional.pad(kept.cumsum(0), (1, 0))[offsets.long()].to(offsets.dtype), ids[kept]


def mask_ids(ids: Tensor, rows: int) -> tuple[Tensor, Tensor]:
    """Ids with those out of range replaced by 0, and where that happened; no synchronisation."""
    bad = (ids < 0) | (ids >= rows)
    return ids.masked_fill(bad, 0), bad
