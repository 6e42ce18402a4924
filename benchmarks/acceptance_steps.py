"""The steps of ``gpu_acceptance.py``, each run as a process: it writes a line of JSON for each thing that it has measured.

A step looks at the time before it begins something, and ends when its seconds are over.
"""

import argparse
import importlib.util
import json
import os
import re
import shutil
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import case_parts
import kernel_cases
import pytest
import timing
import torch
from torch import Tensor

import recbole_llm_kernels as kernels
from recbole_llm_kernels import reference

ROOT = timing.ROOT
Result = dict[str, Any]
DTYPES = {"bfloat16": torch.bfloat16, "float32": torch.float32}
TESTS = ("gpu", "pairs", "sampled", "catalog", "topk", "contract", "segment_sum")  # and those of further operators
SHAPES = {"cuda": kernel_cases.CARD, "cpu": kernel_cases.QUICK}
# (BLOCK_R, BLOCK_C, BLOCK_D, num_warps, num_stages), bfloat16, by D; the first is what is shipped
CANDIDATES = {
    64: [(64, 64, 64, 4, 2), (64, 64, 64, 4, 3), (128, 64, 64, 8, 2), (128, 64, 64, 8, 3), (64, 32, 64, 4, 3),
         (128, 32, 64, 4, 3)],
    128: [(64, 64, 128, 4, 2), (64, 64, 128, 4, 3), (64, 64, 128, 8, 2), (128, 64, 128, 8, 2), (64, 32, 128, 4, 3),
          (64, 64, 64, 4, 3)],
}  # fmt: skip


class Step:
    """What a step is given, and where its rows go."""

    def __init__(self, file: Path, seconds: float, device: str) -> None:
        self.file, self.device = file, device
        self.stop = time.monotonic() + seconds
        self.compile_seconds = float(os.environ.get("ACCEPTANCE_SLOW_COMPILER", "0"))
        self.compiled: set[Any] = set()

    @property
    def left(self) -> float:
        """Seconds."""
        return self.stop - time.monotonic()

    def put(self, **row: Any) -> None:
        """Write a row to the disk, at once."""
        with self.file.open("a") as file:
            file.write(json.dumps(row) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def compiles(self, *what: Any) -> None:
        """In a rehearsal, take the time of a compilation at the first call of something."""
        if what not in self.compiled:
            self.compiled.add(what)
            time.sleep(min(self.compile_seconds, max(self.left, 0)))


def operands(
    device: str, dtype: torch.dtype, D: int, B: int, N: int, seed: int = 0
) -> tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]:
    """Queries, items, a bias with items outside the catalogue, and five targets per row."""
    generator = torch.Generator().manual_seed(seed)

    def rows(n: int) -> Tensor:
        return (torch.randn(n, D, generator=generator) * D**-0.25).to(device, dtype)

    query, item, bias = rows(B), rows(N), torch.randn(N, generator=generator) - 2
    bias[::17] = -torch.inf
    step = (N - 1) // 6
    targets = (torch.arange(1, 6) * step + torch.arange(B)[:, None] % step).view(-1)
    targets += (targets % 17 == 0).long()  # not the items outside; rows stay in order
    offsets = torch.arange(0, 5 * B + 1, 5)
    return query, item, bias.to(device), (offsets.to(device), targets.to(device))


def calls(device: str, dtype: torch.dtype, D: int, B: int, N: int) -> Iterator[tuple[str, Callable[[], list[Tensor]]]]:
    """Every operator by name, as a function that returns its value and its gradients."""
    query, item, bias, targets = operands(device, dtype, D, B, N)
    generator = torch.Generator().manual_seed(1)

    def ids(high: int, *shape: int) -> Tensor:
        return torch.randint(high, shape, generator=generator).to(device)

    data = SimpleNamespace(user_id=ids(B, B), pos=targets[1][::5].contiguous(), neg=ids(N, B, 20), shared=ids(N, 300),
                           label=torch.rand(B, generator=generator).to(device), targets=targets)  # fmt: skip

    def differentiated(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in (query, item, bias)]
        value = function(*leaves)
        grad = torch.linspace(-1, 1, value.numel(), device=device).view_as(value)
        return [value.detach(), *torch.autograd.grad(value, leaves, grad)]

    for name, function in kernel_cases.calls(data).items():
        yield name, partial(differentiated, function)
    yield from kernel_cases.steps(data, query, item, bias).items()


# ---------------------------------------------------------------- the steps


def machine(step: Step) -> None:
    """Versions, and on a card its name, memory, driver, clocks and power."""
    found = timing.machine(step.device) | {"python": sys.version.split()[0]}
    if step.device == "cuda":
        card = torch.cuda.get_device_properties(0)
        found |= {"card": card.name, "memory_bytes": card.total_memory, "processors": card.multi_processor_count,
                  "capability": f"{card.major}.{card.minor}", "cuda": torch.version.cuda, "hip": torch.version.hip}  # fmt: skip
        asked = "driver_version,clocks.sm,clocks.mem,clocks.max.sm,power.draw,power.limit,temperature.gpu"
        if shutil.which("nvidia-smi"):
            query = ["nvidia-smi", f"--query-gpu={asked}", "--format=csv,noheader"]
            told = subprocess.run(query, capture_output=True, text=True, timeout=15).stdout.strip().split("\n")[0]
            found["nvidia_smi"] = dict(zip(asked.split(","), told.split(", "), strict=False))
    step.put(passed=True, **found)


def tests(step: Step) -> None:
    """The operators' tests, in as many processes as there are cores, which compile side by side; a row for each test."""
    folder = ROOT / "tests" / "ops"
    further = [str(file) for file in sorted(folder.glob("test_*.py")) if "\nEMULATED = {" in file.read_text()]
    files = [*(str(folder / f"test_{name}.py") for name in TESTS), *further]
    if step.device == "cpu":
        step.compiles("tests")
        files = further[:1]  # a rehearsal
    processes = str(min(12, os.cpu_count() or 1)) if step.device == "cuda" else "0"
    options = ["-q", "-p", "no:cacheprovider", "-W", "ignore"]
    if importlib.util.find_spec("xdist") is not None:
        options += ["-n", processes, "--dist", "loadfile"]
    code = pytest.main([*options, *files], plugins=[Reports(step)])
    step.put(passed=code == 0, exit_status=int(code))


class Reports:
    """A plugin of pytest that puts a row down for each test, and ends the run when time is up."""

    def __init__(self, step: Step) -> None:
        self.step = step

    def pytest_runtest_logreport(self, report: Any) -> None:
        """Put a row down."""
        if report.when == "call" or report.outcome != "passed":
            row: Result = {"test": report.nodeid, "outcome": report.outcome, "seconds": round(report.duration, 3)}
            if report.outcome == "failed":
                row |= {"passed": False, "message": str(report.longreprtext)[-1000:]}
            self.step.put(**row)

    def pytest_runtest_protocol(self, item: Any) -> None:
        """End where time is up."""
        if self.step.left <= 0:
            item.session.shouldstop = "time is up"


def sanitizer(step: Step) -> None:
    """compute-sanitizer over one call of every operator; only our kernels, and no allocator that hides an overrun."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        step.put(skipped="compute-sanitizer is not on PATH; it comes with the CUDA toolkit")
        return
    environment = os.environ | {"PYTORCH_NO_CUDA_MEMORY_CACHING": "1"}
    for kind in ("memcheck", "racecheck"):
        for dtype in DTYPES:
            if step.left < 5:
                return
            run = [sys.executable, __file__, "exercise", "--file", str(step.file), "--dtype", dtype]
            done = None
            for only_ours in (
                ["--kernel-regex", "kns=_kernel"],
                [],
            ):  # without, where a version reads it in another way
                command = [tool, "--tool", kind, "--error-exitcode", "9", *only_ours, *run]
                done = subprocess.run(
                    command, env=environment, capture_output=True, text=True, timeout=max(step.left, 1)
                )
                if "SUMMARY" in done.stdout:
                    break
            assert done is not None
            errors = re.findall(r"ERROR SUMMARY: .*|RACECHECK SUMMARY: .*", done.stdout)
            passed = done.returncode == 0 and bool(errors)
            step.put(passed=passed, tool=kind, dtype=dtype, summary=errors, tail=(done.stdout + done.stderr)[-800:])


def exercise(device: str, dtype: torch.dtype) -> None:
    """Call every operator once, for the sanitizer."""
    for _, call in calls(device, dtype, 64, 70, 700):
        call()
    if device == "cuda":
        torch.cuda.synchronize()


def repeats(step: Step, runs: int = 20) -> None:
    """Bitwise equality of the runs of every operator, dtype by dtype."""
    for name_of_dtype, dtype in DTYPES.items():
        for name, call in calls(step.device, dtype, 64, 200, 5000):
            if step.left < 1:
                return
            step.compiles(name, dtype)
            first = [x.reshape(-1).view(torch.uint8) for x in call()]  # NaN equals NaN, bit for bit
            same = all(
                torch.equal(a, b.reshape(-1).view(torch.uint8))
                for _ in range(runs - 1)
                for a, b in zip(first, call(), strict=True)
            )
            step.put(passed=same, operator=name, dtype=name_of_dtype, runs=runs)


def speed(step: Step) -> None:
    """Milliseconds of eager, torch.compile and ours, forward, backward and full, once the results are right."""
    for number, (name, shape) in enumerate(SHAPES[step.device]):
        for dtype in DTYPES:
            left = (len(SHAPES[step.device]) - number) * len(DTYPES)
            if step.left < 2:
                return
            step.compiles(name, dtype)
            try:
                step.put(**measured(step, name, shape, dtype, min(4.0, step.left / left / 2)))
            except torch.cuda.OutOfMemoryError as error:
                step.put(operator=name, shape=shape, dtype=dtype, unavailable=str(error)[:200])
            if step.device == "cuda":
                torch.cuda.empty_cache()


def measured(step: Step, name: str, shape: Result, dtype: str, budget: float) -> Result:
    """A row of ``speed``."""
    case = kernel_cases.OPERATORS[name](shape, step.device, DTYPES[dtype])
    if step.device == "cpu":
        case.variants.pop("torch.compile", None)
    errors = case.check()
    row: Result = {"operator": name, "shape": shape, "dtype": dtype, "errors": errors}
    row["passed"] = all(error <= (1e-2 if dtype == "bfloat16" else 5e-6) for error in errors.values())
    if not row["passed"]:
        return row
    variants = {k: v for k, v in case.variants.items() if k in ("eager", "torch.compile", "ours")}
    full = timing.paired(variants, budget / 2, step.device)["wall"]
    forward_only = {k: v.forward for k, v in variants.items() if isinstance(v, case_parts.Training)}
    forward = timing.paired(forward_only, budget / 2, step.device)["wall"] if forward_only else {}
    for variant, times in full.items():
        ms = timing.summary(times)["ms"]
        row[variant] = {"full_ms": ms, "ours_is_faster_by": timing.ratio(times, full["ours"])}
        if variant in forward:
            ahead = timing.summary(forward[variant])["ms"]
            row[variant] |= {"forward_ms": ahead, "backward_ms": ms - ahead}
    limits = timing.ceilings(step.device, DTYPES[dtype]) if step.device == "cuda" else None
    if limits is not None:
        ideal = timing.least_seconds(case.bytes, case.flops, limits, step.device)
        row["share_of_roofline"] = None if ideal is None else 1e3 * ideal / row["ours"]["full_ms"]
    return row


def tuning(step: Step, rows: int = 2048, items: int = 200_000) -> None:
    """Times of six block sizes of the pass over tiles, bfloat16; one that is wrong or does not fit is named."""
    from triton.testing import do_bench

    from recbole_llm_kernels.triton_ops import tuning as blocks_of

    shipped = blocks_of.tiles
    for D, candidates in CANDIDATES.items():
        small = operands("cuda", torch.bfloat16, D, 200, 5000)
        large = operands("cuda", torch.bfloat16, D, rows, items)
        for blocks in candidates:
            if step.left < 3:
                return
            blocks_of.tiles = lambda *_, blocks=blocks: blocks_of.TileBlocks(*blocks)
            row: Result = {"D": D, "dtype": "bfloat16", "blocks": blocks, "is_shipped": blocks == candidates[0]}
            try:
                row["error"] = tile_error(small)
                if row["error"] < 1e-5:
                    row["ms"] = do_bench(lambda large=large: catalog_step(large), warmup=10, rep=50)
                else:
                    row["unavailable"] = "wrong beyond 1e-5"
            except Exception as failure:  # out of resources, or the compiler gives up: the candidate is out
                row["unavailable"] = f"{type(failure).__name__}: {failure}"[:300]
            finally:
                blocks_of.tiles = shipped
            step.put(**row)


def catalog_step(given: tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    """Loss and gradients of ``catalog_bce``."""
    leaves = [x.detach().requires_grad_() for x in given[:3]]
    loss = kernels.catalog_bce(leaves[0], leaves[1], *given[3], item_bias=leaves[2])
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def tile_error(given: tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]) -> float:
    """Largest error of loss and bias gradient against float64: both stay in float32, whatever the matrices' dtype."""
    loss, _, _, grad_bias = catalog_step(given)
    leaves = [x.double().requires_grad_() for x in given[:3]]
    truth = reference.catalog_bce(leaves[0], leaves[1], *given[3], item_bias=leaves[2])
    (wanted,) = torch.autograd.grad(truth, leaves[2])
    of_loss = ((loss - truth) / truth).abs().item()
    return max(of_loss, ((grad_bias - wanted).abs().max() / wanted.abs().max()).item())


def profile(step: Step) -> None:
    """What a training step of every operator launches, and how long the device is busy with it."""
    from torch.profiler import ProfilerActivity

    activities = [ProfilerActivity.CPU] + ([ProfilerActivity.CUDA] if step.device == "cuda" else [])
    for name, call in calls(step.device, torch.bfloat16, 64, 512, 20_000 if step.device == "cuda" else 2000):
        if step.left < 1:
            return
        call()
        with torch.profiler.profile(activities=activities) as recorded:
            call()
            if step.device == "cuda":
                torch.cuda.synchronize()
        wanted = torch.autograd.DeviceType.CUDA if step.device == "cuda" else torch.autograd.DeviceType.CPU
        events = [e for e in recorded.events() if e.device_type == wanted]
        longest = sorted(events, key=lambda e: -e.time_range.elapsed_us())[:5]
        busiest = [[e.name[:60], e.time_range.elapsed_us()] for e in longest]
        step.put(passed=True, operator=name, launches=len(events), busiest_us=busiest)


STEPS = {f.__name__: f for f in (machine, tests, sanitizer, repeats, speed, tuning, profile)}


def main(arguments: list[str] | None = None) -> int:
    """Run one step; an error ends it, with what it has written kept."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("step", choices=[*STEPS, "exercise"])
    parser.add_argument("--file", type=Path, required=True, help="where the rows go")
    parser.add_argument("--seconds", type=float, default=1e9)
    parser.add_argument("--device", choices=["cuda", "cpu"], default=os.environ.get("ACCEPTANCE_DEVICE", "cuda"))
    parser.add_argument("--dtype", choices=list(DTYPES), default="bfloat16")
    options = parser.parse_args(arguments)
    if options.step == "exercise":
        exercise(options.device, DTYPES[options.dtype])
        return 0
    STEPS[options.step](Step(options.file, options.seconds, options.device))
    return 0


if __name__ == "__main__":
    sys.exit(main())
