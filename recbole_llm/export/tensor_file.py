"""Read safetensors files so that the bytes that were hashed are the bytes that score.

A file is read once into memory of the process, checked and hashed there, and its tensors are views of that memory. It may
be mapped instead, so that several processes share one copy in the page cache; whoever then writes over the file changes
the answers, and whoever cuts it off ends the process (SIGBUS). Format: 8 bytes little-endian header length, JSON header,
data.
"""

import hashlib
import json
import math
import mmap
import os
import stat
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np

from recbole_llm.export.errors import ExportError

_DTYPES = {
    "F32": np.float32,
    "F64": np.float64,
    "I32": np.int32,
    "I64": np.int64,
    "U8": np.uint8,
    "I8": np.int8,
    "BOOL": np.bool_,
}
_FLOAT_BITS = 1024  # an integer of as many is beyond float64
_MAX_HEADER_BYTES = 1 << 20
READ_BYTES = 16 << 20


def open_file(path: Path, n_bytes: int | None = None, sha256: str | None = None, *, mapped: bool = False) -> memoryview:
    """Read a regular file, and compare it with what is known of it.

    Args:
        path: the file; a symbolic link is refused.
        n_bytes: expected size; ``None``: any.
        sha256: expected hexadecimal sum; ``None``: not computed.
        mapped: map the file instead of reading it.

    Raises:
        ExportError: if it is missing, a link, no regular file, or differs.
    """
    with _opened(path, n_bytes) as (descriptor, size):
        if not size:
            content = memoryview(b"")
        elif mapped:
            content = memoryview(mmap.mmap(descriptor, 0, access=mmap.ACCESS_READ))
        else:
            content = memoryview(
                mmap.mmap(-1, size, flags=mmap.MAP_PRIVATE | mmap.MAP_ANONYMOUS)
            )  # freed with its last view
            _read(descriptor, content, path.name)
            content = content.toreadonly()
    if sha256 is not None:
        _compare(hashlib.sha256(content), sha256, path.name)
    return content


def check_file(path: Path, n_bytes: int, sha256: str | None) -> None:
    """Compare a file with what is known of it as :func:`open_file` does, without keeping it."""
    with _opened(path, n_bytes) as (descriptor, size):
        digest, buffer = hashlib.sha256(), memoryview(bytearray(min(READ_BYTES, size)))
        for at in range(0, size if sha256 is not None else 0, READ_BYTES):
            part = buffer[: min(READ_BYTES, size - at)]
            _read(descriptor, part, path.name)
            digest.update(part)
    if sha256 is not None:
        _compare(digest, sha256, path.name)


@contextmanager
def _opened(path: Path, n_bytes: int | None) -> Iterator[tuple[int, int]]:
    """A regular file's descriptor and size."""
    try:
        descriptor = os.open(path, os.O_RDONLY | os.O_NOFOLLOW | os.O_CLOEXEC | os.O_NONBLOCK)
    except FileNotFoundError:
        raise ExportError(f"{path.name} is missing: copy the export again, whole.") from None
    except OSError as error:
        raise ExportError(
            f"{path.name} cannot be opened as a plain file ({error.strerror}); links are refused."
        ) from None
    try:
        status = os.fstat(descriptor)
        if not stat.S_ISREG(status.st_mode):
            raise ExportError(f"{path.name} is not a plain file.")
        if n_bytes is not None and status.st_size != n_bytes:
            raise ExportError(
                f"{path.name} has {status.st_size} bytes, the manifest says {n_bytes}: copy the export again."
            )
        yield descriptor, status.st_size
    finally:
        os.close(descriptor)


def _read(descriptor: int, content: memoryview, name: str) -> None:
    at = 0
    while at < len(content):
        found = os.readv(descriptor, [content[at : at + READ_BYTES]])
        if not found:
            raise ExportError(f"{name} was cut off while it was read: copy the export again.")
        at += found


def _compare(digest: Any, sha256: str, name: str) -> None:
    if digest.hexdigest() != sha256:
        raise ExportError(f"{name} does not have the sha256 of the manifest: it is damaged or was edited.")


def parse_json(content: bytes | memoryview, name: str) -> Any:
    """Parse strict JSON: no NaN, no number beyond float64, no repeated key.

    Whatever is wrong is an :class:`ExportError` that names the file.
    """

    def unique(pairs: list[tuple[str, Any]]) -> dict[str, Any]:
        result = dict(pairs)
        if len(result) != len(pairs):
            raise ValueError("a key is repeated")
        return result

    def refuse(constant: str) -> Any:
        raise ValueError(f"{constant} is no number of JSON that a float holds")

    def number(text: str) -> float:
        value = float(text)
        return value if math.isfinite(value) else refuse(text[:32])

    def integer(text: str) -> int:
        value = int(text)
        return value if value.bit_length() < _FLOAT_BITS else refuse(f"{text[:32]}...")

    try:
        return json.loads(
            str(content, "utf-8"),
            object_pairs_hook=unique,
            parse_constant=refuse,
            parse_float=number,
            parse_int=integer,
        )
    except (ValueError, RecursionError) as error:
        raise ExportError(f"{name} is not valid JSON ({error}).") from None


def parse_tensors(content: memoryview, name: str) -> dict[str, np.ndarray]:
    """Parse a safetensors file into read-only views of ``content``.

    Raises:
        ExportError: if the header, a dtype, a shape or an offset is wrong, or bytes are left over.
    """
    damaged = ExportError(f"{name} is not a safetensors file of this export's kind.")
    if len(content) < 8:
        raise damaged
    header_bytes = int.from_bytes(content[:8], "little")
    if header_bytes > min(_MAX_HEADER_BYTES, len(content) - 8):
        raise damaged
    header = parse_json(content[8 : 8 + header_bytes], name)
    if not isinstance(header, dict):
        raise damaged
    header.pop("__metadata__", None)
    data = content[8 + header_bytes :]
    tensors: dict[str, np.ndarray] = {}
    spans = []
    for key, entry in header.items():
        try:
            dtype = np.dtype(_DTYPES[entry["dtype"]])
            shape = tuple(entry["shape"])
            start, stop = entry["data_offsets"]
        except (KeyError, TypeError, ValueError):
            raise damaged from None
        if any(type(number) is not int or number < 0 for number in (*shape, start, stop)):
            raise damaged
        if stop > len(data) or stop - start != math.prod(shape) * dtype.itemsize:
            raise damaged
        spans.append((start, stop))
        try:
            tensors[key] = np.frombuffer(data[start:stop], dtype=dtype).reshape(shape)
        except ValueError:  # more dimensions, or in a tensor of no number longer ones, than there can be
            raise damaged from None
    at = 0
    for start, stop in sorted(spans):
        if start != at:
            raise damaged
        at = stop
    if at != len(data):
        raise damaged
    return tensors


def take(
    tensors: dict[str, np.ndarray], file: str, key: str, dtype: type[np.generic], shape: tuple[int | None, ...]
) -> np.ndarray:
    """Remove a tensor and check it.

    Args:
        tensors: of :func:`parse_tensors`.
        file: name for messages.
        key: name of the tensor.
        dtype: expected.
        shape: expected; ``None`` for any size of an axis.

    Raises:
        ExportError: if it is absent, has another dtype or shape, or holds NaN or infinity.
    """
    if key not in tensors:
        raise ExportError(f"{file} lacks the tensor {key!r}.")
    array = tensors.pop(key)
    fits = array.ndim == len(shape) and all(want in (None, got) for want, got in zip(shape, array.shape, strict=True))
    if array.dtype != dtype or not fits:
        wanted = ", ".join("any" if n is None else str(n) for n in shape)
        raise ExportError(
            f"{file}: {key!r} is {array.dtype} {list(array.shape)}, expected {np.dtype(dtype)} [{wanted}]."
        )
    if array.dtype.kind == "f":
        # chunks: isfinite of a whole table would allocate a quarter of it
        flat = array.reshape(-1)
        for start in range(0, flat.size, 1 << 20):
            if not np.isfinite(flat[start : start + (1 << 20)]).all():
                raise ExportError(f"{file}: {key!r} holds NaN or infinity.")
    return array
