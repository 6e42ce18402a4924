"""Small copies of pictures for whoever looks at a list: JPEG of a bounded size, without anything that the file said beside it."""

from collections.abc import Sequence
from dataclasses import dataclass, field
from io import BytesIO
from pathlib import Path
from typing import TYPE_CHECKING

from recbole_llm.content.images.reading import PictureError, open_picture, read_bytes, require_pillow
from recbole_llm.content.media.encode import placeholders_among
from recbole_llm.content.media.files import some
from recbole_llm.content.store.store import raw_key

if TYPE_CHECKING:
    from PIL import Image

QUALITIES = (82, 60, 40, 20, 5)


@dataclass
class ThumbnailCounts:
    """What became of the pictures.

    Attributes:
        items: rows asked for.
        made: rows that have a small picture.
        unreadable: reason to the names of the files.
        placeholders: name to the rows that share the picture, which says nothing of one item.
    """

    items: int = 0
    made: int = 0
    unreadable: dict[str, list[str]] = field(default_factory=dict)
    placeholders: dict[str, int] = field(default_factory=dict)

    def lines(self) -> list[str]:
        """Format the counts as lines for a log."""
        lines = [f"Small pictures: {self.made} of {self.items} items have one"]
        lines += [f"Without one, {why}: {some(files)} ({len(files)})" for why, files in self.unreadable.items()]
        lines += [f"Left out, {name!r} stands for {items} items" for name, items in self.placeholders.items()]
        return lines


def thumbnails_of(
    paths: Sequence[Sequence[Path]], side: int, max_bytes: int
) -> tuple[list[bytes | None], ThumbnailCounts]:
    """Make the small pictures of rows; of several files the first that can be read counts.

    Args:
        paths: the files of each row, none for a row without a picture.
        side: pixels of the longer side at most.
        max_bytes: of one.

    Returns:
        A JPEG or ``None`` for each row, and the counts. Files that cannot be read never stop it.
    """
    counts = ThumbnailCounts(items=len(paths))
    key_of: dict[Path, bytes] = {}
    for path in dict.fromkeys(path for files in paths for path in files):
        try:
            key_of[path] = raw_key(read_bytes(path))
        except PictureError as error:
            counts.unreadable.setdefault(str(error), []).append(path.name)
    keys = [list(dict.fromkeys(key_of[path] for path in files if path in key_of)) for files in paths]
    left_out = placeholders_among(keys, sum(bool(files) for files in paths))
    named = {key_of[path]: path.name for path in reversed(list(key_of))}
    counts.placeholders = {named[key]: rows for key, rows in sorted(left_out.items())}
    made: dict[bytes, bytes | None] = {}
    found = []
    for files in paths:
        small = None
        for path in files:
            key = key_of.get(path)
            if small is not None or key is None or key in left_out:
                continue
            if key not in made:
                made[key] = _made(path, key, side, max_bytes, counts)
            small = made[key]
        found.append(small)
    counts.made = sum(small is not None for small in found)
    return found, counts


def _made(path: Path, key: bytes, side: int, max_bytes: int, counts: ThumbnailCounts) -> bytes | None:
    try:
        data = read_bytes(path)
        if raw_key(data) != key:
            raise PictureError("changed while it was read")
        return thumbnail(open_picture(data, side), side, max_bytes)
    except PictureError as error:
        counts.unreadable.setdefault(str(error), []).append(path.name)
        return None


def thumbnail(picture: "Image.Image", side: int, max_bytes: int) -> bytes:
    """Make a small JPEG of an RGB picture.

    Args:
        picture: of :func:`recbole_llm.content.images.reading.open_picture`.
        side: pixels of the longer side at most.
        max_bytes: of the JPEG; quality gives way to it.

    Raises:
        PictureError: if it is larger at the lowest quality too.
    """
    Image = require_pillow()
    small = picture.copy()
    small.thumbnail((side, side), Image.Resampling.LANCZOS)
    plain = Image.new("RGB", small.size)  # nothing but pixels: a copy keeps comments and profiles
    plain.paste(small)
    for quality in QUALITIES:
        written = BytesIO()
        plain.save(written, "JPEG", quality=quality, optimize=True)
        if len(data := written.getvalue()) <= max_bytes:
            return data
    raise PictureError(f"no copy of {side} pixels fits into {max_bytes} bytes")
