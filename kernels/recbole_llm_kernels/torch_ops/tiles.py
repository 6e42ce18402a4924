r"""Blocks of the logit matrix: what the catalogue losses and shared negatives have in common.

    S = Q C^T + bias        Q [B, D] queries, C [M, D] columns: all items, or the shared negatives

is produced tile by tile, used, and overwritten. Work is split between threads along the longer axis, so that each
thread owns its rows of the large gradient and only the smaller one is summed over threads, in a fixed order.
"""

from collections.abc import Callable, Iterator, Sequence
from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from recbole_llm_kernels.torch_ops import threads
from recbole_llm_kernels.torch_ops.products import add_product, add_transposed_product, rows_by_rows
from recbole_llm_kernels.torch_ops.segment_sum import accumulator

TILE = 1 << 18  # elements: 1 MiB of float32. From 256 x 1024 to 1024 x 512 all shapes are within 5% of each other
MOST_ROWS = 512  # of a tile; with fewer rows a tile is wider, so that a small batch takes few steps


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
            outside = bias == -torch.inf
            if outside.device.type != "cpu" or bool(outside.any()):
                rows = rows.masked_fill(outside[:, None], 0)
        return rows, bias


def columns(item: Tensor, ids: Tensor | None, bias: Tensor | None) -> Columns:
    """Columns with the bias converted, and a look at whether any is outside the catalogue (assumed so on a GPU)."""
    if bias is None:
        return Columns(item, ids, None, False)
    bias = bias.to(accumulator(item.dtype))
    any_outside = bias.device.type != "cpu" or bool((bias == -torch.inf).any())
    return Columns(item, ids, bias, any_outside)


class Grid(NamedTuple):
    """How the logits are cut into tiles."""

    B: int
    M: int
    rows: int  # of a tile
    columns: int

    @property
    def row_starts(self) -> range:
        """Where blocks of rows begin."""
        return range(0, self.B, self.rows)

    @property
    def column_starts(self) -> range:
        """Where blocks of columns begin."""
        return range(0, self.M, self.columns)

    def number(self, row: int, column: int) -> int:
        """The number of the tile that begins there; column blocks come first."""
        return column // self.columns * len(self.row_starts) + row // self.rows


def cut_in_tiles(B: int, M: int) -> Grid:
    """Tiles for ``B`` rows and ``M`` columns."""
    rows = max(1, min(B, MOST_ROWS))
    return Grid(B, M, rows, TILE // rows)


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


def group_targets(target_offsets: Tensor, target_ids: Tensor, grid: Grid, dtype: torch.dtype) -> Targets:
    """Sort the targets by tile; on a GPU this reads the counts back, once a call."""
    row, ids = target_rows(target_offsets, len(target_ids)), target_ids.long()
    tile = ids.div(grid.columns, rounding_mode="floor") * len(grid.row_starts) + row // grid.rows
    tile, order = torch.sort(tile, stable=True)
    edges = torch.arange(len(grid.row_starts) * len(grid.column_starts) + 1, device=tile.device)
    bounds = torch.searchsorted(tile, edges).tolist()
    row, column = (row % grid.rows)[order], (ids % grid.columns)[order]
    return Targets(order, row, column, bounds, ids.new_empty(len(ids), dtype=dtype))


def target_rows(target_offsets: Tensor, total: int) -> Tensor:
    """The row of every target, ``[T]``."""
    counts = target_offsets.diff().long()
    return torch.repeat_interleave(torch.arange(len(counts), device=counts.device), counts, output_size=total)


class Tile(NamedTuple):
    """One block of rows within a block of columns."""

    number: int  # as Targets counts tiles
    rows: slice
    logits: Tensor  # [height, width], overwritten by the next tile


class ColumnBlock(NamedTuple):
    """A block of columns, its vectors, and the tiles it has in common with the rows at hand."""

    columns: slice
    vectors: Tensor  # [width, D]
    tiles: Iterator[Tile]


def visit(query: Tensor, cols: Columns, grid: Grid, rows: range, column_starts: range) -> Iterator[ColumnBlock]:
    """Go through the tiles of ``rows`` x ``column_starts``, one column block after another.

    Args:
        query: ``[B, D]`` in the accumulator's dtype.
        cols: the columns.
        grid: the tiles.
        rows: starts of the row blocks.
        column_starts: starts of the column blocks.

    Yields:
        column blocks, each with its tiles of logits; a tile may be overwritten.
    """
    buffer = query.new_empty(min(grid.rows, grid.B) * min(grid.columns, grid.M))
    for c in column_starts:
        columns = slice(c, min(c + grid.columns, grid.M))
        vectors, bias = cols.tile(columns.start, columns.stop)
        yield ColumnBlock(columns, vectors, _tiles(query, grid, c, vectors, bias, rows, buffer))


def _tiles(
    query: Tensor, grid: Grid, column: int, vectors: Tensor, bias: Tensor | None, rows: range, buffer: Tensor
) -> Iterator[Tile]:
    width = len(vectors)
    for r in rows:
        row = slice(r, min(r + grid.rows, grid.B))
        logits = rows_by_rows(query[row], vectors, buffer[: (row.stop - r) * width].view(-1, width))
        if bias is not None:
            logits += bias
        yield Tile(grid.number(r, column), row, logits)


class Sums(NamedTuple):
    """What passes over the tiles add up; fields that are not wanted are None."""

    loss: Tensor  # [B] float64
    query: Tensor | None  # [B, D]
    columns: Tensor | None  # [M, D]
    bias: Tensor | None  # [M]


def accumulate(query: Tensor, grid: Grid, need: Sequence[bool], work: Callable[[Sums, range, range], None]) -> Sums:
    """Run ``work(sums, row blocks, column blocks)`` over the whole matrix, in parallel parts.

    The sums along the axis that is cut are shared: each part has its own stretch of them. Those along the other axis
    are each part's own and added in order, so that the result depends on the number of threads alone.

    Args:
        query: ``[B, D]``.
        grid: the tiles.
        need: whether the gradients of (query, columns, bias) are wanted.
        work: adds to the sums it is given, at absolute positions.
    """
    B, M, D = grid.B, grid.M, query.shape[1]
    spans = split(grid, query.device)
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


def split(grid: Grid, device: torch.device) -> list[tuple[range, range]]:
    """Each thread's row and column blocks: the longer axis cut in equal parts."""
    rows, cols = grid.row_starts, grid.column_starts
    if grid.M >= grid.B:
        return [(rows, span) for span in threads.cut(cols, device)]
    return [(span, cols) for span in threads.cut(rows, device)]


class Gradients:
    """Adds the slopes of tile after tile of one column block to the gradients.

    The columns' gradient is summed transposed, from the transposed queries: that product is the faster one.
    """

    def __init__(self, sums: Sums, block: ColumnBlock, scaled: Tensor, scale: Tensor) -> None:
        self.sums, self.block, self.scaled, self.scale = sums, block, scaled, scale
        self.columns = None if sums.columns is None else scaled.new_zeros(len(scaled), len(block.vectors))

    def add(self, tile: Tile, p: Tensor) -> None:
        """Add the slopes ``p``: to the rows without their scale, to the columns through the scaled queries."""
        if self.sums.query is not None:
            add_product(self.sums.query[tile.rows], p, self.block.vectors)
        if self.columns is not None:
            add_transposed_product(self.columns, self.scaled[:, tile.rows], p)
        if self.sums.bias is not None:
            self.sums.bias[self.block.columns].addmv_(p.T, self.scale[tile.rows])

    def finish(self) -> None:
        """Hand the block's sums over."""
        if self.sums.columns is not None and self.columns is not None:
            self.sums.columns[self.block.columns] += self.columns.T
