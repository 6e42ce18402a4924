"""CSV, TSV and JSON Lines, also compressed with gzip, as tables of strings.

A block of CSV without quotes is read by pyarrow. From the first quote on ``csv.reader(strict=True)`` reads: it refuses
a quote that is not closed and names the line, where pyarrow's parser joins all rows up to the next quote and says
nothing. It also reads each block in which pyarrow finds a fault, to name the lines. benchmarks/import_speed.py has the
speeds.
"""

import codecs
import csv
import gzip
import io
import json
import re
import zlib
from collections import Counter
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from itertools import islice
from pathlib import Path
from typing import Any, BinaryIO

import pyarrow as pa
import pyarrow.csv

from recbole_llm.importing import limits
from recbole_llm.importing.lines import Lines
from recbole_llm.importing.table import Batch, Number, Source, joined
from recbole_llm.progress import progress_bar

DELIMITERS = (",", "\t", ";", "|")
# rows of the first batch, by which columns are told apart
FIRST_ROWS = 1000
# rows that Python reads at once, unless they hold more than a block; 2^16 took twice as long
ROWS = 1 << 12

WRONG_WIDTH = "wrong number of cells"
NOT_AN_OBJECT = "not a JSON object"

_ATOMIC_TYPE = re.compile(r":(token|token_seq|float|float_seq)$")
_LINE_END = re.compile(r"\r\n|\r|\n")
_SHOWN = {"\t": "tab", " ": "space"}


class _BoundedGzip(gzip.GzipFile):
    """A compressed file that does not give more than ``limits.MAX_EXPANSION`` times what it holds."""

    def __init__(self, raw: BinaryIO, refuse: Callable[[str], ValueError]) -> None:
        super().__init__(fileobj=raw)
        self._raw, self._refuse = raw, refuse

    def read(self, size: int | None = -1) -> bytes:
        """Up to ``size`` bytes.

        Raises:
            ValueError: if the file expands too much.
        """
        data = super().read(size)
        if self.tell() > max(limits.FREE_EXPANSION, limits.MAX_EXPANSION * self._raw.tell()):
            raise self._refuse(
                f"the compressed file holds more than {limits.MAX_EXPANSION} times its size, which is no table of "
                "interactions or texts. If it is one, unpack it (gunzip) and import the unpacked file."
            )
        return data


class _TextSource(Source):
    """Bytes of a text file, with a progress bar over them."""

    # what to do about a line that does not end
    endless = "One JSON object a line is expected."

    def __init__(self, path: Path, encoding: str, compressed: bool) -> None:
        super().__init__(path)
        self.encoding = encoding
        self.compressed = compressed
        self.is_utf8 = codecs.lookup(encoding).name in ("utf-8", "utf-8-sig")
        with self._stream() as (stream, _):
            has_mark = stream.read(3) == codecs.BOM_UTF8
        mark = " with a byte-order mark" if self.is_utf8 and has_mark else ""
        self.read_as = {"encoding": encoding + mark}
        if compressed:
            self.read_as["compressed"] = "gzip"

    @contextmanager
    def _stream(self, progress: bool = False) -> Iterator[tuple[BinaryIO, Callable[[], object]]]:
        """The file's bytes, and a function that moves the progress bar up to what has been read."""
        size = self.path.stat().st_size
        bar = progress_bar(
            total=size, unit="B", unit_scale=True, desc=self.path.name, leave=False, disable=None if progress else True
        )
        with self.path.open("rb") as raw, bar:
            stream: Any = _BoundedGzip(raw, self.error) if self.compressed else raw
            try:
                yield stream, lambda: bar.update(raw.tell() - bar.n)
            except UnicodeError as error:
                raise self.error(f"not {self.encoding}: {getattr(error, 'reason', error)}.") from error
            except (EOFError, zlib.error, gzip.BadGzipFile) as error:
                raise self.error(f"the compressed file is damaged or cut off ({error}).") from error

    def _lines(self, stream: BinaryIO, block: int, place: Callable[[], int]) -> Lines:
        """The lines of a stream; ``place`` gives the number of those read so far, for an error's message."""
        encoding = "utf-8-sig" if self.is_utf8 and not stream.tell() else "utf-8" if self.is_utf8 else self.encoding
        return Lines(stream, encoding, block, lambda what: self.error(f"line {place() + 1} {what}. {self.endless}"))

    def _array(self, cells: Sequence[str | None], lines: Sequence[int]) -> pa.Array:
        try:
            return pa.array(cells, pa.string())
        except UnicodeEncodeError:
            for line, cell in zip(lines, cells, strict=True):
                if cell is not None and any(0xD800 <= ord(character) <= 0xDFFF for character in cell):
                    raise self._not_text(line, cell) from None
            raise

    def _not_text(self, line: int, cell: str) -> ValueError:
        foreign = [f"byte 0x{ord(c) - 0xDC00:02x}" for c in cell if 0xDC80 <= ord(c) <= 0xDCFF]
        return self.error(
            f"line {line} is not {self.encoding}: {foreign[0] if foreign else 'half of a surrogate pair'} in "
            f"{cell[:60]!r}. Give the file's encoding (--encoding latin-1, cp1252, ...), or convert it to UTF-8."
        )


class CsvSource(_TextSource):
    """Cells between separators; the first line that is not blank is the header."""

    endless = "Is a quote not closed? If quotes are plain characters here, give --quoting none."

    def __init__(self, path: Path, encoding: str, compressed: bool, separator: str | None, quoting: str) -> None:
        super().__init__(path, encoding, compressed)
        self.quoting = quoting
        with self._stream() as (stream, _):
            line = next((line for line in self._lines(stream, limits.HEADER_BYTES, int) if line.strip("\r\n")), None)
        if line is None:
            raise self.error("the file has only blank lines.")
        if "\0" in line:
            raise self.error("the first line contains NUL bytes: this is not text in that encoding.")
        self.separator = separator or max(DELIMITERS, key=line.count)
        with _cell_limit(), self._stream() as (stream, _):
            reader = self._reader(self._lines(stream, limits.HEADER_BYTES, int))
            header = self._rows(reader, 1)[0]
            while not header:
                header = self._rows(reader, 1)[0]
            self._header_lines = reader.line_num
        self.check_columns(header)
        self._array(header, [self._header_lines] * len(header))
        names = [_ATOMIC_TYPE.sub("", name.strip()) for name in header]
        repeated = [name for name, count in Counter(names).items() if count > 1 and name]
        if repeated:
            raise self.error(f"the header names {', '.join(map(repr, repeated))} more than once. Rename one.")
        self.names = [name or f"unnamed {at}" for at, name in enumerate(names, start=1)]
        self.foreign_decimals = self.separator != ","
        shown = _SHOWN.get(self.separator, self.separator)
        self.read_as = {"format": "CSV", **self.read_as, "separator": shown}
        if quoting == "none":
            self.read_as["quotes"] = "plain characters"

    def _reader(self, lines: Iterable[str]) -> Any:
        if self.quoting == "none":
            return csv.reader(lines, delimiter=self.separator, quoting=csv.QUOTE_NONE, strict=True)
        return csv.reader(lines, delimiter=self.separator, strict=True)

    def _rows(self, reader: Any, count: int, first_line: int = 0) -> list[list[str]]:
        try:
            return list(islice(reader, count))
        except csv.Error as error:
            raise self._wrong_quote(error, first_line + reader.line_num) from error

    def _wrong_quote(self, error: csv.Error, line: int) -> ValueError:
        return self.error(
            f"line {line}: {error}. A double quote opens or closes in the wrong place (or a cell is longer than "
            f"{limits.MAX_RECORD} characters). If quotes are plain characters here, give --quoting none."
        )

    def batches(self, names: Sequence[str] | None = None, progress: bool = False) -> Iterator[Batch]:
        """Read as :meth:`Source.batches` says."""
        self.blank_lines = self.multiline_cells = 0
        wanted = self.names if names is None else list(names)
        with _cell_limit(), self._stream(progress) as (stream, advance):
            line = 0
            if self.is_utf8 and self.separator.isascii():
                for _ in range(self._header_lines):
                    stream.readline()
                line = self._header_lines if self._is_plain_so_far(stream) else 0
            begin = stream.tell() if line else 0
            while line:
                block = _block(stream, limits.BLOCK_BYTES)
                if not block:
                    return
                batch = self._plain_batch(block, line, wanted)
                if batch is None:  # a quote: the end of the block may lie inside a cell
                    break
                advance()
                yield batch
                line += _count_lines(block)
                begin += len(block)
            stream.seek(begin)
            yield from self._quoted_batches(stream, line, wanted, advance)

    def _is_plain_so_far(self, stream: BinaryIO) -> bool:
        """Whether the header is one physical line for bytes as it is for text: no quote, no lone carriage return."""
        end = stream.tell()
        stream.seek(0)
        header = stream.read(end)
        stream.seek(end)
        return b'"' not in header and header.count(b"\r") == header.count(b"\r\n")

    def _plain_batch(self, block: bytes, line: int, wanted: list[str]) -> Batch | None:
        """The rows of whole lines of bytes; ``None`` if a quote may join lines, or a line does not end."""
        if (self.quoting != "none" and b'"' in block) or len(block) > limits.BLOCK_BYTES + limits.MAX_RECORD:
            return None
        lines = _count_lines(block)
        if block.count(b"\r") == block.count(b"\r\n"):
            try:
                table = pyarrow.csv.read_csv(
                    pa.BufferReader(block),
                    read_options=pyarrow.csv.ReadOptions(
                        column_names=self.names, block_size=len(block) + 1, use_threads=False
                    ),
                    parse_options=pyarrow.csv.ParseOptions(delimiter=self.separator, quote_char=False),
                    convert_options=pyarrow.csv.ConvertOptions(
                        column_types=dict.fromkeys(wanted, pa.string()),
                        include_columns=wanted,
                        strings_can_be_null=False,
                    ),
                )
            except pa.ArrowInvalid:
                table = None
            if table is not None and table.num_rows == lines:
                columns = {name: table.column(name).combine_chunks() for name in wanted}
                return Batch(columns, range(line + 1, line + lines + 1))
        # a line has a fault: name it
        reader = self._reader(io.StringIO(block.decode("utf-8", "surrogateescape"), newline=""))
        return self._batch(self._rows(reader, lines + block.count(b"\r"), line), line, line + reader.line_num, wanted)

    def _quoted_batches(
        self, stream: BinaryIO, line: int, wanted: list[str], advance: Callable[[], object]
    ) -> Iterator[Batch]:
        lines = self._lines(stream, limits.BLOCK_BYTES, lambda: line + reader.line_num)
        reader = self._reader(lines)
        if not line:
            while not self._rows(reader, 1)[0]:
                self.blank_lines += 1
        size, before = FIRST_ROWS, reader.line_num
        while rows := self._some_rows(reader, lines, size, line):
            advance()
            yield self._batch(rows, line + before, line + reader.line_num, wanted)
            before, size = reader.line_num, ROWS

    def _some_rows(self, reader: Any, lines: Lines, count: int, line: int) -> list[list[str]]:
        try:
            return lines.some(reader, count)
        except csv.Error as error:
            raise self._wrong_quote(error, line + reader.line_num) from error

    def _batch(self, rows: list[list[str]], before: int, after: int, wanted: list[str]) -> Batch:
        places: Sequence[int] = range(before + 1, after + 1)
        if after - before != len(rows):
            places = self._places(rows, before)
        rejected: list[tuple[int, str]] = []
        width = len(self.names)
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
        at = {name: place for place, name in enumerate(self.names)}
        return Batch({name: self._array(cells[at[name]], places) for name in wanted}, places, rejected)

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
        self.read_as = {"format": "JSON Lines", **self.read_as}
        self._line = 0
        seen: dict[str, None] = {}
        with self._stream() as (stream, _):
            lines = self._lines(stream, limits.JSON_BLOCK_BYTES, lambda: self._line)
            for number, line in enumerate(islice(lines, FIRST_ROWS), start=1):
                self._line = number
                lines.settle()
                if number == 1 and line.lstrip().startswith("["):
                    raise self.error("the file is a JSON array; write one object a line (jq -c '.[]' does it).")
                row = _json_object(line)
                if row is not None:
                    seen.update(dict.fromkeys(row))
                    self.check_columns(seen)
        if not seen:
            raise self.error(f"no line among the first {FIRST_ROWS} holds a JSON object with a key.")
        self._array(list(seen), [1] * len(seen))
        self.names = list(seen)

    def batches(self, names: Sequence[str] | None = None, progress: bool = False) -> Iterator[Batch]:
        """Read as :meth:`Source.batches` says."""
        self.blank_lines = 0
        wanted = self.names if names is None else list(names)
        size, self._line = FIRST_ROWS, 0
        with self._stream(progress) as (stream, advance):
            lines = self._lines(stream, limits.JSON_BLOCK_BYTES, lambda: self._line)
            texts = iter(lines)
            while block := lines.some(texts, size):
                advance()
                yield self._batch(block, self._line, wanted)
                self._line += len(block)
                size = ROWS

    def _batch(self, block: list[str], line: int, wanted: list[str]) -> Batch:
        rows, places, rejected = [], [], []
        known = set(self.names)
        for place, text in enumerate(block, start=line + 1):
            row = _json_object(text)
            if row is not None:
                late = [name for name in row if name not in known]
                if late:
                    self._array(late, [place] * len(late))
                    self.late_names.update(late)
                    self.check_columns(known | self.late_names)
                rows.append(row)
                places.append(place)
            elif text.strip():
                self._array([text], [place])
                rejected.append((place, NOT_AN_OBJECT))
            else:
                self.blank_lines += 1
        columns, kinds = {}, {}
        for name in wanted:
            cells = [row.get(name) for row in rows]
            kinds[name] = set(map(type, cells))
            if not kinds[name] <= {str, Number, type(None)}:
                try:
                    cells = [_json_cell(cell) for cell in cells]
                except RecursionError:
                    where = f"lines {places[0]} to {places[-1]}"
                    raise self.error(f"{where}: {name!r} holds lists in lists, deeper than can be read.") from None
            columns[name] = self._array(cells, places)
        return Batch(columns, places, rejected, kinds)


def _block(stream: BinaryIO, size: int) -> bytes:
    """At least one line, and as many as fit about ``size`` bytes."""
    block = stream.read(size)
    return block if len(block) < size else block + stream.readline(limits.MAX_RECORD + 1)


def _count_lines(block: bytes) -> int:
    return block.count(b"\n") + (not block.endswith(b"\n"))


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
    before = csv.field_size_limit(limits.MAX_RECORD)
    try:
        yield
    finally:
        csv.field_size_limit(before)
