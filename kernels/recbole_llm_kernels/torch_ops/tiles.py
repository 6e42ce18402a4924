r"""Blocks of the logit matrix: what the catalogue losses and shared negatives have in common.

    S = Q C^T + bias        Q [B, D] queries, C [M, D] columns: all items, or the shared negatives

is produced tile by tile, used, and overwritten. Work is split between threads along the longer axis, so that each
thread owns its rows of the large gradient and only the smaller one is summed over threads, in a fixed order.
"""

from collections.abc import Callable, Sequence
from functools import partial
from itertools import pairwise
from typing import NamedTuple

import torch
from torch import Tensor

from recbole_llm_kernels.torch_ops import threads
from recbole_llm_kernels.torch_ops.segment_sum import accumulator

ROWS, COLUMNS = 256, 1024  # a tile: 1 MiB of float32, in the second-level cache with its operands


class Columns(NamedTuple):
    """The matrix of the columns: ``item`` itself, or its rows ``ids``."""

    item: Tensor  # [N, D]
    ids: Tensor | None  # [M], None for all of ``item``
    bias: Tensor | None  # [M] in the accumulator's dtype; -inf: not in the catalogue
    any_outside: bool

    @property
    def total(self) -> int:
        """M, the number of columns."""
        return len(self.item) if self.ids is None else len(self.ids)

    def tile(self, lo: int, hi: int) -> tuple[Tensor, Tensor | None]:
        """Rows ``[hi - lo, D]`` in the accumulator's dtype, zero outside the catalogue whatever they hold, and bias."""
        rows = self.item[lo:hi] if self.ids is None else self.item.index_select(0, self.ids[lo:hi])
        rows = rows.to(accumulator(rows.dtype))
        bias = None if self.bias is None else self.bias[lo:hi]
        if bias is not None and self.any_outside:
            rows = rows.masked_fill((bias == -torch.inf)[:, None], 0)
        return rows, bias


def columns(item: Tensor, ids: Tensor | None, bias: Tensor | None) -> Columns:
    """Columns with the bias converted, and a look at whether any is outside the catalogue (assumed so on a GPU)."""
    if bias is None:
        return Columns(item, ids, None, False)
    bias = bias.to(accumulator(item.dtype))
    any_outside = bias.device.type != "cpu" or bool((bias == -torch.inf).any())
    return Columns(item, ids, bias, any_outside)


class Targets(NamedTuple):
    """Positive entries of the logit matrix, grouped by the tile they lie in."""

    order: Tensor  # [T] positions in target_ids, tile by tile
    row: Tensor  # [T] in that order: row within the tile
    column: Tensor  # [T] column within the tile
    bounds: list[int]  # where each tile's entries begin; tiles are numbered column block first
    logits: Tensor  # [T] as target_ids, filled by take

    def of(self, tile: int, width: int) -> tuple[slice, Tensor] | None:
        """Where the tile's targets stand in ``order``, and flat in a tile of ``width`` columns; None if it has none."""
        lo, hi = self.bounds[tile], self.bounds[tile + 1]
        return None if lo == hi else (slice(lo, hi), self.row[lo:hi] * width + self.column[lo:hi])

    def take(self, tile: int, s: Tensor) -> tuple[Tensor, Tensor] | None:
        """Move the targets' logits out of the tile ``s``, where -inf takes their place; flat positions and logits."""
        found = self.of(tile, s.shape[1])
        if found is None:
            return None
        place, flat = found
        logits = s.view(-1).index_select(0, flat)
        s.view(-1).index_fill_(0, flat, -torch.inf)
        self.logits.index_copy_(0, self.order[place], logits)
        return flat, logits


def group_targets(target_offsets: Tensor, target_ids: Tensor, B: int, M: int, dtype: torch.dtype) -> Targets:
    """Sort the targets by tile; on a GPU this reads the counts back, once a call."""
    row = target_rows(target_offsets, len(target_ids))
    ids = target_ids.long()
    blocks = -(-B // ROWS)
    tile, order = torch.sort(ids.div(COLUMNS, rounding_mode="floor") * blocks + row // ROWS, stable=True)
    edges = torch.arange(blocks * -(-M // COLUMNS) + 1, device=tile.device)
    bounds = torch.searchsorted(tile, edges).tolist()
    return Targets(order, (row % ROWS)[order], (ids % COLUMNS)[order], bounds, ids.new_empty(len(ids), dtype=dtype))


def target_rows(target_offsets: Tensor, total: int) -> Tensor:
    """The row of every target, ``[T]``."""
    counts = target_offsets.diff().long()
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=total)


class Block(NamedTuple):
    """One tile of logits and where it lies."""

    number: int  # as Targets counts tiles
    rows: slice
    columns: slice
    vectors: Tensor  # [width, D] the columns' vectors
    logits: Tensor  # [height, width], overwritten by the next tile


def visit(query: Tensor, cols: Columns, rows: range, cols_range: range, use: Callable[[Block], None]) -> None:
    """Call ``use`` with every tile of ``rows`` x ``cols_range``, one column block after another.

    Args:
        query: ``[B, D]`` in the accumulator's dtype.
        cols: the columns.
        rows: starts of the row blocks.
        cols_range: starts of the column blocks.
        use: may overwrite the logits.
    """
    blocks = -(-len(query) // ROWS)
    buffer = torch.empty(ROWS * COLUMNS, dtype=query.dtype, device=query.device)
    for c in cols_range:
        column = slice(c, min(c + COLUMNS, cols.total))
        vectors, bias = cols.tile(column.start, column.stop)
        for r in rows:
            row = slice(r, min(r + ROWS, len(query)))
            shape = (row.stop - r, column.stop - c)
            logits = buffer[: shape[0] * shape[1]].view(shape)
            torch.mm(query[row], vectors.T, out=logits)
            if bias is not None:
                logits += bias
            use(Block(c // COLUMNS * blocks + r // ROWS, row, column, vectors, logits))


class Sums(NamedTuple):
    """What passes over the tiles add up; fields that are not wanted are None."""

    loss: Tensor  # [B] float64
    query: Tensor | None  # [B, D]
    columns: Tensor | None  # [M, D]
    bias: Tensor | None  # [M]


def accumulate(query: Tensor, cols: Columns, need: Sequence[bool], work: Callable[[Sums, range, range], None]) -> Sums:
    """Run ``work(sums, row blocks, column blocks)`` over the whole matrix, in parallel parts.

    The sums along the axis that is cut are shared: each part has its own stretch of them. Those along the other axis
    are each part's own and added in order, so that the result depends on the number of threads alone.

    Args:
        query: ``[B, D]``.
        cols: the columns.
        need: whether the gradients of (query, columns, bias) are wanted.
        work: adds to the sums it is given, at absolute positions.
    """
    B, M, D = len(query), cols.total, query.shape[1]
    spans = split(B, M, query.device)
    by_column = M >= B

    def of_rows() -> dict[str, Tensor | None]:
        loss = torch.zeros(B, dtype=torch.float64, device=query.device)
        return {"loss": loss, "query": query.new_zeros(B, D) if need[0] else None}

    def of_columns() -> dict[str, Tensor | None]:
        columns = query.new_zeros(M, D) if need[1] else None
        return {"columns": columns, "bias": query.new_zeros(M) if need[2] else None}

    shared, own = (of_columns, of_rows) if by_column else (of_rows, of_columns)
    common = shared()
    own_names = ("loss", "query") if by_column else ("columns", "bias")
    parts = [Sums(**common, **own()) for _ in spans]  # type: ignore[arg-type]
    threads.run([partial(work, part, *span) for part, span in zip(parts, spans, strict=True)])
    total = parts[0]
    for part in parts[1:]:
        for name in own_names:
            if (sums := getattr(total, name)) is not None:
                sums += getattr(part, name)
    return total


def split(B: int, M: int, device: torch.device) -> list[tuple[range, range]]:
    """Each thread's row and column blocks: the longer axis cut in equal parts."""
    rows, cols = range(0, B, ROWS), range(0, M, COLUMNS)
    longer = cols if M >= B else rows
    parts = max(1, min(threads.workers(device), len(longer)))
    cuts = [len(longer) * p // parts for p in range(parts + 1)]
    spans = [longer[lo:hi] for lo, hi in pairwise(cuts)]
    return [(rows, span) if M >= B else (span, cols) for span in spans]
