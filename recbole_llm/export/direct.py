"""Direct rows of an export's blocks: what an item of a history adds to a few items beside the product of vectors.

    direct.safetensors      for each block b that has some: b.offsets i64[N+1]  b.items i32[nnz]  b.values f32[nnz]

Row j of block b holds the items that j adds to, ascending, and how much. With the weights of :mod:`recbole_llm.export.pooling`

    score_i = <q, w_i> + bias_i + sum_b f_b (sum_j t_j / T^e_b M_b,ji - dislikes_b sum_{j disliked} M_b,ji)
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recbole_llm.export.errors import ExportError
from recbole_llm.export.manifest import DIRECT, Block
from recbole_llm.export.tensor_file import parse_tensors, take


@dataclass(frozen=True, eq=False)
class DirectRows:
    """Rows of target items of one block.

    Attributes:
        offsets: ``[N + 1]`` int64.
        items: ``[nnz]`` int32, ascending and unique within a row.
        values: ``[nnz]`` float32.
    """

    offsets: np.ndarray
    items: np.ndarray
    values: np.ndarray

    def entries(self, rows: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Collect the entries of some rows, ``[h]`` int64; rows of items newer than the export have none.

        Returns:
            For every entry its position in ``rows``, its item, and its value.
        """
        n = len(self.offsets) - 1
        known = rows < n
        first = self.offsets[np.where(known, rows, 0)]
        sizes = np.where(known, self.offsets[np.where(known, rows, 0) + 1] - first, 0)
        position = np.repeat(np.arange(len(rows)), sizes)
        at = np.arange(len(position)) + np.repeat(first - (np.cumsum(sizes) - sizes), sizes)
        return position, self.items[at].astype(np.int64), self.values[at]

    def between(self, rows: np.ndarray, items: np.ndarray) -> np.ndarray:
        """Look up what each of ``rows`` ``[h]`` adds to each of ``items`` ``[n]``: ``[n, h]`` float64, 0 for nothing."""
        position, found, values = self.entries(rows)
        width = len(self.offsets)  # above every item
        keys = np.append(position * width + found, np.int64(len(rows)) * width)
        known = items < width - 1
        wanted = np.arange(len(rows)) * width + np.where(known, items, 0)[:, None]
        at = np.searchsorted(keys, wanted)
        hit = (keys[at] == wanted) & known[:, None]
        return np.where(hit, np.append(values, np.float32(0))[at], 0.0).astype(np.float64)

    def into(self, item: int) -> tuple[np.ndarray, np.ndarray]:
        """Find the rows that add to an item, ascending, and how much each does."""
        at = np.flatnonzero(self.items == item)
        return np.searchsorted(self.offsets, at, side="right") - 1, self.values[at]


def to_tensors(direct: Mapping[int, DirectRows]) -> dict[str, np.ndarray]:
    """Convert direct rows by the place of their block to the tensors of the file."""
    tensors = {}
    for b, rows in direct.items():
        tensors[f"{b}.offsets"] = np.ascontiguousarray(rows.offsets, dtype=np.int64)
        tensors[f"{b}.items"] = np.ascontiguousarray(rows.items, dtype=np.int32)
        tensors[f"{b}.values"] = np.ascontiguousarray(rows.values, dtype=np.float32)
    return tensors


def read_direct(content: memoryview, n_items: int, blocks: Sequence[Block]) -> dict[int, DirectRows]:
    """Read the file and check it.

    Args:
        content: of the file.
        n_items: N.
        blocks: of the export.

    Raises:
        ExportError: if a tensor is missing, is of another shape or kind, or is none of a block's; if rows do not fit together;
            if an item is out of bounds or not in order; or if a block's queries have length 1.
    """
    tensors = parse_tensors(content, DIRECT)
    found = {}
    for b, block in enumerate(blocks):
        if f"{b}.offsets" in tensors:
            if block.scoring != "dot":
                raise ExportError(f"{DIRECT}: block {b} scores by {block.scoring}, which has no direct rows.")
            offsets = take(tensors, DIRECT, f"{b}.offsets", np.int64, (n_items + 1,))
            items = take(tensors, DIRECT, f"{b}.items", np.int32, (None,))
            values = take(tensors, DIRECT, f"{b}.values", np.float32, (len(items),))
            _check(offsets, items, n_items)
            found[b] = DirectRows(offsets, items, values)
    if tensors:
        raise ExportError(f"{DIRECT} holds tensors that do not belong there: {', '.join(sorted(tensors))[:200]}.")
    if not found:
        raise ExportError(f"{DIRECT} holds no rows of any block.")
    return found


def _check(offsets: np.ndarray, items: np.ndarray, n_items: int) -> None:
    if offsets[0] != 0 or offsets[-1] != len(items) or (np.diff(offsets) < 0).any():
        raise ExportError(f"{DIRECT}: offsets do not divide the {len(items)} entries into rows.")
    if len(items) and (items.min() < 0 or items.max() >= n_items):
        raise ExportError(f"{DIRECT}: an item is outside the catalogue of {n_items}.")
    rises = np.diff(items.astype(np.int64)) > 0
    starts = offsets[1:-1]
    rises[starts[(starts > 0) & (starts < len(items))] - 1] = True  # from one row to the next
    if not rises.all():
        raise ExportError(f"{DIRECT}: the items of a row are not ascending and unique.")
