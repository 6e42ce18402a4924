"""Give memory back to the system after a burst; the interpreter and the C library would keep what was freed."""

import asyncio
import ctypes
import gc
import os
from collections.abc import Callable
from pathlib import Path

LOOK_SECONDS = 2.0
REST_SECONDS = 4.0  # between two releases where nothing has grown: what was in use by then may be free
GROWTH_BYTES = 16 << 20  # since the start: less is not worth a release
GAIN_BYTES = 1 << 20
HELD_BYTES = 4 << 20  # of bodies: while more are held, the burst is not over


def _trim() -> Callable[[], object] | None:
    """Return the C library's function that gives free memory back, if it has one."""
    try:
        trim = ctypes.CDLL(None).malloc_trim
    except (AttributeError, OSError, TypeError):  # musl, macOS, Windows
        return None
    return lambda: trim(0)


def resident_bytes() -> int:
    """Return the memory of this process that is in use, in bytes; 0 if the system does not say."""
    try:
        return int(Path("/proc/self/statm").read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE")
    except (OSError, ValueError):
        return 0


def release(trim: Callable[[], object]) -> None:
    """Give back what no object needs.

    A full collection empties the interpreter's lists of free tuples, lists and dictionaries as well. Each of them that was
    first made in a burst keeps a megabyte around it from being given back. What an export consists of is frozen and not
    looked at. While one is loaded no collection runs, here neither.
    """
    if gc.isenabled():
        gc.collect()
    trim()


async def give_back(held: Callable[[], int]) -> None:
    """Release memory while the process is larger than at first and no burst is going on; runs until it is cancelled.

    Args:
        held: bytes of bodies that are held now.
    """
    trim = _trim()
    if trim is None or not resident_bytes():
        return
    first = left = resident_bytes()
    rested = 0.0
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        rested += LOOK_SECONDS
        now = resident_bytes()
        if now - first <= GROWTH_BYTES or held() >= HELD_BYTES:
            continue
        if now - left >= GAIN_BYTES or rested >= REST_SECONDS:
            await asyncio.get_running_loop().run_in_executor(None, release, trim)  # trimming lets the interpreter go
            left, rested = resident_bytes(), 0.0
