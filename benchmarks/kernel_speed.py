"""Speed and memory of every operator against eager PyTorch, torch.compile and the best public competitor that fits.

    python benchmarks/kernel_speed.py                        # the whole grid, to benchmarks/results/kernel_speed_<device>.json
    python benchmarks/kernel_speed.py --quick                # tiny shapes, under a minute, for CI; writes nothing
    python benchmarks/kernel_speed.py --only catalog_bce pair_bce --threads 1

A shape is timed only after its value and gradients, in that shape and dtype, agree with the float64 oracle; a red check
is an error. Losses are timed forward and backward, with dense gradients for both matrices. Times are paired and
interleaved (timing.py), peak memory is measured in a process of its own. The share of the roofline is the time that the
bytes (each distinct row once, each gradient once) or the multiplications would take at the ceilings measured on the same
machine, over the time taken.
"""

import argparse
import json
import os
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any, NamedTuple

import timing
import torch
import torch.nn.functional as functional
from torch import Tensor

import recbole_llm_kernels as kernels
from recbole_llm_kernels import reference

RESULTS = timing.ROOT / "benchmarks" / "results"
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
Shape = dict[str, Any]


class Case(NamedTuple):
    """One operator at one shape."""

    variants: dict[str, Callable[[], object]]  # "ours", the baselines, and competitors
    check: Callable[[], dict[str, float]]  # largest relative errors against the oracle
    bytes: float
    flops: float
    unavailable: dict[str, str]  # competitors that cannot run here, and why


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(n: int, shape: tuple[int, ...], law: str, seed: int, device: str) -> Tensor:
    """Uniform ids, or Zipf ids: the r-th most popular is drawn in proportion to 1 / r."""
    if law == "zipf":
        flat = torch.multinomial(
            1 / torch.arange(1, n + 1.0), int(torch.tensor(shape).prod()), True, generator=generator(seed)
        )
        return torch.randperm(n, generator=generator(seed + 1))[flat].view(shape).to(device)
    return torch.randint(n, shape, generator=generator(seed)).to(device)


def leaf(n: int, D: int, scale: float, seed: int, device: str, dtype: torch.dtype) -> Tensor:
    return (torch.randn(n, D, generator=generator(seed)) * scale).to(device, dtype).requires_grad_()


def step(loss: Callable[[], Tensor], *leaves: Tensor) -> Callable[[], object]:
    """Forward and backward of ``loss``, with fresh gradients as after ``zero_grad(set_to_none=True)``."""

    def run() -> None:
        for x in leaves:
            x.grad = None
        loss().backward()

    return run


def compiled(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return torch.compile(loss, fullgraph=True)


def agreement(
    ours: Callable[[], object], leaves: tuple[Tensor, ...], oracle: Callable[..., Tensor]
) -> dict[str, float]:
    """Largest errors of the gradients, in units of the largest gradient."""
    ours()
    doubled = [x.detach().double().requires_grad_() for x in leaves]
    oracle(*doubled)
    return {
        f"gradient_{number}": float((x.grad.double() - d.grad).abs().max() / d.grad.abs().max())
        for number, (x, d) in enumerate(zip(leaves, doubled, strict=True))
    }


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).abs() / want.detach().abs())


def pair_bce(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    """P pairs from tables of n users and n items."""
    P, n, D = shape["P"], shape["n"], shape["D"]
    user, item = leaf(n, D, 0.1, 0, device, dtype), leaf(n, D, 0.1, 1, device, dtype)
    u, i = ids(n, (P,), "uniform", 2, device), ids(n, (P,), shape.get("ids", "uniform"), 3, device)
    y = torch.randint(2, (P,), generator=generator(5)).to(device, torch.float32)

    def eager() -> Tensor:
        s = (functional.embedding(u, user) * functional.embedding(i, item)).sum(-1)
        return functional.binary_cross_entropy_with_logits(s, y.to(s.dtype))

    def best() -> Tensor:
        rows = functional.embedding(u, user)[:, None, :], functional.embedding(i, item)[:, :, None]
        s = torch.bmm(*rows).view(-1)
        return functional.binary_cross_entropy_with_logits(s, y.to(s.dtype))

    def ours() -> Tensor:
        return kernels.pair_bce(user, item, u, i, y)

    def check() -> dict[str, float]:
        def oracle(a: Tensor, b: Tensor) -> Tensor:
            loss = reference.pair_bce(a, b, u, i, y.double())
            loss.backward()
            return loss

        errors = agreement(step(ours, user, item), (user, item), oracle)
        with torch.no_grad():
            errors["loss"] = relative(ours(), reference.pair_bce(user.double(), item.double(), u, i, y.double()))
        return errors

    size = user.element_size()
    touched = len(u.unique()) + len(i.unique())
    variants = {"eager": eager, "eager best": best, "torch.compile": compiled(eager), "ours": ours}
    moved = touched * D * size + 20 * P + 2 * n * D * size
    return Case({k: step(v, user, item) for k, v in variants.items()}, check, moved, 6 * P * D, {})


def sampled_bce(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    """B rows with K negatives of their own, tables of n rows."""
    B, K, n, D = shape["B"], shape["K"], shape["n"], shape["D"]
    user, item = leaf(n, D, 0.1, 0, device, dtype), leaf(n, D, 0.1, 1, device, dtype)
    law = shape.get("ids", "uniform")
    u, pos, neg = ids(n, (B,), "uniform", 2, device), ids(n, (B,), law, 3, device), ids(n, (B, K), law, 5, device)
    neg = torch.where(neg == pos[:, None], (neg + 1) % n, neg)  # eager has no mask for accidental hits

    def logits() -> tuple[Tensor, Tensor]:
        q = functional.embedding(u, user)
        s = (q * functional.embedding(pos, item)).sum(-1)
        return s, (functional.embedding(neg, item) @ q[:, :, None])[:, :, 0]

    def eager() -> Tensor:
        s, t = logits()
        every = torch.cat([s[:, None], t], 1)
        y = torch.zeros_like(every)
        y[:, 0] = 1
        return functional.binary_cross_entropy_with_logits(every, y, reduction="sum") / B

    def best() -> Tensor:
        s, t = logits()
        return (functional.softplus(-s).sum() + functional.softplus(t).sum()) / B

    def ours() -> Tensor:
        return kernels.sampled_bce(user, item, u, pos, neg)

    def check() -> dict[str, float]:
        def oracle(a: Tensor, b: Tensor) -> None:
            for part in torch.arange(B, device=device).split(512):
                (reference.sampled_bce(a, b, u[part], pos[part], neg[part], reduction="sum") / B).backward()

        return agreement(step(ours, user, item), (user, item), oracle)  # type: ignore[arg-type]

    size = user.element_size()
    touched = len(u.unique()) + len(torch.cat([pos, neg.view(-1)]).unique())
    variants = {"eager": eager, "eager best": best, "torch.compile": compiled(best), "ours": ours}
    moved = touched * D * size + 12 * B * (K + 1) + 2 * n * D * size
    return Case({k: step(v, user, item) for k, v in variants.items()}, check, moved, 6 * B * (K + 1) * D, {})


def _catalog(shape: Shape, device: str, dtype: torch.dtype) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    B, N, D = shape["B"], shape["N"], shape["D"]
    query, item = leaf(B, D, 0.3, 0, device, dtype), leaf(N, D, 0.3, 1, device, dtype)
    return query, item, torch.arange(B + 1, device=device), ids(N, (B,), "uniform", 2, device)


def _catalog_case(
    name: str,
    shape: Shape,
    variants: dict[str, Callable[[], Tensor]],
    data: tuple[Tensor, ...],
    unavailable: dict[str, str],
) -> Case:
    query, item, _, target = data
    (B, D), N, size = query.shape, len(item), query.element_size()

    def check() -> dict[str, float]:
        def oracle(q: Tensor, w: Tensor) -> None:
            for lo in range(0, B, 16):
                part = slice(lo, min(lo + 16, B))
                rows = torch.arange(part.stop - lo + 1, device=q.device)
                (getattr(reference, name)(q[part], w, rows, target[part], reduction="sum") / B).backward()

        return agreement(step(variants["ours"], query, item), (query, item), oracle)  # type: ignore[arg-type]

    steps = {k: step(v, query, item) for k, v in variants.items()}
    return Case(steps, check, 2 * (B + N) * D * size, 6 * B * N * D, unavailable)


def catalog_bce(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    """B queries against N items, one target each."""
    query, item, offsets, target = data = _catalog(shape, device, dtype)
    B = len(query)

    def eager() -> Tensor:
        s = query @ item.T
        y = torch.zeros_like(s).scatter_(1, target[:, None], 1.0)
        return functional.binary_cross_entropy_with_logits(s, y, reduction="sum") / B

    def best() -> Tensor:
        s = query @ item.T
        return (functional.softplus(s).sum() - s.gather(1, target[:, None]).sum()) / B

    def ours() -> Tensor:
        return kernels.catalog_bce(query, item, offsets, target)

    variants = {"eager": eager, "eager best": best, "torch.compile": compiled(best), "ours": ours}
    return _catalog_case("catalog_bce", shape, variants, data, {})


def catalog_ce(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    """B queries against N items, one target each."""
    query, item, offsets, target = data = _catalog(shape, device, dtype)

    def eager() -> Tensor:
        return functional.cross_entropy(query @ item.T, target)

    def ours() -> Tensor:
        return kernels.catalog_ce(query, item, offsets, target)

    variants: dict[str, Callable[[], Tensor]] = {"eager": eager, "torch.compile": compiled(eager), "ours": ours}
    unavailable = {}
    if hasattr(functional, "linear_cross_entropy"):
        options = torch.nn.LinearCrossEntropyOptions

        def chunked(rows: int | None) -> Callable[[], Tensor]:
            chosen = options() if rows is None else options(batch_chunk_size=rows, chunking_method=None)
            return lambda: functional.linear_cross_entropy(query, item, target, options=chosen)

        variants["linear_cross_entropy default"] = chunked(None)
        for rows in (64, 256):
            variants[f"linear_cross_entropy {rows} rows"] = chunked(rows)
    else:
        unavailable["linear_cross_entropy"] = f"PyTorch {torch.__version__} has none"
    _add_gpu_competitors(variants, unavailable, query, item, target, device)
    return _catalog_case("catalog_ce", shape, variants, data, unavailable)


def _add_gpu_competitors(
    variants: dict[str, Callable[[], Tensor]],
    unavailable: dict[str, str],
    query: Tensor,
    item: Tensor,
    target: Tensor,
    device: str,
) -> None:
    if device != "cuda":
        unavailable |= {"Liger-Kernel": "runs on a GPU only", "cut-cross-entropy": "runs on a GPU only"}
        return
    try:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        liger = LigerFusedLinearCrossEntropyLoss()
        variants["Liger-Kernel"] = lambda: liger(item, query, target)
    except ImportError as error:
        unavailable["Liger-Kernel"] = f"not installed: {error}"
    try:
        from cut_cross_entropy import linear_cross_entropy

        variants["cut-cross-entropy exact"] = lambda: linear_cross_entropy(query, item, target, filter_eps=None)
    except ImportError as error:
        unavailable["cut-cross-entropy"] = f"not installed: {error}"


def score_topk(shape: Shape, device: str, dtype: torch.dtype) -> Case:
    """RecBole's full-sort evaluation: B users, N items, 100 seen items and 5 positives each; hits of the k best."""
    B, N, D, k = shape["B"], shape["N"], shape["D"], shape["k"]
    query, item = (leaf(n, D, 1.0, s, device, dtype).detach() for n, s in ((B, 0), (N, 1)))
    user = torch.arange(B, device=device)
    history = user.repeat_interleave(100), torch.randint(1, N, (100 * B,), generator=generator(2)).to(device)
    positive = user.repeat_interleave(5), torch.randint(1, N, (5 * B,), generator=generator(3)).to(device)
    seen = torch.unique(history[0] * N + history[1])
    offsets = torch.searchsorted(seen, torch.arange(B + 1, device=device) * N)
    seen = seen % N
    bias = torch.zeros(N, device=device)
    bias[0] = -torch.inf  # [PAD]

    def hits(best: Tensor) -> tuple[Tensor, Tensor]:
        key = torch.unique(positive[0] * N + positive[1])
        asked = (user[:, None] * N + best).view(-1)
        place = torch.searchsorted(key, asked).clamp_(max=len(key) - 1)
        return (key[place] == asked).view(B, k).int(), torch.bincount(key // N, minlength=B)[:, None]

    def masked() -> Tensor:
        s = query @ item.T
        s[:, 0] = -torch.inf
        s[history] = -torch.inf
        return torch.topk(s, k, dim=-1).indices

    def recbole() -> tuple[Tensor, Tensor]:
        # recbole 1.2.1: trainer.py:537-560 (_full_sort_batch_eval), evaluator/collector.py:144-160
        best = masked()
        matrix = torch.zeros(B, N, dtype=torch.int, device=device)
        matrix[positive] = 1
        return torch.gather(matrix, 1, best), matrix.sum(1, keepdim=True)

    def ours() -> tuple[Tensor, Tensor]:
        top = kernels.score_topk(query, item, k, item_bias=bias, seen_offsets=offsets, seen_ids=seen)
        return hits(top.ids)

    def check() -> dict[str, float]:
        some = min(B, 16)
        part = slice(0, int(offsets[some]))
        options = dict(item_bias=bias.double(), seen_offsets=offsets[: some + 1], seen_ids=seen[part])
        want, _ = reference.score_topk(query[:some].double(), item.double(), k, **options)
        got = kernels.score_topk(query, item, k, item_bias=bias, seen_offsets=offsets, seen_ids=seen)
        exact = torch.stack([item[got.ids[b]].double() @ query[b].double() for b in range(some)])
        return {
            "scores": float(((got.scores[:some].double() - exact).abs() / exact.abs()).max()),
            "best scores": float(((want - exact).abs() / want.abs()).max()),
        }

    variants: dict[str, Callable[[], object]] = {"eager": recbole, "eager best": lambda: hits(masked()), "ours": ours}
    return Case(variants, check, (B + N) * D * query.element_size() + 12 * B * k, 2 * B * N * D, {})


OPERATORS = {f.__name__: f for f in (pair_bce, sampled_bce, catalog_bce, catalog_ce, score_topk)}
FULL: list[tuple[str, Shape]] = [
    ("pair_bce", dict(P=65536, n=100_000, D=64)),
    ("pair_bce", dict(P=65536, n=100_000, D=64, ids="zipf")),
    ("pair_bce", dict(P=65536, n=1_000_000, D=64)),
    ("pair_bce", dict(P=2048, n=10_000, D=64)),
    ("sampled_bce", dict(B=4096, K=64, n=100_000, D=64)),
    ("sampled_bce", dict(B=4096, K=64, n=100_000, D=64, ids="zipf")),
    ("sampled_bce", dict(B=16384, K=4, n=100_000, D=64)),
    ("catalog_bce", dict(B=2048, N=200_000, D=64)),
    ("catalog_bce", dict(B=2048, N=50_000, D=64)),
    ("catalog_bce", dict(B=1024, N=50_000, D=128)),
    ("catalog_bce", dict(B=943, N=1683, D=64)),
    ("catalog_ce", dict(B=2048, N=200_000, D=64)),
    ("catalog_ce", dict(B=2048, N=50_000, D=64)),
    ("catalog_ce", dict(B=943, N=1683, D=64)),
    ("score_topk", dict(B=1024, N=100_000, D=64, k=50)),
    ("score_topk", dict(B=256, N=1_000_000, D=64, k=50)),
    ("score_topk", dict(B=4096, N=10_000, D=64, k=20)),
]
QUICK: list[tuple[str, Shape]] = [
    ("pair_bce", dict(P=4096, n=5000, D=32)),
    ("sampled_bce", dict(B=512, K=8, n=5000, D=32)),
    ("catalog_bce", dict(B=128, N=6000, D=32)),
    ("catalog_ce", dict(B=128, N=6000, D=32)),
    ("score_topk", dict(B=128, N=20_000, D=32, k=10)),
]
ALLOWED = {"float32": 5e-6, "bfloat16": 1e-2, "float16": 2e-3}  # a rounding of the result, and a few of the sums


def build(name: str, shape: Shape, device: str, dtype: str, with_compile: bool) -> Case:
    case = OPERATORS[name](shape, device, DTYPES[dtype])
    if not with_compile:
        case.variants.pop("torch.compile", None)
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
    ideal = max(case.bytes / limits["bytes_per_s"], case.flops / limits["flop_per_s"])
    for variant in case.variants:
        figures = timing.summary(wall[variant])
        seconds = figures["ms"] / 1e3
        figures |= {
            "cpu_ms": timing.summary(cpu[variant])["ms"],
            "gb_per_s": case.bytes / seconds / 1e9,
            "gflop_per_s": case.flops / seconds / 1e9,
            "share_of_roofline": ideal / seconds,
            "ours_is_faster_by": timing.ratio(wall[variant], wall["ours"]),
            "ours_is_faster_by_cpu_time": timing.ratio(cpu[variant], cpu["ours"]),
        }
        entry["variants"][variant] = figures
    return entry


def worker(args: argparse.Namespace) -> None:
    """One measurement in a fresh process: the plan comes as JSON, the result goes to standard output as JSON."""
    plan = json.loads(args.worker)
    torch.set_num_threads(plan["threads"])
    if plan["memory"] is None:
        result = measure(plan["name"], plan["shape"], args, args.budget)
    else:
        case = build(plan["name"], plan["shape"], args.device, args.dtype, args.compile)
        torch.mm(torch.ones(300, 64), torch.ones(64, 300))  # libraries load outside the measurement
        result = {"mib": timing.peak_memory(case.variants[plan["memory"]], args.device)}
    print("\n" + json.dumps(result))


def spawn(args: argparse.Namespace, name: str, shape: Shape, threads: int, memory: str | None) -> dict[str, Any]:
    plan = json.dumps(dict(name=name, shape=shape, threads=threads, memory=memory))
    command = [sys.executable, __file__, "--worker", plan, "--device", args.device, "--dtype", args.dtype]
    command += ["--budget", str(args.budget)] + ([] if args.compile else ["--no-compile"])
    path = os.pathsep.join([str(timing.ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    env = {**os.environ, "OMP_NUM_THREADS": str(threads), "PYTHONPATH": path}
    done = subprocess.run(command, capture_output=True, text=True, env=env)
    if done.returncode:
        raise SystemExit(f"{name} {shape}: {done.stderr.strip()[-2000:]}")
    return json.loads(done.stdout.strip().splitlines()[-1])


def show(entry: dict[str, Any]) -> None:
    shape = " ".join(f"{k}={v}" for k, v in entry["shape"].items())
    print(f"\n{entry['operator']}  {shape}  {entry['dtype']}  {entry['threads']} threads, {entry['rounds']} rounds")
    for name, v in entry["variants"].items():
        memory = f"{v['mib']:8.0f} MiB" if "mib" in v else ""
        faster = f"ours x{v['ours_is_faster_by']:.2f} ({v['ours_is_faster_by_cpu_time']:.2f} CPU time)"
        print(
            f"  {name:30s} {v['ms']:10.2f} ms  {v['gflop_per_s']:7.1f} GFLOP/s  "
            f"{100 * v['share_of_roofline']:3.0f}% of roofline  {faster} {memory}",
            flush=True,
        )


def key(entry: dict[str, Any]) -> tuple[object, ...]:
    """What two figures must share for one to replace the other."""
    return entry["operator"], json.dumps(entry["shape"]), entry["dtype"], entry["threads"]


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--quick", action="store_true", help="tiny shapes in this process, nothing written")
    parser.add_argument("--only", nargs="*", choices=list(OPERATORS), help="operators to run")
    parser.add_argument("--device", choices=["cpu", "cuda"], default="cuda" if torch.cuda.is_available() else "cpu")
    parser.add_argument("--dtype", choices=list(DTYPES), default="float32")
    parser.add_argument("--threads", nargs="*", type=int, default=[1, 2], help="CPU threads (default: 1 2)")
    parser.add_argument("--budget", type=float, default=20.0, help="seconds of timing per shape (default: 20)")
    parser.add_argument("--no-compile", dest="compile", action="store_false", help="leave torch.compile out")
    parser.add_argument("--output", type=Path, help="result file")
    parser.add_argument("--worker", help=argparse.SUPPRESS)
    args = parser.parse_args()
    if args.worker:
        worker(args)
        return
    if args.quick:
        args.compile = False
        for name, shape in QUICK:
            if not args.only or name in args.only:
                show(measure(name, shape, args, budget=0.5))
        return
    output = args.output or RESULTS / f"kernel_speed_{args.device}_{args.dtype}.json"
    output.parent.mkdir(parents=True, exist_ok=True)
    report: dict[str, Any] = {"machine": timing.machine(args.device), "device": args.device, "entries": []}
    if output.exists():  # figures of what is not measured now stay, each with its own commit
        report["entries"] = json.loads(output.read_text())["entries"]
    for name, shape in FULL:
        if args.only and name not in args.only:
            continue
        memory: dict[str, float] = {}
        for threads in args.threads if args.device == "cpu" else [torch.get_num_threads()]:
            entry = spawn(args, name, shape, threads, None)
            for variant, figures in entry["variants"].items():
                if variant not in memory:
                    memory[variant] = spawn(args, name, shape, threads, variant)["mib"]
                figures["mib"] = memory[variant]
            ours = memory["ours"]
            for variant, figures in entry["variants"].items():
                figures["ours_takes_less_memory_by"] = memory[variant] / max(ours, 0.1)
            show(entry)
            entry["commit"] = report["machine"]["commit"]
            report["entries"] = [e for e in report["entries"] if key(e) != key(entry)] + [entry]
            output.write_text(json.dumps(report, indent=1) + "\n")


if __name__ == "__main__":
    main()
