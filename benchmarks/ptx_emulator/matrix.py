"""Products of tensor cores: a warp group's, asynchronous, from shared memory and registers; a warp's, from registers."""

import re
from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ptx_emulator.machine import Machine, Mask, Product, Step, decodes
from ptx_emulator.program import EmulationError, Instruction
from ptx_emulator.values import Array, of_matrix

WIDTHS = {1: 128, 2: 64, 3: 32}  # bytes of a row by the descriptor's swizzle
_LANE = np.arange(128)
_ROW = 16 * (_LANE // 32) + _LANE % 32 // 4  # a thread's first row of 64
_SIZES = {"bf16": 2, "f16": 2, "tf32": 4}  # bytes of an operand's element
Floats = NDArray[np.float64]


class Tile(NamedTuple):
    """What a descriptor names."""

    start: int
    leading: int  # bytes between groups of columns of a transposed matrix
    stride: int  # bytes between groups of eight rows
    width: int  # bytes of a swizzled row

    @classmethod
    def of(cls, descriptor: int) -> "Tile":
        """Read a descriptor."""
        swizzle = descriptor >> 62 & 3
        if swizzle not in WIDTHS:
            raise EmulationError("a matrix without swizzle is not emulated")
        start, leading, stride = ((descriptor >> shift & 0x3FFF) << 4 for shift in (0, 16, 32))
        return cls(start, leading, stride, WIDTHS[swizzle])

    def places(self, rows: int, columns: int, size: int, transposed: bool) -> NDArray[np.int64]:
        """The places of the elements' bytes, ``[rows, columns, size]``."""
        r, c = np.arange(rows)[:, None], np.arange(columns)[None, :]
        if transposed:
            across = self.width // size
            place = c // 8 * self.stride + c % 8 * self.width + r % across * size + r // across * self.leading
        else:
            place = r // 8 * self.stride + r % 8 * self.width + c * size
        place = self.start + place
        place ^= (place >> 7 & {128: 7, 64: 3, 32: 1}[self.width]) << 4
        return place[:, :, None] + np.arange(size)


@decodes("wgmma")
def _warp_group(machine: Machine, instruction: Instruction) -> Step:
    if machine.threads % 128:
        raise EmulationError("a warp group has 128 threads")
    if "fence" in instruction.parts:  # the compiler moves registers behind it: ptxas decides, which is not emulated
        return lambda mask: None
    if "commit_group" in instruction.parts:
        return lambda mask: _commit(machine)
    if "wait_group" in instruction.parts:
        pending = int(instruction.word(0))
        return lambda mask: _wait(machine, pending)
    return _product(machine, instruction)


def _commit(machine: Machine) -> None:
    machine.groups.append(machine.products)
    machine.products = []


def _wait(machine: Machine, pending: int) -> None:
    """The products of all groups but the ``pending`` last are in their registers."""
    while len(machine.groups) > pending:
        finished = machine.groups.pop(0)
        later = {
            name for group in [*machine.groups, machine.products] for product in group for name in product.registers
        }
        for name in {name for product in finished for name in product.registers} - later:
            machine.register(name)[:] = machine.accumulators.pop(name).view(np.uint32)
    machine.shared.read_by_matrix = [
        reads for group in [*machine.groups, machine.products] for product in group for reads in product.reads
    ]


class _Operands(NamedTuple):
    """A product D (+)= A B, A 64 x K in registers or shared memory, B K x N in shared memory."""

    kind: str  # bf16, f16 or tf32
    N: int
    K: int
    a: tuple[str, ...]  # registers, or one descriptor
    b: str  # descriptor
    keeps: str  # a predicate: whether D is added to
    transposed: tuple[bool, bool]  # A and B


def _read(instruction: Instruction) -> _Operands:
    shape = next((m for part in instruction.parts if (m := re.fullmatch(r"m64n(\d+)k(\d+)", part))), None)
    kind = instruction.type
    if shape is None or kind not in _SIZES or instruction.parts[-3] != "f32":
        raise EmulationError(f"not emulated: {instruction.text}")
    signs = [instruction.word(n) for n in (4, 5)]
    if signs != ["1", "1"]:
        raise EmulationError(f"negated operands are not emulated: {instruction.text}")
    flags = [instruction.word(n) == "1" for n in range(6, len(instruction.operands))]
    in_registers = isinstance(instruction.operands[1], tuple)
    flags = [False] * (2 - len(flags)) + flags if in_registers else flags + [False] * (2 - len(flags))
    keeps = instruction.word(3)
    return _Operands(
        kind, int(shape[1]), int(shape[2]), instruction.words(1), instruction.word(2), keeps, (flags[0], flags[1])
    )


def _product(machine: Machine, instruction: Instruction) -> Step:
    operands, registers = _read(instruction), instruction.words(0)
    keeps = machine.source(operands.keeps, "pred")
    of_a = _from_registers(machine, operands) if len(operands.a) > 1 else _from_memory(machine, operands, 0)
    of_b = _from_memory(machine, operands, 1)
    for name in registers:
        machine.register(name)

    def step(mask: Mask) -> None:
        if mask is not None or keeps.any() != keeps.all():
            raise EmulationError(f"not emulated with some threads alone: {instruction.text}")
        reads: list[NDArray[np.int64]] = []
        values = np.zeros((len(registers), machine.threads))
        for group in range(machine.threads // 128):
            result = of_a(group, reads) @ of_b(group, reads).T
            for n in range(len(registers)):
                column = 8 * (n // 4) + 2 * (_LANE % 4) + n % 2
                values[n, 128 * group : 128 * group + 128] = result[_ROW + 8 * (n // 2 % 2), column]
        for name, value in zip(registers, values, strict=True):
            lanes = machine.register(name)
            if keeps[0]:
                value = value + machine.accumulators.get(name, lanes.view(np.float32)).astype(np.float64)
            machine.accumulators[name] = value.astype(np.float32)
            lanes[:] = 0xFFFFFFFF  # NaN, until the product is waited for
        machine.products.append(Product(registers, reads))
        machine.shared.read_by_matrix += reads

    return step


_Read = Callable[[int, list[NDArray[np.int64]]], Floats]


def _from_registers(machine: Machine, operands: _Operands) -> _Read:
    lanes = [machine.source(name, "b32") for name in operands.a]

    def read(group: int, reads: list[NDArray[np.int64]]) -> Floats:
        threads = slice(128 * group, 128 * group + 128)
        return _fragment([x[threads] for x in lanes], operands.kind, 2).reshape(64, operands.K)

    return read


def _fragment(lanes: Sequence[Array], kind: str, halves: int) -> Floats:
    """What the warps hold of a matrix in registers, ``[warps, 8 * halves, K]``.

    Args:
        lanes: the registers, each with a value of 32 bits for every thread.
        kind: of the elements; two of 16 bits share a register.
        halves: eighths of rows that a thread has elements of, which follow each other in its registers.
    """
    each = 4 // _SIZES[kind]  # elements of a register
    warps = len(lanes[0]) // 32
    out = np.zeros((warps, 8 * halves, 4 * each * len(lanes) // halves))
    row, first = np.arange(32) // 4, np.arange(32) % 4 * each
    for n, x in enumerate(lanes):
        elements = of_matrix(np.ascontiguousarray(x).view(f"u{_SIZES[kind]}"), kind).reshape(warps, 32, each)
        for m in range(each):
            out[:, row + 8 * (n % halves), first + 4 * each * (n // halves) + m] = elements[:, :, m]
    return out


@decodes("mma")
def _warp_product(machine: Machine, instruction: Instruction) -> Step:
    """D = A B + C of a warp, at once: A 16 x K, B K x 8, all of it in registers."""
    shape = re.fullmatch(r"m16n8k(\d+)", instruction.parts[3])
    kind = instruction.parts[7] if len(instruction.parts) == 10 else ""
    ways = "sync", "aligned", "row", "col", "f32", kind, "f32"
    if shape is None or kind not in _SIZES or [instruction.parts[n] for n in (1, 2, 4, 5, 6, 8, 9)] != list(ways):
        raise EmulationError(f"not emulated: {instruction.text}")
    a, b = ([machine.source(word, "b32") for word in instruction.words(n)] for n in (1, 2))
    c = [machine.source(word, "f32") for word in instruction.words(3)]
    writers = [machine.writer(word) for word in instruction.words(0)]
    registers = int(shape[1]) * _SIZES[kind] // 16  # of a column of B
    if (len(a), len(b), len(c)) != (2 * registers, registers, 4):
        raise EmulationError(f"registers that do not fit the shape: {instruction.text}")
    warp, row, column = np.arange(machine.threads) // 32, machine.lane // 4, 2 * (machine.lane % 4)

    def step(mask: Mask) -> None:
        whole = machine.every(mask).reshape(-1, 32)
        if (whole.any(1) != whole.all(1)).any():
            machine.report("a lane takes part in a product that it does not execute")
        result = _fragment(a, kind, 2) @ _fragment(b, kind, 1).transpose(0, 2, 1)
        added = [result[warp, row + 8 * (n // 2), column + n % 2] + x for n, x in enumerate(c)]
        for write, value in zip(writers, added, strict=True):
            write(value.astype(np.float32), mask)

    return step


def _from_memory(machine: Machine, operands: _Operands, side: int) -> _Read:
    descriptor = machine.source(operands.b if side else operands.a[0], "b64")
    rows, size = operands.N if side else 64, _SIZES[operands.kind]
    transposed = operands.transposed[side]

    def read(group: int, reads: list[NDArray[np.int64]]) -> Floats:
        own = descriptor[128 * group : 128 * group + 128]
        if (own != own[0]).any():
            machine.report("the threads of a warp group give different descriptors")
        place = Tile.of(int(own[0])).places(rows, operands.K, size, transposed)
        data = machine.shared.read_matrix(place, range(4 * group, 4 * group + 4))
        reads.append(np.unique(place))
        bits = np.ascontiguousarray(data).view(np.uint32 if size == 4 else np.uint16)[:, :, 0]
        return of_matrix(bits, operands.kind)

    return read
