"""What every table in a file is to the importer: names, and batches of string columns with the place of each row."""

from abc import ABC, abstractmethod
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import pyarrow as pa


class Number(str):
    """A number of a JSON file, digit for digit as written; a plain ``str`` was in quotes."""


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
    """

    unit = "line"

    def __init__(self, path: Path) -> None:
        self.path = path
        self.names: list[str] = []
        self.late_names: set[str] = set()
        self.unused: dict[str, str] = {}
        self.blank_lines = 0
        self.multiline_cells = 0

    @abstractmethod
    def batches(self, names: Sequence[str] | None = None, progress: bool = False) -> Iterator[Batch]:
        """Read from the start; ``names`` limits the columns."""

    def error(self, message: str) -> ValueError:
        """A ``ValueError`` that names the file."""
        return ValueError(f"{self.path.name}: {message}")


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


def joined(cells: Sequence[Any]) -> str:
    """The parts of a list as one text; missing and empty parts are left out."""
    return ", ".join(str(cell) for cell in cells if cell is not None and str(cell).strip())
