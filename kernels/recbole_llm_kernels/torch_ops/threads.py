"""Outer blocks on a pool of threads, each of which runs its PyTorch operations on one core.

On contended cores, loops of many small multi-threaded operations are several times slower than the same operations run
side by side on one thread each: every small operation waits for its slowest OpenMP thread.
"""

import os
import threading
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from itertools import pairwise
from typing import TypeVar

import torch

T = TypeVar("T")
U = TypeVar("U")

_pools: dict[int, ThreadPoolExecutor] = {}
_lock = threading.Lock()
if hasattr(os, "register_at_fork"):  # not on Windows

    def _after_fork_in_child() -> None:
        _pools.clear()  # threads do not survive a fork
        _lock.release()

    # a child must not inherit the lock from a thread that it does not have
    os.register_at_fork(before=_lock.acquire, after_in_parent=_lock.release, after_in_child=_after_fork_in_child)


def workers(device: torch.device) -> int:
    """How many jobs run side by side: PyTorch's own thread count on a CPU, 1 elsewhere."""
    return torch.get_num_threads() if device.type == "cpu" else 1


def cut(blocks: range, device: torch.device) -> list[range]:
    """``blocks`` in as many equal stretches as there are workers; at least one, perhaps empty."""
    parts = max(1, min(workers(device), len(blocks)))
    cuts = [len(blocks) * p // parts for p in range(parts + 1)]
    return [blocks[lo:hi] for lo, hi in pairwise(cuts)]


def run(jobs: Sequence[Callable[[], T]]) -> list[T]:
    """Results of ``jobs`` in order; in the calling thread when there is one job or one thread."""
    threads = torch.get_num_threads()
    if len(jobs) == 1 or threads == 1:
        return [job() for job in jobs]
    return list(_pool(threads).map(_without_grad, jobs))


def both(first: Callable[[], T], second: Callable[[], U], device: torch.device) -> tuple[T, U]:
    """Results of two jobs: side by side on two threads of a CPU, elsewhere in turn, each on all threads there are."""
    if workers(device) != 2:
        return first(), second()
    a, b = run([first, second])  # type: ignore[list-item]
    return a, b  # type: ignore[return-value]


def _without_grad(job: Callable[[], T]) -> T:
    with torch.no_grad():  # grad mode belongs to the thread
        return job()


def _pool(threads: int) -> ThreadPoolExecutor:
    with _lock:
        if threads not in _pools:
            ready = threading.Barrier(threads + 1)
            pool = ThreadPoolExecutor(threads, "recbole_llm_kernels", lambda: torch.set_num_threads(1))
            for _ in range(threads):
                pool.submit(ready.wait)
            ready.wait()
            # set_num_threads also sets what threads started later inherit: give that back
            torch.set_num_threads(threads)
            _pools[threads] = pool
        return _pools[threads]
