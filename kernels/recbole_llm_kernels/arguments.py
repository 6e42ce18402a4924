"""What a call may look like: shapes, dtypes, devices and options, checked without reading a tensor's values."""

import math

import torch
from torch import Tensor

from recbole_llm_kernels.backends import BACKENDS

REDUCTIONS = ("mean", "sum", "none")
DTYPES = (torch.float32, torch.bfloat16, torch.float16, torch.float64)


def matrices(name: str, rows: Tensor, item: Tensor, item_bias: Tensor | None) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check both matrices and the bias against each other; cast the matrices under autocast; make all contiguous."""
    for label, x in ((name, rows), ("item", item)):
        if x.ndim != 2 or x.shape[1] < 1:
            raise ValueError(f"{label} must be a matrix [rows, D] with D >= 1, got shape {tuple(x.shape)}")
        if x.dtype not in DTYPES:
            raise ValueError(f"{label} must be float32, bfloat16, float16 or float64, got {x.dtype}; convert it first")
    if rows.shape[1] != item.shape[1]:
        raise ValueError(
            f"{name} and item must have equal D, got shapes {tuple(rows.shape)} and {tuple(item.shape)}; "
            "project one of them"
        )
    check_device("item", item, rows)
    device = rows.device.type
    if torch.is_autocast_enabled(device):
        dtype = torch.get_autocast_dtype(device)
        rows, item = (x if x.dtype == torch.float64 else x.to(dtype) for x in (rows, item))
    if rows.dtype != item.dtype:
        raise ValueError(
            f"{name} and item must have one dtype, got {rows.dtype} and {item.dtype}; convert one, or use autocast"
        )
    if item_bias is not None:
        vector("item_bias", item_bias, len(item), "one per item", rows, differentiable=True)
        if not item_bias.is_floating_point():
            raise ValueError(f"item_bias must be floating point, got {item_bias.dtype}")
        item_bias = item_bias.contiguous()
    return rows.contiguous(), item.contiguous(), item_bias


def need(rows: Tensor, item: Tensor, item_bias: Tensor | None) -> list[bool]:
    """Which gradients a backward would ask for."""
    enabled = torch.is_grad_enabled()
    return [enabled and x is not None and x.requires_grad for x in (rows, item, item_bias)]


def check_device(name: str, x: Tensor, like: Tensor) -> None:
    """Raise unless ``x`` is where ``like`` is."""
    if x.device != like.device:
        raise ValueError(f"{name} must be on {like.device} like the first matrix, got {x.device}; move it with .to()")


def ids(name: str, x: Tensor, like: Tensor, dims: tuple[int, ...] = (1,)) -> None:
    """Check an id tensor's dtype, number of dimensions and device."""
    if x.dtype not in (torch.int32, torch.int64):
        raise ValueError(f"{name} must be int32 or int64, got {x.dtype}; convert it with .long()")
    if x.ndim not in dims:
        expected = " or ".join(f"{d}-dimensional" for d in dims)
        raise ValueError(f"{name} must be {expected}, got shape {tuple(x.shape)}")
    check_device(name, x, like)


def one_id_type(*tensors: Tensor) -> tuple[Tensor, ...]:
    """Contiguous ids of one integer type."""
    dtype = tensors[0].dtype if all(x.dtype == tensors[0].dtype for x in tensors) else torch.int64
    return tuple(x.to(dtype).contiguous() for x in tensors)


def pair_ids(user_id: Tensor, item_id: Tensor, like: Tensor) -> tuple[Tensor, ...]:
    """Check and unify the ids of (user, item) pairs."""
    ids("user_id", user_id, like)
    ids("item_id", item_id, like)
    if len(user_id) != len(item_id):
        raise ValueError(f"user_id and item_id must have one entry per pair, got {len(user_id)} and {len(item_id)}")
    return one_id_type(user_id, item_id)


def row_lists(offsets_name: str, offsets: Tensor, ids_name: str, values: Tensor, rows: Tensor) -> tuple[Tensor, ...]:
    """Check and unify row lists: ``values[offsets[b]:offsets[b + 1]]`` belongs to row b."""
    ids(offsets_name, offsets, rows)
    ids(ids_name, values, rows)
    if len(offsets) != len(rows) + 1:
        raise ValueError(
            f"{offsets_name} must have one entry per row and one more, {len(rows) + 1} for {len(rows)} rows, "
            f"got {len(offsets)}"
        )
    return one_id_type(offsets, values)


def vector(name: str, x: Tensor, length: int, meaning: str, like: Tensor, *, differentiable: bool = False) -> None:
    """Check a vector's length and device, and that no gradient is expected where none is computed."""
    if x.ndim != 1 or len(x) != length:
        raise ValueError(f"{name} must have shape ({length},), {meaning}, got {tuple(x.shape)}")
    if x.is_complex():
        raise ValueError(f"{name} must be real, got {x.dtype}")
    check_device(name, x, like)
    if x.requires_grad and not differentiable:
        raise ValueError(f"{name} requires a gradient, but only matrices and item_bias get one; pass {name}.detach()")


def weights(x: Tensor | None, length: int, meaning: str, like: Tensor) -> Tensor | None:
    """Check ``weight`` and make it contiguous."""
    if x is None:
        return None
    vector("weight", x, length, meaning, like)
    return x.contiguous()


def options(reduction: str, backend: str) -> None:
    """Check the names of reduction and backend."""
    if reduction not in REDUCTIONS:
        raise ValueError(f"reduction must be one of {', '.join(REDUCTIONS)}, got {reduction!r}")
    check_backend(backend)


def check_backend(backend: str) -> None:
    """Check the name of the backend."""
    if backend not in BACKENDS:
        raise ValueError(f"backend must be one of {', '.join(BACKENDS)}, got {backend!r}")


def negative_weight(x: float) -> float:
    """``neg_weight`` as a float."""
    if not isinstance(x, (int, float)) or not 0 <= x < math.inf:  # no int | float: torch.compile of 2.6 cannot read it
        raise ValueError(f"neg_weight must be a finite number of at least 0, got {x!r}")
    return float(x)
