"""A folder of pictures or sounds to those of a dataset: ``recbole-llm import --images`` and ``--audio``."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from recbole_llm.content.media.files import SEPARATOR, file_stem, some
from recbole_llm.content.media.kinds import FileKind, UnreadableError
from recbole_llm.content.text import read_atomic_table


@dataclass
class MediaImport:
    """What became of a folder of pictures or sounds.

    Attributes:
        what: the word for one of them, ``picture`` or ``sound``.
        folder: its name.
        items: of the dataset.
        matched: items with a file that can be read.
        files: of the kind in the folder.
        copied: of these, those of an item.
        column: the item file's field that names them; ``None`` where files are named after items.
        refused: reason to the files or cells that were left out.
        encoder: for the YAML; ``None`` for a line that waits for one.
    """

    what: str
    folder: str
    items: int = 0
    matched: int = 0
    files: int = 0
    copied: int = 0
    column: str | None = None
    refused: dict[str, list[str]] = field(default_factory=dict)
    encoder: str | None = None

    def lines(self) -> list[str]:
        """Format the counts as text."""
        how = f"by the column {self.column}" if self.column else "by the file's name"
        lines = [
            f"{self.folder}: {self.files:,} {self.what}s; {self.matched:,} of {self.items:,} items have one ({how}), "
            f"{self.items - self.matched:,} have none; {self.files - self.copied:,} files belong to no item"
        ]
        lines += [f"  left out {len(names):,}: {reason} ({some(names)})" for reason, names in self.refused.items()]
        return lines


@dataclass(frozen=True)
class MediaSource:
    """A folder of pictures or sounds as a caller gives it.

    Attributes:
        kind: of files.
        folder: the folder.
        column: of the items' file, which names files inside it; ``None``: files are named after the items.
        encoder: for the YAML.
    """

    kind: FileKind
    folder: Path
    column: str | None
    encoder: str | None


def check_media(
    name: str, folder: str | Path | None, column: str | None, encoder: str | None, has_items: bool
) -> MediaSource | None:
    """Check the folder of pictures or sounds.

    Args:
        name: of the argument that gives it, ``images`` or ``audio``.
        folder: what was given; ``None``: nothing.
        column: of the items' file, which names files inside it.
        encoder: for the YAML.
        has_items: whether that file was given.

    Raises:
        ValueError: if there is no such folder, or the column belongs to no file.
    """
    one = name.removesuffix("s")
    what = "pictures" if name == "images" else "sounds"
    if folder is None:
        if column is None and encoder is None:
            return None
        raise ValueError(
            f"{one}_column and {one}_encoder belong to {name}, the folder of the {what}, which was not given."
        )
    found = Path(folder).expanduser()
    if not found.is_dir():
        raise ValueError(f"{name}: {str(folder)!r} is no folder. Give the folder that holds the {what}.")
    if column is not None and not has_items:
        raise ValueError(f"{one}_column names a column of the items' file, and items was not given.")
    if name == "images":
        from recbole_llm.content.images.files import PICTURES as KIND
    else:
        from recbole_llm.content.sounds.files import SOUNDS as KIND
        from recbole_llm.content.sounds.reading import require_soundfile

        require_soundfile()
    return MediaSource(KIND, found, column, encoder)


def import_media(
    given: MediaSource, target: Path, item_file: Path | None, ids: list[str], field_name: str | None = None
) -> MediaImport:
    """Copy the pictures or sounds of items into a dataset's folder.

    Args:
        given: the folder with them.
        target: the dataset's folder.
        item_file: the ``.item`` file that was written; ``None`` where there is none.
        ids: the items, where there is no such file.
        field_name: its field with paths inside that folder; ``None``: files are named after the items.
    """
    kind, source = given.kind, given.folder
    root = source.resolve()
    paths = [path for path in sorted(source.rglob("*")) if path.suffix.lower() in kind.suffixes and path.is_file()]
    report = MediaImport(kind.one, source.name, files=len(paths), column=field_name, encoder=given.encoder)
    table = None if item_file is None else read_atomic_table(item_file, "item_id", separator="\t", encoding="utf-8")
    if table is not None:
        ids = list(table.row_of)
    report.items = len(ids)
    copies = _Copies(kind, root, target, report)
    if table is not None and field_name is not None:
        for item, row in table.row_of.items():
            cells = filter(None, (part.strip() for part in table.columns[field_name][row].split(SEPARATOR)))
            report.matched += any([copies.named(cell, item) for cell in cells])
    else:
        of_id: dict[str, list[Path]] = {}
        for path in paths:
            if path.parent == source:
                of_id.setdefault(unquote(path.stem, errors="replace"), []).append(path)
        for item in ids:
            found = of_id.get(item, [])
            for path in found[1:]:
                report.refused.setdefault(f"a second {kind.one} of an item", []).append(path.name)
            if found:
                name = f"{kind.folder}/{file_stem(item)}{found[0].suffix.lower()}"
                report.matched += copies.copy(found[0], name, item)
    report.copied = len(copies.taken)
    return report


class _Copies:
    """Copies files of a folder into another, each once, and counts what is left out."""

    def __init__(self, kind: FileKind, root: Path, target: Path, report: MediaImport) -> None:
        self.root, self.target, self.report, self.kind = root, target, report, kind
        self.taken: set[Path] = set()

    def named(self, cell: str, item: str) -> bool:
        """Copy the file that a cell names to the same path in the dataset's folder; whether it is there now."""
        path = PurePosixPath(cell)
        if "://" in cell or cell.startswith("data:"):
            return self._refuse("an address, and nothing is fetched", item)
        if path.is_absolute() or ".." in path.parts or "\0" in cell:
            return self._refuse("a path that leads out of the folder", item)
        if path.suffix.lower() not in self.kind.suffixes:
            return self._refuse(f"a file that does not end in {', '.join(self.kind.suffixes)}", item)
        return self.copy(self.root / cell, cell, item)

    def copy(self, path: Path, name: str, item: str) -> bool:
        """Copy one file; whether it is there now."""
        try:
            real = path.resolve()
        except (OSError, RuntimeError):  # a circle of links
            return self._refuse("a path that leads out of the folder", item)
        if not real.is_relative_to(self.root):
            return self._refuse("a path that leads out of the folder", item)
        target = self.target / name
        if not target.exists():
            try:
                self.kind.check(self.kind.read(real))
            except UnreadableError as error:
                return self._refuse(str(error), path.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(real, target)
        self.taken.add(real)
        return True

    def _refuse(self, reason: str, name: str) -> bool:
        self.report.refused.setdefault(reason, []).append(name)
        return False
