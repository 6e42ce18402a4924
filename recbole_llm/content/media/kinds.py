"""A kind of files that describe items, and how one is read whose maker nobody knows."""

import stat
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


class UnreadableError(ValueError):
    """A file that counts as missing; the message is the reason, in words that are the same for the same fault."""


@dataclass(frozen=True)
class FileKind:
    """What is said of files of one kind, and how they are read.

    Attributes:
        modality: ``image`` or ``audio``.
        folder: of the dataset's folder, with files named after items.
        suffixes: of these files.
        one: the word for a file.
        most_bytes: of a file.
        check: what the header says, from the bytes; raises :class:`UnreadableError`.
        decode: bytes and encoder to what the encoder prepares; raises :class:`UnreadableError`.
    """

    modality: str
    folder: str
    suffixes: tuple[str, ...]
    one: str
    most_bytes: int
    check: Callable[[bytes], None] = field(repr=False)
    decode: Callable[[bytes, Any], Any] = field(repr=False)

    @property
    def column(self) -> str:
        """The usual column of the ``.item`` file."""
        return self.modality

    @property
    def many(self) -> str:
        """The word for several files."""
        return f"{self.one}s"

    def read(self, path: Path) -> bytes:
        """Read a file; raises as :func:`read_limited`."""
        return read_limited(path, self.most_bytes)


def read_limited(path: Path, most: int, error: type[UnreadableError] = UnreadableError) -> bytes:
    """Read a file of at most so many bytes.

    Args:
        path: the file.
        most: bytes.
        error: the class that is raised.

    Raises:
        UnreadableError: if it is no file, is empty or is larger.
    """
    try:
        status = path.stat()
        if not stat.S_ISREG(status.st_mode):  # opening a pipe would wait for ever
            raise error("no such file")
        if status.st_size > most:
            raise error(f"larger than {most >> 20} MB")
        with path.open("rb") as file:
            data = file.read(most + 1)
    except FileNotFoundError:
        raise error("no such file") from None
    except OSError as cause:
        raise error(f"not readable ({cause.strerror or type(cause).__name__})") from None
    if len(data) > most:
        raise error(f"larger than {most >> 20} MB")
    if not data:
        raise error("empty file")
    return data
