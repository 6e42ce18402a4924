"""What the compiler makes of every Triton kernel, without a GPU: registers, spills, shared memory, instructions, floor.

    python benchmarks/aot_report.py --check                  # the whole table, three quarters of an hour of one core
    python benchmarks/aot_report.py --check --minutes 7      # a piece of it: the next call goes on from there
    python benchmarks/aot_report.py --arch sm_90 --dtype bfloat16 --dim 64 --json none

The launchers run on small CPU tensors with Triton's launch replaced by a recorder, so what is compiled is what would be
launched. ``--check`` exits with 1 where a kernel spills, exceeds shared memory, lacks the tensor-core or wide-load
instructions it is meant to have, fetches no tile ahead of its loop, or multiplies row offsets in 32 bits. The floor is a
prediction from nominal peaks for the workload named in the table (pairs P = 65,536; rows B = 2,048; N = 1,000,000;
K = 64), never a measurement: the longest of moving the bytes, of tensor cores, of special functions and, for passes over
tiles on NVIDIA's cards, of issuing the loop's instructions, one a cycle and scheduler.
"""

import argparse
import hashlib
import importlib
import itertools
import json
import os
import re
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from types import SimpleNamespace
from typing import Any, NamedTuple
from unittest import mock

import kernel_cases
import sass
import timing
import torch
import triton
import triton.backends.compiler
from torch import Tensor
from triton.backends.compiler import GPUTarget
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from recbole_llm_kernels import triton_ops
from recbole_llm_kernels.signatures import Sampled
from recbole_llm_kernels.triton_ops import catalog, pairs, sampled, topk, tuning


class Arch(NamedTuple):
    """A target, its limits, and the nominal peaks of its data-centre card for the predicted floor."""

    target: GPUTarget
    on: tuning.Target
    shared_limit: int  # bytes of one program
    matrix: str  # tensor-core instruction
    bandwidth: float  # bytes / s
    matrix_peak: float  # dense bfloat16 flop / s
    exponentials: float  # special functions / s
    clock: float  # cycles / s


ARCHS = {
    "sm_80": Arch(GPUTarget("cuda", 80, 32), tuning.Target("cuda", 80, 108), 163 << 10, "HMMA", 2.0e12, 312e12, 2.4e12, 1.41e9),
    "sm_90": Arch(GPUTarget("cuda", 90, 32), tuning.Target("cuda", 90, 132), 227 << 10, "HGMMA", 4.3e12, 790e12, 3.9e12, 1.98e9),
    "sm_100": Arch(GPUTarget("cuda", 100, 32), tuning.Target("cuda", 100, 148), 227 << 10, "UTCMMA", 8e12, 2.2e15, 4.4e12, 1.96e9),
    "gfx942": Arch(GPUTarget("hip", "gfx942", 64), tuning.Target("hip", 942, 304), 64 << 10, "MFMA", 5.3e12, 1.3e15, 1e13, 2.1e9),
}  # fmt: skip
NAMES = {torch.float32: "fp32", torch.bfloat16: "bf16", torch.float16: "fp16", torch.int32: "i32", torch.int64: "i64",
         torch.bool: "i1"}  # fmt: skip
_ATTRIBUTES = getattr(triton.backends.compiler, "AttrsDescriptor", None)  # of Triton 3.2
RESULT = timing.ROOT / "benchmarks" / "results" / "aot_report.json"
Row = dict[str, Any]
DTYPES = {"float32": torch.float32, "bfloat16": torch.bfloat16, "float16": torch.float16}
# Triton 3.2 fetches no tile ahead that two products read; from 3.6 on every pass does, between them nobody has looked
FETCHES_AHEAD = tuple(map(int, triton.__version__.split(".")[:2])) >= (3, 6)
OPTIONS = ("num_warps", "num_stages", "enable_fp_fusion")
# integers as a launch specialises them: any; 1 becomes a constant of the compiler; 16 makes wide accesses possible. Sizes
# of a batch are not specialised, so that most kernels are the same in all three
SIZES = ("generic", "one", "sixteen")


class Recorded(NamedTuple):
    """One launch: the kernel, and the value of every argument and option."""

    kernel: JITFunction
    values: dict[str, Any]
    options: dict[str, Any]

    @property
    def label(self) -> str:
        """The kernel's name without decoration, the term of a tile pass, and whether it leaves slopes."""
        name = self.kernel.__name__.strip("_").removesuffix("_kernel")
        if "TERM" not in self.values:
            return name
        return f"{name}[{self.values['TERM']}]" + (", slopes" if self.values["slope_ptr"] is not None else "")


@contextmanager
def recorder(on: tuning.Target) -> Iterator[list[Recorded]]:
    """Launches are recorded instead of made, with block sizes for ``on``."""
    recorded: list[Recorded] = []

    def record(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        values = dict(zip(self.arg_names, args, strict=False))
        values |= {name: value for name, value in options.items() if name in self.arg_names}
        recorded.append(Recorded(self, values, {name: options[name] for name in OPTIONS if name in options}))

    run, target = JITFunction.run, tuning.target
    JITFunction.run, tuning.target = record, lambda device: on
    try:
        yield recorded
    finally:
        JITFunction.run, tuning.target = run, target


def launches(arch: str, dtype: torch.dtype, D: int) -> list[Recorded]:
    """Every kernel once, as its launcher configures it for the architecture, dtype and width."""
    B, N, K = 96, 4096, 40
    user, item = torch.zeros(B, D, dtype=dtype), torch.zeros(N, D, dtype=dtype)
    bias, ids, one = torch.zeros(N), torch.zeros(B, dtype=torch.int64), torch.ones(())
    rows, every = torch.arange(B + 1), [True, True, True]
    targets, negatives = (rows, rows[:-1].clone()), torch.zeros(B, K, dtype=torch.int64)
    with recorder(ARCHS[arch].on) as recorded:
        _, slope = pairs.pair_bce_fwd(user, item, ids, ids, torch.zeros(B), bias, None, "mean")
        pairs.pair_bwd(one, slope, user, item, ids, ids, bias, every)
        many = torch.zeros(tuning.COUNTED_PAIRS + 1, dtype=torch.int64)  # as many as are sorted
        pairs.order_pairs(many, many, bias, B, N, every)
        _, query, _, _ = catalog.catalog_bce_fwd(user, item, *targets, bias, None, 1.0, "mean", every)
        formed = (query, None, None)
        catalog.catalog_bce_bwd(one, user, item, *targets, bias, None, 1.0, "mean", formed, every)
        _, log_z, slope, _, _, _ = catalog.catalog_ce_fwd(user, item, *targets, bias, None, "mean", every)
        nothing = (None, None, None)
        catalog.catalog_ce_bwd(one, user, item, *targets, bias, None, "mean", log_z, slope, nothing, every)
        sampled.sampled_bce_fwd(
            Sampled(user, item, bias, ids, ids, negatives, bias, None, None, 1.0, "mean", every, "triton")
        )
        topk.score_topk(user, item, 10, bias, *targets)
        known = {launch.kernel for launch in recorded}
        recorded += [launch for launch in every_launch(user, item, bias, targets) if launch.kernel not in known]
    unique: dict[tuple[Any, ...], Recorded] = {}
    for launch in recorded:
        given = tuple((name, x is None) for name, x in launch.values.items())
        unique.setdefault((launch.label, given), launch)
    return list(unique.values())


def every_launch(user: Tensor, item: Tensor, bias: Tensor, targets: tuple[Tensor, Tensor]) -> list[Recorded]:
    """What the operators of ``kernel_cases`` launch, forward and backward; only within :func:`recorder`."""
    for file in Path(triton_ops.__path__[0]).glob("*.py"):  # before they are told that Triton interprets
        importlib.import_module(f"{triton_ops.__name__}.{file.stem}")
    B, ids = len(user), torch.zeros(len(user), dtype=torch.int64)
    data = SimpleNamespace(user_id=ids, pos=ids, label=torch.zeros(B), neg=ids[:, None].expand(B, 40),
                           shared=torch.zeros(300, dtype=torch.int64), targets=targets)  # fmt: skip
    found: list[Recorded] = []
    with recorder(tuning.target(user.device)) as recorded, mock.patch.dict(os.environ, {"TRITON_INTERPRET": "1"}):
        for call in kernel_cases.calls(data, backend="triton").values():
            leaves = [x.clone().requires_grad_() for x in (user, item, bias)]
            call(*leaves).sum().backward()
        for step in kernel_cases.steps(data, user, item, bias, backend="triton").values():
            step()
        found += recorded
    return found


def specialised(launch: Recorded, sizes: str) -> ASTSource:
    """What the compiler is given, integer arguments specialised as ``sizes`` says."""
    signature, constants, attributes = {}, {}, {}
    for i, parameter in enumerate(launch.kernel.params):
        value = launch.values[parameter.name]
        signature[parameter.name] = "constexpr"
        if parameter.is_constexpr or value is None:
            constants[i,] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + NAMES[value.dtype]
            attributes[i,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif parameter.do_not_specialize or sizes == "generic":
            signature[parameter.name] = "i32"
        elif sizes == "one":
            constants[i,] = 1
        else:
            signature[parameter.name] = "i32"
            attributes[i,] = [["tt.divisibility", 16]]
    if _ATTRIBUTES is not None:
        return _for_triton_3_2(launch.kernel, signature, constants, attributes)
    return ASTSource(fn=launch.kernel, signature=signature, constexprs=constants, attrs=attributes)


def _for_triton_3_2(kernel: JITFunction, signature: Row, constants: Row, attributes: Row) -> ASTSource:
    """The same in the words of Triton 3.2: constants by name, and a size of 1 is an i32 known to be 1."""
    params = kernel.params
    kinds = {}
    for p in params:
        if not p.is_constexpr:
            kinds[p.name] = signature[p.name]
            if kinds[p.name] == "constexpr":
                kinds[p.name] = "*i8" if constants[p.num,] is None else "i32"
    by_name = {params[i].name: value for (i,), value in constants.items()}
    ones = [i for (i,) in constants if not params[i].is_constexpr and constants[i,] is not None]
    properties = {"tt.divisibility": [i for (i,) in attributes], "tt.equal_to": ones}
    described = _ATTRIBUTES.from_dict({"arg_properties": properties, "cls": "AttrsDescriptor"})
    return ASTSource(fn=kernel, signature=kinds, constants=by_name, attrs=described)


def compile_launch(launch: Recorded, arch: str, sizes: str = "sixteen") -> Any:
    """Compile for ``arch`` with integer arguments specialised as ``sizes`` says."""
    return triton.compile(specialised(launch, sizes), target=ARCHS[arch].target, options=launch.options)


def fingerprint(launch: Recorded, arch: str, sizes: str) -> str:
    """Changes with the kernel's source, its arguments and options, the target and the compiler."""
    given = (specialised(launch, sizes).hash(), ARCHS[arch].target, sorted(launch.options.items()), triton.__version__)
    return hashlib.sha256(repr(given).encode()).hexdigest()[:16]


def measure(compiled: Any, arch: str) -> dict[str, Any]:
    """Registers, spilled bytes (registers on AMD), shared memory and counts of instructions.

    On NVIDIA's cards too: whether tiles are fetched ahead of the loop over them, and its instructions, see ``sass``.
    """
    found: dict[str, Any] = {
        "shared": compiled.metadata.shared,
        "pipelined": None,
        "loop": None,
        "common": None,
        "around": None,
    }
    if arch.startswith("gfx"):
        text = compiled.asm["amdgcn"]
        for key, name in (("registers", "vgpr_count"), ("spills", "vgpr_spill_count")):
            match = re.search(rf"\.{name}:\s*(\d+)", text)
            assert match is not None
            found[key] = int(match[1])
        counts = {"matrix": "v_mfma", "wide_loads": r"(?:global|buffer)_load_dwordx4", "exponentials": "v_exp_f32",
                  "fma": r"v_(?:pk_)?fma", "atomics": r"(?:global|buffer)_atomic"}  # fmt: skip
    else:
        tools = Path(triton.__file__).parent / "backends" / "nvidia" / "bin"
        with tempfile.NamedTemporaryFile(suffix=".cubin") as file:
            file.write(compiled.asm["cubin"])
            file.flush()
            command = [str(tools / "cuobjdump"), "--dump-resource-usage", file.name]
            usage = subprocess.run(command, capture_output=True, text=True, check=True).stdout
            text = subprocess.run([tools / "nvdisasm", file.name], capture_output=True, text=True, check=True).stdout
        if (loop := sass.product_loop(text)) is not None:
            found |= {"pipelined": sass.is_pipelined(compiled.asm["ttgir"]), "loop": loop.instructions,
                      "common": loop.common, "around": loop.around}  # fmt: skip
        match = re.search(r"REG:(\d+) STACK:(\d+) SHARED:\d+ LOCAL:(\d+)", usage)
        assert match is not None
        found |= {"registers": int(match[1]), "spills": int(match[2]) + int(match[3])}
        counts = {"matrix": r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b", "wide_loads": r"\bLDG\.E\.(?:\w+\.)*128|\bLDGSTS",
                  "exponentials": r"\bMUFU\.EX2", "fma": r"\bFFMA", "atomics": r"\b(?:ATOMG|RED)\."}  # fmt: skip
    return found | {name: len(re.findall(pattern, text)) for name, pattern in counts.items()}


def narrow_offsets(ttir: str) -> list[str]:
    """Pointer offsets in 32 bits that hold a product of tensors, a row number times a width: they overflow."""
    defined = {m[1]: m[2] for m in re.finditer(r"^\s*(%[\w#]+)(?::\d+)? = (.*)$", ttir, re.M)}

    def multiplies(name: str, seen: set[str]) -> bool:
        text = defined.get(name, "")
        if name in seen or "xi32>" not in text:  # scalars are program numbers times block sizes
            return False
        if text.startswith("arith.muli"):
            return True
        kept = text.startswith(
            ("arith.addi", "arith.subi", "tt.broadcast", "tt.expand_dims", "arith.select", "tt.splat")
        )
        return kept and any(multiplies(x, seen | {name}) for x in re.findall(r"%[\w#]+", text))

    found = []
    for line in ttir.splitlines():
        match = re.search(r"tt\.addptr (%[\w#]+), (%[\w#]+) : .*, tensor<[\dx]+xi32>", line)
        if match and multiplies(match[2], set()):
            found.append(line.strip().split(" loc(")[0])
    return found


def is_product(launch: Recorded) -> bool:
    """Whether the kernel is meant to use tensor cores."""
    return "TERM" in launch.values or "PLANES" in launch.values


def problems(launch: Recorded, row: dict[str, Any], ttir: str) -> list[str]:
    """What a kernel must not show; empty where all is well."""
    arch, values, found = ARCHS[row["arch"]], launch.values, []
    if row["spills"]:
        found.append(f"spills {row['spills']}")
    if row["shared"] > arch.shared_limit:
        found.append(f"needs {row['shared']} bytes of shared memory, the limit is {arch.shared_limit}")
    if row["atomics"]:
        found.append(f"has {row['atomics']} atomic operations")
    precision = values.get("LOGIT_PRECISION", values.get("PRECISION"))
    on_cuda_cores = precision == "ieee" and row["dtype"] == "float32" and arch.on.kind == "cuda"
    if is_product(launch) and not on_cuda_cores and row["matrix"] == 0:
        found.append(f"has no {arch.matrix}")
    if FETCHES_AHEAD and is_product(launch) and row["pipelined"] is False:
        found.append("fetches no tile ahead of its loop: copies wait within the iteration that uses them")
    aligned = row["D"] * (4 if row["dtype"] == "float32" else 2) % 16 == 0
    reads_rows = is_product(launch) or row["kernel"] in ("pair_fwd", "sampled_bce_fwd", "group_score")
    if reads_rows and aligned and row["wide_loads"] == 0:
        found.append("has no 128-bit loads")
    return found + [f"multiplies an offset in 32 bits: {line}" for line in narrow_offsets(ttir)]


def per_logit(launch: Recorded, row: Row) -> float | None:
    """Instructions that a thread issues for a logit on a tile without targets; None where the loop is not known."""
    values = launch.values
    if row["common"] is None or not is_product(launch):
        return None
    steps = -(-values["D"] // values["BLOCK_D"])
    each: int = row["common"]
    if "PLANES" in values:  # a program for each piece of D
        each *= steps
    elif steps > 1:  # a loop over D within that over the columns
        if row["around"] is None:
            return None
        each = each * steps + row["around"]
    return each * 32 * launch.options["num_warps"] / (values["BLOCK_R"] * values["BLOCK_C"])


def floor(label: str, arch: Arch, D: int, dtype: torch.dtype, issued: float | None = None) -> tuple[float, str]:
    """Predicted microseconds and the resource that sets them, for the reference workload.

    Args:
        label: the kernel.
        arch: the target.
        D: width of the vectors.
        dtype: of the vectors.
        issued: instructions of a thread for a logit; None: not known.
    """
    B, N = 2048, 1_000_000
    work = kernel_cases.work(65_536, B, N, 64, D, dtype.itemsize, tuning.COUNTED_PAIRS)
    rate = arch.matrix_peak * (1 if dtype.itemsize == 2 else 0.25)
    size, flops, exponentials = work[label]
    times = {"memory": size / arch.bandwidth, "matrix": flops / rate, "exp": exponentials / arch.exponentials}
    if issued is not None:
        times["issue"] = B * N * issued / 32 / (4 * arch.on.processors) / arch.clock
    limit = max(times, key=lambda name: times[name])
    return round(1e6 * times[limit], 2), limit


def wanted(archs: list[str], dtypes: list[str], dims: list[int], sizes: list[str]) -> Iterator[tuple[Recorded, Row]]:
    """Every launch to compile, with the columns of its row that are known before."""
    for arch in archs:
        for dtype in dtypes:
            for D in dims:
                for launch in launches(arch, DTYPES[dtype], D):
                    # sizes of a batch are not specialised: most kernels are the same for all three
                    distinct = {fingerprint(launch, arch, variant): variant for variant in reversed(sizes)}
                    for variant in reversed(distinct.values()):
                        absent = ",".join(n for n in launch.kernel.arg_names if launch.values[n] is None)
                        row = {"arch": arch, "dtype": dtype, "D": D, "kernel": launch.label, "sizes": variant}
                        yield launch, row | {"absent": absent, "source": fingerprint(launch, arch, variant)}


def filled(launch: Recorded, row: Row) -> Row:
    """The row with what the compiler made of the launch; key "problems" lists what is wrong."""
    arch, dtype = ARCHS[row["arch"]], DTYPES[row["dtype"]]
    compiled = compile_launch(launch, row["arch"], row["sizes"])
    row = row | {"warps": launch.options["num_warps"], **measure(compiled, row["arch"])}
    row["per_logit"] = per_logit(launch, row)
    row["floor_us"], row["floor_by"] = floor(launch.label, arch, row["D"], dtype, row["per_logit"])
    return row | {"problems": problems(launch, row, compiled.asm["ttir"])}


FIELDS = ("arch", "dtype", "D", "kernel", "absent", "sizes", "precision", "warps", "registers", "spills", "shared", "matrix",
          "wide_loads", "exponentials", "fma", "atomics", "pipelined", "loop", "common", "around", "per_logit", "floor_us",
          "floor_by", "problems", "source")  # fmt: skip


def rows_of(data: Row) -> list[Row]:
    """The rows of a result file."""
    return [dict(zip(data["columns"], row, strict=True)) for row in data["rows"]]


def place_of(row: Row) -> tuple[Any, ...]:
    """What two rows share of which the later one replaces the earlier."""
    return tuple(row[name] for name in ("arch", "dtype", "D", "kernel", "absent", "sizes", "precision"))


COLUMNS = ("arch", "dtype", "D", "kernel", "sizes", "warps", "registers", "spills", "shared", "matrix", "wide_loads",
           "exponentials", "fma", "pipelined", "per_logit", "floor_us", "floor_by")  # fmt: skip
WIDTHS = (6, 8, 4, 21, 7, 5, 9, 6, 7, 6, 10, 12, 6, 9, 9, 9, 8)


def line(row: dict[str, Any]) -> str:
    """A row of the table."""
    cells = (f"{row[c]:.1f}" if isinstance(row[c], float) else str(row[c]) for c in COLUMNS)
    text = "  ".join(cell.ljust(width) for cell, width in zip(cells, WIDTHS, strict=True))
    return text + "".join(f"\n    PROBLEM: {problem}" for problem in row["problems"])


def main(arguments: list[str] | None = None) -> int:
    """Print the table; with ``--check`` return 1 where anything is wrong; 3: time ran out before the table was whole."""
    parser = argparse.ArgumentParser(description=__doc__.split("\n")[0])
    parser.add_argument("--arch", nargs="+", choices=list(ARCHS), default=list(ARCHS))
    parser.add_argument("--dtype", nargs="+", choices=list(DTYPES), default=list(DTYPES))
    parser.add_argument("--dim", nargs="+", type=int, default=[64, 128, 384])
    parser.add_argument("--sizes", nargs="+", choices=SIZES, default=list(SIZES))
    parser.add_argument("--precision", choices=["highest", "high", "medium"], default="highest",
                        help="torch.set_float32_matmul_precision")  # fmt: skip
    parser.add_argument(
        "--kernels", nargs="+", default=[""], help="compile those whose names begin so; others are kept"
    )
    parser.add_argument("--json", default=str(RESULT), help='result file, kept up after each kernel; "none": no file')
    parser.add_argument("--minutes", type=float, default=float("inf"), help="stop after so long; the next call goes on")
    parser.add_argument("--check", action="store_true", help="exit with 1 where anything is wrong")
    options = parser.parse_args(arguments)
    torch.set_float32_matmul_precision(options.precision)
    file = None if options.json == "none" else Path(options.json)
    before = rows_of(json.loads(file.read_text())) if file and file.exists() else []
    before = [row for row in before if set(FIELDS) <= row.keys()]  # not of a table that had fewer columns
    known = {row["source"]: row for row in before}
    stop = time.monotonic() + 60 * options.minutes
    print("  ".join(name.ljust(width) for name, width in zip(COLUMNS, WIDTHS, strict=True)))
    rows: list[Row] = []
    missing = 0
    for launch, asked in wanted(options.arch, options.dtype, options.dim, options.sizes):
        is_chosen = asked["kernel"].startswith(tuple(options.kernels))
        if asked["source"] not in known and (time.monotonic() > stop or not is_chosen):
            missing += 1
            continue
        rows.append(known.get(asked["source"]) or filled(launch, asked | {"precision": options.precision}))
        print(line(rows[-1]), flush=True)
    if file:
        # of the combinations asked for, what was compiled from other sources is not kept
        asked_for = {(*x, options.precision) for x in itertools.product(options.arch, options.dtype, options.dim)}
        others = [r for r in before if (r["arch"], r["dtype"], r["D"], r["precision"]) not in asked_for]
        place = {place_of(row): row for row in [*others, *rows]}
        facts = {"triton": triton.__version__, "commit": timing.commit(), "columns": FIELDS}
        lines = ",\n".join(json.dumps([row.get(name) for name in FIELDS]) for row in place.values())
        file.write_text(json.dumps(facts)[:-1] + f', "rows": [\n{lines}\n]}}\n')
    wrong = sum(bool(row["problems"]) for row in rows)
    print(
        f"{len(rows)} kernels compiled with Triton {triton.__version__}, {wrong} with problems, {missing} still to do"
    )
    return 3 if missing else int(options.check and wrong > 0)


if __name__ == "__main__":
    sys.exit(main())
