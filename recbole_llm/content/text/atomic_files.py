"""RecBole's atomic files of items and users, read without quoting and without guessing.

RecBole's own reader takes a leading quote for quoting, turns "NA" into a missing value, splits ``token_seq`` cells at every
space and copies each loaded item column into every batch. Here a cell is what stands between two separators, and nothing
else is read into it.
"""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from recbole_llm.text_files import wide_encoding

FIELD_TYPES = ("token", "token_seq", "float", "float_seq")


@dataclass(frozen=True)
class AtomicTable:
    """One atomic file: strings as they stand in the file, without the white space around texts.

    Attributes:
        path: the file.
        id_field: the column of the ids.
        types: column name to RecBole type, in file order.
        row_of: id to row; the first row of a repeated id.
        columns: column name to cells; only the first row of each id is kept.
        duplicates: rows that were left out because their id had come before.
        seq_separator: what stands between the words of a ``token_seq`` cell.
    """

    path: Path
    id_field: str
    types: dict[str, str]
    row_of: dict[str, int]
    columns: dict[str, list[str]]
    duplicates: int
    seq_separator: str = " "

    def words(self, name: str, cells: Sequence[str] | None = None) -> Sequence[str]:
        """Return cells of a column as texts, all if none are given.

        The words of a ``token_seq`` have spaces between them.
        """
        cells = self.columns[name] if cells is None else cells
        separator = self.seq_separator.strip()
        if self.types[name] != "token_seq" or not separator:
            return cells
        return [" ".join(filter(None, map(str.strip, cell.split(separator)))) for cell in cells]

    def describe_columns(self) -> str:
        """Write ``name:type`` of every column, for messages."""
        return ", ".join(f"{name}:{kind}" for name, kind in self.types.items())


def atomic_header(path: str | Path, *, separator: str = "\t", encoding: str = "utf-8") -> dict[str, str]:
    """Read the first line of an atomic file.

    Args:
        path: the file.
        separator: RecBole's ``field_separator``.
        encoding: RecBole's ``encoding``; a byte-order mark is dropped.

    Returns:
        Column name to RecBole type, in file order.

    Raises:
        ValueError: if the file is missing, empty, not in that encoding, or its first line is not ``name:type`` for each
            column.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path.name}: no such file in {path.parent}.")
    try:
        with path.open(encoding=encoding, newline="\n") as file:
            return _parse_header(file.readline().rstrip("\r\n").removeprefix("\ufeff"), path, separator)
    except (UnicodeError, LookupError) as error:
        raise _not_in(encoding, path, error) from error


def _not_in(encoding: str, path: Path, error: Exception) -> ValueError:
    with path.open("rb") as file:
        wide = wide_encoding(file.read(1000))
    way_out = "Set encoding, or convert the file." if wide is None else f"It is {wide.upper()}: set encoding to {wide}."
    return ValueError(f"{path.name} cannot be read as {encoding}: {error}. {way_out}")


def read_atomic_table(
    path: str | Path, id_field: str, *, separator: str = "\t", encoding: str = "utf-8", seq_separator: str = " "
) -> AtomicTable:
    r"""Read an atomic file (``.item``, ``.user``) without quoting, without guessing of missing values.

    Lines end with ``\n`` or ``\r\n``; quotes are ordinary characters (``csv.QUOTE_NONE``); blank lines are skipped; a
    line with fewer cells than the header has empty cells at its end, as RecBole reads it.

    Args:
        path: the file; its first line holds ``name:type`` per column.
        id_field: name of the id column.
        separator: RecBole's ``field_separator``.
        encoding: RecBole's ``encoding``; a byte-order mark is dropped.
        seq_separator: RecBole's ``seq_separator``; see :meth:`AtomicTable.words`.

    Raises:
        ValueError: if the file is missing, empty, not in that encoding, has a header that is not ``name:type``, lacks
            the id column, has an empty id, or a line with more cells than the header; says which and where.
    """
    path = Path(path)
    if not path.is_file():
        raise ValueError(f"{path.name}: no such file in {path.parent}.")
    try:
        with path.open(encoding=encoding, newline="\n") as file:
            header = file.readline().rstrip("\r\n").removeprefix("\ufeff")
            types = _parse_header(header, path, separator)
            if id_field not in types:
                raise ValueError(
                    f"{path.name} has no id column {id_field!r}; its columns are {', '.join(types)}. "
                    "Rename the column, or set USER_ID_FIELD / ITEM_ID_FIELD."
                )
            names = list(types)
            at, width = names.index(id_field), len(names)
            row_of: dict[str, int] = {}
            columns: list[list[str]] = [[] for _ in names]
            duplicates = 0
            for number, line in enumerate(file, start=2):
                line = line.rstrip("\r\n")
                if not line:
                    continue
                cells = line.split(separator)
                if len(cells) > width:
                    raise ValueError(
                        f"{path.name}, line {number}: {len(cells)} cells where the header has {width}. A text contains "
                        "the separator: replace it by a space (quotes do not protect it), or set field_separator."
                    )
                cells += [""] * (width - len(cells))
                token = cells[at]  # with its spaces: RecBole keeps them
                if not token.strip():
                    raise ValueError(f"{path.name}, line {number}: the id column {id_field!r} is empty.")
                if token in row_of:
                    duplicates += 1
                    continue
                row_of[token] = len(row_of)
                for column, cell in zip(columns, cells, strict=True):
                    column.append(cell.strip())
    except (UnicodeError, LookupError) as error:
        raise _not_in(encoding, path, error) from error
    cells_of = dict(zip(names, columns, strict=True))
    return AtomicTable(path, id_field, types, row_of, cells_of, duplicates, seq_separator)


def _parse_header(header: str, path: Path, separator: str) -> dict[str, str]:
    if not header:
        raise ValueError(f"{path.name} is empty: its first line must hold name:type for every column.")
    if "\0" in header:
        raise ValueError(
            f"{path.name} begins with zero bytes, as UTF-16 does: set encoding (to utf-16-le), or convert it."
        )
    types: dict[str, str] = {}
    for cell in header.split(separator):
        name, _, kind = cell.strip().partition(":")
        if not name or kind not in FIELD_TYPES:
            raise ValueError(
                f"{path.name}: the header cell {cell!r} is not name:type with a type of {', '.join(FIELD_TYPES)}. "
                f"Columns are split at field_separator, which is {separator!r}."
            )
        if name in types:
            raise ValueError(f"{path.name}: the header names the column {name!r} twice.")
        types[name] = kind
    return types
