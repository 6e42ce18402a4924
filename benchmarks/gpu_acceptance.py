"""Accept the Triton kernels on a card: what no check without a GPU can see, in one command and one JSON file.

    python benchmarks/gpu_acceptance.py                      # everything, to benchmarks/results/gpu_acceptance_<card>.json
    python benchmarks/gpu_acceptance.py --steps repeats tuning
    python benchmarks/gpu_acceptance.py --device cpu --steps repeats --repeats 3     # a rehearsal on the torch backend

Steps: ``tests`` (all operator tests on the card, and every test marked gpu), ``sanitizer`` (compute-sanitizer memcheck and
racecheck over one call of every operator, where it is installed), ``repeats`` (100 runs of every operator, bitwise
equal), ``speed`` (benchmarks/kernel_speed.py), ``tuning`` (block sizes of the pass over tiles for every D and dtype,
each checked against float64 before it is timed). A step that cannot run says why and is not counted as passed.
"""

import argparse
import json
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable, Iterator
from functools import partial
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import kernel_cases
import torch
from torch import Tensor

import recbole_llm_kernels as kernels
from recbole_llm_kernels import reference

ROOT = Path(__file__).parents[1]
STEPS = ("tests", "sanitizer", "repeats", "speed", "tuning")
Result = dict[str, Any]


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

    user_id, label = ids(B, B), torch.rand(B, generator=generator).to(device)
    data = SimpleNamespace(user_id=user_id, pos=targets[1][::5].contiguous(), neg=ids(N, B, 20), shared=ids(N, 300),
                           label=label, targets=targets)  # fmt: skip

    def differentiated(function: Callable[..., Tensor]) -> list[Tensor]:
        leaves = [x.detach().clone().requires_grad_() for x in (query, item, bias)]
        value = function(*leaves)
        grad = torch.linspace(-1, 1, value.numel(), device=device).view_as(value)
        return [value.detach(), *torch.autograd.grad(value, leaves, grad)]

    for name, function in kernel_cases.calls(data).items():
        yield name, partial(differentiated, function)
    yield from kernel_cases.steps(data, query, item, bias).items()


def run_repeats(device: str, count: int) -> Result:
    """Bitwise equality of ``count`` runs of every operator, dtype by dtype."""
    differing = []
    for dtype in (torch.float32, torch.bfloat16, torch.float16):
        for name, call in calls(device, dtype, 64, 200, 5000):
            first = call()
            for _ in range(count - 1):
                # NaN equals NaN, bit for bit: compare the bytes
                if not all(torch.equal(a.view(torch.uint8), b.view(torch.uint8)) for a, b in _flat(first, call())):
                    differing.append(f"{name} {dtype}")
                    break
    return {"passed": not differing, "runs": count, "differing": differing}


def _flat(a: list[Tensor], b: list[Tensor]) -> Iterator[tuple[Tensor, Tensor]]:
    return zip([x.reshape(-1) for x in a], [x.reshape(-1) for x in b], strict=True)


def _command(*command: str, timeout: int = 7200) -> Result:
    environment = os.environ | {"PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True, timeout=timeout)
    tail = (done.stdout + done.stderr)[-4000:]
    return {
        "passed": done.returncode == 0,
        "returncode": done.returncode,
        "command": " ".join(command[1:]),
        "tail": tail,
    }


def run_tests() -> Result:
    """The operator tests, which run on the card where there is one, and every test marked gpu."""
    operators = _command(sys.executable, "-m", "pytest", "-q", "tests/ops")
    marked = _command(sys.executable, "-m", "pytest", "-q", "-m", "gpu", "tests")
    none_marked = marked["returncode"] == 5  # pytest: no test was collected
    return {
        "passed": operators["passed"] and (marked["passed"] or none_marked),
        "operators": operators,
        "marked": "no test is marked gpu" if none_marked else marked,
    }


def run_sanitizer() -> Result:
    """compute-sanitizer over one call of every operator."""
    tool = shutil.which("compute-sanitizer")
    if tool is None:
        return {"passed": False, "skipped": "compute-sanitizer is not on PATH; it comes with the CUDA toolkit"}
    results = {}
    for kind in ("memcheck", "racecheck"):
        command = (tool, "--tool", kind, "--error-exitcode", "9", sys.executable, __file__, "--exercise")
        results[kind] = _command(*command)
    return {"passed": all(r["passed"] for r in results.values()), **results}


def run_speed() -> Result:
    """The speed grid, gated on its own correctness checks."""
    script = ROOT / "benchmarks" / "kernel_speed.py"
    if not script.exists():
        return {"passed": False, "skipped": "benchmarks/kernel_speed.py is not there"}
    return _command(sys.executable, str(script))


def tile_candidates(D: int) -> list[tuple[int, int, int, int, int]]:
    """(BLOCK_R, BLOCK_C, BLOCK_D, num_warps, num_stages) worth a try; BLOCK_C divides 64."""
    from recbole_llm_kernels.triton_ops.tuning import padded

    widths = sorted({min(padded(D), width) for width in (64, 128, 256)})
    return [
        (rows, columns, width, warps, stages)
        for rows in (32, 64, 128)
        for columns in (32, 64)
        for width in widths
        for warps in (4, 8)
        for stages in (2, 3)
    ]


def run_tuning(rows: int, items: int, dims: list[int]) -> Result:
    """Times of every candidate of the tile pass, by (D, dtype); a candidate that is wrong or does not fit is named."""
    from triton.testing import do_bench

    from recbole_llm_kernels.triton_ops import tuning

    default, table = tuning.tiles, []
    for D in dims:
        for dtype in (torch.bfloat16, torch.float16, torch.float32):
            small, large = operands("cuda", dtype, D, 200, 5000), operands("cuda", dtype, D, rows, items)
            on = tuning.target(torch.device("cuda"))
            chosen = tuple(default(D, dtype, tuning.dot_precision(dtype, on).logits, on))
            entry: Result = {"D": D, "dtype": str(dtype).removeprefix("torch."), "arch": on.arch, "default": chosen,
                             "candidates": []}  # fmt: skip
            for blocks in dict.fromkeys([chosen, *tile_candidates(D)]):
                tuning.tiles = lambda *_, blocks=blocks: tuning.TileBlocks(*blocks)
                try:
                    error = _tile_error(small)
                    trial: Result = {"blocks": blocks, "error": error}
                    if error < 1e-5:
                        trial["ms"] = do_bench(lambda large=large: _catalog_step(large))
                    else:
                        trial["failed"] = "wrong beyond 1e-5"
                except Exception as failure:  # out of resources, or the compiler gives up: the candidate is out
                    trial = {"blocks": blocks, "failed": f"{type(failure).__name__}: {failure}"[:300]}
                finally:
                    tuning.tiles = default
                entry["candidates"].append(trial)
            timed = [c for c in entry["candidates"] if "ms" in c]
            entry["best"] = min(timed, key=lambda c: c["ms"]) if timed else None
            table.append(entry)
    return {"passed": all(e["best"] for e in table), "rows": rows, "items": items, "table": table}


def _catalog_step(given: tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]) -> tuple[Tensor, ...]:
    leaves = [x.detach().requires_grad_() for x in given[:3]]
    loss = kernels.catalog_bce(leaves[0], leaves[1], *given[3], item_bias=leaves[2])
    return loss.detach(), *torch.autograd.grad(loss, leaves)


def _tile_error(given: tuple[Tensor, Tensor, Tensor, tuple[Tensor, Tensor]]) -> float:
    """Largest error of loss and bias gradient against float64: both stay in float32, whatever the matrices' dtype."""
    loss, _, _, grad_bias = _catalog_step(given)
    leaves = [x.double().requires_grad_() for x in given[:3]]
    truth = reference.catalog_bce(leaves[0], leaves[1], *given[3], item_bias=leaves[2])
    (wanted,) = torch.autograd.grad(truth, leaves[2])
    of_loss = ((loss - truth) / truth).abs().item()
    return max(of_loss, ((grad_bias - wanted).abs().max() / wanted.abs().max()).item())


def machine(device: str) -> Result:
    """What the results hold for."""
    commit = subprocess.run(["git", "rev-parse", "HEAD"], cwd=ROOT, capture_output=True, text=True).stdout.strip()
    found: Result = {"device": device, "torch": torch.__version__, "python": sys.version.split()[0], "commit": commit}
    if device == "cuda":
        import triton

        card = torch.cuda.get_device_properties(0)
        found |= {"card": card.name, "memory_bytes": card.total_memory, "processors": card.multi_processor_count,
                  "capability": f"{card.major}.{card.minor}", "cuda": torch.version.cuda, "hip": torch.version.hip,
                  "triton": triton.__version__}  # fmt: skip
    return found


def main(arguments: list[str] | None = None) -> int:
    """Run the steps, write the JSON after each, return 0 if all passed, 1 if not, 2 without a GPU."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--steps", nargs="+", choices=STEPS, default=list(STEPS))
    parser.add_argument("--device", choices=["cuda", "cpu"], default="cuda", help="cpu: a rehearsal of repeats alone")
    parser.add_argument("--repeats", type=int, default=100)
    parser.add_argument("--rows", type=int, default=2048, help="B of the tuning")
    parser.add_argument("--items", type=int, default=200_000, help="N of the tuning")
    parser.add_argument("--dims", type=int, nargs="+", default=[32, 64, 128, 256], help="D of the tuning")
    parser.add_argument("--output", type=Path, help="JSON file; default: benchmarks/results/gpu_acceptance_<card>.json")
    parser.add_argument("--exercise", action="store_true", help="call every operator once and stop (for the sanitizer)")
    options = parser.parse_args(arguments)
    if options.device == "cuda" and not torch.cuda.is_available():
        print("no GPU: PyTorch sees no CUDA or ROCm device; nothing was run and nothing was written")
        return 2
    if options.device == "cpu" and options.steps != ["repeats"]:
        parser.error("--device cpu rehearses repeats alone: add --steps repeats")
    if options.exercise:
        for _, call in calls(options.device, torch.float32, 64, 70, 700):
            call()
        torch.cuda.synchronize()
        return 0
    results = machine(options.device)
    path = options.output
    if path is None:
        name = "".join(c if c.isalnum() else "-" for c in results.get("card", "cpu")).lower()
        folder = ROOT / "benchmarks" / "results" if options.device == "cuda" else Path(tempfile.gettempdir())
        path = folder / f"gpu_acceptance_{name}.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    steps: dict[str, Callable[[], Result]] = {
        "tests": run_tests,
        "sanitizer": run_sanitizer,
        "repeats": lambda: run_repeats(options.device, options.repeats),
        "speed": run_speed,
        "tuning": lambda: run_tuning(options.rows, options.items, options.dims),
    }
    for step in options.steps:
        results[step] = steps[step]()
        path.write_text(json.dumps(results, indent=1) + "\n")
        verdict = "passed" if results[step]["passed"] else results[step].get("skipped", "FAILED")
        print(f"{step}: {verdict}", flush=True)
    print(f"written to {path}")
    return 0 if all(results[step]["passed"] for step in options.steps) else 1


if __name__ == "__main__":
    sys.exit(main())
