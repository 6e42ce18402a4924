"""Mistakes in compiled kernels, each of which a GPU would punish: the emulator must see every one."""

import re
from collections.abc import Callable
from typing import Any

from ptx_emulator.launch import Fault

PASS = "tile_pass[bce]"


def _replaced(pattern: str, by: str | Callable[["re.Match[str]"], str], count: int = 0) -> Callable[[str], str]:
    def edit(ptx: str) -> str:
        changed, times = re.subn(pattern, by, ptx, count=count, flags=re.S)
        if not times:
            raise ValueError(f"the fault finds nothing to break: {pattern}")
        return changed

    return edit


def _with(name: str, change: Callable[[int], int]) -> Callable[[dict[str, Any]], dict[str, Any]]:
    return lambda values: values | {name: change(values[name])}


FAULTS: dict[str, Fault] = {
    # copies of 16 bytes, or of none where the row or column is not there
    "dropped mask": Fault(PASS, ptx=_replaced(r"selp\.b32(\s+%r\d+), 16, 0, %p\d+;", r"mov.b32\1, 16;")),
    # between the copies and the product that reads them
    "missing barrier": Fault(PASS, ptx=_replaced(r"(cp\.async\.wait_group\s+\d+;\s*)bar\.sync\s+0;", r"\1")),
    # the last group of copies may still be under way
    "wait moved": Fault(
        PASS, ptx=_replaced(r"cp\.async\.wait_group\s+(\d+);", lambda m: f"cp.async.wait_group {int(m[1]) + 1};")
    ),
    # the distance between groups of eight rows, in units of 16 bytes from bit 32 on
    "wrong descriptor": Fault(
        PASS, ptx=_replaced(r"(or\.b64\s+%rd\d+, %rd\d+, )(46116862\d+);", lambda m: f"{m[1]}{int(m[2]) + (1 << 32)};")
    ),
    # rows of the table half as far apart
    "wrong stride": Fault(
        PASS,
        ptx=_replaced(
            r"((?:mad|mul)\.wide\.s32\s+%rd\d+, %r\d+, )128\b|(shl\.b64\s+%rd\d+, %rd\d+, )7;",
            lambda m: f"{m[1]}64" if m[1] else f"{m[2]}6;",
        ),
    ),
    "lost column": Fault(PASS, values=_with("C", lambda C: C - 1)),
    "off-by-one split": Fault(PASS, values=_with("split", lambda tiles: tiles - 1)),
    "wrong dtype": Fault(PASS, ptx=_replaced(r"f32\.bf16\.bf16", "f32.f16.f16")),
}
