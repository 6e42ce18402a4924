"""Arguments that operators share: written once as a named tuple, from which schemas and launchers read them."""

import inspect
from collections.abc import Callable
from typing import Any, List, NamedTuple, get_args, get_origin, get_type_hints  # noqa: UP035

from torch import Tensor

_list_of: Any = List  # noqa: UP006


class Sampled(NamedTuple):
    """Arguments of the losses with sampled negatives, in the order of their operators.

    Attributes:
        user: ``[n_users, D]``.
        item: ``[N, D]``.
        item_bias: ``[N]``; -inf: not in the catalogue.
        user_id: ``[B]``.
        pos_id: ``[B]``.
        neg_id: ``[B, K]`` for each row its own, or ``[M]`` shared by the batch.
        log_q: ``[N]``, subtracted from the logits.
        neg_valid: bool, as ``neg_id``; of shared negatives also ``[B, M]``.
        weight: ``[B]``.
        neg_weight: factor of the negatives' part; 1 for the softmax.
        reduction: "mean", "sum" or "none".
        need: whether gradients of user, item and item_bias are wanted.
        backend: "auto", "triton" or "torch".
    """

    user: Tensor
    item: Tensor
    item_bias: Tensor | None
    user_id: Tensor
    pos_id: Tensor
    neg_id: Tensor
    log_q: Tensor | None
    neg_valid: Tensor | None
    weight: Tensor | None
    neg_weight: float
    reduction: str
    need: list[bool]
    backend: str


def schema_type(kind: Any) -> Any:
    """Return a type as PyTorch 2.6 reads it in a schema: it knows typing.List, and not list."""
    return _list_of[get_args(kind)[0]] if get_origin(kind) is list else kind


def takes(fields: type) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a function of ``*given``: PyTorch, which makes schemas of signatures, sees a parameter for each field.

    Args:
        fields: a named tuple such as :class:`Sampled`.
    """
    hints = get_type_hints(fields)
    return lambda function: _with_parameters(function, hints)


def takes_back(forward: Callable[..., Any]) -> Callable[[Callable[..., Any]], Callable[..., Any]]:
    """Decorate a backward of ``grad, state, *given``, of which ``given`` are the arguments of ``forward``."""
    parameters = inspect.signature(forward).parameters.values()
    hints = {"grad": Tensor, "state": list[Tensor]} | {each.name: each.annotation for each in parameters}
    return lambda function: _with_parameters(function, hints)


def _with_parameters(function: Callable[..., Any], hints: dict[str, Any]) -> Callable[..., Any]:
    kind = inspect.Parameter.POSITIONAL_OR_KEYWORD
    parameters = [inspect.Parameter(name, kind, annotation=schema_type(hint)) for name, hint in hints.items()]
    returns = function.__annotations__["return"]
    function.__signature__ = inspect.Signature(parameters, return_annotation=returns)  # type: ignore[attr-defined]
    return function
