"""What every table in a file is to the importer: names, and batches of string columns with the place of each row."""

import re
from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa

from recbole_llm.importing import limits

# pandas writes the index of a table into such a column: a row number, or what is left of a shuffle
INDEX_NAME = re.compile(r"__index_level_\d+__|Unnamed: \d+(?:_level_\d+|\.\d+)*")
INDEX = "index of a pandas table"


class Number(str):
    """A number of a JSON file, digit for digit as written; a plain ``str`` was in quotes."""

    __slots__ = ()


@dataclass(frozen=True)
class Batch:
    """Consecutive rows of a table.

    Attributes:
        columns: name to ``string`` array ``[rows]``; null where the file has no value.
        lines: the place of each row in the file, from 1: the line where it begins, or in Parquet the row.
        rejected: places of rows that are no rows of this table, each with the reason.
        kinds: of JSON, per column, the types met: ``str``, :class:`Number`, ``NoneType``, ...
    """

    columns: dict[str, pa.Array]
    lines: Sequence[int]
    rejected: list[tuple[int, str]] = field(default_factory=list)
    kinds: dict[str, set[type]] = field(default_factory=dict)


class Source(ABC):
    """A table in a file.

    Attributes:
        path: the file.
        unit: what ``Batch.lines`` counts, ``"line"`` or ``"row"``.
        names: the columns. In JSON Lines those of the first rows; ``late_names`` are seen only later.
        blank_lines: lines without anything, after ``batches`` has run.
        multiline_cells: cells with a line break inside, after ``batches`` has run.
        unused: columns that cannot be read as text, with the reason.
        read_as: how the file was read, in words: its format, encoding, separator.
        numeric: columns that hold numbers and no strings, so that no decimal sign is in question.
        foreign_decimals: whether numbers with a decimal comma are likely, since cells are not separated by commas.
    """

    unit = "line"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        self.late_names: set[str] = set()
        self.unused: dict[str, str] = {}
        self.blank_lines = 0
        self.multiline_cells = 0
        self.read_as: dict[str, str] = {}
        self.numeric: set[str] = set()
        self.foreign_decimals = False

    @abstractmethod
    def batches(self, names: Sequence[str] | None = None, progress: bool = False) -> Iterator[Batch]:
        """Read from the start; ``names`` limits the columns."""

    def error(self, message: str) -> ValueError:
        """Build a ``ValueError`` of one line that names the file."""
        text = "".join(c if c.isprintable() else "?" for c in f"{self.path.name}: {message}")
        if len(text) > limits.MAX_MESSAGE:
            text = f"{text[: limits.MAX_MESSAGE // 2]} ... {text[-limits.MAX_MESSAGE // 2 :]}"
        return ValueError(text)

    def is_typed(self, batch: Batch, name: str) -> bool:
        """Return whether a column holds numbers that the format itself wrote, so that their decimal sign is a point."""
        kinds = batch.kinds.get(name, set())
        return name in self.numeric or (Number in kinds and kinds <= {Number, type(None)})

    def check_columns(self, names: Collection[str]) -> None:
        """Refuse a table of more columns, or with longer names, than can be meant.

        Raises:
            ValueError: names their number, or the length.
        """
        if len(names) > limits.MAX_COLUMNS:
            raise self.error(
                f"{len(names):,} columns, and at most {limits.MAX_COLUMNS:,} are read. Leave out those that are no ids, texts, "
                "ratings or times; or is the separator wrong (--separator)?"
            )
        longest = max(names, key=len, default="")
        if len(longest) > limits.MAX_NAME:
            raise self.error(
                f"a column's name of {len(longest):,} characters begins with {longest[:60]!r}: is that a row of data? Put a line "
                "with the columns' names on top; or is the separator wrong (--separator)?"
            )


class OneKind:
    """Refuses a JSON column of ids that holds numbers and strings: 1 and "1" would become one id."""

    def __init__(self, source: Source, column: str) -> None:
        self.source, self.column = source, column
        self._seen: set[type] = set()

    def check(self, batch: Batch) -> None:
        """Look at one more batch.

        Raises:
            ValueError: if both kinds have been seen.
        """
        self._seen |= batch.kinds.get(self.column, set()) & {str, Number}
        if len(self._seen) == 2:
            raise self.source.error(
                f"column {self.column!r} holds ids as numbers and ids in quotes (both by line {batch.lines[-1]}), and "
                '1 and "1" would become one id. Write all of them in quotes.'
            )


def is_nameless(name: str) -> bool:
    """Return whether a column has no name of its own: its header cell is empty, or pandas made one up for its index."""
    return name.startswith("unnamed ") or INDEX_NAME.fullmatch(name) is not None


def joined(cells: Sequence[Any]) -> str:
    """Join the parts of a list to one text; missing and empty parts are left out."""
    return ", ".join(str(cell) for cell in cells if cell is not None and str(cell).strip())
