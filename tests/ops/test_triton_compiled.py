"""Triton kernels compiled ahead of time: no spills, tensor cores and wide loads where meant, 64-bit offsets.

``benchmarks/aot_report.py --check`` compiles every combination; here each kernel is compiled for sm_90, and the pass over
tiles for every architecture. Most of it takes ``-m slow``.
"""

import importlib.util
import os
import re
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
from torch.utils._python_dispatch import TorchDispatchMode
from triton.backends import backends

from recbole_llm_kernels.triton_ops import tiles, topk

_path = Path(__file__).parents[2] / "benchmarks" / "aot_report.py"
_spec = importlib.util.spec_from_file_location("aot_report", _path)
aot = importlib.util.module_from_spec(_spec)
sys.path.insert(0, str(_path.parent))  # its neighbours
sys.modules["aot_report"] = aot
_spec.loader.exec_module(aot)

BF16 = aot.launches("sm_90", torch.bfloat16, 64)
# what is launched where vectors are too wide for their sums to stay in registers, and only there
WIDE = [x for x in aot.launches("sm_90", torch.bfloat16, 384) if "slope" in x.label]


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
    assert {x.kernel.__name__ for x in [*BF16, *WIDE]} == {name for name in defined if name.endswith("_kernel")}
    terms = {x.values["TERM"] for x in BF16 if aot.is_product(x)}
    assert terms == {"bce", "softmax", "exp_sum", "group_max"}


STRIDES = {"valid_row_stride", "valid_col_stride"}  # one of them is 1, which makes the mask's loads wide


@pytest.mark.parametrize("launch", [*BF16, *WIDE], ids=lambda x: x.label)
def test_no_batch_is_compiled_for_its_size(launch):
    """A size that is specialised on 1 and on multiples of 16 compiles the kernel anew for another batch."""
    sizes = {p.name for p in launch.kernel.params if not p.is_constexpr and type(launch.values[p.name]) is int}
    assert sizes - STRIDES
    assert {p.name for p in launch.kernel.params if p.name in sizes and not p.do_not_specialize} <= STRIDES
    assert launch.label.startswith("tile_pass") or aot.fingerprint(launch, "sm_90", "one") == aot.fingerprint(
        launch, "sm_90", "sixteen"
    )


def test_columns_of_a_part_are_counted_in_64_bits():
    """The last part of 2**31 columns ends behind them."""
    launch = next(x for x in BF16 if x.label == "tile_pass[exp_sum]")
    ttir = aot.compile_launch(launch, "sm_90", "generic").asm["ttir"]
    part = re.search(r"(%\w+) = tt.get_program_id y", ttir)[1]
    part = re.search(rf"(%\w+) = arith.addi {part}, %first_part : i32", ttir)[1]
    assert not re.search(rf"arith.(muli|addi) {part}, .* : i32", ttir) and f"arith.extsi {part} : i32 to i64" in ttir


def test_more_rows_than_int32_are_refused():
    many = torch.zeros(1, 4).expand(2**31, 4)
    for rows, cols in ((many, torch.zeros(3, 4)), (torch.zeros(3, 4), many)):
        with pytest.raises(ValueError, match=r"at most 2,147,418,112 rows and items, got .* use backend"):
            tiles.tile_pass("exp_sum", tiles.Axis(rows), tiles.Axis(cols), want_value=True)
    with pytest.raises(ValueError, match="at most 2,147,418,112 rows and items, got 3 and 2,147,483,648"):
        topk.score_topk(torch.zeros(3, 4), many, 1, None, None, None)


@pytest.mark.parametrize("sizes", [pytest.param("one", marks=pytest.mark.slow), "sixteen"])
@pytest.mark.parametrize("number", range(len(BF16)), ids=lambda n: f"{n}-{BF16[n].label}")
def test_every_kernel_on_sm_90(number, sizes):
    """Sizes of 1 are constants of the compiler, on which methods of tensors do not exist."""
    if sizes == "one" and aot.fingerprint(BF16[number], "sm_90", "sixteen") == aot.fingerprint(
        BF16[number], "sm_90", "one"
    ):
        pytest.skip("none of its integers is specialised")
    row, problems = compiled(BF16[number], "sm_90", sizes)
    assert not problems, row


@pytest.mark.parametrize("dtype", [pytest.param("float32", marks=pytest.mark.slow), "bfloat16"])
@pytest.mark.parametrize("arch", ["sm_80", "sm_100", "gfx942"])
def test_the_pass_over_tiles_on_every_architecture(arch, dtype):
    launch = next(x for x in aot.launches(arch, aot.DTYPES[dtype], 64) if x.label == "tile_pass[bce]")
    row, problems = compiled(launch, arch, "generic", dtype)
    assert not problems, row
    assert dtype == "float32" or row["matrix"] > 0


@pytest.mark.parametrize("dtype", ["bfloat16", pytest.param("float32", marks=pytest.mark.slow)])
@pytest.mark.parametrize("arch", ["sm_90", *(pytest.param(x, marks=pytest.mark.slow) for x in ("sm_80", "sm_100"))])
def test_few_queries_have_blocks_of_their_own(arch, dtype):
    """What a service asks: 16 rows a tile, and a program for every processor though there is one block of rows."""
    grids, run = [], triton.runtime.jit.JITFunction.run
    on, given = aot.ARCHS[arch].on, aot.DTYPES[dtype]
    with aot.recorder(on) as recorded:
        keep = triton.runtime.jit.JITFunction.run

        def watched(self, *args, grid, **options):
            grids.append(grid)
            keep(self, *args, grid=grid, **options)

        triton.runtime.jit.JITFunction.run = watched
        topk.score_topk(torch.zeros(8, 64, dtype=given), torch.zeros(500_000, 64, dtype=given), 10, None, None, None)
    assert triton.runtime.jit.JITFunction.run is run
    launch, grid = next(x for x in zip(recorded, grids, strict=True) if x[0].label == "tile_pass[group_max]")
    assert launch.values["BLOCK_R"] == 16 and grid[0] == 1 and grid[1] > 3 * on.processors
    row, problems = compiled(launch, arch, "generic", dtype)
    assert not problems, row


class Operations(TorchDispatchMode):
    """Operations of PyTorch that keep a device busy: not views, nor fresh memory."""

    NOTHING = {"detach", "view", "empty", "empty_like", "select", "expand", "slice", "unsqueeze", "alias", "unbind"}

    def __init__(self):
        super().__init__()
        self.found = []

    def __torch_dispatch__(self, function, types, args=(), kwargs=None):
        name = function.name().split("::")[1].split(".")[0]
        if name not in self.NOTHING:
            self.found.append(name)
        return function(*args, **kwargs or {})


def launches_of_a_step(loss, B, N, T, dtype, D=64):
    """Launches of the loss of B queries with T targets each and of all gradients: kernels, fills and casts."""
    query, item, bias = torch.zeros(B, D, dtype=dtype), torch.zeros(N, D, dtype=dtype), torch.zeros(N)
    lists = T * torch.arange(B + 1), torch.arange(T).repeat(B)
    extra = (1.0,) if loss == "catalog_bce" else ()
    options, every = (bias, None, *extra, "mean"), [True] * 3
    one = torch.ones(())
    with aot.recorder(aot.ARCHS["sm_90"].on) as recorded, Operations() as operations, torch.no_grad():
        _, *formed = getattr(aot.catalog, f"{loss}_fwd")(query, item, *lists, *options, every)
        kept, formed = formed[:-3], tuple(formed[-3:])
        getattr(aot.catalog, f"{loss}_bwd")(one, query, item, *lists, *options, *kept, formed, every)
    return [x.label for x in recorded] + operations.found


@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16], ids=str)
@pytest.mark.parametrize("shape", [(943, 1683, 3), (2048, 100_000, 1), (2048, 20_000, 5)], ids=str)
def test_a_step_over_the_catalogue_takes_twelve_launches(shape, dtype, monkeypatch):
    """catalog_bce, columns in several parts, few targets that are counted and many that are sorted."""
    monkeypatch.undo()  # fresh buffers stay as they are: no fills that the code has not asked for
    found = launches_of_a_step("catalog_bce", *shape, dtype)
    assert len(found) <= 12 and {"tile_pass[bce]", "mark"} <= set(found), found


WORST = {}  # by label, the launch with a loss, which holds the most in registers
for launch in WIDE:
    WORST.setdefault(launch.label, launch)


@pytest.mark.parametrize("arch", [pytest.param("sm_80", marks=pytest.mark.slow), "sm_90",
                                  pytest.param("sm_100", marks=pytest.mark.slow)])  # fmt: skip
@pytest.mark.parametrize("label", WORST)
def test_wide_vectors_leave_room_for_two_programs(arch, label):
    """D = 384: logits are formed once, nothing spills, and half of the registers are left for a second program."""
    assert WORST.keys() == {"tile_pass[bce], slopes", "tile_pass[softmax], slopes", "slope_product"}
    launches = WORST.values() if arch == "sm_90" else aot.launches(arch, torch.bfloat16, 384)
    launch = next(x for x in launches if x.label == label)
    row, problems = compiled(launch, arch, "generic")
    assert not problems, row
    assert 2 * 32 * launch.options["num_warps"] * row["registers"] <= 65_536
    assert 2 * row["shared"] <= aot.ARCHS[arch].shared_limit


def test_logits_of_wide_vectors_are_formed_once():
    """The pieces of the logit matrix do not overlap, and no program of a pass over tiles is for a piece of D."""
    grids, run = [], triton.runtime.jit.JITFunction.run
    B, N, D, bfloat16 = 300, 40_000, 384, torch.bfloat16
    query, item, targets = torch.zeros(B, D, dtype=bfloat16), torch.zeros(N, D, dtype=bfloat16), torch.arange(B + 1)
    with aot.recorder(aot.ARCHS["sm_90"].on) as recorded:
        keep = triton.runtime.jit.JITFunction.run

        def watched(self, *args, grid, **options):
            grids.append(grid)
            keep(self, *args, grid=grid, **options)

        triton.runtime.jit.JITFunction.run = watched
        aot.catalog.catalog_bce_fwd(query, item, targets, targets[:-1].clone(), None, None, 1.0, "mean", [True] * 3)
    assert triton.runtime.jit.JITFunction.run is run
    passes = [(x.values, grid) for x, grid in zip(recorded, grids, strict=True) if x.label.startswith("tile_pass")]
    assert len(passes) > 1 and all(len(grid) == 2 for _, grid in passes)
    logits = sum(grid[0] * x["BLOCK_R"] * grid[1] * 64 * x["split"] for x, grid in passes)
    assert B * N <= logits < (B + passes[0][0]["BLOCK_R"]) * (N + 64 * passes[0][0]["split"])
    assert all(4 * values["slope_ptr"].numel() <= 2**26 for values, _ in passes)


@pytest.mark.skipif(not aot.FETCHES_AHEAD, reason="this Triton fetches no tile ahead that two products read")
def test_a_pass_that_fetches_nothing_ahead_is_named():
    launch = next(x for x in BF16 if x.label == "tile_pass[bce]")
    row, problems = compiled(launch._replace(options=launch.options | {"num_stages": 1}), "sm_90", "sixteen")
    assert not row["pipelined"] and [p.startswith("fetches no tile ahead of its loop") for p in problems] == [True]


def test_few_instructions_are_issued_for_a_logit():
    """bfloat16, D = 64, neg_weight 1, on a tile without a target: 41.8 + 33.3 before marks stood behind a branch."""
    launches = [x for x in BF16 if x.label == "tile_pass[bce]"]
    rows = [compiled(x, "sm_90", "sixteen")[0] for x in launches]
    counts = [aot.per_logit(x, row) for x, row in zip(launches, rows, strict=True)]
    assert len(counts) == 2 and counts[0] <= 26 and counts[1] <= 21, counts
    seconds = [1e-6 * aot.floor("tile_pass[bce]", aot.ARCHS["sm_90"], 64, torch.bfloat16, x)[0] for x in counts]
    assert sum(seconds) <= 2.9e-3
    assert all(
        2 * 32 * row["registers"] * x.options["num_warps"] <= 65_536 for x, row in zip(launches, rows, strict=True)
    )


SASS = """
        /*0000*/                   MOV R1, c[0x0] ;
.L_x_1:
        /*0010*/                   LDS R2, [R3] ;
        /*0020*/              @!P1 BRA `(.L_x_2) ;
        /*0030*/                   FADD R4, R4, R5 ;
        /*0040*/                   FADD R4, R4, R6 ;
.L_x_2:
        /*0050*/                   HGMMA.64x64x16.F32.BF16 R8, gdesc[UR4], R8 ;
        /*0060*/               @P0 BRA `(.L_x_1) ;
        /*0070*/                   EXIT ;
"""


def test_what_a_branch_skips_is_not_counted():
    assert aot.sass.product_loop(SASS) == (6, 4, None)
    assert aot.sass.product_loop(SASS.replace("@!P1 BRA", "NOP")) == (6, 6, None)
    assert aot.sass.product_loop(SASS.replace("HGMMA", "FFMA")) is None


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
