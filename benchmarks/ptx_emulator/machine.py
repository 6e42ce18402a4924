"""A program under way: registers as NumPy lanes, a program counter per thread, barriers."""

from collections.abc import Callable, Sequence
from typing import NamedTuple

import numpy as np
from numpy.typing import NDArray

from ptx_emulator.memory import GlobalMemory, SharedMemory
from ptx_emulator.program import EmulationError, Instruction, Program
from ptx_emulator.values import BITS, TYPES, Array, immediate

Mask = NDArray[np.bool_] | None  # None: every thread
Step = Callable[[Mask], None]
Decoder = Callable[["Machine", Instruction], Step]
DECODERS: dict[str, Decoder] = {}
MOST_STEPS = 5_000_000
_CONTROL = ("bra", "ret", "exit", "bar", "barrier")


def decodes(*names: str) -> Callable[[Decoder], Decoder]:
    """Register the decoder of instructions by name."""

    def register(decoder: Decoder) -> Decoder:
        DECODERS.update(dict.fromkeys(names, decoder))
        return decoder

    return register


class Product(NamedTuple):
    """A product of tensor cores that is not waited for."""

    registers: tuple[str, ...]  # its results'
    reads: list[NDArray[np.int64]]  # places in shared memory


class Machine:
    """Runs the programs of one launch, one after another.

    Args:
        program: the kernel.
        memory: its arguments.
        parameters: their values in order, pointers as addresses in ``memory``.
        grid: programs along x, y and z.
        shared: bytes of shared memory.
    """

    def __init__(
        self, program: Program, memory: GlobalMemory, parameters: Sequence[float], grid: Sequence[int], shared: int
    ) -> None:
        self.program, self.memory, self.grid, self.shared_size = program, memory, tuple(grid), shared
        self.threads = T = program.threads
        self.lane, self.warp = np.arange(T) % 32, np.arange(T) // 32
        self.findings: dict[str, str] = {}  # what -> the instruction that showed it first
        self.steps = 0
        self.text = ""
        memory.report = self.report
        self.shared = SharedMemory(shared, self.report)
        self.values = dict(zip((name for _, name in program.parameters), parameters, strict=True))
        self.kinds = {name: kind for kind, name in program.parameters}
        self.special: dict[str, NDArray[np.uint32]] = {
            "%tid.x": np.arange(T, dtype=np.uint32), "%laneid": self.lane.astype(np.uint32),
            "%ntid.x": np.full(T, T, np.uint32), "%warpid": self.warp.astype(np.uint32),
        }  # fmt: skip
        for axis, size in zip("xyz", self.grid, strict=True):
            self.special[f"%ctaid.{axis}"] = np.zeros(T, np.uint32)
            self.special[f"%nctaid.{axis}"] = np.full(T, size, np.uint32)
        self.registers: dict[str, Array] = {}
        self.accumulators: dict[str, Array] = {}  # of products that are not waited for
        self.products: list[Product] = []  # that no group holds yet
        self.groups: list[list[Product]] = []
        self.steps_of = [self._decode(instruction) for instruction in program.code]

    def report(self, what: str) -> None:
        """Put a finding down, once."""
        self.findings.setdefault(what, self.text)

    # --- operands

    def register(self, name: str) -> Array:
        """The lanes of a register: what was never written is NaN, or an address outside everything."""
        if name not in self.registers:
            prefix = name.rstrip("0123456789")
            kind, _ = self.program.registers.get(name) or self.program.registers.get(prefix) or ("", 0)
            if not kind:
                raise EmulationError(f"register {name} is not declared")
            if kind == "pred":
                self.registers[name] = np.zeros(self.threads, np.bool_)
            else:
                size = np.dtype(TYPES[kind]).itemsize
                self.registers[name] = np.full(self.threads, (1 << 8 * size) - 1, BITS[size])
        return self.registers[name]

    def source(self, word: str, kind: str) -> Array:
        """The lanes of an operand in the type ``kind``; registers are views that follow later writes."""
        dtype = TYPES[kind]
        if word in self.special:
            special = self.special[word]
            return special if np.dtype(dtype).itemsize == 4 else special.astype(dtype)
        if word.startswith(("%tid.", "%ntid.")):  # y and z
            return np.full(self.threads, int(word.startswith("%n")), dtype)
        if word.startswith("%"):
            lanes = self.register(word)
            if kind == "pred" or lanes.dtype.itemsize == np.dtype(dtype).itemsize:
                return lanes.view(dtype)
            raise EmulationError(f"{word} has {lanes.dtype.itemsize} bytes, {kind} was asked for")
        if word == "global_smem":
            return np.zeros(self.threads, dtype)
        if kind == "pred":
            return np.full(self.threads, int(word, 0) != 0)
        return np.full(self.threads, immediate(word, dtype))

    def writer(self, name: str) -> Callable[[Array, Mask], None]:
        """A function that writes lanes of a register; ``_`` takes everything."""
        if name == "_":
            return lambda value, mask: None
        lanes = self.register(name)
        dtype = lanes.dtype

        def write(value: Array, mask: Mask) -> None:
            if value.dtype != dtype:
                value = value.view(dtype) if value.dtype.itemsize == dtype.itemsize else value.astype(dtype)
            if mask is None:
                lanes[:] = value
            else:
                np.copyto(lanes, value, where=mask)

        return write

    def every(self, mask: Mask) -> NDArray[np.bool_]:
        """The mask as an array."""
        return np.ones(self.threads, bool) if mask is None else mask

    # --- running

    def _decode(self, instruction: Instruction) -> Step:
        if instruction.name in _CONTROL:
            return lambda mask: None
        decoder = DECODERS.get(instruction.name)
        if decoder is None:
            raise EmulationError(f"not emulated: {instruction.text}")
        return decoder(self, instruction)

    def run(self, place: Sequence[int]) -> None:
        """Run the program at ``place`` of the grid to its end."""
        for axis, number in zip("xyz", place, strict=True):
            self.special[f"%ctaid.{axis}"][:] = number
        self.memory.program = (place[2] * self.grid[1] + place[1]) * self.grid[0] + place[0]
        for lanes in self.registers.values():
            lanes[:] = np.False_ if lanes.dtype == np.bool_ else np.iinfo(lanes.dtype).max
        self.shared.__init__(self.shared_size, self.report)  # type: ignore[misc]
        self.accumulators.clear()
        self.products, self.groups = [], []
        with np.errstate(all="ignore"):
            self._run()
        if self.shared.open or any(self.shared.groups):
            self.report("the program ends with copies that nobody has waited for")
        if self.products or any(self.groups):
            self.report("the program ends with products that nobody has waited for")

    def _run(self) -> None:
        T, code, steps_of = self.threads, self.program.code, self.steps_of
        counter = np.zeros(T, np.int64)
        done, waiting = np.zeros(T, bool), np.zeros(T, bool)
        while not done.all():
            ready = ~(done | waiting)
            if not ready.any():
                if len(np.unique(counter[waiting])) > 1:
                    raise EmulationError("threads wait at different barriers")
                self.shared.barrier()
                counter[waiting] += 1
                waiting[:] = False
                continue
            at = int(counter[ready].min())  # who is behind runs first
            active = ready & (counter == at)
            mask: Mask = None if active.all() else active
            while True:  # as long as the same threads go on together
                instruction = code[at]
                self.steps += 1
                if self.steps > MOST_STEPS:
                    raise EmulationError("the program does not end")
                taken = self._taken(instruction, mask)
                if instruction.name in _CONTROL:
                    self._control(instruction, active, self.every(taken), at, counter, done, waiting)
                    break
                if taken is None or taken.any():
                    self.text = instruction.text
                    steps_of[at](taken)
                at += 1
                counter[active] = at
                if mask is not None and (counter[ready & ~active] == at).any():
                    break

    def _taken(self, instruction: Instruction, mask: Mask) -> Mask:
        if instruction.predicate is None:
            return mask
        chosen = self.register(instruction.predicate)
        chosen = ~chosen if instruction.negated else chosen.copy()
        if mask is not None:
            chosen &= mask
        return None if chosen.all() else chosen

    def _control(
        self,
        instruction: Instruction,
        active: Array,
        taken: Array,
        at: int,
        counter: Array,
        done: Array,
        waiting: Array,
    ) -> None:
        if instruction.name == "bra":
            counter[active] = at + 1
            counter[taken] = self.program.labels[instruction.word(0)]
        elif instruction.name in ("ret", "exit"):
            counter[active] = at + 1
            done |= taken
        else:
            if instruction.word(0) != "0" or len(instruction.operands) > 1:
                raise EmulationError(f"not emulated: {instruction.text}")
            waiting |= active


def run(machine: Machine) -> None:
    """Run every program of the grid."""
    X, Y, Z = machine.grid
    for z in range(Z):
        for y in range(Y):
            for x in range(X):
                machine.run((x, y, z))
