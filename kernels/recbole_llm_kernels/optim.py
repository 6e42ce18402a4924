"""Optimizers that visit only the rows that a step touches."""

from collections.abc import Callable, Iterable
from typing import Any

import torch
from torch import Tensor

from recbole_llm_kernels import arguments
from recbole_llm_kernels.backends import as_given, launchers
from recbole_llm_kernels.checks import check_ids, synchronising_checks

__all__ = ["RowwiseAdagrad", "rowwise_adagrad_"]


def rowwise_adagrad_(
    table: Tensor,
    state: Tensor,
    ids: Tensor,
    grad: Tensor,
    *,
    lr: float,
    eps: float = 1e-10,
    backend: str = "auto",
) -> None:
    """Take a step of row-wise Adagrad on the rows that ``ids`` name; all other rows are not even read.

    With g_r the sum of the terms of row r: ``state_r += mean(g_r ** 2)``, then ``w_r -= lr * g_r / (sqrt(state_r) + eps)``.
    One number is kept for a row, where Adam keeps 2 D. A row that is named twice takes one step, from the sum. The result
    is that of the same rule on the dense gradient, for which a row without terms stays as it is.

    Args:
        table: changed in place, ``[N, D]`` float32, bfloat16 or float16 (float64 on the torch backend); contiguous.
        state: changed in place, ``[N]`` float32 (float64 with float64); sums of mean squares, 0 before the first step.
        ids: rows of ``table``, ``[P]``, in any order, with repeats. On a GPU a term whose id is out of range is left
            out; the loss that it stems from is NaN there.
        grad: the terms, ``[P, D]`` in the dtype of ``table`` or float32.
        lr: learning rate, greater than 0.
        eps: added to the root, at least 0.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: an argument's shape, dtype, device or value does not fit.
        IndexError: an id is out of range (CPU, or debug mode).

    Example:
        >>> table, state = torch.ones(3, 2), torch.zeros(3)
        >>> rowwise_adagrad_(table, state, torch.tensor([2, 2]), torch.ones(2, 2), lr=0.5)
        >>> table.tolist(), [round(value, 3) for value in state.tolist()]
        ([[1.0, 1.0], [1.0, 1.0], [0.5, 0.5]], [0.0, 0.0, 4.0])
    """
    arguments.matrices("table", table, table, None)
    arguments.check_backend(backend)
    arguments.ids("ids", ids, table)
    _check_step(lr, eps)
    kept = torch.float64 if table.dtype == torch.float64 else torch.float32
    if state.shape != table.shape[:1] or state.dtype != kept:
        raise ValueError(f"state must be {kept} of shape ({len(table)},), got {state.dtype} {tuple(state.shape)}")
    arguments.check_device("state", state, table)
    if grad.shape != (len(ids), table.shape[1]) or grad.dtype not in (table.dtype, kept):
        raise ValueError(
            f"grad must be {table.dtype} or {kept} of shape {(len(ids), table.shape[1])}, one row per id, "
            f"got {grad.dtype} {tuple(grad.shape)}"
        )
    arguments.check_device("grad", grad, table)
    if not (table.is_contiguous() and state.is_contiguous()):
        raise ValueError(
            "table and state are changed in place and must be contiguous; pass x.contiguous(), and keep it"
        )
    run = launchers("rowwise_adagrad", table, backend)
    if synchronising_checks(table.device):
        check_ids("ids", ids, len(table))
    elif ".triton_ops." not in run.__name__:
        inside = (ids >= 0) & (ids < len(table))
        # a term of 0 changes nothing, whatever row it goes to
        ids, grad = ids.masked_fill(~inside, 0), grad.masked_fill(~inside[:, None], 0)
    with torch.no_grad(), as_given(table):
        run.rowwise_adagrad(table, state, ids.contiguous(), grad.contiguous(), float(lr), float(eps))


class RowwiseAdagrad(torch.optim.Optimizer):
    """Row-wise Adagrad, whose time and memory go by the rows that a step touches.

    A parameter with a sparse gradient (``torch.nn.Embedding(..., sparse=True)``) takes :func:`rowwise_adagrad_`. A dense
    gradient means all rows; of a vector or a scalar every element is a row. A parameter with more than two dimensions is
    one row for each of the first.

    Args:
        params: parameters or groups.
        lr: learning rate, greater than 0.
        eps: added to the root, at least 0.
        backend: "auto", "triton" or "torch".

    Raises:
        ValueError: ``lr``, ``eps`` or ``backend`` is out of range.
    """

    def __init__(self, params: Iterable[Any], lr: float = 0.01, eps: float = 1e-10, backend: str = "auto") -> None:
        _check_step(lr, eps)
        arguments.check_backend(backend)
        super().__init__(params, {"lr": lr, "eps": eps})
        self.backend = backend

    @torch.no_grad()
    def step(self, closure: Callable[[], Any] | None = None) -> Any:  # type: ignore[override]
        """Take a step; ``closure`` evaluates the loss again, and is returned."""
        loss = None
        if closure is not None:
            with torch.enable_grad():
                loss = closure()
        for group in self.param_groups:
            for parameter in group["params"]:
                if parameter.grad is not None:
                    self._update(parameter, parameter.grad, group["lr"], group["eps"])
        return loss

    def load_state_dict(self, state_dict: dict[str, Any]) -> None:
        """Take over what :meth:`state_dict` gave. The sums keep their precision, whatever that of the parameters."""
        super().load_state_dict(state_dict)
        numbers = [number for group in state_dict["param_groups"] for number in group["params"]]
        parameters = [parameter for group in self.param_groups for parameter in group["params"]]
        for number, parameter in zip(numbers, parameters, strict=True):
            if number in state_dict["state"]:
                sums = state_dict["state"][number]["sum"]
                self.state[parameter]["sum"] = sums.to(parameter.device, copy=True)

    def _update(self, parameter: Tensor, grad: Tensor, lr: float, eps: float) -> None:
        kept = torch.float64 if parameter.dtype == torch.float64 else torch.float32
        state = self.state[parameter]
        if "sum" not in state:
            state["sum"] = torch.zeros(parameter.shape[:1], dtype=kept, device=parameter.device)
        if grad.is_sparse:
            rows, terms = grad._indices()[0], grad._values()  # not coalesced: the step sums, and sorts once
            rowwise_adagrad_(parameter.data, state["sum"], rows, terms, lr=lr, eps=eps, backend=self.backend)
            return
        grad = grad.to(kept)
        square = grad.square()
        state["sum"] += square.flatten(1).mean(1) if grad.ndim > 1 else square
        step = lr / (state["sum"].sqrt() + eps)
        step = step.view(step.shape + (1,) * (grad.ndim - step.ndim))
        parameter.copy_(parameter.to(kept) - step * grad)


def _check_step(lr: float, eps: float) -> None:
    if not 0 < lr < float("inf"):
        raise ValueError(f"lr must be a finite number greater than 0, got {lr!r}")
    if not 0 <= eps < float("inf"):
        raise ValueError(f"eps must be a finite number of at least 0, got {eps!r}")
