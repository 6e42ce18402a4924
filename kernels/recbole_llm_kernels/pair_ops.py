"""The operators on (user, item) pairs; ``ops`` says what all operators have in common."""

from typing import Any

import torch
from torch import Tensor

from recbole_llm_kernels.backends import as_given, checked, launchers
from recbole_llm_kernels.checks import check_inside, synchronising_checks
from recbole_llm_kernels.registration import (
    accumulator,
    fake_grads,
    fake_loss,
    filled_grads,
    no_second_derivative,
    poisoned,
    registered,
)


@registered
def pair_dot(
    user: Tensor, item: Tensor, user_id: Tensor, item_id: Tensor, item_bias: Tensor | None, backend: str
) -> Tensor:
    """Logits [P]."""
    run = launchers("pairs", user, backend)
    (user_id, item_id), poison = checked(user, run, ("user_id", user_id, user), ("item_id", item_id, item))
    with as_given(user):
        return poisoned(run.pair_dot_fwd(user, item, user_id, item_id, item_bias), poison)


@pair_dot.register_fake
def _(user: Tensor, item: Tensor, user_id: Tensor, *rest: Any) -> Tensor:
    return user.new_empty(user_id.shape, dtype=accumulator(user))


def _pair_dot_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, None)


@registered
def pair_sigmoid(
    user: Tensor, item: Tensor, user_id: Tensor, item_id: Tensor, item_bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Probabilities [P]; slopes [P]."""
    run = launchers("pairs", user, backend)
    (user_id, item_id), poison = checked(user, run, ("user_id", user_id, user), ("item_id", item_id, item))
    with as_given(user):
        p, slope = run.pair_sigmoid_fwd(user, item, user_id, item_id, item_bias)
        return poisoned(p, poison), slope


@pair_sigmoid.register_fake
def _(user: Tensor, item: Tensor, user_id: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    p = user.new_empty(user_id.shape, dtype=accumulator(user))
    return p, torch.empty_like(p)


def _pair_sigmoid_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    ctx.save_for_backward(*tensors, output[1])


@registered
def pair_bce(
    user: Tensor,
    item: Tensor,
    user_id: Tensor,
    item_id: Tensor,
    item_bias: Tensor | None,
    label: Tensor,
    weight: Tensor | None,
    reduction: str,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Loss [] or [P]; slopes [P]."""
    run = launchers("pairs", user, backend)
    (user_id, item_id), poison = checked(user, run, ("user_id", user_id, user), ("item_id", item_id, item))
    if synchronising_checks(user.device) and item_bias is not None:
        check_inside("item_id", item_id[label > 0], item_bias)
    with as_given(user):
        loss, slope = run.pair_bce_fwd(user, item, user_id, item_id, label, item_bias, weight, reduction)
        return poisoned(loss, poison), slope


@pair_bce.register_fake
def _(user: Tensor, item: Tensor, user_id: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    reduction = rest[-2]
    return fake_loss(len(user_id), reduction, user), user.new_empty(user_id.shape, dtype=accumulator(user))


def _pair_bce_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _label, _weight, _reduction, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    ctx.save_for_backward(*tensors, output[1])


@registered
def pair_backward(
    grad: Tensor,
    slope: Tensor | None,
    user: Tensor,
    item: Tensor,
    user_id: Tensor,
    item_id: Tensor,
    item_bias: Tensor | None,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of user, item and item_bias for all pair operators."""
    run = launchers("pairs", user, backend)
    (user_id, item_id), _ = checked(user, run, ("user_id", user_id, user), ("item_id", item_id, item), again=True)
    with as_given(user):
        grads = run.pair_bwd(grad, slope, user, item, user_id, item_id, item_bias, need)
    return filled_grads(grads, need, (user, item, item_bias))


@pair_backward.register_fake
def _(grad: Tensor, slope: Tensor | None, user: Tensor, item: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _user_id, _item_id, item_bias, need, _backend = rest
    return fake_grads(need, (user, item, item_bias))


def _pair_backward(ctx: Any, grad: Tensor | None, _slope: Tensor | None = None) -> tuple[Tensor | None, ...]:
    if grad is None:
        return (None,) * len(ctx.needs_input_grad)
    user, item, user_id, item_id, item_bias, slope = ctx.saved_tensors
    need = [ctx.needs_input_grad[0], ctx.needs_input_grad[1], ctx.needs_input_grad[4]]
    grads = pair_backward(grad, slope, user, item, user_id, item_id, item_bias, need, ctx.backend)
    grad_user, grad_item, grad_bias = (g if n else None for g, n in zip(grads, need, strict=True))
    rest = (None,) * (len(ctx.needs_input_grad) - 5)
    return grad_user, grad_item, None, None, grad_bias, *rest


pair_dot.register_autograd(_pair_backward, setup_context=_pair_dot_setup)
pair_sigmoid.register_autograd(_pair_backward, setup_context=_pair_sigmoid_setup)
pair_bce.register_autograd(_pair_backward, setup_context=_pair_bce_setup)
pair_backward.register_autograd(no_second_derivative)
