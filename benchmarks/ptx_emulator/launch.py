"""Launches of Triton kernels executed by the emulator, on CPU tensors.

Inside ``emulated()`` a launcher of ``recbole_llm_kernels.triton_ops`` runs as on a card: integers are specialised as a
launch would, block sizes are those of sm_90, and PTX is what Triton emits for it.
"""

import importlib
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, contextmanager
from types import ModuleType
from typing import Any, NamedTuple
from unittest.mock import patch

import aot_report as aot
import numpy as np
import torch
import triton
from triton.compiler import ASTSource
from triton.runtime.jit import JITFunction

from ptx_emulator import arithmetic, matrix, transfers  # noqa: F401 (they register the instructions)
from ptx_emulator.machine import Machine, run
from ptx_emulator.memory import Bytes, GlobalMemory
from ptx_emulator.program import Program, parse
from recbole_llm_kernels import backends
from recbole_llm_kernels.triton_ops import tuning

ARCH = "sm_90"


class Executed(NamedTuple):
    """One launch."""

    label: str
    grid: tuple[int, ...]
    steps: int  # instructions of all programs
    seconds: float  # of executing, without compiling
    findings: dict[str, str]  # what a GPU may punish -> an instruction that showed it


class _Fresh(NamedTuple):
    """A tensor whose bytes nobody has written yet."""

    tensor: torch.Tensor  # kept, so that its addresses stay its own
    written: np.ndarray


_programs: dict[str, Program] = {}


class Fault(NamedTuple):
    """A mistake, made on purpose in every launch of one kernel; see ``faults``."""

    kernel: str  # a label, as tile_pass[bce]
    values: Callable[[dict[str, Any]], dict[str, Any]] = lambda values: values
    ptx: Callable[[str], str] = lambda ptx: ptx


class Emulator:
    """Executes launches and keeps what was found."""

    def __init__(self, fault: Fault | None = None) -> None:
        self.fault = fault
        self.executed: list[Executed] = []
        self._fresh: list[_Fresh] = []

    @property
    def findings(self) -> list[str]:
        """Everything found, with the kernel that showed it."""
        return [f"{x.label}: {what} ({text})" for x in self.executed for what, text in x.findings.items()]

    def keep(self, tensor: torch.Tensor) -> torch.Tensor:
        """Remember that nobody has written ``tensor`` yet."""
        if tensor.numel():
            _bytes_of(tensor)[:] = 0xFF
            self._fresh.append(_Fresh(tensor, np.zeros(_extent(tensor) * tensor.element_size(), bool)))
        return tensor

    def launch(self, kernel: JITFunction, values: dict[str, Any], options: dict[str, Any], grid: Sequence[int]) -> None:
        """Compile and execute one launch."""
        label = aot.Recorded(kernel, values, options).label
        fault = self.fault if self.fault is not None and self.fault.kernel == label else None
        if fault is not None:
            values = fault.values(dict(values))
        signature, constants, attributes = _specialised(kernel, values)
        source = _source(kernel, signature, constants, attributes)
        compiled = triton.compile(source, target=aot.ARCHS[ARCH].target, options=options)
        text = compiled.asm["ptx"] if fault is None else fault.ptx(compiled.asm["ptx"])
        if text not in _programs:
            _programs[text] = parse(text)
        program = _programs[text]
        memory = GlobalMemory(lambda what: None)
        addresses = self._place(memory, [x for x in values.values() if isinstance(x, torch.Tensor)])
        given: list[float] = []
        for parameter in kernel.params:
            if signature[parameter.name] != "constexpr":
                value = values[parameter.name]
                given.append(addresses[value.data_ptr()] if isinstance(value, torch.Tensor) else value)
        given += [0] * (len(program.parameters) - len(given))  # scratch memory of the driver, which no kernel here uses
        started = time.perf_counter()
        machine = Machine(program, memory, given, (*grid, 1, 1)[:3], compiled.metadata.shared)
        run(machine)
        seconds = time.perf_counter() - started
        self.executed.append(Executed(label, tuple(grid), machine.steps, seconds, machine.findings))

    def _place(self, memory: GlobalMemory, tensors: list[torch.Tensor]) -> dict[int, int]:
        """Addresses in the emulator by those of the tensors; views that overlap share a buffer."""
        by_span = {(x.data_ptr(), x.data_ptr() + _extent(x) * x.element_size()): x for x in tensors}
        spans = sorted(by_span.items(), key=lambda item: item[0])
        addresses: dict[int, int] = {}
        at = 0
        while at < len(spans):
            (first, last), _ = spans[at]
            stop = at + 1
            while stop < len(spans) and spans[stop][0][0] < last:
                last = max(last, spans[stop][0][1])
                stop += 1
            widest = max((item for item in spans[at:stop]), key=lambda item: item[0][1] - item[0][0])
            if widest[0] != (first, last):
                raise ValueError("views that overlap in part are not emulated")
            base = memory.add(_bytes_of(widest[1]), self._written(first, last))
            addresses |= {span[0]: base + span[0] - first for span, _ in spans[at:stop]}
            at = stop
        return addresses

    def _written(self, first: int, last: int) -> "np.ndarray | None":
        for fresh in self._fresh:
            start = fresh.tensor.data_ptr()
            if start <= first and last <= start + len(fresh.written):
                return fresh.written[first - start : last - start]
        return None


def _bytes_of(tensor: torch.Tensor) -> Bytes:
    """The memory from a tensor's first element to its last, whatever its strides."""
    if not tensor.numel():
        return np.zeros(0, np.uint8)
    flat = torch.as_strided(tensor.detach(), (_extent(tensor),), (1,))
    return flat.view(torch.uint8).numpy()


def _extent(tensor: torch.Tensor) -> int:
    steps = zip(tensor.shape, tensor.stride(), strict=True)
    return 1 + sum((size - 1) * stride for size, stride in steps) if tensor.numel() else 0


def _specialised(kernel: JITFunction, values: dict[str, Any]) -> tuple[dict, dict, dict]:
    """Signature, constants and attributes as a launch with these values has them."""
    signature: dict[str, str] = {}
    constants: dict[tuple[int], Any] = {}
    attributes: dict[tuple[int], Any] = {}
    for i, parameter in enumerate(kernel.params):
        value = values[parameter.name]
        signature[parameter.name] = "constexpr"
        if parameter.is_constexpr or value is None:
            constants[i,] = value
        elif isinstance(value, torch.Tensor):
            signature[parameter.name] = "*" + aot.NAMES[value.dtype]
            if value.data_ptr() % 16 == 0:
                attributes[i,] = [["tt.divisibility", 16]]
        elif isinstance(value, float):
            signature[parameter.name] = "fp32"
        elif value == 1 and not parameter.do_not_specialize:
            constants[i,] = 1
        else:
            signature[parameter.name] = "i32" if -(2**31) <= value < 2**31 else "i64"
            if value % 16 == 0 and not parameter.do_not_specialize:
                attributes[i,] = [["tt.divisibility", 16]]
    return signature, constants, attributes


def _source(kernel: JITFunction, signature: dict, constants: dict, attributes: dict) -> ASTSource:
    return ASTSource(fn=kernel, signature=signature, constexprs=constants, attrs=attributes)


@contextmanager
def emulated(fault: Fault | None = None) -> Iterator[Emulator]:
    """Kernels that are launched inside are executed by the emulator; ``backend="triton"`` takes CPU tensors.

    Args:
        fault: a mistake to make.

    Yields:
        what was executed and found.
    """
    emulator = Emulator(fault)

    def launch(self: JITFunction, *args: Any, grid: Any, warmup: bool, **options: Any) -> None:
        values = dict(zip(self.arg_names, args, strict=False))
        values |= {name: value for name, value in options.items() if name in self.arg_names}
        emulator.launch(self, values, {name: options[name] for name in aot.OPTIONS if name in options}, tuple(grid))

    def fresh(make: Callable[..., torch.Tensor]) -> Callable[..., torch.Tensor]:
        return lambda *args, **options: emulator.keep(make(*args, **options))

    def launchers(module: str, like: torch.Tensor, backend: str) -> ModuleType:
        return importlib.import_module(f"recbole_llm_kernels.triton_ops.{module}")

    on, chosen = aot.ARCHS[ARCH].on, backends.launchers
    with (
        ExitStack() as choosing,
        patch.object(JITFunction, "run", launch),
        patch.object(tuning, "target", lambda device: on),
        patch.object(torch, "empty", fresh(torch.empty)),
        patch.object(torch, "empty_like", fresh(torch.empty_like)),
    ):
        for name, module in list(sys.modules.items()):  # wherever an operator chooses its launchers
            if name.startswith("recbole_llm_kernels.") and vars(module).get("launchers") is chosen:
                choosing.enter_context(patch.object(module, "launchers", launchers))
        yield emulator
