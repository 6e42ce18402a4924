"""Opens a table by its name and first bytes."""

import codecs
from pathlib import Path

from recbole_llm.importing.parquet import ParquetSource
from recbole_llm.importing.table import Source
from recbole_llm.importing.text_tables import CsvSource, JsonSource

QUOTING = ("auto", "csv", "none")


def open_source(
    path: str | Path, *, separator: str | None = None, quoting: str = "auto", encoding: str = "utf-8"
) -> Source:
    """A table, its format told by its name and first bytes.

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
    try:
        codecs.lookup(encoding)
    except LookupError:
        raise ValueError(f"encoding {encoding!r} is unknown; try utf-8, utf-16, latin-1 or cp1252.") from None
    if not path.is_file():
        raise ValueError(f"{path}: no such file.")
    with path.open("rb") as file:
        head = file.read(8)
    if not head:
        raise ValueError(f"{path.name}: the file is empty.")
    if head.startswith((b"PK\x03\x04", b"\xd0\xcf\x11\xe0")):
        raise ValueError(f"{path.name} is a ZIP archive or a spreadsheet: unpack it, or save it as CSV.")
    if head.startswith((codecs.BOM_UTF16_LE, codecs.BOM_UTF16_BE)) and encoding.lower().startswith("utf-8"):
        raise ValueError(f"{path.name} is not UTF-8 but begins like UTF-16: give --encoding utf-16.")
    return head
