"""Progress bars that another process cannot block.

tqdm guards its bars with two locks: one for the threads of the process, and a semaphore shared with all forked
processes. A child that is killed while it draws a bar never releases the semaphore, and its parent and every later
child wait for ever. The bars of this program take a lock for threads only.
"""

import os
import sys
import threading
from collections.abc import Iterable, Iterator
from typing import Any

from tqdm import tqdm
from tqdm.std import TqdmDefaultWriteLock  # type: ignore[attr-defined]  # not in the stubs

SECONDS_IN_A_FILE = 30.0  # between two drawings: a log keeps every one of them

_lock = threading.RLock()
if hasattr(os, "register_at_fork"):  # not on Windows
    # a child must not inherit the lock from a thread that it does not have, such as tqdm's own monitor
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_lock.release)


def progress_bar(iterable: Iterable[Any] | None = None, **options: Any) -> Any:
    """Make a bar of tqdm that takes a lock for threads only. In a file it is drawn every half minute, on a terminal as tqdm does.

    Args:
        iterable: what to iterate over; ``None`` for a bar that is moved by its ``update``.
        options: any of tqdm's own.

    Returns:
        The bar, a ``tqdm.tqdm``.
    """
    use_thread_lock()
    stream = options.get("file") or sys.stderr
    if not getattr(stream, "isatty", bool)():
        options.setdefault("mininterval", SECONDS_IN_A_FILE)
    return tqdm(iterable, **options)


def use_thread_lock() -> None:
    """Replace tqdm's default lock, in all its classes, by one for threads only. Keep a lock set by the program itself."""
    for bar in _bar_classes(tqdm):
        lock = vars(bar).get("_lock")
        if isinstance(lock, TqdmDefaultWriteLock) or (lock is None and bar is tqdm):
            bar.set_lock(_lock)


def _bar_classes(bar: Any) -> Iterator[Any]:
    """The class and those derived from it; each may have made a lock of its own with its first bar."""
    yield bar
    for derived in bar.__subclasses__():
        yield from _bar_classes(derived)
