"""Which picture or sound belongs to which item: a column of the item file, else a file of the item's name.

    .item     image:token      paths inside the dataset's folder, several with "|" between them; empty: none
    images/   ITEM_ID.jpg      characters that a file name cannot hold are percent-encoded

The column goes before the folder, item by item. Nothing is fetched: addresses are counted and left alone. A path that leads out
of the dataset's folder, through ".." or a link, is refused and counted.
"""

import re
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from urllib.parse import quote, unquote

from recbole_llm.content.media.kinds import FileKind

SEPARATOR = "|"
NAMED = 3  # items that a line of the report names

_ADDRESS = re.compile(r"[a-z][a-z0-9+.-]*://|data:", re.IGNORECASE)


def file_stem(item_id: str) -> str:
    """The name of an item's file without its ending.

    Example:
        >>> file_stem("a/b c.1")
        'a%2Fb c%2E1'
    """
    safe = quote(item_id, safe=" !#$&'()+,;=@[]{}~^`", encoding="utf-8")
    safe = safe.replace(".", "%2E")
    return safe.replace(" ", "%20") if safe != safe.strip(" ") else safe


@dataclass
class FilesReport:
    """What became of the items' files.

    Attributes:
        kind: of files.
        n: items asked for, padding not counted.
        by_column: items with a file by the column.
        by_folder: items with a file by their name.
        refused: reason to the items that named such a file.
        column: the column that was read; ``None`` where there is none.
    """

    kind: FileKind
    n: int = 0
    by_column: int = 0
    by_folder: int = 0
    refused: dict[str, list[str]] = field(default_factory=dict)
    column: str | None = None

    def refuse(self, reason: str, item: str) -> None:
        """Count a file that is not read."""
        self.refused.setdefault(reason, []).append(item)

    def lines(self) -> list[str]:
        """Format the report as lines for a log."""
        with_some = self.by_column + self.by_folder
        where = f"{self.by_column} by the column {self.column!r}, " if self.column else ""
        title = self.kind.many.capitalize()
        lines = [
            f"{title}: {with_some} of {self.n} items name one ({where}{self.by_folder} by a file {self.kind.folder}/ITEM_ID.*); "
            f"{self.n - with_some} without one are left out of the {self.kind.one} kernel"
        ]
        for reason, items in self.refused.items():
            lines.append(f"{title} not read: {len(items)}, {reason} (items {some(items)})")
        return lines


@dataclass(frozen=True)
class ItemFiles:
    """The files of each of a list of ids, none for padding, and the counts."""

    paths: tuple[tuple[Path, ...], ...]
    report: FilesReport


def some(names: Sequence[str]) -> str:
    """List the first few names."""
    return ", ".join(map(repr, names[:NAMED])) + (", ..." if len(names) > NAMED else "")


def find_files(
    kind: FileKind,
    folder: Path,
    tokens: Sequence[str | None],
    cells: Mapping[str, str] | None = None,
    column: str | None = None,
) -> ItemFiles:
    """Find the files of items.

    Args:
        kind: of files.
        folder: the dataset's.
        tokens: ids in the order wanted; ``None`` is padding.
        cells: id to the cell of the column; ``None`` where there is no such column.
        column: its name, for the report.
    """
    root = folder.resolve()
    named = _by_name(folder / kind.folder, kind.suffixes)
    report = FilesReport(kind, sum(token is not None for token in tokens), column=column if cells is not None else None)
    found: list[tuple[Path, ...]] = []
    for token in tokens:
        paths: list[Path] = []
        if token is not None:
            cell = (cells or {}).get(token, "")
            paths = _of_cell(cell, root, token, report)
            if paths:
                report.by_column += 1
            elif not cell and token in named:
                paths = [path for path in [_inside(root, named[token])] if path is not None]
                if paths:
                    report.by_folder += 1
                else:
                    report.refuse(_OUTSIDE, token)
        found.append(tuple(paths))
    return ItemFiles(tuple(found), report)


_OUTSIDE = "their paths lead out of the dataset's folder"
_ADDRESSES = "their column holds addresses, and nothing is fetched: put the files into the dataset's folder"
_ABSENT = "no such file"


def _of_cell(cell: str, root: Path, token: str, report: FilesReport) -> list[Path]:
    paths = []
    reasons: Counter[str] = Counter()
    for part in filter(None, (part.strip() for part in cell.split(SEPARATOR))):
        if _ADDRESS.match(part):
            reasons[_ADDRESSES] += 1
            continue
        path = _inside(root, root / part)
        if path is None:
            reasons[_OUTSIDE] += 1
        elif not path.is_file():
            reasons[_ABSENT] += 1
        else:
            paths.append(path)
    for reason in reasons:
        report.refuse(reason, token)
    return paths


def _inside(root: Path, path: Path) -> Path | None:
    """The real path, if it lies inside the folder and links do not lead out of it."""
    try:
        real = path.resolve()
    except (OSError, RuntimeError, ValueError):  # a circle of links, a zero byte
        return None
    return real if real.is_relative_to(root) else None


def _by_name(folder: Path, suffixes: tuple[str, ...]) -> dict[str, Path]:
    """The files of a folder by the id that their name stands for; of several endings the first in order."""
    if not folder.is_dir():
        return {}
    found: dict[str, Path] = {}
    for path in sorted(folder.iterdir()):
        if path.suffix.lower() in suffixes:
            found.setdefault(unquote(path.stem, errors="replace"), path)
    return found
