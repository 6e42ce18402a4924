"""Small pictures of the items, as an export holds them.

    thumbnails.safetensors   offsets i64[N+1]   bytes u8[...]: one JPEG after the other; row i from offsets[i], empty without one

Every picture is checked when it is read, for it goes to browsers as it is: a baseline JPEG of one scan, without metadata, of a
bounded size. Plain NumPy; nothing is decoded.
"""

import re
from dataclasses import dataclass

import numpy as np

from recbole_llm.export.errors import ExportError
from recbole_llm.export.manifest import THUMBNAILS
from recbole_llm.export.tensor_file import parse_tensors, take

SIDE = 192  # pixels of the longer side at most
MAX_BYTES = 32 << 10  # of one

_SEGMENTS = frozenset({0xE0, 0xDB, 0xC4, 0xC0})  # JFIF, quantisation, Huffman tables, a baseline frame
_SCAN = 0xDA
_MARKER_IN_SCAN = re.compile(rb"\xff[^\x00]")


def jpeg_size(data: bytes) -> tuple[int, int]:
    """Check a small picture; returns its width and height in pixels.

    Raises:
        ValueError: if it is anything but a baseline JPEG of one scan without metadata, or is too large.
    """
    if not 0 < len(data) <= MAX_BYTES:
        raise ValueError(f"a picture has {len(data)} bytes, expected 1 to {MAX_BYTES}")
    if data[:2] != b"\xff\xd8" or data[-2:] != b"\xff\xd9":
        raise ValueError("a picture is no whole JPEG")
    at, size = 2, None
    while True:
        marker, length = data[at : at + 2], int.from_bytes(data[at + 2 : at + 4], "big")
        stop = at + 2 + length
        if len(marker) < 2 or marker[0] != 0xFF or length < 2 or stop > len(data) - 2:
            raise ValueError("a picture's header is damaged")
        if marker[1] == _SCAN:
            break
        part = data[at + 4 : stop]
        if marker[1] not in _SEGMENTS or (marker[1] == 0xE0 and part[:5] != b"JFIF\x00"):
            raise ValueError("a picture holds metadata, or is no baseline JPEG")
        if marker[1] == 0xC0:
            size = _frame(part, size)
        at = stop
    if size is None:
        raise ValueError("a picture has no size")
    if _MARKER_IN_SCAN.search(data[stop:-2]):
        raise ValueError("a picture holds more than one scan")
    return size


def _frame(part: bytes, size: tuple[int, int] | None) -> tuple[int, int]:
    if size is not None or len(part) < 6 or part[0] != 8 or part[5] not in (1, 3):
        raise ValueError("a picture's frame is damaged")
    height, width = int.from_bytes(part[1:3], "big"), int.from_bytes(part[3:5], "big")
    if not (1 <= width <= SIDE and 1 <= height <= SIDE):
        raise ValueError(f"a picture is {width} x {height} pixels, expected 1 to {SIDE}")
    return width, height


@dataclass(frozen=True, eq=False)
class Thumbnails:
    """The small pictures of N items.

    Attributes:
        offsets: ``[N + 1]`` int64, where each begins.
        data: ``[n]`` uint8, one after the other.

    Raises:
        ValueError: on offsets that do not rise from 0 to n, or a picture that :func:`jpeg_size` refuses.
    """

    offsets: np.ndarray
    data: np.ndarray

    def __post_init__(self) -> None:
        sizes = np.diff(self.offsets)
        if not len(self.offsets) or self.offsets[0] != 0 or self.offsets[-1] != len(self.data) or (sizes < 0).any():
            raise ValueError("offsets do not rise from 0 to the number of bytes")
        for row in np.flatnonzero(sizes).tolist():
            jpeg_size(self._bytes(row))

    @staticmethod
    def join(pictures: "list[bytes | None]") -> "Thumbnails":
        """Lay pictures, ``None`` for a row without one, one after the other."""
        offsets = np.concatenate([[0], np.cumsum([len(one or b"") for one in pictures])]).astype(np.int64)
        return Thumbnails(offsets, np.frombuffer(b"".join(one or b"" for one in pictures), np.uint8))

    @property
    def count(self) -> int:
        """Rows that have one."""
        return int((np.diff(self.offsets) > 0).sum())

    def has(self, row: int) -> bool:
        """Return whether a row has one."""
        return bool(self.offsets[row + 1] > self.offsets[row])

    def of(self, row: int) -> bytes | None:
        """Return the JPEG of a row, ``None`` where it has none."""
        return self._bytes(row) if self.has(row) else None

    def _bytes(self, row: int) -> bytes:
        found: bytes = self.data[self.offsets[row] : self.offsets[row + 1]].tobytes()
        return found

    def to_tensors(self) -> dict[str, np.ndarray]:
        """As the file holds them."""
        return {
            "offsets": np.ascontiguousarray(self.offsets, np.int64),
            "bytes": np.ascontiguousarray(self.data, np.uint8),
        }


def read_thumbnails(content: memoryview, n_items: int) -> Thumbnails:
    """Read ``thumbnails.safetensors`` and check every picture of it.

    Raises:
        ExportError: if the file is damaged, of another catalogue, or holds what is no small picture.
    """
    tensors = parse_tensors(content, THUMBNAILS)
    offsets = take(tensors, THUMBNAILS, "offsets", np.int64, (n_items + 1,))
    data = take(tensors, THUMBNAILS, "bytes", np.uint8, (None,))
    if tensors:
        raise ExportError(f"{THUMBNAILS} holds tensors that do not belong there: {', '.join(sorted(tensors))[:200]}.")
    try:
        return Thumbnails(offsets, data)
    except ValueError as error:
        raise ExportError(f"{THUMBNAILS}: {error}.") from None
