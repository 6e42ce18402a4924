"""Give memory back to the system after a burst; the C library would keep what was freed."""

import asyncio
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

LOOK_SECONDS = 2.0
REST_SECONDS = 15.0  # after a trim that gained nothing
GROWTH_BYTES = 16 << 20  # since the start: less is not worth a trim
GAIN_BYTES = 1 << 20
TRIM_WITHOUT = 4 << 20  # bytes of bodies: while more are held, the burst is not over


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


async def give_back(held: Callable[[], int]) -> None:
    """Trim while the process is larger than at first and no burst is going on; runs until it is cancelled.

    Args:
        held: bytes of bodies that are held now.
    """
    trim = _trim()
    if trim is None or not resident_bytes():
        return
    first = resident_bytes()
    pause = LOOK_SECONDS
    while True:
        await asyncio.sleep(pause)
        pause = LOOK_SECONDS
        before = resident_bytes()
        if before - first > GROWTH_BYTES and held() < TRIM_WITHOUT:
            await asyncio.get_running_loop().run_in_executor(None, trim)  # it lets the interpreter go meanwhile
            if before - resident_bytes() < GAIN_BYTES:  # what is left is in use, or will be free after a burst
                pause = REST_SECONDS
