"""A memory and race checker for Triton's interpreter: what a GPU would punish fails here, on a CPU.

The stock interpreter runs one program after another on host memory, so it forgives what hardware does not. With
``install()`` every launch is watched:

- an active lane outside the *view* of every argument is a fault (the interpreter reads whatever lies there);
- a masked lane of a load without ``other=`` reads NaN, or a huge integer (the interpreter gives 0, a device anything);
- two programs that store to one address, a program that loads what another one stores in the same launch or what it has
  stored itself without a barrier since, and two lanes of one store on the same address are races;
- programs run in the order of ``program_order(seed)``, so a sum that depends on the order shows as a difference.

Four defects of the interpreter are repaired. Triton 3.9: float32 to bfloat16 truncates instead of rounding to nearest
even (``cast_impl``); a product of bfloat16 multiplies their bit patterns as integers (``create_dot``); a reduction with a
function of one's own visits element after element in Python (``generic_reduce``). Up to Triton 3.6: a scalar becomes a
Python integer through ``int`` of an array of one element, which NumPy 2.4 refuses (``_patch_lang_tensor``).

Not seen: races between warps of a program, miscompilation, asynchronous copies, tensor-core rounding, launch errors.
TRITON_INTERPRET=1 must be set before Triton is imported.
"""

import inspect
import os
import random
from collections.abc import Iterator
from contextlib import contextmanager

import numpy as np
import triton.language as tl
from triton.runtime import interpreter

if os.environ.get("TRITON_INTERPRET") != "1":
    raise RuntimeError("Triton does not interpret: set TRITON_INTERPRET=1 before Python starts")

_Builder, _Executor = interpreter.InterpreterBuilder, interpreter.GridExecutor
_stock = {
    name: getattr(owner, name)
    for owner, names in (
        (_Builder, ("create_masked_load", "create_masked_store", "create_atomic_rmw", "set_grid_dim", "set_grid_idx")),
        (_Executor, ("_init_args_hst", "__call__")),
    )
    for name in names
}


class Launch:
    """What one launch has touched."""

    def __init__(self) -> None:
        self.views: set[tuple[int, int]] = set()  # first and last address of every argument
        self.program = 0
        self.loads: dict[int, list[np.ndarray]] = {}  # program -> addresses
        self.stores: dict[int, list[np.ndarray]] = {}
        self.unseen: dict[int, list[np.ndarray]] = {}  # program -> addresses it has stored since its last barrier
        self.faults: list[str] = []
        self.patched: frozenset[str] = frozenset()  # names of the language's modules
        self.zero_given = False  # whether the load at hand has other=, which the interpreter drops where it is one zero

    def touch(self, pointers, mask, what: str) -> np.ndarray:
        """Addresses of the active lanes; a fault where one is outside every argument."""
        size = max(pointers.get_element_ty().primitive_bitwidth // 8, 1)
        address = pointers.data.astype(np.int64)[np.broadcast_to(mask.data, pointers.data.shape).astype(bool)].ravel()
        inside = np.zeros(address.shape, dtype=bool)
        for first, last in self.views:
            inside |= (address >= first) & (address + size <= last)
        if not inside.all():
            raise IndexError(f"{what}: {int((~inside).sum())} lanes of program {self.program} outside every argument")
        return address

    def races(self) -> list[str]:
        """Addresses that two programs store, or that one loads and another stores."""
        found = []
        programs, stored = _flat(self.stores)
        order = np.argsort(stored, kind="stable")
        programs, stored = programs[order], stored[order]
        clash = (stored[1:] == stored[:-1]) & (programs[1:] != programs[:-1])
        if clash.any():
            at = int(clash.argmax())
            found.append(f"race: programs {programs[at]} and {programs[at + 1]} store to one address")
        readers, loaded = _flat(self.loads)
        if len(stored) and len(loaded):
            place = np.minimum(np.searchsorted(stored, loaded), len(stored) - 1)
            clash = (stored[place] == loaded) & (programs[place] != readers)
            if clash.any():
                at = int(clash.argmax())
                found.append(f"race: program {readers[at]} loads what program {programs[place[at]]} stores")
        return found


def _flat(touched: dict[int, list[np.ndarray]]) -> tuple[np.ndarray, np.ndarray]:
    """Programs and addresses, each program's addresses once."""
    unique = {program: np.unique(np.concatenate(parts)) for program, parts in touched.items()}
    programs = [np.full(len(addresses), program) for program, addresses in unique.items()]
    empty = np.empty(0, dtype=np.int64)
    return np.concatenate([empty, *programs]), np.concatenate([empty, *unique.values()])


_launch = Launch()
_seed: int | None = None
_order: list[int] = []
_grid = (1, 1, 1)
launches = 0  # watched so far
launching = False  # whether one is under way


@contextmanager
def program_order(seed: int | None) -> Iterator[None]:
    """Run the programs of every launch in an order drawn from ``seed``; None: ascending."""
    global _seed
    before, _seed = _seed, seed
    try:
        yield
    finally:
        _seed = before


def _load(self, pointers, mask, other, *rest):
    address = _launch.touch(pointers, mask, "load")
    _launch.loads.setdefault(_launch.program, []).append(address)
    unseen = _launch.unseen.get(_launch.program)
    if unseen and np.isin(address, np.concatenate(unseen)).any():
        _launch.faults.append(f"race: program {_launch.program} loads what it has stored, without a barrier")
    if other is None and not _launch.zero_given:
        element = pointers.get_element_ty()
        dtype = interpreter._get_np_dtype(element)
        if element == tl.bfloat16:
            undefined = 0x7FC0  # NaN
        elif np.issubdtype(dtype, np.floating):
            undefined = np.nan
        else:
            undefined = 1 if dtype == np.bool_ else np.iinfo(dtype).max // 2
        other = interpreter.TensorHandle(np.full_like(pointers.data, undefined, dtype=dtype), element)
    return _stock["create_masked_load"](self, pointers, mask, other, *rest)


def _semantic_load(self, pointers, mask=None, other=None, *rest, **options):
    _launch.zero_given = other is not None
    return _stock_semantic_load(self, pointers, mask, other, *rest, **options)


_Semantic = type(interpreter.interpreter_semantic)  # up to Triton 3.6 every patched module has an instance of its own
_stock_semantic_load = _Semantic.load


def _store(self, pointers, value, mask, *rest):
    address = _launch.touch(pointers, mask, "store")
    if len(np.unique(address)) < len(address):
        _launch.faults.append(f"race: two lanes of program {_launch.program} store to one address")
    _launch.stores.setdefault(_launch.program, []).append(address)
    _launch.unseen.setdefault(_launch.program, []).append(address)
    return _stock["create_masked_store"](self, pointers, value, mask, *rest)


def _barrier(self):
    _launch.unseen.pop(_launch.program, None)


def _atomic(self, operation, pointers, value, mask, *rest):
    _launch.touch(pointers, mask, "atomic")
    return _stock["create_atomic_rmw"](self, operation, pointers, value, mask, *rest)


def _set_grid_dim(self, *grid):
    global _grid, _order
    _grid = grid
    _order = list(range(grid[0] * grid[1] * grid[2]))
    if _seed is not None:
        random.Random(_seed).shuffle(_order)
    return _stock["set_grid_dim"](self, *grid)


def _set_grid_idx(self, x, y, z):
    program = _order[(x * _grid[1] + y) * _grid[2] + z]
    _launch.program = program
    yz = _grid[1] * _grid[2]
    return _stock["set_grid_idx"](self, program // yz, program // _grid[2] % _grid[1], program % _grid[2])


def _init_args(self, args, kwargs):
    host = _stock["_init_args_hst"](self, args, kwargs)
    for x in [*host[0], *host[1].values()]:
        if hasattr(x, "data_ptr") and x.numel():
            _launch.views.add((x.data_ptr(), x.data_ptr() + x.numel() * x.element_size()))
    return host


def _no_copy_back(self, *args):
    """Tensors on a CPU are shared with the interpreter; copying whole storages would touch every page of a table."""


def _call(self, *args, **kwargs):
    global _launch, launches, launching
    _launch, launching = Launch(), True
    try:
        _stock["__call__"](self, *args, **kwargs)
    finally:
        launching = False
    launches += 1
    faults = _launch.faults + _launch.races()
    if faults:
        raise RuntimeError("; ".join(faults[:3]))


def _round_to_bfloat16(x: np.ndarray) -> np.ndarray:
    bits = np.ascontiguousarray(x, dtype=np.float32).view(np.uint32)
    rounded = ((bits + 0x7FFF + ((bits >> 16) & 1)) >> 16).astype(np.uint16)
    return np.where(np.isnan(x), np.uint16(0x7FC0), rounded)


def _cast(self, source, target, *rounding):
    if source.dtype.scalar == tl.float32 and target.scalar == tl.bfloat16:
        return interpreter.TensorHandle(_round_to_bfloat16(source.data), target.scalar)
    return _stock_cast(self, source, target)


_stock_cast = _Builder.cast_impl


def _dot(self, a, b, accumulator, *rest):
    a, b = (_stock_cast(self, x, tl.float32) if x.dtype.scalar == tl.bfloat16 else x for x in (a, b))
    return _stock_dot(self, a, b, accumulator, *rest)


_stock_dot = _Builder.create_dot


def _reduce(self, input):
    """Halves of the axis combined with each other, as a device does, whole arrays at a time."""
    (operand,) = input
    data, axis = operand.handle.data, self.axis
    if axis is None:
        data, axis = data.ravel(), 0
    data = np.moveaxis(data, axis, 0)
    while len(data) > 1:
        half = len(data) // 2
        pair = [self.to_tensor(np.ascontiguousarray(x), operand.dtype) for x in (data[:half], data[half:])]
        data = self.combine_fn.fn(*pair).handle.data
    data = data[0]
    if self.keep_dims:
        data = np.expand_dims(data, axis)
    return [self.to_tensor(data, operand.dtype)]


def _patch_lang(fn):
    """Once a launch: the interpreter patches the language again at every call of a device function, a quarter of all time."""
    if fn not in _modules:
        found = (x.__name__ for x in fn.__globals__.values() if inspect.ismodule(x))
        _modules[fn] = frozenset(name for name in found if name in ("triton.language", "triton.language.core"))
    if _modules[fn] <= _launch.patched:
        return None
    _launch.patched |= _modules[fn]
    return _stock_patch_lang(fn)


def _patch_lang_tensor(tensor, *scope):
    _stock_patch_lang_tensor(tensor, *scope)
    # through the scope where there is one (from Triton 3.4 on), so that the patch ends with the launch
    patch = scope[0].set_attr if scope else setattr
    patch(tensor, "__index__", lambda self: self.handle.data.item())


_stock_patch_lang_tensor = interpreter._patch_lang_tensor
_modules: dict[object, frozenset[str]] = {}
_stock_patch_lang = interpreter._patch_lang


def install() -> None:
    """Watch every launch from now on."""
    _Builder.create_masked_load, _Builder.create_masked_store = _load, _store
    _Builder.create_atomic_rmw, _Builder.create_barrier = _atomic, _barrier
    _Semantic.load = _semantic_load
    _Builder.set_grid_dim, _Builder.set_grid_idx = _set_grid_dim, _set_grid_idx
    _Builder.cast_impl, _Builder.create_dot = _cast, _dot
    _Executor._init_args_hst, _Executor._restore_args_dev = _init_args, _no_copy_back
    _Executor.__call__ = _call
    interpreter.ReduceOps.generic_reduce = _reduce
    interpreter._patch_lang, interpreter._patch_lang_tensor = _patch_lang, _patch_lang_tensor
