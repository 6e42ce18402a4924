"""A folder of pictures to the pictures of a dataset: ``recbole-llm import --images``."""

import shutil
from dataclasses import dataclass, field
from pathlib import Path, PurePosixPath
from urllib.parse import unquote

from recbole_llm.content.images.files import FOLDER, SEPARATOR, file_stem, some
from recbole_llm.content.images.reading import SUFFIXES, PictureError, check_header, read_bytes
from recbole_llm.content.text import read_atomic_table


@dataclass
class PictureImport:
    """What became of a folder of pictures.

    Attributes:
        folder: its name.
        items: of the dataset.
        matched: items with a picture that can be read.
        files: pictures in the folder.
        copied: of these, those of an item.
        column: the item file's field that names them; ``None`` where files are named after items.
        refused: reason to the files or cells that were left out.
        encoder: for the YAML; ``None`` for a line that waits for one.
    """

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
            f"{self.folder}: {self.files:,} pictures; {self.matched:,} of {self.items:,} items have one ({how}), "
            f"{self.items - self.matched:,} have none; {self.files - self.copied:,} files belong to no item"
        ]
        lines += [f"  left out {len(names):,}: {reason} ({some(names)})" for reason, names in self.refused.items()]
        return lines


def check_pictures(images: str | Path, image_column: str | None, has_items: bool) -> Path:
    """Return the folder of pictures.

    Raises:
        ValueError: if there is no such folder, or the column belongs to no file.
    """
    folder = Path(images).expanduser()
    if not folder.is_dir():
        raise ValueError(f"images: {str(images)!r} is no folder. Give the folder that holds the pictures.")
    if image_column is not None and not has_items:
        raise ValueError("image_column names a column of the items' file, and items was not given.")
    return folder


def import_pictures(
    images: Path, target: Path, item_file: Path | None, ids: list[str], field_name: str | None = None
) -> PictureImport:
    """Copy the pictures of items into a dataset's folder.

    Args:
        images: the folder with the pictures.
        target: the dataset's folder.
        item_file: the ``.item`` file that was written; ``None`` where there is none.
        ids: the items, where there is no such file.
        field_name: its field with paths inside ``images``; ``None``: files are named after the items.
    """
    root = images.resolve()
    paths = [path for path in sorted(images.rglob("*")) if path.suffix.lower() in SUFFIXES and path.is_file()]
    report = PictureImport(images.name, files=len(paths), column=field_name)
    table = None if item_file is None else read_atomic_table(item_file, "item_id", separator="\t", encoding="utf-8")
    if table is not None:
        ids = list(table.row_of)
    report.items = len(ids)
    copies = _Copies(root, target, report)
    if table is not None and field_name is not None:
        for item, row in table.row_of.items():
            cells = filter(None, (part.strip() for part in table.columns[field_name][row].split(SEPARATOR)))
            report.matched += any([copies.named(cell, item) for cell in cells])
    else:
        of_id: dict[str, list[Path]] = {}
        for path in paths:
            if path.parent == images:
                of_id.setdefault(unquote(path.stem, errors="replace"), []).append(path)
        for item in ids:
            found = of_id.get(item, [])
            for path in found[1:]:
                report.refused.setdefault("a second picture of an item", []).append(path.name)
            if found:
                name = f"{FOLDER}/{file_stem(item)}{found[0].suffix.lower()}"
                report.matched += copies.copy(found[0], name, item)
    report.copied = len(copies.taken)
    return report


class _Copies:
    """Copies files of a folder into another, each once, and counts what is left out."""

    def __init__(self, root: Path, target: Path, report: PictureImport) -> None:
        self.root, self.target, self.report = root, target, report
        self.taken: set[Path] = set()

    def named(self, cell: str, item: str) -> bool:
        """Copy the file that a cell names to the same path in the dataset's folder; whether it is there now."""
        path = PurePosixPath(cell)
        if "://" in cell or cell.startswith("data:"):
            return self._refuse("an address, and nothing is fetched", item)
        if path.is_absolute() or ".." in path.parts or "\0" in cell:
            return self._refuse("a path that leads out of the folder", item)
        if path.suffix.lower() not in SUFFIXES:
            return self._refuse(f"a file that does not end in {', '.join(SUFFIXES)}", item)
        return self.copy(self.root / cell, cell, item)

    def copy(self, path: Path, name: str, item: str) -> bool:
        """Copy one picture; whether it is there now."""
        try:
            real = path.resolve()
        except (OSError, RuntimeError):  # a circle of links
            return self._refuse("a path that leads out of the folder", item)
        if not real.is_relative_to(self.root):
            return self._refuse("a path that leads out of the folder", item)
        target = self.target / name
        if not target.exists():
            try:
                check_header(read_bytes(real))
            except PictureError as error:
                return self._refuse(str(error), path.name)
            target.parent.mkdir(parents=True, exist_ok=True)
            shutil.copyfile(real, target)
        self.taken.add(real)
        return True

    def _refuse(self, reason: str, name: str) -> bool:
        self.report.refused.setdefault(reason, []).append(name)
        return False
