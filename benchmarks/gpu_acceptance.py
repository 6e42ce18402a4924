"""Accept the Triton kernels on a card within one slot: what no check without a GPU can see, in one command of nine minutes.

    python benchmarks/gpu_acceptance.py --out DIR                    # everything, in 540 s
    python benchmarks/gpu_acceptance.py --out DIR --steps speed tuning --limit 200
    python benchmarks/gpu_acceptance.py --out DIR --device cpu --slow-compiler 0.5     # a rehearsal on the torch backend

Each step is a process of its own with a share of the time, see ``PLAN``. It writes a line of JSON to DIR/STEP.jsonl for each
thing it has measured, at once, so that what is there when it is stopped, or fails, is kept; the others go on.
DIR/summary.json says of each step whether it passed, and is written again after each; copied to
``benchmarks/results/gpu_acceptance_<card>.json`` it becomes a section of the report. Nothing is read from git.

Steps: ``machine`` (versions, driver, clocks), ``tests`` (the operators' tests on the card, in parallel processes, which
compile in parallel), ``sanitizer`` (memcheck and racecheck of a bfloat16 and a float32 exercise, without PyTorch's caching
allocator, which hides overruns), ``repeats`` (runs of every operator, bitwise equal), ``speed`` (bfloat16 and float32;
forward, backward, full; eager, torch.compile, ours), ``tuning`` (block sizes chosen ahead, checked against float64 before they
are timed), ``profile`` (launches and device time of a training step). ``acceptance_steps.py`` holds them.
"""

import argparse
import json
import os
import shutil
import signal
import subprocess
import sys
import time
from pathlib import Path
from typing import Any, NamedTuple

ROOT = Path(__file__).resolve().parents[1]
Result = dict[str, Any]


class Share(NamedTuple):
    """The time of a step, as shares of the limit, and whether it runs on a CPU too."""

    most: float
    on_cpu: bool


PLAN = {  # 540 s: 22, 162, 86, 32, 135, 65, 27; the rest is what starting seven processes takes
    "machine": Share(0.04, True),
    "tests": Share(0.30, True),
    "sanitizer": Share(0.16, False),
    "repeats": Share(0.06, True),
    "speed": Share(0.25, True),
    "tuning": Share(0.12, False),
    "profile": Share(0.05, True),
}
PROGRAM = ROOT / "benchmarks" / "acceptance_steps.py"
GRACE = 3.0  # seconds between the word to end and the end


def environment(options: argparse.Namespace) -> dict[str, str]:
    """The steps' environment: deterministic cuBLAS, and this checkout's packages."""
    path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    values = {"CUBLAS_WORKSPACE_CONFIG": ":4096:8", "PYTHONPATH": path, "ACCEPTANCE_DEVICE": options.device}
    if options.device == "cpu":
        values["CUDA_VISIBLE_DEVICES"] = ""
    if options.slow_compiler:
        values["ACCEPTANCE_SLOW_COMPILER"] = str(options.slow_compiler)
    return os.environ | values


def run_step(step: str, seconds: float, options: argparse.Namespace) -> Result:
    """Run a step in a process group of its own, and end the group when its time is up.

    Returns:
        "passed", "seconds", "rows" written, and why it did not pass.
    """
    file = options.out / f"{step}.jsonl"
    file.unlink(missing_ok=True)
    command = [sys.executable, str(PROGRAM), step, "--file", str(file)]
    command += ["--seconds", f"{max(seconds - GRACE, 1):.1f}", "--device", options.device]
    began = time.monotonic()
    with (options.out / f"{step}.log").open("wb") as log:
        child = subprocess.Popen(
            command, cwd=ROOT, env=environment(options), stdout=log, stderr=log, start_new_session=True
        )
        try:
            code: int | None = child.wait(seconds)
        except subprocess.TimeoutExpired:
            code = None
        finally:
            _end(child)
    rows = rows_of(file)
    result: Result = {"seconds": round(time.monotonic() - began, 1), "rows": len(rows)}
    failed = [row for row in rows if row.get("passed") is False]
    skipped = next((row["skipped"] for row in rows if "skipped" in row), None)
    result["passed"] = code == 0 and not failed and skipped is None and bool(rows)
    if skipped is not None:
        result["skipped"] = skipped
    elif code is None:
        result["stopped"] = f"its {seconds:.0f} s were over; what it had measured is in {file.name}"
    elif code:
        result["failed"] = f"exit status {code}", (options.out / f"{step}.log").read_text(errors="replace")[-1500:]
    if failed:
        result["wrong"] = failed[:20]
    return result


def _end(child: subprocess.Popen[bytes]) -> None:
    """End what is left of the step's process group: first asked, then without a choice."""
    for how, patience in ((signal.SIGTERM, GRACE), (signal.SIGKILL, 5.0)):
        try:
            os.killpg(child.pid, how)
        except ProcessLookupError:
            break
        try:
            child.wait(patience)
        except subprocess.TimeoutExpired:
            continue
    child.wait()


def rows_of(file: Path) -> list[Result]:
    """The whole lines of a step's file; the last one may have been cut off."""
    if not file.exists():
        return []
    return [json.loads(line) for line in file.read_text().split("\n")[:-1] if line]


def allowance(step: str, waiting: list[str], left: float, limit: float) -> float:
    """Seconds for a step: its share, and what the steps before it left, without touching the shares of those to come."""
    later = sum(PLAN[name].most for name in waiting) * limit
    return min(max(PLAN[step].most * limit, left - later), left)


def main(arguments: list[str] | None = None) -> int:
    """Run the steps; 0: all passed, 1: not all, 2: there is no GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--out", type=Path, required=True, help="folder of the results")
    parser.add_argument("--steps", nargs="+", choices=list(PLAN), default=list(PLAN))
    parser.add_argument("--limit", type=float, default=540.0, help="seconds of everything (default: 540)")
    parser.add_argument(
        "--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal on the torch backend"
    )
    parser.add_argument("--slow-compiler", type=float, default=0.0, metavar="SECONDS",
                        help="in a rehearsal: what the first call of each operator and dtype pretends to compile")  # fmt: skip
    options = parser.parse_args(arguments)
    stop = time.monotonic() + options.limit
    if options.device == "cuda" and not _has_gpu():
        print("no GPU: PyTorch sees no CUDA or ROCm device; nothing was run and nothing was written")
        return 2
    options.out.mkdir(parents=True, exist_ok=True)
    summary: Result = {"device": options.device, "limit": options.limit}
    steps = [step for step in PLAN if step in options.steps]
    for number, step in enumerate(steps):
        left = stop - time.monotonic() - GRACE
        if options.device == "cpu" and not PLAN[step].on_cpu:
            summary[step] = {"passed": False, "skipped": "needs a card"}
        elif left < 2 * GRACE:
            summary[step] = {"passed": False, "skipped": "no time was left"}
        else:
            waiting = [x for x in steps[number + 1 :] if options.device == "cuda" or PLAN[x].on_cpu]
            summary[step] = run_step(step, allowance(step, waiting, left, options.limit), options)
        if step == "machine":
            summary |= {k: v for row in rows_of(options.out / "machine.jsonl") for k, v in row.items() if k != "passed"}
        _write(options.out / "summary.json", summary)
        verdict = "passed" if summary[step]["passed"] else summary[step].get("skipped", "FAILED")
        print(
            f"{step}: {verdict}, {summary[step].get('seconds', 0)} s, {summary[step].get('rows', 0)} rows", flush=True
        )
    print(f"written to {options.out}, {options.limit - (stop - time.monotonic()):.0f} s of {options.limit:.0f}")
    counted = [step for step in steps if options.device == "cuda" or PLAN[step].on_cpu]
    return 0 if all(summary[step]["passed"] for step in counted) else 1


def _write(file: Path, data: Result) -> None:
    """Replace the file at once: whoever collects results may come at any moment."""
    new = file.with_suffix(".part")
    new.write_text(json.dumps(data, indent=1) + "\n")
    shutil.move(new, file)


def _has_gpu() -> bool:
    import torch

    return torch.cuda.is_available()


if __name__ == "__main__":
    sys.exit(main())
