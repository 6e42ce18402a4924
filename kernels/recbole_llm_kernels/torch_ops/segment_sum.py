r"""Sums of weighted rows by segment: the gradient of a gather.

    out[r] = sum over p with out_id_p = r of value_p * source[in_id_p]

As a matrix, out = S source with S sparse [n_out, n_source]: nothing of shape [P, D] is stored. A stable sort of
``out_id`` fixes the order of every sum, so results are bitwise repeatable.
"""

from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

LONGEST_SUM = 512  # terms added one after another in float32; a longer segment is summed in pieces, then the pieces
GATHERED = 1 << 19  # elements of a float16 or bfloat16 source converted to float32 at a time: 2 MiB


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums and losses are kept in: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Segments(NamedTuple):
    """Terms grouped by the output row they belong to."""

    order: Tensor  # [P] the terms, those of row 0 first
    offsets: Tensor  # [n_out + 1] where each row's terms begin in ``order``


def sort_segments(out_id: Tensor, n_out: int, live: Tensor | None = None) -> Segments:
    """Group terms by ``out_id``; terms that are not ``live`` are left out of every segment."""
    if live is not None:
        out_id = torch.where(live, out_id, n_out)
    if n_out < 2**31:
        out_id = out_id.int()  # half the sort's traffic
    rows, order = torch.sort(out_id, stable=True)
    bounds = torch.arange(n_out + 1, device=out_id.device, dtype=rows.dtype)
    return Segments(order, torch.searchsorted(rows, bounds))


def sum_segments(segments: Segments, in_id: Tensor, value: Tensor, source: Tensor, dtype: torch.dtype) -> Tensor:
    """``[n_out, D]`` weighted sums of ``source`` rows, accumulated in float32 (float64), rounded once to ``dtype``."""
    order, offsets = segments
    in_id, value = in_id.index_select(0, order), value.index_select(0, order)
    pieces = _pieces(offsets) if order.numel() > LONGEST_SUM else None
    bounds = offsets if pieces is None else pieces.offsets
    if source.dtype == accumulator(source.dtype):
        sums = _bag(in_id, source, bounds, value)
    else:
        sums = _bag_converted(in_id, source, bounds, value)
    if pieces is not None:
        first = torch.arange(len(sums), device=sums.device)
        sums = _bag(first, sums, pieces.owner_offsets, torch.ones_like(sums[:, 0]))
    return sums.to(dtype)


def sum_values(segments: Segments, value: Tensor, dtype: torch.dtype) -> Tensor:
    """``[n_out]`` sums of the values alone, in float64, rounded once to ``dtype``."""
    order, offsets = segments
    one = torch.ones(1, 1, dtype=torch.float64, device=value.device)
    return _bag(torch.zeros_like(order), one, offsets, value.double().index_select(0, order))[:, 0].to(dtype)


def segment_sum(out_id: Tensor, in_id: Tensor, value: Tensor, source: Tensor, n_out: int, dtype: torch.dtype) -> Tensor:
    """Sort and sum in one call; see the module's formula."""
    return sum_segments(sort_segments(out_id, n_out), in_id, value, source, dtype)


class _Pieces(NamedTuple):
    offsets: Tensor  # [pieces + 1] bounds of the pieces in the sorted terms
    owner_offsets: Tensor  # [n_out + 1] bounds of each row's pieces


def _pieces(offsets: Tensor) -> _Pieces | None:
    """Cut segments longer than LONGEST_SUM; None when there is none (on a GPU the cut is always made: no sync)."""
    length = offsets.diff()
    if offsets.device.type == "cpu" and int(length.max()) <= LONGEST_SUM:
        return None
    count = (length + LONGEST_SUM - 1).div(LONGEST_SUM, rounding_mode="floor").clamp(min=1)
    owner_offsets = torch.zeros_like(offsets)
    torch.cumsum(count, 0, out=owner_offsets[1:])
    owner = torch.repeat_interleave(count)
    rank = torch.arange(len(owner), device=offsets.device) - owner_offsets[:-1][owner]
    begin = offsets[:-1][owner] + rank * LONGEST_SUM
    return _Pieces(torch.cat([begin, offsets[-1:]]), owner_offsets)


def _bag(in_id: Tensor, source: Tensor, offsets: Tensor, value: Tensor) -> Tensor:
    if in_id.numel() == 0 or source.shape[0] == 0:
        return source.new_zeros(len(offsets) - 1, source.shape[1])
    end = int(offsets[-1]) if offsets.device.type == "cpu" else len(in_id)
    return embedding_bag(
        in_id[:end].to(offsets.dtype),
        source,
        offsets,
        mode="sum",
        per_sample_weights=value[:end],
        include_last_offset=True,
    )


def _bag_converted(in_id: Tensor, source: Tensor, offsets: Tensor, value: Tensor) -> Tensor:
    """As ``_bag`` for a low-precision source: whole segments at a time, their rows converted to float32 first."""
    sums = torch.zeros(len(offsets) - 1, source.shape[1], dtype=value.dtype, device=source.device)
    chunk = max(1, GATHERED // source.shape[1])
    if offsets.device.type != "cpu":
        return _bag(torch.arange(len(in_id), device=in_id.device), source[in_id].to(value.dtype), offsets, value)
    touched = offsets.diff().nonzero()[:, 0]
    begin, end = offsets[touched], offsets[touched + 1]
    row = 0
    while row < len(touched):
        # as many whole segments as fit; one that does not fit alone is at most LONGEST_SUM long
        stop = max(row + 1, int(torch.searchsorted(end, begin[row] + chunk, right=True)))
        lo, hi = int(begin[row]), int(end[stop - 1])
        local = torch.cat([begin[row:stop], end[stop - 1 : stop]]) - lo
        rows = source.index_select(0, in_id[lo:hi]).to(value.dtype)
        sums[touched[row:stop]] = _bag(torch.arange(hi - lo), rows, local, value[lo:hi])
        row = stop
    return sums
