"""Rows of an atomic file written as they come, then chosen and ordered without reading them as objects again."""

from collections.abc import Mapping, Sequence
from contextlib import suppress
from pathlib import Path
from types import TracebackType
from typing import BinaryIO

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# rows gathered at once when rows are left out or reordered
GATHER_ROWS = 1 << 17


class RowFile:
    """A tab-separated file whose rows are kept or reordered after all of them have been written.

    Beside the file a few numbers per row stay in memory: its length, and the ``columns`` asked for.

    Args:
        path: the file; its rows stand in ``path`` + ``.rows`` until :meth:`finish`.
        header: ``name:type`` of each column; may be set later, before :meth:`finish`.
        columns: name to dtype of what is remembered per row.
        open_ended: whether :meth:`finish` is given the last cell of every row.
    """

    def __init__(
        self, path: Path, header: Sequence[str], columns: Mapping[str, type], open_ended: bool = False
    ) -> None:
        self.path, self.header, self._end = path, header, "\t" if open_ended else "\n"
        self._rows_path = path.with_name(path.name + ".rows")
        self._file = self._rows_path.open("wb")
        self._lengths: list[np.ndarray] = []
        self._columns: dict[str, list[np.ndarray]] = {name: [np.empty(0, dtype)] for name, dtype in columns.items()}
        self._n = 0

    def __enter__(self) -> "RowFile":
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, trace: TracebackType | None
    ) -> None:
        self._file.close()
        with suppress(FileNotFoundError):
            self._rows_path.unlink()

    def __len__(self) -> int:
        return self._n

    def write(self, cells: Sequence[pa.Array], alive: np.ndarray, remembered: Mapping[str, np.ndarray]) -> None:
        """Append rows.

        Args:
            cells: a ``string`` array ``[rows]`` per column; null is an empty cell. No cell holds a tab or a line break.
            alive: bool ``[rows]``: which rows to write.
            remembered: an array ``[rows]`` per remembered column.
        """
        if not alive.all():
            mask = pa.array(alive)
            cells = [cell.filter(mask) for cell in cells]
        joined = pc.binary_join_element_wise(*cells, "\t", null_handling="replace", null_replacement="")
        self.write_lines(pc.binary_join_element_wise(joined, "", self._end))
        for name, values in remembered.items():
            chunks = self._columns[name]
            chunks.append(values[alive].astype(chunks[0].dtype, copy=False))

    def write_lines(self, lines: pa.Array) -> None:
        """Append finished lines, a ``string`` array."""
        if not len(lines):
            return
        offsets = np.frombuffer(lines.buffers()[1], dtype=np.int32)[lines.offset : lines.offset + len(lines) + 1]
        self._file.write(memoryview(lines.buffers()[2])[offsets[0] : offsets[-1]])
        self._lengths.append(np.diff(offsets))
        self._n += len(lines)

    def remember(self, name: str, values: np.ndarray) -> None:
        """Choose what to keep of rows given to :meth:`write_lines`."""
        self._columns[name].append(values)

    def column(self, name: str) -> np.ndarray:
        """Return a remembered column, ``[len(self)]``."""
        self._columns[name] = [np.concatenate(self._columns[name])]
        return self._columns[name][0]

    def finish(
        self, keep: np.ndarray, order: np.ndarray | None = None, extra: bytes = b"", last: pa.Array | None = None
    ) -> None:
        """Write the file.

        Args:
            keep: bool ``[rows]``.
            order: a permutation of all rows; ``None`` for the order in which they came.
            extra: lines to put at the end.
            last: a ``string`` array ``[rows]``, the last cells of an open-ended file.
        """
        self._file.close()
        with self.path.open("wb") as target:
            target.write(("\t".join(self.header) + "\n").encode())
            if order is not None or not keep.all() or last is not None:
                self._gather(target, np.flatnonzero(keep) if order is None else order[keep[order]], last)
            elif self._n:
                with self._rows_path.open("rb") as rows:
                    while block := rows.read(1 << 24):
                        target.write(block)
            target.write(extra)

    def _gather(self, target: BinaryIO, chosen: np.ndarray, last: pa.Array | None = None) -> None:
        offsets = np.zeros(self._n + 1, dtype=np.int64)
        np.cumsum(np.concatenate(self._lengths), out=offsets[1:])
        self._lengths = []
        with pa.memory_map(str(self._rows_path)) as mapped:
            data = mapped.read_buffer()
            lines = pa.LargeBinaryArray.from_buffers(pa.large_binary(), self._n, [None, pa.py_buffer(offsets), data])
            for start in range(0, len(chosen), GATHER_ROWS):
                at = pa.array(chosen[start : start + GATHER_ROWS])
                part = lines.take(at)
                if last is not None:
                    ends = pc.cast(last.take(at), pa.large_binary())
                    newline, nothing = (pa.scalar(text, pa.large_binary()) for text in (b"\n", b""))
                    part = pc.binary_join_element_wise(part, ends, newline, nothing)
                ends = np.frombuffer(part.buffers()[1], dtype=np.int64)[: len(part) + 1]
                target.write(memoryview(part.buffers()[2])[ends[0] : ends[-1]])
