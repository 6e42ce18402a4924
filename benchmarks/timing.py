"""Clocks, peak memory, log lines and machine facts, shared by the benchmarks.

Variants are timed in turn, round after round in a rotating order, so that a slow spell of the machine meets all of them;
ratios are medians of the ratios within a round. A CPU is timed by wall clock and by the process's CPU time beside it: on
a shared machine the second is the steadier one. A GPU is timed by events, with its second-level cache overwritten first.
"""

import ctypes
import gc
import json
import logging
import os
import platform
import statistics
import subprocess
import tempfile
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from importlib.metadata import PackageNotFoundError, version
from itertools import accumulate
from pathlib import Path
from typing import Any

import torch

ROOT = Path(__file__).parents[1]
Variants = Mapping[str, Callable[[], object]]


@contextmanager
def logged(name: str, level: int = logging.INFO) -> Iterator[list[str]]:
    """The messages of a logger and of those below it, from this level on, while the context lasts."""
    lines: list[str] = []
    handler = logging.Handler(level)
    handler.emit = lambda record: lines.append(record.getMessage())  # type: ignore[method-assign]
    logger = logging.getLogger(name)
    before = logger.level
    logger.addHandler(handler)
    logger.setLevel(level)
    try:
        yield lines
    finally:
        logger.removeHandler(handler)
        logger.setLevel(before)


class Clock:
    """Seconds of one call: (wall, CPU) on a CPU, (device, device) on a GPU."""

    def __init__(self, device: str) -> None:
        self.cuda = device == "cuda"
        if self.cuda:
            size = torch.cuda.get_device_properties(0).L2_cache_size
            self.flush = torch.empty(2 * size // 4, dtype=torch.int32, device="cuda")

    def __call__(self, function: Callable[[], object]) -> tuple[float, float]:
        """Time one call."""
        if not self.cuda:
            wall, cpu = time.perf_counter(), time.process_time()
            function()
            return time.perf_counter() - wall, time.process_time() - cpu
        self.flush.zero_()
        begin, end = (torch.cuda.Event(enable_timing=True) for _ in range(2))
        begin.record()
        function()
        end.record()
        end.synchronize()
        seconds = begin.elapsed_time(end) / 1e3
        return seconds, seconds


def paired(variants: Variants, budget: float, device: str, most: int = 30, fewest: int = 3) -> dict[str, Any]:
    """Time ``variants`` in interleaved rounds for about ``budget`` seconds after one warm-up call of each.

    Args:
        variants: name -> call.
        budget: seconds of all rounds together, kept where ``fewest`` rounds allow.
        device: "cpu" or "cuda".
        most: rounds at most.
        fewest: rounds at least.

    Returns:
        rounds, and by variant the lists of wall and CPU seconds.
    """
    clock, names = Clock(device), list(variants)
    once = 0.0
    for name in names:
        seconds, _ = clock(variants[name])
        once += seconds if seconds > 1 and not name.endswith("compile") else clock(variants[name])[0]
    rounds = max(fewest, min(most, int(budget / max(once, 1e-9))))
    wall: dict[str, list[float]] = {name: [] for name in names}
    cpu: dict[str, list[float]] = {name: [] for name in names}
    for number in range(rounds):
        shift = number % len(names)
        for name in names[shift:] + names[:shift]:
            seconds = clock(variants[name])
            wall[name].append(seconds[0])
            cpu[name].append(seconds[1])
    return {"rounds": rounds, "wall": wall, "cpu": cpu}


def summary(times: list[float]) -> dict[str, float]:
    """Median, fastest, and the quintiles around the median, in milliseconds."""
    ordered = sorted(times)
    last = len(ordered) - 1
    return {
        "ms": 1e3 * statistics.median(ordered),
        "ms_min": 1e3 * ordered[0],
        "ms_p20": 1e3 * ordered[round(0.2 * last)],
        "ms_p80": 1e3 * ordered[round(0.8 * last)],
    }


def ratio(baseline: list[float], times: list[float]) -> float:
    """How many times as fast as ``baseline``: the median over rounds."""
    return statistics.median(b / t for b, t in zip(baseline, times, strict=True))


def peak_memory(function: Callable[[], object], device: str, forget: Callable[[], None]) -> dict[str, float]:
    """Peak MiB of one call after the first, above what is there before it, results included.

    Call it in a process that has done nothing else. What the first call leaves behind once its results are dropped, code
    of libraries and compiled graphs, is not counted.

    Args:
        function: the call; its results stay until ``forget``.
        device: "cpu" or "cuda".
        forget: drops the results.

    Returns:
        "allocated": most bytes held at once, as PyTorch's allocator counts them; on a CPU this leaves out what libraries
        allocate themselves, and what other threads than the caller's do. "resident", on a CPU under Linux: how far the
        process grows over three calls (fewer beyond 15 seconds).
    """
    began = time.perf_counter()
    function()
    forget()
    took = time.perf_counter() - began
    gc.collect()
    if device == "cuda":
        torch.cuda.synchronize()
        torch.cuda.reset_peak_memory_stats()
        before = torch.cuda.memory_allocated()
        function()
        torch.cuda.synchronize()
        return {"allocated": (torch.cuda.max_memory_allocated() - before) / 2**20}
    ctypes.CDLL(None).malloc_trim(0)
    Path("/proc/self/clear_refs").write_text("5")
    before_kib = _status("VmRSS")
    for _ in range(max(1, min(3, int(15 / took)))):
        function()
    resident = (_status("VmHWM") - before_kib) / 2**10
    forget()
    found = {"resident": resident}
    if torch.get_num_threads() == 1:
        found["allocated"] = _allocated_at_once(function) / 2**20
    return found


def _allocated_at_once(function: Callable[[], object]) -> int:
    """Bytes, from the events of PyTorch's profiler."""
    with torch.profiler.profile(activities=[torch.profiler.ProfilerActivity.CPU], profile_memory=True) as profile:
        function()
    with tempfile.TemporaryDirectory() as folder:
        trace = Path(folder) / "trace.json"
        profile.export_chrome_trace(str(trace))
        events = json.loads(trace.read_text())["traceEvents"]
    changes = sorted((e["ts"], e["args"]["Bytes"]) for e in events if e["name"] == "[memory]")
    return max(accumulate(change for _, change in changes))


def _status(field: str) -> int:
    for line in Path("/proc/self/status").read_text().splitlines():
        if line.startswith(field + ":"):
            return int(line.split()[1])
    raise OSError(f"/proc/self/status has no {field}; peak memory is measured on Linux only")


def ceilings(device: str, dtype: torch.dtype) -> dict[str, float]:
    """What this machine does at best, measured now: multiplications and additions, and bytes moved, per second."""
    from recbole_llm_kernels.torch_ops.products import rows_by_rows

    clock, n = Clock(device), 2048
    a, b = (torch.randn(n, n, device=device).to(dtype) for _ in range(2))
    products = [lambda: torch.mm(a, b)]
    if device == "cpu":
        out = torch.empty(n, n, dtype=dtype)
        products.append(lambda: rows_by_rows(a, b, out))
    source = torch.ones(1 << 26, dtype=torch.float32, device=device)  # 256 MiB, beyond any cache
    target = torch.empty_like(source)

    def fastest(function: Callable[[], object]) -> float:
        function()
        return min(clock(function)[0] for _ in range(5))

    return {
        "flop_per_s": 2 * n**3 / min(fastest(p) for p in products),
        "mm_flop_per_s": 2 * n**3 / fastest(products[0]),
        "bytes_per_s": 2 * source.nbytes / fastest(lambda: target.copy_(source)),
    }


CACHE = 64 * 2**20  # bytes of a last-level cache whose size the system does not tell


def cache_bytes(device: str) -> int:
    """The size of the cache nearest to main memory."""
    if device == "cuda":
        return torch.cuda.get_device_properties(0).L2_cache_size
    try:
        return os.sysconf("SC_LEVEL3_CACHE_SIZE") or CACHE
    except (OSError, ValueError):
        return CACHE


def least_seconds(moved: float, flops: float, limits: Mapping[str, float], device: str) -> float | None:
    """The roofline: the least seconds that one call can take.

    Args:
        moved: bytes that the call reads and writes at least.
        flops: its multiplications and additions.
        limits: of :func:`ceilings`.
        device: "cpu" or "cuda".

    Returns:
        None where the bytes would be the limit and fit into the cache, whose bandwidth is not measured.
    """
    memory, arithmetic = moved / limits["bytes_per_s"], flops / limits["flop_per_s"]
    if memory > arithmetic and moved <= cache_bytes(device):
        return None
    return max(memory, arithmetic)


def machine(device: str) -> dict[str, Any]:
    """Processor or card, threads, versions and commit; nothing that names the host."""
    model = platform.processor() or platform.machine()
    cpuinfo = Path("/proc/cpuinfo")
    if cpuinfo.exists():
        lines = [line for line in cpuinfo.read_text().splitlines() if line.startswith("model name")]
        model = lines[0].split(":", 1)[1].strip() if lines else model
    return {
        "cpu": model,
        "cores": os.cpu_count(),
        "vector": torch.backends.cpu.get_cpu_capability(),
        "device": torch.cuda.get_device_name() if device == "cuda" else "cpu",
        "load_average": os.getloadavg()[0],
        "versions": {name: _version(name) for name in ("torch", "triton", "recbole-llm", "recbole-llm-kernels")}
        | {"python": platform.python_version()},
        "commit": commit(),
    }


def _version(name: str) -> str | None:
    try:
        return version(name)
    except PackageNotFoundError:
        return None


def commit() -> str | None:
    """The checkout's commit, "+changes" where kernels or benchmarks differ from it; None outside a checkout."""

    def git(*command: str) -> str | None:
        try:
            return subprocess.run(
                ["git", *command], cwd=ROOT, capture_output=True, text=True, check=True
            ).stdout.strip()
        except (OSError, subprocess.CalledProcessError):
            return None

    head = git("rev-parse", "HEAD")
    changed = git("status", "--porcelain", "--", "kernels", "benchmarks/*.py")
    return head + "+changes" if head and changed else head
