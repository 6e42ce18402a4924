"""Opens a table by its name and first bytes."""

import codecs
import gzip
import zlib
from pathlib import Path

from recbole_llm.importing.parquet import ParquetSource
from recbole_llm.importing.table import Source
from recbole_llm.importing.text_tables import CsvSource, JsonSource
from recbole_llm.text_files import wide_encoding

QUOTING = ("auto", "csv", "none")


def open_source(
    path: str | Path, *, separator: str | None = None, quoting: str = "auto", encoding: str = "utf-8"
) -> Source:
    """Open a table, its format told by its name and first bytes.

    Args:
        path: ``.csv``, ``.tsv``, ``.txt``, RecBole atomic files, ``.jsonl``, ``.ndjson``, ``.json`` (an object a
            line), each also ``.gz``; ``.parquet``.
        separator: between cells; found from the header if empty.
        quoting: ``csv`` (cells in double quotes), ``none`` (quotes are characters), ``auto`` (none for atomic files).
        encoding: of text formats; a byte-order mark is dropped.

    Raises:
        ValueError: if the file is missing, empty, not text of that encoding or not of a known format.
    """
    path = Path(path)
    head = _checked_head(path, separator, quoting, encoding)
    if head.startswith(b"PAR1"):
        return ParquetSource(path)
    suffixes = [suffix.lower() for suffix in path.suffixes]
    compressed = head.startswith(b"\x1f\x8b")
    if suffixes and suffixes[-1] == ".gz":
        suffixes.pop()
    kind = suffixes[-1] if suffixes else ""
    if kind in (".parquet", ".pq"):
        hint = ": unpack it (gunzip), Parquet is compressed inside." if compressed else "."
        raise ValueError(f"{path.name} is not a Parquet file{hint}")
    if kind in (".jsonl", ".ndjson", ".json"):
        return JsonSource(path, encoding, compressed)
    if quoting == "auto":
        quoting = "none" if kind in (".inter", ".item", ".user") else "csv"
    default = "\t" if kind in (".tsv", ".tab", ".inter", ".item", ".user") else None
    return CsvSource(path, encoding, compressed, separator or default, quoting)


def _checked_head(path: Path, separator: str | None, quoting: str, encoding: str) -> bytes:
    """The first bytes of a file that may be one of ours."""
    if quoting not in QUOTING:
        raise ValueError(f"quoting must be one of {', '.join(QUOTING)}, and {quoting!r} was given.")
    if separator is not None and len(separator) != 1:
        raise ValueError(f"separator must be one character, and {separator!r} was given.")
    if separator is not None and separator in '"\n\r\0':
        raise ValueError(f"separator {separator!r} is a quote or ends a line; give the character between cells.")
    _check_encoding(encoding)
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    try:
        with path.open("rb") as file:
            head = file.read(1000)
    except OSError as error:
        raise ValueError(f"{path}: cannot be read ({error.strerror or error}).") from error
    if not head:
        raise ValueError(f"{path.name}: the file is empty.")
    if head.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise ValueError(f"{path.name} is a ZIP archive or a spreadsheet: unpack it, or save it as CSV.")
    wide = wide_encoding(_text_head(path, head))
    if wide is not None and not encoding.lower().replace("_", "-").startswith(("utf-16", "utf-32", "utf16", "utf32")):
        raise ValueError(f"{path.name} is not {encoding} but {wide.upper()}: give --encoding {wide}.")
    return head


def _check_encoding(encoding: str) -> None:
    """Refuse what is no encoding of texts; ``base64`` is a codec too."""
    try:
        codecs.lookup(encoding)
        "".encode(encoding)
        codecs.getincrementaldecoder(encoding)().decode(b"")
    except (LookupError, UnicodeError):
        raise ValueError(f"encoding {encoding!r} is unknown; try utf-8, utf-16, latin-1 or cp1252.") from None


def _text_head(path: Path, head: bytes) -> bytes:
    """The first bytes, unpacked; empty where they cannot be."""
    if head.startswith(b"PAR1"):
        return b""
    if not head.startswith(b"\x1f\x8b"):
        return head
    try:
        with gzip.open(path) as file:
            return file.read(1000)
    except (OSError, EOFError, zlib.error):  # the reader names the fault
        return b""
