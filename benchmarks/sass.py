"""What a pass over tiles issues for every tile: instructions of its loop, read from the disassembly."""

import re
from typing import NamedTuple

_LABEL = re.compile(r"(\.L_x_\d+):")
_INSTRUCTION = re.compile(r"/\*[0-9a-f]{4,}\*/\s+(.*?);")
_BRANCH = re.compile(r"BRA\b.*?(\.L_x_\d+)")
_PRODUCT = re.compile(r"\b(?:HMMA|HGMMA|UTC\w*MMA)\b")
# operations that show an asynchronous copy and a product of tensor cores in Triton's GPU dialect
_COPY, _DOT = "async_copy_global_to_local", re.compile(r"\.warp_group_dot |tt\.dot |\.tc_gen5_mma")


class Loop(NamedTuple):
    """One iteration of the loop that holds the products."""

    instructions: int  # all of them
    common: int  # without those that a branch within the iteration skips: marks, where a tile has none
    around: int | None = (
        None  # common ones of an iteration of the loop around it, without this loop's; None: there is none
    )


def product_loop(text: str) -> Loop | None:
    """The loop with the most products, the shortest of equals; of nested ones the inner one. None: there is none.

    Args:
        text: what nvdisasm prints.
    """
    code, labels = _read(text)
    targets = {n: labels.get(m[1], -1) for n, line in enumerate(code) if (m := _BRANCH.search(line))}
    products = [n for n, line in enumerate(code) if _PRODUCT.search(line)]
    every = [(first, last) for last, first in targets.items() if 0 <= first <= last]
    loops = [x for x in every if any(x[0] <= n <= x[1] for n in products)]
    inner = [x for x in loops if not any(x[0] < y[0] and y[1] < x[1] for y in loops)]
    if not inner:
        return None
    first, last = max(inner, key=lambda x: (sum(x[0] <= n <= x[1] for n in products), x[0] - x[1]))
    common = _common(first, last, code, targets, products)
    outer = min((x for x in loops if x[0] < first and last < x[1]), key=lambda x: x[1] - x[0], default=None)
    around = None if outer is None else _common(*outer, code, targets, products) - (last - first + 1)
    return Loop(last - first + 1, common, around)


def _common(first: int, last: int, code: list[str], targets: dict[int, int], products: list[int]) -> int:
    """Instructions from ``first`` to ``last`` that no branch forward skips; what holds a product is no rare case."""
    skipped: set[int] = set()
    for n in range(first, last + 1):
        if n < targets.get(n, -1) <= last + 1 and code[n].startswith("@"):
            jumped = set(range(n + 1, targets[n]))
            skipped |= set() if jumped & set(products) else jumped
    return last - first + 1 - len(skipped)


def _read(text: str) -> tuple[list[str], dict[str, int]]:
    code: list[str] = []
    labels: dict[str, int] = {}
    for line in text.splitlines():
        line = line.strip()
        if label := _LABEL.match(line):
            labels[label[1]] = len(code)
        elif instruction := _INSTRUCTION.match(line):
            code.append(instruction[1])
    return code, labels


def is_pipelined(ttgir: str) -> bool:
    """Whether the copies of a tile begin before the loop over tiles: the next tile is fetched while one is worked on."""
    pieces = ttgir.split("scf.for ")
    loops = [n for n, piece in enumerate(pieces) if n and _DOT.search(piece)]
    return bool(loops) and any(_COPY in piece for piece in pieces[: loops[-1]])
