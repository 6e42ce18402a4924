"""CSV, TSV and JSON Lines, also compressed with gzip, as tables of strings.

CSV is split into cells by ``csv.reader(strict=True)``: it refuses a quote that is not closed and names the line, where
pyarrow's parser joins all rows up to the next quote and says nothing (benchmarks/import_speed.py has both, and others).
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
from tqdm import tqdm

from recbole_llm.importing.table import BATCH_CHARACTERS, BATCH_ROWS, Batch, Number, Source, joined

DELIMITERS = (",", "\t", ";", "|")
# rows of the first batch, by which columns are told apart
FIRST_ROWS = 1000
# a longer cell is more likely an unclosed quote than a text
MAX_CELL = 1 << 24

WRONG_WIDTH = "wrong number of cells"
NOT_AN_OBJECT = "not a JSON object"

_ATOMIC_TYPE = re.compile(r":(token|token_seq|float|float_seq)$")
_LINE_END = re.compile(r"\r\n|\r|\n")


class _TextSource(Source):
    """Lines of text, counted, with a progress bar over the bytes of the file."""

    def __init__(self, path: Path, encoding: str, compressed: bool) -> None:
        super().__init__(path)
        self.encoding = encoding
        self.compressed = compressed
        self._strict = codecs.lookup(encoding).name not in ("utf-8", "utf-8-sig")
        self._characters = 0

    @contextmanager
    def _lines(self, progress: bool) -> Iterator[Iterator[str]]:
        """Lines with their ends. Bytes that are not UTF-8 come as surrogates, which no array of strings accepts."""
        with (
            self.path.open("rb") as raw,
            tqdm(
                total=self.path.stat().st_size,
                unit="B",
                unit_scale=True,
                desc=self.path.name,
                disable=None if progress else True,
                leave=False,
            ) as bar,
        ):
            binary: BinaryIO = gzip.GzipFile(fileobj=raw) if self.compressed else raw  # type: ignore[assignment]
            text = io.TextIOWrapper(
                binary, self.encoding, errors="strict" if self._strict else "surrogateescape", newline=""
            )
            try:
                yield self._counted(text, raw, bar)
            except UnicodeDecodeError as error:
                raise self.error(f"not {self.encoding}: {error.reason} at byte {error.start} of a block.") from error
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise self.error(f"the compressed file is damaged or cut off ({error}).") from error

    def _counted(self, text: io.TextIOWrapper, raw: BinaryIO, bar: Any) -> Iterator[str]:
        for number, line in enumerate(text):
            if number == 0:
                line = line.removeprefix("\ufeff")
            self._characters += len(line)
            if not number % BATCH_ROWS:
                bar.update(raw.tell() - bar.n)
            yield line

    def _next_size(self, size: int, characters: int) -> int:
        """Rows of the next batch, so that it holds about ``BATCH_CHARACTERS``."""
        return max(min(BATCH_ROWS, 4 * size, size * BATCH_CHARACTERS // max(characters, 1)), 16)

    def _array(self, cells: Sequence[str | None], lines: Sequence[int]) -> pa.Array:
        try:
            return pa.array(cells, pa.string())
        except UnicodeEncodeError:
            for line, cell in zip(lines, cells, strict=True):
                if cell is not None and _has_surrogates(cell):
                    byte = next(
                        (f"byte 0x{ord(c) - 0xDC00:02x}" for c in cell if 0xDC80 <= ord(c) <= 0xDCFF),
                        "half of a surrogate pair",
                    )
                    raise self.error(
                        f"line {line} is not {self.encoding}: {byte} in {cell[:60]!a}. Give the file's "
                        "encoding (--encoding latin-1, cp1252, ...), or convert it to UTF-8."
                    ) from None
            raise


class CsvSource(_TextSource):
    """Cells between separators; the first line that is not blank is the header."""

    def __init__(self, path: Path, encoding: str, compressed: bool, separator: str | None, quoting: str) -> None:
        super().__init__(path, encoding, compressed)
        self.quoting = quoting
        with self._lines(False) as lines:
            header = next((line for line in lines if line.strip("\r\n")), None)
        if header is None:
            raise self.error("the file has only blank lines.")
        if "\0" in header:
            raise self.error("the first line contains NUL bytes: this is not a text file in that encoding.")
        self.separator = separator or max(DELIMITERS, key=header.count)
        with _cell_limit(), self._lines(False) as lines:
            self._header = self._read_header(self._reader(lines))
        self.names = self._header

    def _reader(self, lines: Iterator[str]) -> Any:
        if self.quoting == "none":
            return csv.reader(lines, delimiter=self.separator, quoting=csv.QUOTE_NONE, strict=True)
        return csv.reader(lines, delimiter=self.separator, strict=True)

    def _read_header(self, reader: Any) -> list[str]:
        header = next(filter(None, self._rows(reader)))
        self._array(header, [1] * len(header))
        names = [_ATOMIC_TYPE.sub("", name.strip()) for name in header]
        repeated = [name for name, count in Counter(names).items() if count > 1 and name]
        if repeated:
            raise self.error(f"the header names {', '.join(map(repr, repeated))} more than once. Rename one.")
        return [name or f"unnamed {at}" for at, name in enumerate(names, start=1)]

    def _rows(self, reader: Any) -> Iterator[list[str]]:
        try:
            yield from reader
        except csv.Error as error:
            raise self.error(
                f"line {reader.line_num}: {error}. A double quote opens or closes in the wrong place (or a cell is "
                f"longer than {MAX_CELL} characters). If quotes are plain characters in this file, give --quoting none."
            ) from error

    def batches(self, names: Sequence[str] | None = None, progress: bool = False) -> Iterator[Batch]:
        """See :meth:`Source.batches`."""
        self.blank_lines = self.multiline_cells = self._characters = 0
        size = FIRST_ROWS
        wanted = self.names if names is None else list(names)
        at = [self.names.index(name) for name in wanted]
        with _cell_limit(), self._lines(progress) as lines:
            reader = self._reader(lines)
            rows_left = self._rows(reader)
            for header in rows_left:
                if header:
                    break
                self.blank_lines += 1
            while True:
                before, self._characters = reader.line_num, 0
                rows = list(islice(rows_left, size))
                if not rows:
                    return
                yield self._batch(rows, before, reader.line_num, wanted, at)
                size = self._next_size(size, self._characters)

    def _batch(self, rows: list[list[str]], before: int, after: int, wanted: list[str], at: list[int]) -> Batch:
        places: Sequence[int] = range(before + 1, after + 1)
        if after - before != len(rows):
            places = self._places(rows, before)
        rejected: list[tuple[int, str]] = []
        width = len(self._header)
        if set(map(len, rows)) != {width}:
            good, good_places = [], []
            for row, place in zip(rows, places, strict=True):
                if len(row) == width:
                    good.append(row)
                    good_places.append(place)
                elif row:
                    rejected.append((place, WRONG_WIDTH))
                else:
                    self.blank_lines += 1
            rows, places = good, good_places
        cells = list(zip(*rows, strict=True)) or [()] * width
        return Batch(
            {name: self._array(cells[i], places) for name, i in zip(wanted, at, strict=True)}, places, rejected
        )

    def _places(self, rows: list[list[str]], before: int) -> list[int]:
        """The line where each row begins, when cells contain line breaks."""
        places, line = [], before + 1
        for row in rows:
            places.append(line)
            breaks = [len(_LINE_END.findall(cell)) for cell in row]
            self.multiline_cells += sum(map(bool, breaks))
            line += 1 + sum(breaks)
        return places


class JsonSource(_TextSource):
    """One JSON object a line."""

    def __init__(self, path: Path, encoding: str, compressed: bool) -> None:
        super().__init__(path, encoding, compressed)
        seen: dict[str, None] = {}
        with self._lines(False) as lines:
            for number, line in enumerate(islice(lines, FIRST_ROWS), start=1):
                if number == 1 and line.lstrip().startswith("["):
                    raise self.error("the file is a JSON array; write one object a line (jq -c '.[]' does it).")
                row = _json_object(line)
                if row is not None:
                    seen.update(dict.fromkeys(row))
        if not seen:
            raise self.error(f"no line among the first {FIRST_ROWS} holds a JSON object with a key.")
        for name in seen:
            self._array([name], [1])
        self.names = list(seen)

    def batches(self, names: Sequence[str] | None = None, progress: bool = False) -> Iterator[Batch]:
        """See :meth:`Source.batches`."""
        self.blank_lines = self.multiline_cells = self._characters = 0
        wanted = self.names if names is None else list(names)
        known, size, line_number = set(self.names), FIRST_ROWS, 0
        with self._lines(progress) as lines:
            while block := list(islice(lines, size)):
                rows, places, rejected = [], [], []
                for line in block:
                    line_number += 1
                    row = _json_object(line)
                    if row is not None:
                        if not known.issuperset(row):
                            self.late_names.update(set(row) - known)
                        rows.append(row)
                        places.append(line_number)
                    elif line.strip():
                        self._array([line], [line_number])
                        rejected.append((line_number, NOT_AN_OBJECT))
                    else:
                        self.blank_lines += 1
                columns, kinds = {}, {}
                for name in wanted:
                    cells = [row.get(name) for row in rows]
                    kinds[name] = set(map(type, cells))
                    if not kinds[name] <= {str, Number, type(None)}:
                        cells = [_json_cell(cell) for cell in cells]
                    columns[name] = self._array(cells, places)
                yield Batch(columns, places, rejected, kinds)
                size, self._characters = self._next_size(size, self._characters), 0


def _has_surrogates(text: str) -> bool:
    return any(0xD800 <= ord(character) <= 0xDFFF for character in text)


_DECODER = json.JSONDecoder(
    parse_float=Number, parse_int=Number, parse_constant=lambda name: None if name == "NaN" else Number(name)
)


def _json_object(line: str) -> dict[str, Any] | None:
    try:
        row = _DECODER.decode(line)
    except (ValueError, RecursionError):
        return None
    return row if isinstance(row, dict) else None


def _json_cell(cell: Any) -> str | None:
    if cell is None or isinstance(cell, str):
        return cell
    if isinstance(cell, bool):
        return "true" if cell else "false"
    if isinstance(cell, list) and not any(isinstance(part, (list, dict)) for part in cell):
        return joined(cell)
    return json.dumps(cell, ensure_ascii=False)


@contextmanager
def _cell_limit() -> Iterator[None]:
    before = csv.field_size_limit(MAX_CELL)
    try:
        yield
    finally:
        csv.field_size_limit(before)
