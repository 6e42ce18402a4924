"""Instructions that move data: to and from memory, and between the lanes of a warp."""

import re
from collections.abc import Callable
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ptx_emulator.machine import Machine, Mask, Step, decodes
from ptx_emulator.program import EmulationError, Instruction
from ptx_emulator.values import BITS, TYPES, Array

_ADDRESS = re.compile(r"\[\s*([%\w$.]+)\s*(?:\+\s*(-?\w+))?\s*\]")


def address_of(machine: Machine, word: str) -> Callable[[], NDArray[np.uint64]]:
    """The lanes of an address operand."""
    match = _ADDRESS.fullmatch(word)
    if match is None:
        raise EmulationError(f"no address: {word}")
    offset = np.uint64(int(match[2] or "0", 0) & (2**64 - 1))
    if match[1] == "global_smem":
        fixed = np.full(machine.threads, offset)
        return lambda: fixed
    lanes = machine.register(match[1])
    return lambda: lanes.astype(np.uint64) + offset


@decodes("ld")
def _load(machine: Machine, instruction: Instruction) -> Step:
    space, kind = instruction.parts[1], instruction.type
    if space == "param":
        return _load_parameter(machine, instruction)
    words, dtype = instruction.words(0), TYPES[kind]
    width = np.dtype(dtype).itemsize
    size, address = width * len(words), address_of(machine, instruction.word(1))
    is_shared = space.startswith("shared")
    if not is_shared and space != "global":
        raise EmulationError(f"not emulated: {instruction.text}")
    # a byte is loaded into a register of 16 bits or more
    into = [dtype if word == "_" else machine.register(word).dtype for word in words]
    writers = [machine.writer(word) for word in words]
    buffers = [np.zeros(machine.threads, x) for x in into]

    def step(mask: Mask) -> None:
        every = machine.every(mask)
        at = address()[every]
        _aligned(at, size)
        data = machine.shared.load(at, size, machine.warp[every]) if is_shared else machine.memory.load(at, size)
        for place, (write, buffer) in enumerate(zip(writers, buffers, strict=True)):
            part = np.ascontiguousarray(data[:, place * width : (place + 1) * width]).view(dtype)[:, 0]
            buffer[every] = part.astype(buffer.dtype) if part.itemsize != buffer.itemsize else part.view(buffer.dtype)
            write(buffer, mask)

    return step


def _aligned(address: NDArray[np.uint64], size: int) -> None:
    if (address % np.uint64(size)).any():
        raise EmulationError(f"an access of {size} bytes is not aligned")


def _load_parameter(machine: Machine, instruction: Instruction) -> Step:
    name = instruction.word(1)[1:-1].strip()
    value, kind = machine.values[name], machine.kinds[name]
    to = machine.register(instruction.word(0)).dtype
    if kind == "f32":
        lanes = np.full(machine.threads, value, np.float32).view(np.uint32)
    else:
        size = np.dtype(TYPES[kind]).itemsize
        lanes = np.full(machine.threads, int(value) & ((1 << 8 * size) - 1), BITS[size])
        if instruction.type.startswith("s"):
            lanes = lanes.view(TYPES[f"s{8 * size}"])
    write = machine.writer(instruction.word(0))
    wide = lanes if lanes.dtype.itemsize == to.itemsize else lanes.astype(TYPES[f"s{8 * to.itemsize}"])
    return lambda mask: write(wide, mask)


@decodes("st")
def _store(machine: Machine, instruction: Instruction) -> Step:
    space, width = instruction.parts[1], np.dtype(TYPES[instruction.type]).itemsize
    words, address = instruction.words(1), address_of(machine, instruction.word(0))
    lanes = []
    for word in words:
        own = machine.register(word).dtype.itemsize if word in machine.registers or word[0] == "%" else width
        lanes.append(machine.source(word, f"b{8 * own}"))
    is_shared = space.startswith("shared")
    if not is_shared and space != "global":
        raise EmulationError(f"not emulated: {instruction.text}")

    def step(mask: Mask) -> None:
        every = machine.every(mask)
        at = address()[every]
        _aligned(at, width * len(words))
        parts = [np.ascontiguousarray(x[every]).view(np.uint8).reshape(-1, x.dtype.itemsize)[:, :width] for x in lanes]
        data = np.concatenate(parts, 1)
        if is_shared:
            machine.shared.store(at, data, machine.warp[every])
        else:
            machine.memory.store(at, data)

    return step


@decodes("cp")
def _copy(machine: Machine, instruction: Instruction) -> Step:
    if "commit_group" in instruction.parts:
        return _together(machine, instruction, lambda: machine.shared.commit())
    if "wait_group" in instruction.parts:
        pending = int(instruction.word(0))
        return _together(machine, instruction, lambda: machine.shared.wait(pending))
    if instruction.parts[1] != "async" or "bulk" in instruction.parts:
        raise EmulationError(f"not emulated: {instruction.text}")
    to, of = (address_of(machine, instruction.word(n)) for n in (0, 1))
    size = int(instruction.word(2), 0)
    given = machine.source(instruction.word(3), "b32") if len(instruction.operands) > 3 else None

    def step(mask: Mask) -> None:
        every = machine.every(mask)
        data = np.zeros((int(every.sum()), size), np.uint8)  # what is not copied is filled with zeros
        source, target = of()[every], to()[every]
        _aligned(target, size)
        count = np.full(len(data), size) if given is None else given[every].astype(np.int64)
        for n in np.unique(count):
            if n:
                lanes = count == n
                _aligned(source[lanes], size)
                data[lanes, :n] = machine.memory.load(source[lanes], int(n))
        machine.shared.copy(target, data, machine.warp[every])

    return step


def _together(machine: Machine, instruction: Instruction, action: Callable[[], None]) -> Step:
    def step(mask: Mask) -> None:
        if mask is not None:
            raise EmulationError(f"not emulated with some threads alone: {instruction.text}")
        action()

    return step


@decodes("fence", "membar")
def _fence(machine: Machine, instruction: Instruction) -> Step:
    is_proxy = "proxy" in instruction.parts
    return lambda mask: machine.shared.fence() if is_proxy else None


@decodes("shfl")
def _shuffle(machine: Machine, instruction: Instruction) -> Step:
    if "|" in instruction.word(0):
        raise EmulationError(f"not emulated: {instruction.text}")
    mode = instruction.parts[2]
    x, by, clamp = (machine.source(instruction.word(n), "b32") for n in (1, 2, 3))
    write, lane, base = machine.writer(instruction.word(0)), machine.lane, 32 * machine.warp

    def step(mask: Mask) -> None:
        segment = (clamp >> np.uint32(8)).astype(np.int64) & 31
        top = (lane & segment) | (clamp.astype(np.int64) & 31 & ~segment)
        other = by.astype(np.int64)
        source = {"bfly": lane ^ other, "idx": (lane & segment) | (other & 31 & ~segment), "up": lane - other,
                  "down": lane + other}[mode]  # fmt: skip
        outside = source < (lane & segment) if mode == "up" else source > top
        source = base + np.where(outside, lane, source)
        every = machine.every(mask)
        if not every[source[every]].all():
            machine.report("a lane takes part in a shuffle that it does not execute")
        write(x[source], mask)

    return step


@decodes("redux")
def _reduce(machine: Machine, instruction: Instruction) -> Step:
    x, write = machine.source(instruction.word(1), instruction.type), machine.writer(instruction.word(0))
    function: dict[str, Callable[[Array], Any]] = {
        "add": lambda v: v.sum(1, dtype=v.dtype), "min": lambda v: v.min(1), "max": lambda v: v.max(1),
        "or": lambda v: np.bitwise_or.reduce(v, 1), "and": lambda v: np.bitwise_and.reduce(v, 1),
    }  # fmt: skip

    def step(mask: Mask) -> None:
        whole = machine.every(mask).reshape(-1, 32)
        if (whole.any(1) != whole.all(1)).any():
            machine.report("a lane takes part in a reduction that it does not execute")
        write(np.repeat(function[instruction.parts[2]](x.reshape(-1, 32)), 32), mask)

    return step


_ROW, _PAIR = np.arange(32) // 4, 2 * (np.arange(32) % 4)  # a lane's row and first column in a matrix of 8 x 8


def _number(instruction: Instruction) -> int:
    if "m8n8" not in instruction.parts or instruction.type != "b16":
        raise EmulationError(f"not emulated: {instruction.text}")
    return int(next(part for part in instruction.parts if re.fullmatch(r"x\d", part))[1:])


def _matrix_rows(machine: Machine, lanes: NDArray[np.uint64], warp: int, number: int) -> list[NDArray[np.uint64]]:
    return [lanes[32 * warp + 8 * n : 32 * warp + 8 * n + 8] for n in range(number)]


@decodes("ldmatrix")
def _load_matrix(machine: Machine, instruction: Instruction) -> Step:
    number, address = _number(instruction), address_of(machine, instruction.word(1))
    writers, transposed = [machine.writer(word) for word in instruction.words(0)], "trans" in instruction.parts
    warps = machine.threads // 32

    def step(mask: Mask) -> None:
        at, out = address(), np.zeros((number, machine.threads), np.uint32)
        for warp in range(warps):
            for n, rows in enumerate(_matrix_rows(machine, at, warp, number)):
                data = machine.shared.load(rows, 16, np.full(8, warp))
                matrix = np.ascontiguousarray(data).view(np.uint16)
                matrix = matrix.T if transposed else matrix
                low, high = matrix[_ROW, _PAIR], matrix[_ROW, _PAIR + 1]
                out[n, 32 * warp : 32 * warp + 32] = low | (high.astype(np.uint32) << np.uint32(16))
        for n, write in enumerate(writers):
            write(out[n], mask)

    return _whole(instruction, step)


@decodes("stmatrix")
def _store_matrix(machine: Machine, instruction: Instruction) -> Step:
    number, address = _number(instruction), address_of(machine, instruction.word(0))
    lanes, transposed = [machine.source(word, "b32") for word in instruction.words(1)], "trans" in instruction.parts

    def step(mask: Mask) -> None:
        at = address()
        for warp in range(machine.threads // 32):
            for x, rows in zip(lanes, _matrix_rows(machine, at, warp, number), strict=True):
                own, matrix = x[32 * warp : 32 * warp + 32], np.zeros((8, 8), np.uint16)
                matrix[_ROW, _PAIR], matrix[_ROW, _PAIR + 1] = own & np.uint32(0xFFFF), own >> np.uint32(16)
                data = np.ascontiguousarray(matrix.T if transposed else matrix).view(np.uint8).reshape(8, 16)
                machine.shared.store(rows, data, np.full(8, warp))

    return _whole(instruction, step)


def _whole(instruction: Instruction, step: Step) -> Step:
    def checked(mask: Mask) -> None:
        if mask is not None:
            raise EmulationError(f"not emulated with some threads alone: {instruction.text}")
        step(mask)

    return checked
