"""Which picture belongs to which item: :mod:`recbole_llm.content.media.files` with pictures."""

from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_llm.content.images.reading import MAX_BYTES, SUFFIXES, check_header, open_picture
from recbole_llm.content.media.files import ItemFiles, find_files
from recbole_llm.content.media.kinds import FileKind

COLUMN, FOLDER = "image", "images"
Pictures = ItemFiles


def _decode(data: bytes, encoder: Any) -> Any:
    return open_picture(data, encoder.side)


PICTURES = FileKind(COLUMN, FOLDER, SUFFIXES, "picture", MAX_BYTES, check_header, _decode)


def find_pictures(
    folder: Path, tokens: Sequence[str | None], cells: Mapping[str, str] | None = None, column: str | None = None
) -> Pictures:
    """Find the pictures of items; arguments as :func:`recbole_llm.content.media.files.find_files`."""
    return find_files(PICTURES, folder, tokens, cells, column)
