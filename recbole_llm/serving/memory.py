"""Give memory back to the system after a burst; the C library would keep what was freed."""

import asyncio
import ctypes
import os
from collections.abc import Callable
from pathlib import Path

LOOK_SECONDS = 2.0
GROWTH_BYTES = 16 << 20  # since the last time: less is not worth a trim
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
    """Trim when the process has grown and a burst is over; runs until it is cancelled.

    Args:
        held: bytes of bodies that are held now.
    """
    trim = _trim()
    if trim is None or not resident_bytes():
        return
    usual = resident_bytes()
    while True:
        await asyncio.sleep(LOOK_SECONDS)
        if resident_bytes() - usual > GROWTH_BYTES and held() < TRIM_WITHOUT:
            await asyncio.get_running_loop().run_in_executor(None, trim)  # it lets the interpreter go meanwhile
            usual = resident_bytes()
