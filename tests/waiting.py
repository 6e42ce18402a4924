"""Waiting for other threads and processes. No test asserts how long anything takes: that is for benchmarks."""

import time

import pytest

# seconds; long enough for a machine that is busy with much else, short enough that a stuck test ends before its time limit
LIMIT = 120


def wait_until(condition, what, every=0.02):
    """Return the first true value of ``condition()``. Fail, naming ``what`` did not happen, after ``LIMIT`` seconds."""
    end = time.monotonic() + LIMIT
    while not (value := condition()):
        if time.monotonic() > end:
            pytest.fail(f"not so within {LIMIT} seconds: {what}")
        time.sleep(every)
    return value


def happens(event, what):
    """Wait for a ``threading.Event``."""
    if not event.wait(LIMIT):
        pytest.fail(f"not so within {LIMIT} seconds: {what}")


def join(*threads):
    """Wait for the end of threads, or of processes of ``multiprocessing``."""
    for thread in threads:
        thread.join(LIMIT)
        if thread.is_alive():
            pytest.fail(f"still running after {LIMIT} seconds: {thread.name}")
