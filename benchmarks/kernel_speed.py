"""Speed and memory of every operator against eager PyTorch, torch.compile and the best public competitor that fits.

    python benchmarks/kernel_speed.py                        # the whole grid, to benchmarks/results/kernel_speed.json
    python benchmarks/kernel_speed.py --minutes 7            # a piece of it: the next call goes on from there
    python benchmarks/kernel_speed.py --quick                # tiny shapes, under a minute, for CI; writes nothing
    python benchmarks/kernel_speed.py --only catalog_bce pair_bce --threads 1

A shape is timed only after its value and gradients, in that shape and dtype, agree with the float64 oracle; a red check
is an error. Losses are timed forward and backward, with dense gradients for both matrices. Times are paired and
interleaved (timing.py). The share of the roofline is the time that the bytes (each distinct row once, each gradient once)
or the multiplications would take at the ceilings measured on the same machine, over the time taken. The ceiling of the
bytes is that of main memory. It bounds no shape that stays in the processor's cache, and such a shape gets no share.

PyTorch alone is enough. Competitors and ``torch.compile`` are timed where they are installed.

Peak memory of a step is measured in a process of its own, on one thread, in two ways. "allocated": bytes that PyTorch's
allocator holds at once, results included. "resident": how far the process grows over three steps. "beyond the result"
leaves out the gradients, which every variant returns. glibc's malloc is kept from holding large blocks back in that
process: left to itself it may keep up to twice as much, of any variant, another amount in each run.
"""

import argparse
import hashlib
import inspect
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "kernels"))  # a checkout needs no installation

import timing
import torch
from case_parts import Case, Shape
from kernel_cases import FULL, OPERATORS, QUICK

RESULTS = timing.ROOT / "benchmarks" / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
ALLOWED = {"float32": 5e-6, "bfloat16": 1e-2, "float16": 2e-3}  # a rounding of the result, and a few of the sums


def build(name: str, shape: Shape, device: str, dtype: str, with_compile: bool) -> Case:
    case = OPERATORS[name](shape, device, DTYPES[dtype])
    if not with_compile:
        for variant in [v for v in case.variants if v.endswith("compile")]:
            del case.variants[variant]
    return case


def gate(case: Case, dtype: str, label: str) -> dict[str, float]:
    """The errors, if they are small; otherwise no figure is reported."""
    errors = case.check()
    if not all(error <= ALLOWED[dtype] for error in errors.values()):
        raise SystemExit(f"{label}: not timed, the result is wrong: {errors}")
    return errors


def measure(name: str, shape: Shape, args: argparse.Namespace, budget: float) -> dict[str, Any]:
    """Errors, times and roofline of one shape in this process, with the thread count it was started with."""
    case = build(name, shape, args.device, args.dtype, args.compile)
    label = f"{name} {shape} {args.dtype}"
    errors = gate(case, args.dtype, label)
    before = os.getloadavg()[0]
    times = timing.paired(case.variants, budget, args.device)
    wall, cpu = times["wall"], times["cpu"]
    limits = timing.ceilings(args.device, DTYPES[args.dtype])
    entry: dict[str, Any] = {"operator": name, "shape": shape, "dtype": args.dtype, "threads": torch.get_num_threads(),
                             "errors": errors, "rounds": times["rounds"], "load_average": before, "ceilings": limits,
                             "unavailable": case.unavailable, "variants": {}}  # fmt: skip
    ideal = timing.least_seconds(case.bytes, case.flops, limits, args.device)
    for variant in case.variants:
        figures = timing.summary(wall[variant])
        seconds = figures["ms"] / 1e3
        figures |= {
            "cpu_ms": timing.summary(cpu[variant])["ms"],
            "gb_per_s": case.bytes / seconds / 1e9,
            "gflop_per_s": case.flops / seconds / 1e9,
            "share_of_roofline": None if ideal is None else ideal / seconds,
            "ours_is_faster_by": timing.ratio(wall[variant], wall["ours"]),
            "ours_is_faster_by_cpu_time": timing.ratio(cpu[variant], cpu["ours"]),
        }
        entry["variants"][variant] = figures
    return entry


def memory(name: str, shape: Shape, args: argparse.Namespace, variant: str) -> dict[str, float]:
    """Peak MiB of one variant: allocated, resident, and of its result."""
    case = build(name, shape, args.device, args.dtype, args.compile)

    def forget() -> None:
        for x in case.leaves:
            x.grad = None

    return timing.peak_memory(case.variants[variant], args.device, forget) | {
        "result": sum(x.nbytes for x in case.leaves) / 2**20
    }


def worker(args: argparse.Namespace) -> None:
    """One measurement in a fresh process: the plan comes as JSON, the result goes to standard output as JSON."""
    plan = json.loads(args.worker)
    torch.set_num_threads(plan["threads"])
    if plan["memory"] is None:
        result = measure(plan["name"], plan["shape"], args, args.budget)
    else:
        result = memory(plan["name"], plan["shape"], args, plan["memory"])
    print("\n" + json.dumps(result))


def spawn(args: argparse.Namespace, name: str, shape: Shape, threads: int, memory: str | None) -> dict[str, Any]:
    plan = json.dumps(dict(name=name, shape=shape, threads=threads, memory=memory))
    command = [sys.executable, __file__, "--worker", plan, "--device", args.device, "--dtype", args.dtype]
    command += ["--budget", str(args.budget)] + ([] if args.compile else ["--no-compile"])
    path = os.pathsep.join([str(timing.ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    if memory is not None:
        env["MALLOC_MMAP_THRESHOLD_"] = "131072"  # glibc's first value, kept: large blocks go back to the system
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{name} {shape}, {memory or 'times'}: exit status {done.returncode}\n{done.stderr[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def show(entry: dict[str, Any]) -> None:
    shape = " ".join(f"{k}={v}" for k, v in entry["shape"].items())
    print(f"\n{entry['operator']}  {shape}  {entry['dtype']}  {entry['threads']} threads, {entry['rounds']} rounds")
    for name, v in entry["variants"].items():
        used = "  ".join(f"{kind} {v['mib'][kind]:.0f}" for kind in v.get("mib", {}))
        faster = f"ours x{v['ours_is_faster_by']:.2f} ({v['ours_is_faster_by_cpu_time']:.2f} CPU time)"
        share = v["share_of_roofline"]
        roofline = "stays in the cache" if share is None else f"{share:4.0%} of roofline"
        print(
            f"  {name:31s} {v['ms']:10.2f} ms  {v['gflop_per_s']:7.1f} GFLOP/s  "
            f"{roofline:18s}  {faster}  {used and 'MiB: ' + used}",
            flush=True,
        )


def source(name: str, device: str) -> str:
    """Changes with the code of the implementation and of the operator's case."""
    folder = timing.ROOT / "kernels" / "recbole_llm_kernels" / ("torch_ops" if device == "cpu" else "triton_ops")
    text = b"".join(file.read_bytes() for file in sorted(folder.glob("*.py")))
    return hashlib.sha256(text + inspect.getsource(OPERATORS[name]).encode()).hexdigest()[:16]


def key(entry: dict[str, Any]) -> tuple[object, ...]:
    """What two figures must share for one to replace the other."""
    return entry["operator"], json.dumps(entry["shape"]), entry["dtype"], entry["threads"]


def run_one(args: argparse.Namespace, name: str, shape: Shape, threads: int) -> dict[str, Any]:
    """Times and, on a GPU or one thread of a CPU, each variant's memory, from processes of their own."""
    entry = spawn(args, name, shape, threads, None)
    if args.device == "cpu" and threads != 1:
        return entry
    variants = entry["variants"]
    for variant, figures in variants.items():
        figures["mib"] = spawn(args, name, shape, threads, variant)
    ours = variants["ours"]["mib"]
    for figures in variants.values():
        mib = figures["mib"]
        less = {kind: mib[kind] / max(ours[kind], 0.1) for kind in ("allocated", "resident") if kind in mib}
        for kind in list(less):
            beyond = [x[kind] - x["result"] for x in (mib, ours)]
            less[f"{kind} beyond the result"] = max(beyond[0], 0.1) / max(beyond[1], 0.1)
        figures["ours_takes_less_memory_by"] = less
    return entry


def wanted(shape: Shape, where: list[str]) -> bool:
    """Whether a shape has every size asked for, as ``N=60000``."""
    return all(str(shape.get(name)) == value for name, _, value in (x.partition("=") for x in where))


def run_grid(args: argparse.Namespace) -> int:
    """Measure what the result file lacks, or has from other code; the number of shapes left when time ran out."""
    output = args.output or RESULTS / ("kernel_speed.json" if args.device == "cpu" else "kernel_speed_cuda.json")
    output.parent.mkdir(parents=True, exist_ok=True)
    entries = {key(e): e for e in json.loads(output.read_text())["entries"]} if output.exists() else {}
    stop, left = time.monotonic() + 60 * args.minutes, 0
    for name, shape in FULL:
        for threads in args.threads if args.device == "cpu" else [torch.get_num_threads()]:
            asked = key({"operator": name, "shape": shape, "dtype": args.dtype, "threads": threads})
            fresh = asked in entries and entries[asked]["source"] == source(name, args.device) and not args.again
            if fresh or (args.only and name not in args.only) or not wanted(shape, args.where):
                continue
            if time.monotonic() > stop:
                left += 1
                continue
            entry = run_one(args, name, shape, threads)
            entry |= {"machine": timing.machine(args.device), "source": source(name, args.device)}
            show(entry)
            entries[asked] = entry
            lines = ",\n".join(json.dumps(e) for e in entries.values())
            output.write_text(f'{{"device": "{args.device}", "entries": [\n{lines}\n]}}\n')
    return left


def main(arguments: list[str] | None = None) -> int:
    """Measure; 3: time ran out before the grid was done."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes in this process, nothing written")
    parser.add_argument("--only", nargs="*", choices=list(OPERATORS), help="operators to run")
    parser.add_argument("--where", nargs="*", default=[], metavar="SIZE=NUMBER", help="shapes of these sizes alone")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2], help="CPU threads (default: 1 2)")
    parser.add_argument("--budget", type=float, default=10.0, help="seconds of timing per shape (default: 10)")
    parser.add_argument("--minutes", type=float, default=float("inf"), help="begin no shape after so long")
    parser.add_argument("--again", action="store_true", help="also what the result file has already")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--output", type=Path, help="result file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args(arguments)
    if args.worker:
        worker(args)
        return 0
    if args.quick:
        args.compile = False
        for name, shape in QUICK:
            if not args.only or name in args.only:
                show(measure(name, shape, args, budget=0.5))
        return 0
    left = run_grid(args)
    print(f"{left} shapes left" if left else "the grid is done")
    return 3 if left else 0


if __name__ == "__main__":
    sys.exit(main())
