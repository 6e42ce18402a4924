"""Files and folders that appear whole or not at all, and are on the disk before they have their name."""

import glob
import os
import shutil
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import IO

NAME_CHARACTERS = 200  # of the final name in a temporary one, which must stay a valid name


def temporary_beside(target: Path) -> Path:
    """Make a name beside ``target`` that no other process takes."""
    return target.with_name(f".{target.name[:NAME_CHARACTERS]}.tmp-{os.getpid()}-{uuid.uuid4().hex[:8]}")


def is_temporary(path: Path) -> bool:
    """Return whether the name is one of :func:`temporary_beside`, or of an earlier version's."""
    return ".tmp-" in path.name or path.suffix == ".tmp"


def remove_leftovers(target: str | os.PathLike[str]) -> None:
    """Delete what killed processes left of writing the file ``target``."""
    path = Path(target)
    for leftover in path.parent.glob(f".{glob.escape(path.name[:NAME_CHARACTERS])}.tmp-*"):
        leftover.unlink(missing_ok=True)


@contextmanager
def atomic_path(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give the path of a temporary file that takes the place of ``path`` in the end; on an error ``path`` stays as it was.

    For writers that open a file by its path. :func:`atomic_file` gives an open file.
    """
    target = Path(path)
    temporary = temporary_beside(target)
    try:
        yield temporary
        sync(temporary)
        replace(temporary, target)
    finally:
        temporary.unlink(missing_ok=True)


@contextmanager
def atomic_file(path: str | os.PathLike[str]) -> Iterator[IO[bytes]]:
    """Give a binary file that takes the place of ``path`` in the end; on an error ``path`` stays as it was."""
    with atomic_path(path) as temporary, open(temporary, "wb") as file:
        yield file


def write_atomically(path: str | os.PathLike[str], text: str) -> None:
    """Make ``text``, in UTF-8, the content of ``path`` in one step."""
    with atomic_file(path) as file:
        file.write(text.encode())


@contextmanager
def atomic_folder(path: str | os.PathLike[str]) -> Iterator[Path]:
    """Give a new folder that becomes ``path`` in the end, every file in it on the disk; on an error nothing is left.

    Raises:
        OSError: if ``path`` is a folder that is not empty.
    """
    target = Path(path)
    temporary = temporary_beside(target)
    temporary.mkdir()
    try:
        yield temporary
        sync_folder(temporary)
        replace(temporary, target)
    except BaseException:
        shutil.rmtree(temporary, ignore_errors=True)
        raise


def replace(temporary: Path, target: Path) -> None:
    """Give a file or folder its name, on the disk too."""
    try:
        os.replace(temporary, target)
    except PermissionError:
        # Windows: another process has just put the same file there and has it open
        if not target.is_file():
            raise
    if os.name == "posix":  # the folder's entry too; Windows has no such call
        sync(target.parent)


def sync_folder(folder: Path) -> None:
    """Wait until a folder and all that lies in it is on the disk."""
    for path in [*folder.rglob("*"), folder]:
        sync(path)


def sync(path: Path) -> None:
    """Wait until a file, or a folder's list of names, is on the disk."""
    if path.is_dir() and os.name != "posix":
        return
    descriptor = os.open(path, os.O_RDONLY if path.is_dir() else os.O_RDWR)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)
