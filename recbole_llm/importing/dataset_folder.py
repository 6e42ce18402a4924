"""The folder of a dataset: it appears complete or not at all, and what a killed import left is cleared up."""

import glob
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager, suppress
from pathlib import Path

from recbole_llm.atomic import replace, sync_folder

_TEMPORARY, _OLD = ".{name}.importing-", "-old"


def refuse_existing(folder: Path, overwrite: bool) -> None:
    """Raise ``ValueError`` where something stands in the place of the dataset's folder, unless it may be replaced."""
    if folder.exists() and not folder.is_dir():
        raise ValueError(f"{folder} is a file; choose another dataset name or data_path.")
    if folder.exists() and any(folder.iterdir()) and not overwrite:
        raise ValueError(f"{folder} exists. Give --overwrite to replace it, or another --dataset or --data-path.")


@contextmanager
def new_folder(folder: Path, overwrite: bool) -> Iterator[Path]:
    """Open a hidden folder beside ``folder``.

    It takes that name when the block ends well, and is removed when it does not.

    A process that is killed leaves the hidden folder; the next import of this dataset removes it, told by its lock that
    nobody works in it any more.
    """
    try:
        folder.parent.mkdir(parents=True, exist_ok=True)
        prefix = _TEMPORARY.format(name=folder.name)
        for stale in folder.parent.glob(f"{glob.escape(prefix)}*"):
            _clear_up(stale, folder)
    except OSError as error:
        raise ValueError(f"data_path: cannot write in {folder.parent}: {error}.") from error
    refuse_existing(folder, overwrite)
    try:
        temporary = Path(tempfile.mkdtemp(prefix=prefix, dir=folder.parent))
    except OSError as error:
        raise ValueError(f"data_path: cannot write in {folder.parent}: {error}.") from error
    try:
        with _locked(temporary):
            yield temporary
            temporary.chmod(0o777 & ~_umask())
            _move(temporary, folder)
    finally:
        shutil.rmtree(temporary, ignore_errors=True)


def _move(temporary: Path, folder: Path) -> None:
    """Give ``temporary``, on the disk by then, the name ``folder``; what stood there is removed after that."""
    aside = temporary.with_name(temporary.name + _OLD)
    try:
        sync_folder(temporary)
        if not folder.exists():
            replace(temporary, folder)
            return
        with _locked(folder):  # the lock stays with the folder under its new name
            replace(folder, aside)
            try:
                replace(temporary, folder)
            except OSError:
                replace(aside, folder)
                raise
            shutil.rmtree(aside)
    except OSError as error:
        raise ValueError(f"{folder} cannot be written, or another import wrote it meanwhile: {error}.") from error


@contextmanager
def _locked(folder: Path) -> Iterator[None]:
    """Hold the folder's lock, which ends with the process; on Windows, which has none for folders, nothing is held.

    Raises:
        BlockingIOError: if another process holds it.
    """
    try:
        import fcntl
    except ModuleNotFoundError:
        yield
        return
    descriptor = os.open(folder, os.O_RDONLY)
    try:
        fcntl.flock(descriptor, fcntl.LOCK_EX | fcntl.LOCK_NB)
        yield
    finally:
        os.close(descriptor)


def _umask() -> int:
    mask = os.umask(0o022)
    os.umask(mask)
    return mask


def _clear_up(stale: Path, folder: Path) -> None:
    """Remove what a killed import left, unless an import is at work in it; put a dataset that it set aside back."""
    with suppress(OSError), _locked(stale):
        if stale.name.endswith(_OLD) and not folder.exists():
            replace(stale, folder)
        else:
            shutil.rmtree(stale)
