"""Operators as PyTorch knows them: registration, fake tensors and autograd.

Every ``recbole_llm_kernels::<op>`` returns its result first, then what its backward needs; ``functional`` checks the
arguments and drops the rest. A gradient that is not there (not wanted, or left to the backward) is an empty tensor.
The launchers of ``torch_ops`` and ``triton_ops`` have the same signatures; ``backends`` chooses between them.
"""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any, List, get_args, get_origin  # noqa: UP035

import torch
from torch import Tensor
from torch.library import CustomOpDef

from recbole_llm_kernels.backends import as_given, checked, launchers
from recbole_llm_kernels.checks import check_inside, check_rows, synchronising_checks

Grads = tuple[Tensor | None, Tensor | None, Tensor | None]
_list_of: Any = List  # noqa: UP006


def _registered(function: Callable[..., Any]) -> CustomOpDef:
    """The operator ``recbole_llm_kernels::<the function's name>``; PyTorch 2.6 knows typing.List, and not list, in one."""
    for name, kind in function.__annotations__.items():
        if get_origin(kind) is list:
            function.__annotations__[name] = _list_of[get_args(kind)[0]]
    return torch.library.custom_op(f"recbole_llm_kernels::{function.__name__}", mutates_args=())(function)


def _poison(loss: Tensor, by: Tensor | None) -> Tensor:
    return loss if by is None else loss + by.to(loss.dtype)


def _filled(grads: Grads, need: list[bool], inputs: Grads) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients as an operator returns them: zeros where one is wanted and nothing contributed, else empty."""
    filled = []
    for grad, wanted, like in zip(grads, need, inputs, strict=True):
        if grad is None:
            grad = torch.zeros_like(like) if wanted and like is not None else _empty(inputs)
        filled.append(grad)
    return filled[0], filled[1], filled[2]


def _formed(like: Tensor, *grads: Tensor | None) -> tuple[Tensor, ...]:
    """Gradients formed in a forward: empty where one is not."""
    return tuple(_empty((like,), _accumulator(like)) if g is None else g for g in grads)


def _present(*grads: Tensor) -> tuple[Tensor | None, ...]:
    """The inverse of ``_formed``; a matrix without rows is present."""
    return tuple(None if g.ndim == 1 and g.numel() == 0 else g for g in grads)


def _empty(inputs: tuple[Tensor | None, ...], dtype: torch.dtype | None = None) -> Tensor:
    assert inputs[0] is not None
    return inputs[0].new_empty(0, dtype=dtype)


def _accumulator(like: Tensor) -> torch.dtype:
    return torch.float64 if like.dtype == torch.float64 else torch.float32


def _fake_grads(need: list[bool], inputs: Grads) -> tuple[Tensor, Tensor, Tensor]:
    wanted = zip(need, inputs, strict=True)
    a, b, c = (torch.empty_like(x) if n and x is not None else _empty(inputs) for n, x in wanted)
    return a, b, c


def _fake_loss(rows: int | torch.SymInt, reduction: str, like: Tensor) -> Tensor:
    return like.new_empty(rows if reduction == "none" else (), dtype=_accumulator(like))


def _no_second_derivative(ctx: Any, *grads: Tensor) -> None:
    raise NotImplementedError(
        "recbole_llm_kernels has first derivatives only, and something differentiates a gradient (create_graph=True, "
        "a gradient penalty, a Hessian product); the functions of recbole_llm_kernels.reference take the same "
        "arguments and can be differentiated again"
    )


@_registered
def pair_dot(
    user: Tensor, item: Tensor, user_id: Tensor, item_id: Tensor, item_bias: Tensor | None, backend: str
) -> Tensor:
    """Logits [P]."""
    run = launchers("pairs", user, backend)
    (user_id, item_id), poison = checked(user, run, ("user_id", user_id, user), ("item_id", item_id, item))
    with as_given(user):
        return _poison(run.pair_dot_fwd(user, item, user_id, item_id, item_bias), poison)


@pair_dot.register_fake
def _(user: Tensor, item: Tensor, user_id: Tensor, *rest: Any) -> Tensor:
    return user.new_empty(user_id.shape, dtype=_accumulator(user))


def _pair_dot_setup(ctx: Any, inputs: tuple[Any, ...], output: Tensor) -> None:
    *tensors, ctx.backend = inputs
    ctx.save_for_backward(*tensors, None)


@_registered
def pair_sigmoid(
    user: Tensor, item: Tensor, user_id: Tensor, item_id: Tensor, item_bias: Tensor | None, backend: str
) -> tuple[Tensor, Tensor]:
    """Probabilities [P]; slopes [P]."""
    run = launchers("pairs", user, backend)
    (user_id, item_id), poison = checked(user, run, ("user_id", user_id, user), ("item_id", item_id, item))
    with as_given(user):
        p, slope = run.pair_sigmoid_fwd(user, item, user_id, item_id, item_bias)
        return _poison(p, poison), slope


@pair_sigmoid.register_fake
def _(user: Tensor, item: Tensor, user_id: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    p = user.new_empty(user_id.shape, dtype=_accumulator(user))
    return p, torch.empty_like(p)


def _pair_sigmoid_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    ctx.save_for_backward(*tensors, output[1])


@_registered
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
        return _poison(loss, poison), slope


@pair_bce.register_fake
def _(user: Tensor, item: Tensor, user_id: Tensor, *rest: Any) -> tuple[Tensor, Tensor]:
    reduction = rest[-2]
    return _fake_loss(len(user_id), reduction, user), user.new_empty(user_id.shape, dtype=_accumulator(user))


def _pair_bce_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    *tensors, _label, _weight, _reduction, ctx.backend = inputs
    ctx.mark_non_differentiable(output[1])
    ctx.set_materialize_grads(False)  # no zeros for what has no gradient
    ctx.save_for_backward(*tensors, output[1])


@_registered
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
    return _filled(grads, need, (user, item, item_bias))


@pair_backward.register_fake
def _(grad: Tensor, slope: Tensor | None, user: Tensor, item: Tensor, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _user_id, _item_id, item_bias, need, _backend = rest
    return _fake_grads(need, (user, item, item_bias))


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
pair_backward.register_autograd(_no_second_derivative)


_functions: dict[CustomOpDef, Callable[..., Any]] = {}
_eager: dict[CustomOpDef, type[torch.autograd.Function]] = {}


def _operator(function: Callable[..., Any]) -> CustomOpDef:
    """Register ``function`` and keep it beside its operator."""
    operator = _registered(function)
    _functions[operator] = function
    return operator


def loss(operator: CustomOpDef, *inputs: Any) -> Tensor:
    """The first result of a registered loss.

    Plain tensors outside a compiler skip the dispatcher, whose Python takes longer than the arithmetic of 2,048 pairs.
    """
    if all(type(x) in (Tensor, torch.nn.Parameter) for x in inputs[:2]) and not torch.compiler.is_compiling():
        return _eager[operator].apply(*inputs)[0]
    return operator(*inputs)[0]


# The losses below share the order of their first arguments, so that one autograd formula serves each pair of operators:
# two matrices and the bias, then ids, then options, with ``need`` (are their gradients wanted) and ``backend`` last.


@_operator
def sampled_bce(
    user: Tensor,
    item: Tensor,
    item_bias: Tensor | None,
    user_id: Tensor,
    pos_id: Tensor,
    neg_id: Tensor,
    log_q: Tensor | None,
    neg_valid: Tensor | None,
    weight: Tensor | None,
    neg_weight: float,
    reduction: str,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [] or [B]; slopes [B, 1 + K]; gradient of the gathered queries [B, D]. neg_id is [B, K]."""
    run = launchers("sampled", user, backend)
    user_id, pos_id, neg_id, poison = _sampled_ids(run, user, item, item_bias, user_id, pos_id, neg_id)
    options = (log_q, neg_valid, weight, neg_weight, reduction)
    with as_given(user):
        loss, slope, query = run.sampled_bce_fwd(user, item, user_id, pos_id, neg_id, item_bias, *options, need)
    return _poison(loss, poison), slope, _formed(slope, query)[0]


@sampled_bce.register_fake
def _(user: Tensor, item: Tensor, item_bias: Tensor | None, *rest: Any) -> tuple[Tensor, Tensor, Tensor]:
    _, _, neg_id, _, _, _, _, reduction, need, _ = rest
    (B, K), dtype = neg_id.shape, _accumulator(user)
    grad_query = user.new_empty((B, user.shape[1]) if need[0] else 0, dtype=dtype)
    return _fake_loss(B, reduction, user), user.new_empty(B, K + 1, dtype=dtype), grad_query


@_operator
def sampled_bce_backward(
    grad: Tensor,
    state: list[Tensor],
    user: Tensor,
    item: Tensor,
    item_bias: Tensor | None,
    user_id: Tensor,
    pos_id: Tensor,
    neg_id: Tensor,
    log_q: Tensor | None,
    neg_valid: Tensor | None,
    weight: Tensor | None,
    neg_weight: float,
    reduction: str,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of user, item and item_bias; ``state`` is what the forward returned after the loss."""
    run = launchers("sampled", user, backend)
    user_id, pos_id, neg_id, _ = _sampled_ids(run, user, item, item_bias, user_id, pos_id, neg_id, again=True)
    slope, query = state[0], _present(state[1])[0]
    with as_given(user):
        grads = run.sampled_bce_bwd(grad, slope, query, user, item, user_id, pos_id, neg_id, item_bias, need)
    return _filled(grads, need, (user, item, item_bias))


@_operator
def shared_bce(
    user: Tensor,
    item: Tensor,
    item_bias: Tensor | None,
    user_id: Tensor,
    pos_id: Tensor,
    neg_id: Tensor,
    log_q: Tensor | None,
    neg_valid: Tensor | None,
    weight: Tensor | None,
    neg_weight: float,
    reduction: str,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss [] or [B]; slopes of the positives [B]; gradients of queries [B, D], negatives [M, D] and their bias [M]."""
    run = launchers("sampled", user, backend)
    user_id, pos_id, neg_id, poison = _sampled_ids(run, user, item, item_bias, user_id, pos_id, neg_id)
    options = (log_q, neg_valid, weight, neg_weight, reduction)
    with as_given(user):
        loss, slope, *grads = run.shared_bce_fwd(user, item, user_id, pos_id, neg_id, item_bias, *options, need)
    grad_query, grad_vectors, grad_shift = _formed(slope, *grads)
    return _poison(loss, poison), slope, grad_query, grad_vectors, grad_shift


@shared_bce.register_fake
def _(user: Tensor, item: Tensor, item_bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    user_id, _, neg_id, _, _, _, _, reduction, need, backend = rest
    query, columns = launchers("sampled", user, backend).shared_bce_forms(reduction)
    (B, D), M, dtype = (len(user_id), user.shape[1]), len(neg_id), _accumulator(user)
    return (
        _fake_loss(B, reduction, user),
        user.new_empty(B, dtype=dtype),
        user.new_empty((B, D) if query and need[0] else 0, dtype=dtype),
        user.new_empty((M, D) if columns and need[1] else 0, dtype=dtype),
        user.new_empty(M if columns and need[2] else 0, dtype=dtype),
    )


@_operator
def shared_bce_backward(
    grad: Tensor,
    state: list[Tensor],
    user: Tensor,
    item: Tensor,
    item_bias: Tensor | None,
    user_id: Tensor,
    pos_id: Tensor,
    neg_id: Tensor,
    log_q: Tensor | None,
    neg_valid: Tensor | None,
    weight: Tensor | None,
    neg_weight: float,
    reduction: str,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of user, item and item_bias; ``state`` is what the forward returned after the loss."""
    run = launchers("sampled", user, backend)
    user_id, pos_id, neg_id, _ = _sampled_ids(run, user, item, item_bias, user_id, pos_id, neg_id, again=True)
    ids, options = (user_id, pos_id, neg_id), (log_q, neg_valid, weight, neg_weight, reduction)
    with as_given(user):
        grads = run.shared_bce_bwd(grad, state[0], user, item, *ids, item_bias, *options, _present(*state[1:]), need)
    return _filled(grads, need, (user, item, item_bias))


def _sampled_ids(
    run: ModuleType,
    user: Tensor,
    item: Tensor,
    item_bias: Tensor | None,
    user_id: Tensor,
    pos_id: Tensor,
    neg_id: Tensor,
    again: bool = False,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None]:
    named = ("user_id", user_id, user), ("pos_id", pos_id, item), ("neg_id", neg_id, item)
    (user_id, pos_id, neg_id), poison = checked(user, run, *named, again=again)
    if not again and synchronising_checks(user.device):
        check_inside("pos_id", pos_id, item_bias)
    return user_id, pos_id, neg_id, poison


@_operator
def catalog_bce(
    query: Tensor,
    item: Tensor,
    item_bias: Tensor | None,
    target_offsets: Tensor,
    target_ids: Tensor,
    weight: Tensor | None,
    neg_weight: float,
    reduction: str,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor]:
    """Loss [] or [B]; gradients of query [B, D], item [N, D] and item_bias [N]."""
    run = launchers("catalog", query, backend)
    target_ids, poison = _target_ids(run, query, item, item_bias, target_offsets, target_ids)
    options = (weight, neg_weight, reduction)
    with as_given(query):
        loss, *grads = run.catalog_bce_fwd(query, item, target_offsets, target_ids, item_bias, *options, need)
    grad_query, grad_item, grad_bias = _formed(query, *grads)
    return _poison(loss, poison), grad_query, grad_item, grad_bias


def _target_ids(
    run: ModuleType,
    query: Tensor,
    item: Tensor,
    item_bias: Tensor | None,
    target_offsets: Tensor,
    target_ids: Tensor,
    again: bool = False,
) -> tuple[Tensor, Tensor | None]:
    (target_ids,), poison = checked(query, run, ("target_ids", target_ids, item), again=again)
    if not again and synchronising_checks(query.device):
        check_rows("target_offsets", target_offsets, "target_ids", target_ids)
        check_inside("target_ids", target_ids, item_bias)
    return target_ids, poison


def _fake_formed(forms: tuple[bool, bool], need: list[bool], query: Tensor, item: Tensor) -> tuple[Tensor, ...]:
    dtype = _accumulator(query)
    return (
        query.new_empty(query.shape if forms[0] and need[0] else 0, dtype=dtype),
        item.new_empty(item.shape if forms[1] and need[1] else 0, dtype=dtype),
        item.new_empty(len(item) if forms[1] and need[2] else 0, dtype=dtype),
    )


@catalog_bce.register_fake
def _(query: Tensor, item: Tensor, item_bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    reduction, need, backend = rest[-3:]
    forms = launchers("catalog", query, backend).catalog_bce_forms(reduction)
    return _fake_loss(len(query), reduction, query), *_fake_formed(forms, need, query, item)


@_operator
def catalog_bce_backward(
    grad: Tensor,
    state: list[Tensor],
    query: Tensor,
    item: Tensor,
    item_bias: Tensor | None,
    target_offsets: Tensor,
    target_ids: Tensor,
    weight: Tensor | None,
    neg_weight: float,
    reduction: str,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, item and item_bias; ``state`` is what the forward returned after the loss."""
    run = launchers("catalog", query, backend)
    target_ids, _ = _target_ids(run, query, item, item_bias, target_offsets, target_ids, again=True)
    targets, options = (target_offsets, target_ids), (weight, neg_weight, reduction)
    with as_given(query):
        grads = run.catalog_bce_bwd(grad, query, item, *targets, item_bias, *options, _present(*state), need)
    return _filled(grads, need, (query, item, item_bias))


@_operator
def catalog_ce(
    query: Tensor,
    item: Tensor,
    item_bias: Tensor | None,
    target_offsets: Tensor,
    target_ids: Tensor,
    weight: Tensor | None,
    reduction: str,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss [] or [B]; log Z [B]; slopes of the targets [T]; gradients of query, item and item_bias."""
    run = launchers("catalog", query, backend)
    target_ids, poison = _target_ids(run, query, item, item_bias, target_offsets, target_ids)
    targets, options = (target_offsets, target_ids), (weight, reduction)
    with as_given(query):
        loss, log_z, slope, *grads = run.catalog_ce_fwd(query, item, *targets, item_bias, *options, need)
    grad_query, grad_item, grad_bias = _formed(query, *grads)
    return _poison(loss, poison), log_z, slope, grad_query, grad_item, grad_bias


@catalog_ce.register_fake
def _(query: Tensor, item: Tensor, item_bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    _, target_ids, _, reduction, need, backend = rest
    forms = launchers("catalog", query, backend).catalog_ce_forms(reduction)
    dtype = _accumulator(query)
    log_z, slope = query.new_empty(len(query), dtype=dtype), query.new_empty(len(target_ids), dtype=dtype)
    return _fake_loss(len(query), reduction, query), log_z, slope, *_fake_formed(forms, need, query, item)


@_operator
def catalog_ce_backward(
    grad: Tensor,
    state: list[Tensor],
    query: Tensor,
    item: Tensor,
    item_bias: Tensor | None,
    target_offsets: Tensor,
    target_ids: Tensor,
    weight: Tensor | None,
    reduction: str,
    need: list[bool],
    backend: str,
) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, item and item_bias; ``state`` is what the forward returned after the loss."""
    run = launchers("catalog", query, backend)
    target_ids, _ = _target_ids(run, query, item, item_bias, target_offsets, target_ids, again=True)
    log_z, slope, *formed = state
    args = (query, item, target_offsets, target_ids, item_bias, weight, reduction, log_z, slope)
    with as_given(query):
        grads = run.catalog_ce_bwd(grad, *args, _present(*formed), need)
    return _filled(grads, need, (query, item, item_bias))


def _setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, ...]) -> None:
    """Save every tensor of a loss and remember its options; all outputs but the loss are state."""
    state = output[1:]
    ctx.mark_non_differentiable(*state)
    ctx.set_materialize_grads(False)  # no zeros for them: the state of a catalogue loss is as large as its gradients
    ctx.states, ctx.options = len(state), [None if isinstance(x, Tensor) else x for x in inputs]
    ctx.save_for_backward(*state, *(x if isinstance(x, Tensor) else None for x in inputs))


def _register_loss(forward: CustomOpDef, backward: CustomOpDef) -> None:
    """Autograd for a loss whose backward takes (upstream gradient, state) and the forward's own arguments."""

    def gradients(run: Callable[..., Any], ctx: Any, grad: Tensor | None) -> tuple[Tensor | None, ...]:
        if grad is None:
            return (None,) * len(ctx.needs_input_grad)
        state, tensors = ctx.saved_tensors[: ctx.states], ctx.saved_tensors[ctx.states :]
        inputs = [option if x is None else x for x, option in zip(tensors, ctx.options, strict=True)]
        need = list(ctx.needs_input_grad[:3])
        inputs[-2] = need
        grads = run(grad, list(state), *inputs)
        return *(g if n else None for g, n in zip(grads, need, strict=True)), *(None,) * (len(inputs) - 3)

    @backward.register_fake
    def _(grad: Tensor, state: list[Tensor], *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return _fake_grads(inputs[-2], inputs[:3])

    class Eager(torch.autograd.Function):
        """The same operator without the dispatcher."""

        @staticmethod
        def forward(*inputs: Any) -> Any:
            return _functions[forward](*inputs)

        @staticmethod
        def setup_context(ctx: Any, inputs: tuple[Any, ...], output: Any) -> None:
            _setup(ctx, inputs, output)

        @staticmethod
        def backward(ctx: Any, grad: Tensor, *_: Tensor) -> Any:
            # create_graph: the operator is the one that refuses a second derivative
            return gradients(backward if torch.is_grad_enabled() else _functions[backward], ctx, grad)

    # apply() reads the signature of forward at every call
    Eager.forward.__signature__ = inspect.signature(Eager.forward)  # type: ignore[attr-defined]
    _eager[forward] = Eager
    forward.register_autograd(lambda ctx, grad, *_: gradients(backward, ctx, grad), setup_context=_setup)
    backward.register_autograd(_no_second_derivative)


_register_loss(sampled_bce, sampled_bce_backward)
_register_loss(shared_bce, shared_bce_backward)
_register_loss(catalog_bce, catalog_bce_backward)
_register_loss(catalog_ce, catalog_ce_backward)


@_registered
def score_topk(
    query: Tensor,
    item: Tensor,
    k: int,
    item_bias: Tensor | None,
    seen_offsets: Tensor | None,
    seen_ids: Tensor | None,
    backend: str,
) -> tuple[Tensor, Tensor]:
    """Scores [B, k]; ids [B, k] int64."""
    run = launchers("topk", query, backend)
    poison = None
    if seen_offsets is not None and seen_ids is not None:
        (seen_ids,), poison = checked(query, run, ("seen_ids", seen_ids, item))
        if synchronising_checks(query.device):
            check_rows("seen_offsets", seen_offsets, "seen_ids", seen_ids)
    with as_given(query):
        scores, ids = run.score_topk(query, item, k, item_bias, seen_offsets, seen_ids)
    return _poison(scores, poison), ids


@score_topk.register_fake
def _(query: Tensor, item: Tensor, k: int, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (len(query), k)
    return query.new_empty(shape, dtype=_accumulator(query)), query.new_empty(shape, dtype=torch.int64)


def _topk_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output)


score_topk.register_autograd(_no_second_derivative, setup_context=_topk_setup)
