"""The fit's log: its stages as records that a program can read, and silence for trials that nobody asked about."""

import time
from collections.abc import Iterator
from contextlib import contextmanager
from logging import WARNING, getLogger

log = getLogger(__name__)


@contextmanager
def quietly(quiet: bool = True) -> Iterator[None]:
    """Leave out the fit's messages below a warning while the context lasts."""
    logger = getLogger("recbole_llm.fitting")
    level = logger.level
    if quiet:
        logger.setLevel(WARNING)
    try:
        yield
    finally:
        logger.setLevel(level)


@contextmanager
def stage(name: str) -> Iterator[None]:
    """Log the beginning and the end of a stage.

    Both records carry ``stage``, the second also ``seconds``, for who shows the progress of a run.

    Args:
        name: of the stage, in a few words.
    """
    log.info("%s ...", name, extra={"stage": name})
    started = time.perf_counter()
    yield
    seconds = time.perf_counter() - started
    log.info("%s: %.1f s", name, seconds, extra={"stage": name, "seconds": seconds})
