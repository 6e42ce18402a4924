"""Files of an export that change under the service that serves them."""

import os
from pathlib import Path

from recbole_llm.export.manifest import MANIFEST

Status = tuple[int, int, int, int] | None  # size, time of modification in ns, inode, device; None: not there


class WatchedFiles:
    """The files of an export as they were when it was read.

    An export is immutable: a file of another size, time or inode was written over, cut off or replaced. Looking costs a
    few microseconds a file; nothing is read.

    Args:
        folder: the export.
    """

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        names = [path.relative_to(folder).as_posix() for path in sorted(folder.rglob("*")) if not path.is_dir()]
        self._status = {name: _status(folder / name) for name in {MANIFEST, *names}}

    def changed(self) -> list[str]:
        """Name the files that are no longer what was read, sorted."""
        return sorted(name for name, status in self._status.items() if _status(self.folder / name) != status)


def _status(path: Path) -> Status:
    try:
        found = os.stat(path)
    except OSError:
        return None
    return found.st_size, found.st_mtime_ns, found.st_ino, found.st_dev
