"""Small text files of the user's: lists of ids, configurations, search spaces."""

import codecs
import csv
from collections.abc import Container, Iterable
from pathlib import Path

# UTF-32 first: its little-endian mark begins with that of UTF-16
_MARKS = (
    (codecs.BOM_UTF32_LE, "utf-32"),
    (codecs.BOM_UTF32_BE, "utf-32"),
    (codecs.BOM_UTF16_LE, "utf-16"),
    (codecs.BOM_UTF16_BE, "utf-16"),
)


def wide_encoding(head: bytes) -> str | None:
    """Name the UTF-16 or UTF-32 in which a text begins.

    Args:
        head: its first bytes, the more the better.

    Returns:
        ``utf-16`` or ``utf-32`` where a byte-order mark says so, ``utf-16-le`` or ``utf-16-be`` where every other byte is
        zero, else ``None``.
    """
    for mark, name in _MARKS:
        if head.startswith(mark):
            return name
    even, odd = head[0::2], head[1::2]
    if len(head) >= 4 and b"\0" in head:
        if not any(odd) and all(even):
            return "utf-16-le"
        if not any(even) and all(odd):
            return "utf-16-be"
    return None


def read_text(path: str | Path, name: str) -> str:
    """Read a small UTF-8 file without its byte-order mark.

    Args:
        path: the file.
        name: the option that names it, for messages.

    Raises:
        ValueError: if the file cannot be read or is not UTF-8; UTF-16 is named.
    """
    try:
        content = Path(path).read_bytes()
    except OSError as error:
        raise ValueError(f"{name} {str(path)!r} cannot be read: {error.strerror or error}.") from error
    wide = wide_encoding(content[:1000])
    if wide is not None:
        raise ValueError(f"{name} {str(path)!r} is {wide.upper()}, and UTF-8 is expected. Save it as UTF-8.")
    try:
        return content.decode("utf-8-sig")
    except UnicodeDecodeError as error:
        line = content[: error.start].count(b"\n") + 1
        raise ValueError(
            f"{name} {str(path)!r}, line {line}: byte 0x{content[error.start]:02x} is not UTF-8. Save the file as UTF-8."
        ) from error


def lines_of(path: str | Path, name: str) -> list[str]:
    r"""Read the lines of a small UTF-8 file; they end with ``\n`` or ``\r\n``, and blank ones are left out.

    Args:
        path: the file.
        name: the option that names it, for messages.

    Raises:
        ValueError: as :func:`read_text`.
    """
    # not splitlines: it cuts at U+2028 and other characters that an id may hold
    lines = (line.removesuffix("\r") for line in read_text(path, name).split("\n"))
    return [line for line in lines if line]


def separated(values: Iterable[str], whole: Container[str] = ()) -> list[str]:
    """Split option values at their commas, as a line of CSV: a part in double quotes keeps its commas.

    Args:
        values: what was given on the command line.
        whole: names that are known; a value that is one of them is not split.

    Returns:
        The parts, without white space in front unless it is in quotes; empty ones are left out.

    Raises:
        ValueError: on a quote that does not close.
    """
    parts: list[str] = []
    for value in values:
        if value in whole:
            parts.append(value)
            continue
        try:
            cells = next(csv.reader([value], skipinitialspace=True, strict=True), [])
        except csv.Error as error:
            raise ValueError(
                f"{value!r} cannot be split at its commas: {error}. Put a part that holds a comma in double quotes, and "
                "write a double quote inside it twice."
            ) from error
        parts += filter(None, cells)
    return parts
