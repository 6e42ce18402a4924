"""Block sizes, chosen for (kernel, D, dtype, target) from ahead-of-time reports.

No size here was timed: none has run on a GPU yet. Each is the largest of the sizes tried that
``benchmarks/aot_report.py`` shows without spills and within shared memory. ``benchmarks/gpu_acceptance.py`` measures
the alternatives on a card.
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
    # 64 pairs of float32 at BLOCK_D = 64 spill on sm_90 with 4 warps
    return PairBlocks(BLOCK_P=32, BLOCK_D=min(padded(D), 64), num_warps=4)


def segment_sum(D: int, dtype: torch.dtype, on: Target) -> SegmentBlocks:
    """Terms per chunk, chunks per program and columns per program."""
    BLOCK_D = min(padded(D), 128)
    return SegmentBlocks(CHUNK=32, BLOCK_C=max(4, 512 // BLOCK_D), BLOCK_D=BLOCK_D, num_warps=4)
