"""Triton kernels compiled ahead of time: no spills, tensor cores and wide loads where meant, 64-bit offsets.

``benchmarks/aot_report.py --check`` compiles every combination; here each kernel is compiled for sm_90, and the pass over
tiles for every architecture. Most of it takes ``-m slow``.
"""

import importlib.util
import os
import sys
from pathlib import Path

import pytest

if importlib.util.find_spec("triton") is None:
    pytest.skip("Triton is not installed", allow_module_level=True)
if os.environ.get("TRITON_INTERPRET") == "1":
    pytest.skip("this process interprets: nothing is compiled", allow_module_level=True)

import torch
import triton
import triton.language as tl
from triton.backends import backends

_path = Path(__file__).parents[2] / "benchmarks" / "aot_report.py"
_spec = importlib.util.spec_from_file_location("aot_report", _path)
aot = importlib.util.module_from_spec(_spec)
sys.path.insert(0, str(_path.parent))  # its neighbours
sys.modules["aot_report"] = aot
_spec.loader.exec_module(aot)

BF16 = aot.launches("sm_90", torch.bfloat16, 64)


def compiled(launch, arch, sizes, dtype="bfloat16"):
    kind = aot.ARCHS[arch].target.backend
    if {"cuda": "nvidia", "hip": "amd"}[kind] not in backends:
        pytest.skip(f"this build of Triton {triton.__version__} has no {kind} backend")
    binary = aot.compile_launch(launch, arch, sizes)
    row = {"arch": arch, "dtype": dtype, "D": 64, "kernel": launch.label, **aot.measure(binary, arch)}
    return row, aot.problems(launch, row, binary.asm["ttir"])


def test_every_kernel_is_recorded():
    """A kernel that no launch reaches would never be compiled."""
    import recbole_llm_kernels.triton_ops as package

    defined = set()
    for file in Path(package.__path__[0]).glob("*.py"):
        module = importlib.import_module(f"recbole_llm_kernels.triton_ops.{file.stem}")
        defined |= {name for name, x in vars(module).items() if isinstance(x, triton.JITFunction)}
    assert {x.kernel.__name__ for x in BF16} == {name for name in defined if name.endswith("_kernel")}
    terms = {x.values["TERM"] for x in BF16 if aot.is_product(x)}
    assert terms == {"bce", "softmax", "exp_sum", "group_max"}


@pytest.mark.parametrize("sizes", [pytest.param("one", marks=pytest.mark.slow), "sixteen"])
@pytest.mark.parametrize("number", range(len(BF16)), ids=lambda n: f"{n}-{BF16[n].label}")
def test_every_kernel_on_sm_90(number, sizes):
    """Sizes of 1 are constants of the compiler, on which methods of tensors do not exist."""
    if sizes == "one" and BF16[number].label in [x.label for x in BF16[:number]]:
        pytest.skip("the same kernel with other arguments left out is compiled for general sizes")
    row, problems = compiled(BF16[number], "sm_90", sizes)
    assert not problems, row


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "gfx942"])
def test_the_pass_over_tiles_on_every_architecture(arch, dtype):
    launch = next(x for x in aot.launches(arch, aot.DTYPES[dtype], 64) if x.label == "tile_pass[bce]")
    row, problems = compiled(launch, arch, "generic", dtype)
    assert not problems, row
    assert dtype == "float32" or row["matrix"] > 0


@triton.jit
def _narrow(table, index, out, D: tl.constexpr, WIDE: tl.constexpr, BLOCK: tl.constexpr):
    row = tl.load(index + tl.arange(0, BLOCK))
    if WIDE:
        row = row.to(tl.int64)
    tl.store(out + tl.arange(0, BLOCK), tl.load(table + row * D))


@triton.jit
def _hungry(x, out, BLOCK: tl.constexpr):
    at = tl.arange(0, BLOCK)[:, None] * BLOCK + tl.arange(0, BLOCK)[None, :]
    v = tl.load(x + at)
    tl.store(out + at, tl.dot(v, v, input_precision="ieee"))


def test_the_checks_see_a_narrow_offset_and_a_spill():
    table, index = torch.zeros(64, 64), torch.zeros(32, dtype=torch.int32)
    for wide in (True, False):
        values = {"table": table, "index": index, "out": index.float(), "D": 64, "WIDE": wide, "BLOCK": 32}
        _, problems = compiled(aot.Recorded(_narrow, values, {"num_warps": 1}), "sm_90", "generic")
        assert [p.startswith("multiplies an offset in 32 bits") for p in problems] == ([] if wide else [True])
    values, options = {"x": table, "out": table, "BLOCK": 32}, {"num_warps": 1, "maxnreg": 32}
    row, problems = compiled(aot.Recorded(_hungry, values, options), "sm_90", "sixteen", "float32")
    assert row["spills"] > 0 and any(p.startswith("spills") for p in problems)
