"""What all operators share: registration, gradients that are not there, shapes of results, no second derivative."""

from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef

from recbole_llm_kernels.signatures import schema_type

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def registered(function: Callable[..., Any]) -> CustomOpDef:
    """Register ``recbole_llm_kernels::<the function's name>``."""
    for name, kind in function.__annotations__.items():
        function.__annotations__[name] = schema_type(kind)
    return torch.library.custom_op(f"recbole_llm_kernels::{function.__name__}", mutates_args=())(function)


def poisoned(loss: Tensor, by: Tensor | None) -> Tensor:
    """Make the loss NaN where ids were out of range or out of order (``checked``, ``checked_rows``), without reading a value.

    Args:
        loss: ``[]`` or ``[B]``.
        by: what to add, ``[]`` or ``[B]``, 0 or NaN; None: nothing.

    Returns:
        ``loss`` itself or its sum with ``by``.
    """
    if by is None:
        return loss
    return loss + (by if by.ndim <= loss.ndim else by.sum()).to(loss.dtype)


def filled_grads(grads: Grads, need: list[bool], inputs: Grads) -> tuple[Tensor, Tensor, Tensor]:
    """Fill in missing gradients: zeros where one is wanted and nothing contributed, else empty."""
    filled = []
    for grad, wanted, like in zip(grads, need, inputs, strict=True):
        if grad is None:
            grad = torch.zeros_like(like) if wanted and like is not None else absent(inputs)
        filled.append(grad)
    return filled[0], filled[1], filled[2]


def formed_grads(like: Tensor, *grads: Tensor | None) -> tuple[Tensor, ...]:
    """Replace gradients that the forward did not form by empty tensors."""
    return tuple(absent((like,), accumulator(like)) if g is None else g for g in grads)


def present_grads(*grads: Tensor) -> tuple[Tensor | None, ...]:
    """Invert ``formed_grads``; a matrix without rows is present."""
    return tuple(None if g.ndim == 1 and g.numel() == 0 else g for g in grads)


def absent(inputs: tuple[Tensor | None, ...], dtype: torch.dtype | None = None) -> Tensor:
    """Return an empty tensor that stands in for a missing gradient.

    Device and (by default) dtype follow ``inputs[0]``.
    """
    assert inputs[0] is not None
    return inputs[0].new_empty(0, dtype=dtype)


def accumulator(like: Tensor) -> torch.dtype:
    """Return the dtype of losses, logits and sums: float64 of float64, else float32."""
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def fake_grads(need: list[bool], inputs: Grads) -> tuple[Tensor, Tensor, Tensor]:
    """Make fake tensors of the three gradients that a backward returns."""
    wanted = zip(need, inputs, strict=True)
    a, b, c = (torch.empty_like(x) if n and x is not None else absent(inputs) for n, x in wanted)
    return a, b, c


def fake_loss(rows: int | torch.SymInt, reduction: str, like: Tensor) -> Tensor:
    """Make a fake loss: ``[rows]`` for "none", else a scalar."""
    return like.new_empty(rows if reduction == "none" else (), dtype=accumulator(like))


def no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    """Refuse a second derivative, and name the functions that have one."""
    raise NotImplementedError(
        "recbole_llm_kernels has first derivatives only, and something differentiates a gradient (create_graph=True, "
        "a gradient penalty, a Hessian product); the functions of recbole_llm_kernels.reference take the same "
        "arguments and can be differentiated again"
    )
