"""Operators as PyTorch knows them: registration, fake tensors and autograd.

Every ``recbole_llm_kernels::<op>`` returns its result first, then what its backward needs; ``functional`` checks the
arguments and drops the rest. A gradient that is not there (not wanted, or left to the backward) is an empty tensor.
The launchers of ``torch_ops`` and ``triton_ops`` have the same signatures; ``backends`` chooses between them.
"""

import inspect
from collections.abc import Callable
from types import ModuleType
from typing import Any

import torch
from torch import Tensor
from torch.library import CustomOpDef
from torch.nn.functional import pad

from recbole_llm_kernels.backends import as_given, checked, checked_rows, launchers
from recbole_llm_kernels.checks import check_inside, synchronising_checks
from recbole_llm_kernels.registration import (
    accumulator,
    fake_grads,
    fake_loss,
    filled_grads,
    formed_grads,
    no_second_derivative,
    poisoned,
    present_grads,
    registered,
)
from recbole_llm_kernels.signatures import Sampled, takes, takes_back

_functions: dict[CustomOpDef, Callable[..., Any]] = {}
_eager: dict[CustomOpDef, type[torch.autograd.Function]] = {}


def _operator(function: Callable[..., Any]) -> CustomOpDef:
    """Register ``function`` and keep it beside its operator."""
    operator = registered(function)
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


def _own_negatives(name: str, module: str) -> tuple[CustomOpDef, CustomOpDef]:
    """Make the operators of a loss with negatives of each row's own (neg_id is [B, K]): forward and backward."""

    @takes(Sampled)
    def forward(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Loss [] or [B]; slopes [B, 1 + K]; gradient of the gathered queries [B, D]."""
        run, args, poison = _sampled(module, Sampled(*given))
        with as_given(args.user):
            loss, slope, query = getattr(run, f"{name}_fwd")(args)
        return poisoned(loss, poison), slope, formed_grads(slope, query)[0]

    forward.__name__ = name
    operator = _operator(forward)

    @operator.register_fake
    def _(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
        args = Sampled(*given)
        user, (B, K), dtype = args.user, args.neg_id.shape, accumulator(args.user)
        grad_query = user.new_empty((B, user.shape[1]) if args.need[0] else 0, dtype=dtype)
        return fake_loss(B, args.reduction, user), user.new_empty(B, K + 1, dtype=dtype), grad_query

    @takes_back(forward)
    def backward(grad: Tensor, state: list[Tensor], *given: Any) -> tuple[Tensor, Tensor, Tensor]:
        """Gradients of user, item and item_bias; ``state`` is what the forward returned after the loss."""
        run, args, _ = _sampled(module, Sampled(*given), again=True)
        with as_given(args.user):
            grads = getattr(run, f"{name}_bwd")(grad, state[0], present_grads(state[1])[0], args)
        return filled_grads(grads, args.need, (args.user, args.item, args.item_bias))

    backward.__name__ = f"{name}_backward"
    return operator, _operator(backward)


sampled_bce, sampled_bce_backward = _own_negatives("sampled_bce", "sampled")
sampled_ce, sampled_ce_backward = _own_negatives("sampled_ce", "sampled_ce")


@_operator
@takes(Sampled)
def shared_bce(*given: Any) -> tuple[Tensor, Tensor, Tensor, Tensor, Tensor]:
    """Loss [] or [B]; slopes of the positives [B]; gradients of queries [B, D], negatives [M, D] and their bias [M]."""
    run, args, poison = _sampled("sampled", Sampled(*given))
    with as_given(args.user):
        loss, slope, *grads = run.shared_bce_fwd(args)
    grad_query, grad_vectors, grad_shift = formed_grads(slope, *grads)
    return poisoned(loss, poison), slope, grad_query, grad_vectors, grad_shift


@shared_bce.register_fake
def _(*given: Any) -> tuple[Tensor, ...]:
    args = Sampled(*given)
    user, need = args.user, args.need
    query, columns = launchers("sampled", user, args.backend).shared_bce_forms(args.reduction)
    (B, D), M, dtype = (len(args.user_id), user.shape[1]), len(args.neg_id), accumulator(user)
    return (
        fake_loss(B, args.reduction, user),
        user.new_empty(B, dtype=dtype),
        user.new_empty((B, D) if query and need[0] else 0, dtype=dtype),
        user.new_empty((M, D) if columns and need[1] else 0, dtype=dtype),
        user.new_empty(M if columns and need[2] else 0, dtype=dtype),
    )


@_operator
@takes_back(_functions[shared_bce])
def shared_bce_backward(grad: Tensor, state: list[Tensor], *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of user, item and item_bias; ``state`` is what the forward returned after the loss."""
    run, args, _ = _sampled("sampled", Sampled(*given), again=True)
    with as_given(args.user):
        grads = run.shared_bce_bwd(grad, state[0], present_grads(*state[1:]), args)
    return filled_grads(grads, args.need, (args.user, args.item, args.item_bias))


@_operator
@takes(Sampled)
def shared_ce(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Loss [] or [B]; slopes of the positives [B]; log Z of the positive and the live negatives [B]."""
    run, args, poison = _sampled("sampled_ce", Sampled(*given))
    with as_given(args.user):
        loss, slope, log_z = run.shared_ce_fwd(args)
    return poisoned(loss, poison), slope, log_z


@shared_ce.register_fake
def _(*given: Any) -> tuple[Tensor, Tensor, Tensor]:
    args = Sampled(*given)
    B, dtype = len(args.user_id), accumulator(args.user)
    slope = args.user.new_empty(B, dtype=dtype)
    return fake_loss(B, args.reduction, args.user), slope, torch.empty_like(slope)


@_operator
@takes_back(_functions[shared_ce])
def shared_ce_backward(grad: Tensor, state: list[Tensor], *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of user, item and item_bias; ``state`` is what the forward returned after the loss."""
    run, args, _ = _sampled("sampled_ce", Sampled(*given), again=True)
    with as_given(args.user):
        grads = run.shared_ce_bwd(grad, *state, args)
    return filled_grads(grads, args.need, (args.user, args.item, args.item_bias))


def _sampled(module: str, args: Sampled, again: bool = False) -> tuple[ModuleType, Sampled, Tensor | None]:
    """Choose the launchers and check the ids; ``again`` in a backward, whose forward has checked them."""
    run = launchers(module, args.user, args.backend)
    named = ("user_id", args.user_id, args.user), ("pos_id", args.pos_id, args.item), ("neg_id", args.neg_id, args.item)
    (user_id, pos_id, neg_id), poison = checked(args.user, run, *named, again=again)
    if not again and synchronising_checks(args.user.device):
        check_inside("pos_id", pos_id, args.item_bias)
    return run, args._replace(user_id=user_id, pos_id=pos_id, neg_id=neg_id), poison


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
    target_offsets, target_ids, poison = _targets(run, item, item_bias, target_offsets, target_ids)
    options = (weight, neg_weight, reduction)
    with as_given(query):
        loss, *grads = run.catalog_bce_fwd(query, item, target_offsets, target_ids, item_bias, *options, need)
    grad_query, grad_item, grad_bias = formed_grads(query, *grads)
    return poisoned(loss, poison), grad_query, grad_item, grad_bias


def _targets(
    run: ModuleType,
    item: Tensor,
    item_bias: Tensor | None,
    target_offsets: Tensor,
    target_ids: Tensor,
    again: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    lists = ("target_offsets", target_offsets, "target_ids", target_ids)
    target_offsets, target_ids, poison = checked_rows(run, *lists, item, again=again)
    if not again and synchronising_checks(item.device):
        check_inside("target_ids", target_ids, item_bias)
    return target_offsets, target_ids, poison


def _fake_formed(forms: tuple[bool, bool], need: list[bool], query: Tensor, item: Tensor) -> tuple[Tensor, ...]:
    dtype = accumulator(query)
    return (
        query.new_empty(query.shape if forms[0] and need[0] else 0, dtype=dtype),
        item.new_empty(item.shape if forms[1] and need[1] else 0, dtype=dtype),
        item.new_empty(len(item) if forms[1] and need[2] else 0, dtype=dtype),
    )


@catalog_bce.register_fake
def _(query: Tensor, item: Tensor, item_bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    reduction, need, backend = rest[-3:]
    forms = launchers("catalog", query, backend).catalog_bce_forms(reduction)
    return fake_loss(len(query), reduction, query), *_fake_formed(forms, need, query, item)


@_operator
@takes_back(_functions[catalog_bce])
def catalog_bce_backward(grad: Tensor, state: list[Tensor], *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, item and item_bias; ``state`` is what the forward returned after the loss."""
    query, item, item_bias, *targets, weight, neg_weight, reduction, need, backend = given
    run = launchers("catalog", query, backend)
    if not all(run.catalog_bce_forms(reduction)):  # otherwise the forward has used them up
        *targets, _ = _targets(run, item, item_bias, *targets, again=True)  # type: ignore[misc]  # of a longer tuple
    options = (weight, neg_weight, reduction)
    with as_given(query):
        grads = run.catalog_bce_bwd(grad, query, item, *targets, item_bias, *options, present_grads(*state), need)
    return filled_grads(grads, need, (query, item, item_bias))


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
    """Loss [] or [B]; what the slopes need of Z, [B]; slopes of the targets [T]; gradients of query, item and item_bias."""
    run, given = launchers("catalog", query, backend), len(target_ids)
    *targets, poison = _targets(run, item, item_bias, target_offsets, target_ids)
    with as_given(query):
        loss, log_z, slope, *grads = run.catalog_ce_fwd(query, item, *targets, item_bias, weight, reduction, need)
    if len(slope) < given:  # repeats were left out
        slope = pad(slope, (0, given - len(slope)))
    grad_query, grad_item, grad_bias = formed_grads(query, *grads)
    return poisoned(loss, poison), log_z, slope, grad_query, grad_item, grad_bias


@catalog_ce.register_fake
def _(query: Tensor, item: Tensor, item_bias: Tensor | None, *rest: Any) -> tuple[Tensor, ...]:
    _, target_ids, _, reduction, need, backend = rest
    forms = launchers("catalog", query, backend).catalog_ce_forms(reduction)
    dtype = accumulator(query)
    log_z, slope = query.new_empty(len(query), dtype=dtype), query.new_empty(len(target_ids), dtype=dtype)
    return fake_loss(len(query), reduction, query), log_z, slope, *_fake_formed(forms, need, query, item)


@_operator
@takes_back(_functions[catalog_ce])
def catalog_ce_backward(grad: Tensor, state: list[Tensor], *given: Any) -> tuple[Tensor, Tensor, Tensor]:
    """Gradients of query, item and item_bias; ``state`` is what the forward returned after the loss."""
    query, item, item_bias, *targets, weight, reduction, need, backend = given
    run = launchers("catalog", query, backend)
    *targets, _ = _targets(run, item, item_bias, *targets, again=True)  # type: ignore[misc]  # of a longer tuple
    log_z, slope, *formed = state
    args = (query, item, *targets, item_bias, weight, reduction, log_z, slope[: len(targets[1])])
    with as_given(query):
        grads = run.catalog_ce_bwd(grad, *args, present_grads(*formed), need)
    return filled_grads(grads, need, (query, item, item_bias))


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
        saved = (
            ctx.saved_tensors
        )  # read once: activation checkpointing recomputes at the first look and forbids another
        state, tensors = saved[: ctx.states], saved[ctx.states :]
        given = [option if x is None else x for x, option in zip(tensors, ctx.options, strict=True)]
        need = list(ctx.needs_input_grad[:3])
        inputs = [*given[:-2], need, given[-1]]
        grads = run(grad, list(state), *inputs)
        return *(g if n else None for g, n in zip(grads, need, strict=True)), *(None,) * (len(inputs) - 3)

    @backward.register_fake
    def _(grad: Tensor, state: list[Tensor], *inputs: Any) -> tuple[Tensor, Tensor, Tensor]:
        return fake_grads(inputs[-2], inputs[:3])

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
    backward.register_autograd(no_second_derivative)


_register_loss(sampled_bce, sampled_bce_backward)
_register_loss(sampled_ce, sampled_ce_backward)
_register_loss(shared_ce, shared_ce_backward)
_register_loss(shared_bce, shared_bce_backward)
_register_loss(catalog_bce, catalog_bce_backward)
_register_loss(catalog_ce, catalog_ce_backward)


@registered
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
        lists = ("seen_offsets", seen_offsets, "seen_ids", seen_ids)
        seen_offsets, seen_ids, poison = checked_rows(run, *lists, item)
    with as_given(query):
        scores, ids = run.score_topk(query, item, k, item_bias, seen_offsets, seen_ids)
    if poison is None:
        return scores, ids
    return scores + poison[:, None].to(scores.dtype), ids.masked_fill(poison.isnan()[:, None], -1)


@score_topk.register_fake
def _(query: Tensor, item: Tensor, k: int, *rest: Any) -> tuple[Tensor, Tensor]:
    shape = (len(query), k)
    return query.new_empty(shape, dtype=accumulator(query)), query.new_empty(shape, dtype=torch.int64)


def _topk_setup(ctx: Any, inputs: tuple[Any, ...], output: tuple[Tensor, Tensor]) -> None:
    ctx.mark_non_differentiable(*output)


score_topk.register_autograd(no_second_derivative, setup_context=_topk_setup)
