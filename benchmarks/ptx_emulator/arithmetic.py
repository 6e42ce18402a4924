"""Instructions between registers."""

import operator
from collections.abc import Callable
from typing import Any

import numpy as np

from ptx_emulator.machine import Machine, Mask, Step, decodes
from ptx_emulator.program import EmulationError, Instruction
from ptx_emulator.values import BITS, TYPES, Array, flushed, from_bfloat16, to_bfloat16, to_tf32


def computed(machine: Machine, destination: str, function: Callable[[], Any]) -> Step:
    """A step that writes what ``function`` gives for every thread."""
    write = machine.writer(destination)

    def step(mask: Mask) -> None:
        write(function(), mask)

    return step


def _quotient(x: Array, y: Array) -> Any:
    """Division towards zero; by zero it gives all ones, as a GPU does."""
    whole = np.where(y == 0, 1, y)
    quotient = x // whole
    if x.dtype.kind == "i":
        quotient = quotient + ((quotient < 0) & (quotient * whole != x))
    return np.where(y == 0, ~np.zeros_like(x), quotient).astype(x.dtype)


_BINARY: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "min": np.minimum, "max": np.maximum,
    "div": _quotient, "rem": lambda x, y: x - y * _quotient(x, y), "and": operator.and_, "or": operator.or_,
    "xor": operator.xor,
}  # fmt: skip
_FLOAT: dict[str, Callable[..., Any]] = {
    "add": operator.add, "sub": operator.sub, "mul": operator.mul, "min": np.fmin, "max": np.fmax,
    "div": operator.truediv, "neg": operator.neg, "abs": np.abs, "rcp": lambda x: np.float32(1) / x, "sqrt": np.sqrt,
    "ex2": lambda x: np.exp2(x.astype(np.float64)), "lg2": lambda x: np.log2(x.astype(np.float64)), "tanh": np.tanh,
    "fma": lambda x, y, z: x.astype(np.float64) * y + z,  # the product is exact there
}  # fmt: skip


@decodes("add", "sub", "mul", "min", "max", "div", "rem", "neg", "abs", "fma", "rcp", "sqrt", "ex2", "lg2", "tanh")
def _arithmetic(machine: Machine, instruction: Instruction) -> Step:
    name, kind = instruction.name, instruction.type
    if kind == "f32":
        return _floating(machine, instruction)
    if kind not in TYPES or kind[0] not in "sub":
        raise EmulationError(f"not emulated: {instruction.text}")
    operands = [machine.source(instruction.word(n), kind) for n in range(1, len(instruction.operands))]
    if name == "neg":
        return computed(machine, instruction.word(0), lambda: np.zeros_like(operands[0]) - operands[0])
    if name == "abs":
        return computed(machine, instruction.word(0), lambda: np.abs(operands[0]))
    if name == "mul" and "wide" in instruction.parts:
        wide = _wide(kind)
        return computed(machine, instruction.word(0), lambda: operands[0].astype(wide) * operands[1].astype(wide))
    if name == "mul" and "hi" in instruction.parts:
        bits = 8 * operands[0].dtype.itemsize
        return computed(
            machine,
            instruction.word(0),
            lambda: ((operands[0].astype(object) * operands[1].astype(object)) >> bits).astype(operands[0].dtype),
        )
    function = _BINARY.get(name)
    if function is None:
        raise EmulationError(f"not emulated: {instruction.text}")
    return computed(machine, instruction.word(0), lambda: function(*operands))


def _wide(kind: str) -> type[np.generic]:
    return TYPES[kind[0] + str(2 * int(kind[1:]))]


def _floating(machine: Machine, instruction: Instruction) -> Step:
    function = _FLOAT.get(instruction.name)
    if function is None:
        raise EmulationError(f"not emulated: {instruction.text}")
    operands = [machine.source(instruction.word(n), "f32") for n in range(1, len(instruction.operands))]
    if "ftz" in instruction.parts:
        return computed(
            machine,
            instruction.word(0),
            lambda: flushed(np.asarray(function(*(flushed(x) for x in operands)), np.float32)),
        )
    return computed(machine, instruction.word(0), lambda: np.asarray(function(*operands), np.float32))


@decodes("mad")
def _multiply_add(machine: Machine, instruction: Instruction) -> Step:
    kind = instruction.type
    x, y = (machine.source(instruction.word(n), kind) for n in (1, 2))
    if "wide" in instruction.parts:
        wide = _wide(kind)
        z = machine.source(instruction.word(3), kind[0] + str(8 * np.dtype(wide).itemsize))
        return computed(machine, instruction.word(0), lambda: x.astype(wide) * y.astype(wide) + z)
    if "lo" not in instruction.parts:
        raise EmulationError(f"not emulated: {instruction.text}")
    z = machine.source(instruction.word(3), kind)
    return computed(machine, instruction.word(0), lambda: x * y + z)


@decodes("and", "or", "xor", "not")
def _bitwise(machine: Machine, instruction: Instruction) -> Step:
    operands = [machine.source(instruction.word(n), instruction.type) for n in range(1, len(instruction.operands))]
    function = operator.invert if instruction.name == "not" else _BINARY[instruction.name]
    return computed(machine, instruction.word(0), lambda: function(*operands))


@decodes("lop3")
def _three_inputs(machine: Machine, instruction: Instruction) -> Step:
    x, y, z = (machine.source(instruction.word(n), "b32") for n in (1, 2, 3))
    table = int(instruction.word(4), 0)

    def value() -> Array:
        out = np.zeros_like(x)
        for row in range(8):
            if table >> row & 1:
                out |= (x if row & 4 else ~x) & (y if row & 2 else ~y) & (z if row & 1 else ~z)
        return out

    return computed(machine, instruction.word(0), value)


@decodes("shl", "shr")
def _shift(machine: Machine, instruction: Instruction) -> Step:
    x, by = machine.source(instruction.word(1), instruction.type), machine.source(instruction.word(2), "b32")
    bits, is_left = 8 * x.dtype.itemsize, instruction.name == "shl"

    def value() -> Any:
        count = np.minimum(by, bits - 1).astype(x.dtype)
        shifted = x << count if is_left else x >> count
        beyond = x >> x.dtype.type(bits - 1) if not is_left and x.dtype.kind == "i" else np.zeros_like(x)
        return np.where(by >= bits, beyond, shifted)

    return computed(machine, instruction.word(0), value)


@decodes("shf")
def _funnel(machine: Machine, instruction: Instruction) -> Step:
    low, high, by = (machine.source(instruction.word(n), "b32") for n in (1, 2, 3))
    is_left, wraps = "l" in instruction.parts, "wrap" in instruction.parts

    def value() -> Any:
        count = (by & np.uint32(31) if wraps else np.minimum(by, 32)).astype(np.uint64)
        both = (high.astype(np.uint64) << np.uint64(32)) | low
        shifted = (both << count) >> np.uint64(32) if is_left else both >> count
        return (shifted & np.uint64(0xFFFFFFFF)).astype(np.uint32)

    return computed(machine, instruction.word(0), value)


@decodes("bfe")
def _extract(machine: Machine, instruction: Instruction) -> Step:
    x = machine.source(instruction.word(1), instruction.type)
    start, length = (machine.source(instruction.word(n), "b32") for n in (2, 3))
    bits, unsigned = 8 * x.dtype.itemsize, BITS[x.dtype.itemsize]

    def value() -> Any:
        count = np.minimum(length & np.uint32(0xFF), bits).astype(np.uint64)
        place = np.minimum(start & np.uint32(0xFF), bits - 1).astype(np.uint64)
        mask = np.where(count >= 64, np.uint64(2**64 - 1), (np.uint64(1) << (count % np.uint64(64))) - np.uint64(1))
        found = (x.view(unsigned).astype(np.uint64) >> place) & mask
        if x.dtype.kind == "i":
            sign = (found >> (np.maximum(count, 1) - np.uint64(1)).astype(np.uint64)) & np.uint64(1)
            found = np.where((sign == 1) & (count > 0), found | ~mask, found)
        return found.astype(unsigned)

    return computed(machine, instruction.word(0), value)


@decodes("bfi")
def _insert(machine: Machine, instruction: Instruction) -> Step:
    x, y = (machine.source(instruction.word(n), instruction.type) for n in (1, 2))
    start, length = (machine.source(instruction.word(n), "b32") for n in (3, 4))

    def value() -> Any:
        place, count = start.astype(x.dtype), length.astype(x.dtype)
        mask = ((x.dtype.type(1) << count) - x.dtype.type(1)) << place
        return (y & ~mask) | ((x << place) & mask)

    return computed(machine, instruction.word(0), value)


@decodes("prmt")
def _permute(machine: Machine, instruction: Instruction) -> Step:
    if instruction.type != "b32":
        raise EmulationError(f"not emulated: {instruction.text}")
    x, y, selector = (machine.source(instruction.word(n), "b32") for n in (1, 2, 3))

    def value() -> Any:
        both = (y.astype(np.uint64) << np.uint64(32)) | x
        out = np.zeros(machine.threads, np.uint32)
        for place in range(4):
            choice = (selector >> np.uint32(4 * place)) & np.uint32(0xF)
            byte = (both >> (np.uint64(8) * (choice & np.uint32(7)).astype(np.uint64))) & np.uint64(0xFF)
            sign = np.where(byte >> np.uint64(7) == 1, np.uint64(0xFF), np.uint64(0))
            out |= np.where(choice & np.uint32(8), sign, byte).astype(np.uint32) << np.uint32(8 * place)
        return out

    return computed(machine, instruction.word(0), value)


_COMPARISONS: dict[str, Callable[..., Any]] = {
    "eq": operator.eq, "ne": operator.ne, "lt": operator.lt, "le": operator.le, "gt": operator.gt, "ge": operator.ge,
    "lo": operator.lt, "ls": operator.le, "hi": operator.gt, "hs": operator.ge,
}  # fmt: skip


@decodes("setp")
def _compare(machine: Machine, instruction: Instruction) -> Step:
    kind, name = instruction.type, instruction.parts[1]
    x, y = (machine.source(instruction.word(n), kind) for n in (1, 2))
    if len(instruction.operands) > 3 or "|" in instruction.word(0):
        raise EmulationError(f"not emulated: {instruction.text}")
    if kind != "f32":
        function = _COMPARISONS[name]
        return computed(machine, instruction.word(0), lambda: function(x, y))

    def value() -> Any:
        unordered = np.isnan(x) | np.isnan(y)
        if name in ("nan", "num"):
            return unordered if name == "nan" else ~unordered
        if name in _COMPARISONS:
            return _COMPARISONS[name](x, y) & ~unordered
        return _COMPARISONS[name[:2]](x, y) | unordered

    return computed(machine, instruction.word(0), value)


@decodes("selp")
def _select(machine: Machine, instruction: Instruction) -> Step:
    x, y = (machine.source(instruction.word(n), instruction.type) for n in (1, 2))
    chosen = machine.source(instruction.word(3), "pred")
    return computed(machine, instruction.word(0), lambda: np.where(chosen, x, y))


@decodes("mov")
def _move(machine: Machine, instruction: Instruction) -> Step:
    kind = instruction.type
    to, of = instruction.operands
    if isinstance(to, tuple):
        return _unpack(machine, instruction)
    if isinstance(of, tuple):
        size = np.dtype(TYPES[kind]).itemsize
        width = size // len(of)
        parts = [machine.source(word, f"b{8 * width}") for word in of]
        return computed(machine, to, lambda: np.stack(parts, 1).view(BITS[size])[:, 0])
    x = machine.source(of, kind)
    return computed(machine, to, lambda: x)


def _unpack(machine: Machine, instruction: Instruction) -> Step:
    words, x = instruction.words(0), machine.source(instruction.word(1), instruction.type)
    width = x.dtype.itemsize // len(words)
    writers = [machine.writer(word) for word in words]

    def step(mask: Mask) -> None:
        parts = np.ascontiguousarray(x).view(BITS[width]).reshape(machine.threads, -1).copy()
        for place, write in enumerate(writers):
            write(parts[:, place], mask)

    return step


@decodes("cvt")
def _convert(machine: Machine, instruction: Instruction) -> Step:
    kinds = [part for part in instruction.parts[1:] if part in TYPES]
    to, of = kinds[0], kinds[1] if len(kinds) > 1 else kinds[0]
    destination = instruction.word(0)
    if to in ("bf16x2", "f16x2"):
        high, low = (machine.source(instruction.word(n), "f32") for n in (1, 2))
        round_ = to_bfloat16 if to == "bf16x2" else _to_half
        return computed(machine, destination, lambda: (round_(high).astype(np.uint32) << np.uint32(16)) | round_(low))
    if to == "tf32":
        x = machine.source(instruction.word(1), "b32")
        return computed(machine, destination, lambda: to_tf32(x))
    x = machine.source(instruction.word(1), of)
    if to == "bf16":
        return computed(machine, destination, lambda: to_bfloat16(x.astype(np.float32)))
    if of == "bf16":
        return computed(machine, destination, lambda: from_bfloat16(x).astype(TYPES[to]))
    if x.dtype.kind == "f" and TYPES[to] not in (np.float16, np.float32, np.float64):
        rounding = {"rzi": np.trunc, "rni": np.rint, "rmi": np.floor, "rpi": np.ceil}
        function = next(rounding[part] for part in instruction.parts if part in rounding)
        limits = np.iinfo(TYPES[to])  # type: ignore[arg-type]
        return computed(
            machine,
            destination,
            lambda: np.clip(function(np.nan_to_num(x.astype(np.float64))), limits.min, limits.max).astype(TYPES[to]),
        )
    return computed(machine, destination, lambda: x.astype(TYPES[to]))


def _to_half(x: Array) -> Any:
    return x.astype(np.float16).view(np.uint16)
