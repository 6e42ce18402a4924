"""Block sizes, chosen for (kernel, D, dtype, target) from ahead-of-time reports.

No size here was timed: none has run on a GPU yet. Those of the tile passes are the largest of the few tried that
compile without spills and within shared memory (``benchmarks/aot_report.py``); the others follow from their widths.
``benchmarks/gpu_acceptance.py`` measures the alternatives on a card. Sizes that one operator alone has stand in its own file.
"""

from functools import cache
from typing import Literal, NamedTuple

import torch
import triton


class Target(NamedTuple):
    """What kernels are launched on."""

    kind: Literal["cuda", "hip", "interpreter"]
    arch: int  # compute capability times ten; 942 for gfx942; 0 in the interpreter
    processors: int  # streaming multiprocessors or compute units


INTERPRETER = Target("interpreter", 0, 2)


@cache
def _device_target(index: int) -> Target:
    properties = torch.cuda.get_device_properties(index)
    if torch.version.hip is not None:
        name = properties.gcnArchName.split(":")[0].removeprefix("gfx")
        return Target("hip", int(name, 16) if not name.isdigit() else int(name), properties.multi_processor_count)
    return Target("cuda", 10 * properties.major + properties.minor, properties.multi_processor_count)


def target(device: torch.device) -> Target:
    """The target that kernels on tensors of ``device`` run on."""
    if device.type != "cuda":
        return INTERPRETER
    return _device_target(torch.cuda.current_device() if device.index is None else device.index)


COUNTED_PAIRS = 4096  # pairs up to which their places are counted, 33 million comparisons for both sides in one launch


class PairBlocks(NamedTuple):
    """Blocks of the pair kernels."""

    BLOCK_P: int
    BLOCK_D: int
    num_warps: int


class SegmentBlocks(NamedTuple):
    """Blocks of the segment sum."""

    CHUNK: int
    BLOCK_C: int
    BLOCK_D: int
    num_warps: int


def padded(D: int, smallest: int = 16) -> int:
    """The power of two that covers ``D``."""
    return max(smallest, triton.next_power_of_2(D))


def pairs(D: int, dtype: torch.dtype, on: Target) -> PairBlocks:
    """Pairs per program and columns per step."""
    # 34 registers on sm_90 for float32 and D = 64: many programs at once hide the latency of the gathers
    return PairBlocks(BLOCK_P=32, BLOCK_D=min(padded(D), 64), num_warps=4)


def segment_sum(D: int, dtype: torch.dtype, on: Target) -> SegmentBlocks:
    """Terms per chunk, chunks per program and columns per program."""
    BLOCK_D = min(padded(D), 128)
    # sm_80, D = 64: 8 bytes spilled with 512 elements, none with 256
    elements = 256 if on.kind == "cuda" and on.arch < 90 else 512
    return SegmentBlocks(CHUNK=32, BLOCK_C=max(4, elements // BLOCK_D), BLOCK_D=BLOCK_D, num_warps=4)


class Precision(NamedTuple):
    """``input_precision`` of the products."""

    logits: str
    gradients: str


def dot_precision(dtype: torch.dtype, on: Target, exact: bool = False) -> Precision:
    """How products of float32 follow ``torch.get_float32_matmul_precision()``.

    "highest" and "high" are three products in TF32 on cards that have it: the losses stay within the bounds of float32
    sums (``tests/ops/test_catalog.py``, in the emulator), on tensor cores. ``exact`` scores at "highest" are float32
    products, since the groups of score_topk are chosen by them.

    Logits of bfloat16 and float16 are exact products summed in float32 whatever is said here. A gradient is a product
    with float32 slopes: beside float16 rows these take part as TF32 in three products, beside bfloat16 rows as two
    bfloat16 numbers; "medium" rounds them once. The matrix cores of AMD multiply float32 as it is. ``exact``: never a single TF32.
    """
    if on.kind == "hip":
        return Precision("ieee", "ieee")
    chosen = {"highest": "ieee", "high": "tf32x3", "medium": "tf32"}[torch.get_float32_matmul_precision()]
    if exact and chosen == "tf32":
        chosen = "tf32x3"
    if not exact and chosen == "ieee" and dtype == torch.float32 and on.arch >= 80:
        chosen = "tf32x3"
    if dtype == torch.float32:
        return Precision(chosen, chosen)
    return Precision("ieee", "tf32" if chosen == "tf32" else "tf32x3")


class TileBlocks(NamedTuple):
    """Blocks of the passes over a logit matrix."""

    BLOCK_R: int
    BLOCK_C: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


FEW_ROWS = 16  # queries up to which score_topk waits for the items' bytes alone: the least rows of a product


def tiles(D: int, dtype: torch.dtype, precision: str, on: Target, rows: int | None = None) -> TileBlocks:
    """Rows, columns and dimensions of a tile; BLOCK_C divides 64. Spills below: Triton 3.9, catalog_bce, both passes.

    ``rows``: how many there are, where their number may choose the block; it never chooses BLOCK_C.
    """
    blocks = _tiles(D, dtype, precision, on)
    if rows is not None and rows <= FEW_ROWS and on.kind != "hip":
        return blocks._replace(BLOCK_R=FEW_ROWS, num_warps=4, num_stages=4)
    return blocks


def _tiles(D: int, dtype: torch.dtype, precision: str, on: Target) -> TileBlocks:
    # AMD, float32, D = 128: 66 registers spilled at a width of 128, none at 64
    BLOCK_D = min(padded(D), 128 if dtype == torch.bfloat16 else 64)
    if D > BLOCK_D and on.kind != "hip" and dtype.itemsize == 2:
        # logits and slopes alone. 128 rows with 8 warps: 186 registers, and one program a multiprocessor
        # sm_80: 8 bytes spilled with 4 warps
        return TileBlocks(64, 64, 64, 8 if on.arch < 90 else 4, 3)
    if on.kind == "hip":
        return TileBlocks(64, 64, BLOCK_D, 4, 2)
    if dtype == torch.bfloat16:
        # none on sm_80 and sm_90; sm_100: 8 bytes with 4 warps, none with 8
        return TileBlocks(64, 64, BLOCK_D, 8 if on.arch >= 100 else 4, 2)
    if dtype == torch.float32 and precision == "ieee":
        # goes without tensor cores. D = 128: 32 bytes on sm_80 at a width of 64, none at 32; 8 on sm_100 with 4 warps
        if on.arch < 90 and D > 64:
            return TileBlocks(32, 32, 32, 8, 2)
        return TileBlocks(32, 32, BLOCK_D, 8 if on.arch >= 100 and D > 64 else 4, 2)
    if on.arch < 90:
        # "tf32x3" on sm_80: 16 bytes at 64 x 32, D = 64; where D goes in pieces, 56 bytes with pieces of 64, none of 32
        return TileBlocks(32, 32, BLOCK_D if D <= BLOCK_D else 32, 4, 2)
    # "tf32x3": sm_90, 120 bytes at 64 x 64; sm_100, float16, D = 128: 16 bytes at 64 x 64, none at 64 x 32, with 8 warps each
    return TileBlocks(64, 32, BLOCK_D, 8 if on.arch >= 100 else 4, 2)


class ProductBlocks(NamedTuple):
    """Blocks of the product of slopes and columns."""

    BLOCK_R: int
    BLOCK_C: int
    BLOCK_D: int
    num_warps: int
    num_stages: int


def slope_product(D: int, dtype: torch.dtype, precision: str, on: Target, summed: bool) -> ProductBlocks:
    """Rows, dimensions, and columns at a time, as many as a tile of slopes has or fewer; ``summed``: over several pieces."""
    if on.kind == "hip":
        return ProductBlocks(64, 32, 64, 4, 2)
    if dtype == torch.bfloat16:
        # two programs a multiprocessor: with 8 warps 116 registers on sm_90, 106 on sm_100, but 165 beside sums of pieces,
        # where 4 warps take 140, and 255 on sm_80
        return ProductBlocks(64, 64, 128, 4, 3) if on.arch < 90 or summed else ProductBlocks(128, 64, 128, 8, 2)
    if precision == "ieee":
        return ProductBlocks(32, 32, 64, 4, 2)
    return ProductBlocks(64, 32, 64, 4, 2)


def column_splits(R: int, C: int, blocks: TileBlocks, on: Target, least: int = 8, most: int = 64) -> tuple[int, int]:
    """In how many parts the columns are cut so that every processor has work, and the columns of one part, a multiple of 64.

    ``least``: the fewest times 64 columns that a part is worth; ``most``: parts.
    """
    tiles_of_64 = max(1, triton.cdiv(C, 64))
    row_blocks = max(1, triton.cdiv(R, blocks.BLOCK_R))
    wanted = max(1, 4 * on.processors // row_blocks)
    parts = min(wanted, triton.cdiv(tiles_of_64, least), most)
    split = triton.cdiv(tiles_of_64, parts) * 64
    return max(1, triton.cdiv(C, split)), split


class SampledBlocks(NamedTuple):
    """Blocks of the kernel for negatives of a row's own."""

    BLOCK_B: int
    BLOCK_K: int
    BLOCK_D: int
    num_warps: int


def sampled(D: int, K: int, on: Target) -> SampledBlocks:
    """Rows, negatives and dimensions at once: about 4,096 elements, a row of any width whole."""
    # sm_80, float32, D = 64: 8 bytes spilled with 4,096 elements, none with 2,048
    elements = 2048 if on.kind == "cuda" and on.arch < 90 else 4096
    BLOCK_D = padded(D)
    BLOCK_K = min(padded(K, 1), 16, max(1, elements // BLOCK_D))
    return SampledBlocks(max(1, elements // (BLOCK_D * BLOCK_K)), BLOCK_K, BLOCK_D, 4)
