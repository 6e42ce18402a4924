r"""Sums of weighted rows by segment: the gradient of a gather.

    out[r] = sum over p with out_id_p = r of value_p * source[in_id_p]

As a matrix, out = S source with S sparse [n_out, n_source]: nothing of shape [P, D] is stored. A stable sort of
``out_id`` fixes the order of every sum, so results are bitwise repeatable.
"""

from collections.abc import Callable
from typing import NamedTuple

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from recbole_llm_kernels.torch_ops.positions import starts
from recbole_llm_kernels.torch_ops.radix import stable_order

LONGEST_SUM = 64  # terms added one after another; 100,000 equal terms: 1e-6 off, at 512 7e-6, uncut 1e-3
GATHERED = 1 << 19  # elements of a float16 or bfloat16 source converted to float32 at a time: 2 MiB


def accumulator(dtype: torch.dtype) -> torch.dtype:
    """The dtype sums and losses are kept in: float64 for float64, otherwise float32."""
    return torch.float64 if dtype == torch.float64 else torch.float32


class Segments(NamedTuple):
    """Terms grouped by the output row they belong to."""

    order: Tensor | None  # [P] the terms, those of row 0 first; None: they come so
    offsets: Tensor  # [n_out + 1] where each row's terms begin in ``order``
    longest: int | None = None  # terms of the row that has most; None: not known, as on a GPU


def sort_segments(out_id: Tensor, n_out: int, live: Tensor | None = None) -> Segments:
    """Group terms by ``out_id``; terms that are not ``live`` are left out of every segment."""
    if live is not None:
        out_id = torch.where(live, out_id, n_out)
    order = stable_order(out_id, n_out + 1)  # n_out itself stands for a term that is not live
    if out_id.device.type == "cpu":
        # int32 where it holds the number of terms: half the memory of all that is read with it
        offsets = torch.zeros(n_out + 1, dtype=torch.int32 if len(out_id) < 2**31 else torch.int64)
        count = torch.bincount(out_id, minlength=n_out)[:n_out]
        torch.cumsum(count, 0, dtype=offsets.dtype, out=offsets[1:])
        return Segments(order, offsets, int(count.max()) if n_out else 0)
    # bincount would synchronise
    bounds = torch.arange(n_out + 1, device=out_id.device, dtype=out_id.dtype)
    return Segments(order, torch.searchsorted(out_id[order], bounds))


def sum_segments(segments: Segments, in_id: Tensor, value: Tensor, source: Tensor, dtype: torch.dtype) -> Tensor:
    """``[n_out, D]`` weighted sums of ``source`` rows, accumulated in float32 (float64), rounded once to ``dtype``."""
    order, offsets, longest = segments
    if order is not None:
        in_id, value = in_id.index_select(0, order), value.index_select(0, order)
    bag = _bag if source.dtype == accumulator(source.dtype) else _bag_converted
    sums = bag(in_id, source, offsets, value)
    if in_id.numel() > LONGEST_SUM and offsets.device.type == "cpu":
        if longest is None:
            longest = int(offsets.diff().max())
        if longest > LONGEST_SUM:
            length = offsets.diff()
            rows = (length > LONGEST_SUM).nonzero()[:, 0]
            sums[rows] = _sum_in_pieces(length, rows, in_id, value, source, bag)
    return sums.to(dtype)


def sum_values(segments: Segments, value: Tensor, dtype: torch.dtype) -> Tensor:
    """``[n_out]`` sums of the values alone, in float64, rounded once to ``dtype``."""
    order, offsets, _ = segments
    one = torch.ones(1, 1, dtype=torch.float64, device=value.device)
    value = value.double() if order is None else value.double().index_select(0, order)
    return _bag(offsets.new_zeros(len(value)), one, offsets, value)[:, 0].to(dtype)


def segment_sum(out_id: Tensor, in_id: Tensor, value: Tensor, source: Tensor, n_out: int, dtype: torch.dtype) -> Tensor:
    """Sort and sum in one call; see the module's formula."""
    return sum_segments(sort_segments(out_id, n_out), in_id, value, source, dtype)


def sum_stretches(width: int, in_id: Tensor, value: Tensor, source: Tensor) -> Tensor:
    """``[P / width, D]`` weighted sums of the ``source`` rows (float32 or float64, on a CPU) of ``width`` terms at a time."""
    offsets = starts(len(in_id) // max(width, 1), width)
    if width <= LONGEST_SUM:
        return _bag(in_id, source, offsets, value)
    return sum_segments(Segments(None, offsets), in_id, value, source, source.dtype)


def sum_rows(out_id: Tensor, rows: Tensor, n_out: int) -> Tensor:
    """``[n_out, D]`` sums of ``rows`` by ``out_id``: as they come, sorted only where a sum is long.

    Args:
        out_id: the sum each row belongs to, ``[B]`` int64 in ``[0, n_out)``, on a CPU.
        rows: ``[B, D]`` float32 or float64.
        n_out: number of sums.
    """
    if not len(out_id) or int(torch.bincount(out_id).max()) <= LONGEST_SUM:
        return rows.new_zeros(n_out, rows.shape[1]).index_add_(0, out_id, rows)
    return segment_sum(out_id, torch.arange(len(rows)), rows.new_ones(len(rows)), rows, n_out, rows.dtype)


def _sum_in_pieces(
    length: Tensor, rows: Tensor, in_id: Tensor, value: Tensor, source: Tensor, bag: Callable[..., Tensor]
) -> Tensor:
    """Sums of long segments once more, in pieces: rounding errors grow with a piece's length, not a segment's."""
    terms = torch.repeat_interleave(length > LONGEST_SUM, length).nonzero()[:, 0]
    length = length[rows]
    count = (length + LONGEST_SUM - 1).div(LONGEST_SUM, rounding_mode="floor")
    owner = torch.repeat_interleave(count)
    rank = torch.arange(len(owner)) - (count.cumsum(0) - count)[owner]
    begin = (length.cumsum(0) - length)[owner] + rank * LONGEST_SUM
    offsets = torch.cat([begin, begin.new_tensor([len(terms)])])
    pieces = bag(in_id.index_select(0, terms), source, offsets, value.index_select(0, terms))
    ones = pieces.new_ones(len(pieces))
    return sum_segments(sort_segments(owner, len(rows)), torch.arange(len(pieces)), ones, pieces, pieces.dtype)


def _bag(in_id: Tensor, source: Tensor, offsets: Tensor, value: Tensor) -> Tensor:
    if in_id.numel() == 0 or source.shape[0] == 0:
        return source.new_zeros(len(offsets) - 1, source.shape[1])
    end = int(offsets[-1]) if offsets.device.type == "cpu" else len(in_id)
    return embedding_bag(
        in_id[:end].to(offsets.dtype),
        source.detach(),  # where a gradient may be asked for, embedding_bag prepares for it
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
        # as many whole segments as fit; one that does not fit alone is that long
        stop = max(row + 1, int(torch.searchsorted(end, begin[row] + chunk, right=True)))
        lo, hi = int(begin[row]), int(end[stop - 1])
        local = torch.cat([begin[row:stop], end[stop - 1 : stop]]) - lo
        rows = source.index_select(0, in_id[lo:hi]).to(value.dtype)
        sums[touched[row:stop]] = _bag(torch.arange(hi - lo), rows, local, value[lo:hi])
        row = stop
    return sums
