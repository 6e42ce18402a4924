"""The losses of a positive against sampled negatives; what all operators promise stands in ``functional``."""

from typing import Any

import torch
from torch import Tensor

from recbole_llm_kernels import arguments, ops

__all__ = ["sampled_bce", "sampled_ce", "valid_negatives"]


def sampled_bce(
    user: Tensor,
    item: Tensor,
    user_id: Tensor,
    pos_id: Tensor,
    neg_id: Tensor,
    *,
    item_bias: Tensor | None = None,
    weight: Tensor | None = None,
    neg_weight: float = 1.0,
    log_q: Tensor | None = None,
    neg_valid: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Compute the binary cross-entropy of one positive against sampled negatives.

    Row loss: softplus(-s_pos) + neg_weight * sum over live k of softplus(s_k), without a ``[B, K, D]`` tensor, nor, for
    shared negatives, a ``[B, M]`` one. A negative equal to its row's positive is never live.

    Args:
        user: user rows, ``[n_users, D]``.
        item: item rows, ``[N, D]``.
        user_id: rows of ``user``, ``[B]``.
        pos_id: each row's positive item, ``[B]``.
        neg_id: negative items, ``[B, K]`` for each row its own, or ``[M]`` shared by all rows. Repeats count again.
        item_bias: added to every item's logits, ``[N]``; -inf: not in the catalogue, never a live negative.
        weight: factor of every row's loss, ``[B]``.
        neg_weight: factor of the negatives' part.
        log_q: log of the expected count of every item among a row's negatives, ``[N]``; subtracted from the logits of
            positives and negatives (the sampled-softmax correction of Bengio and Senecal, 2008).
        neg_valid: bool, True where a negative counts: shaped as ``neg_id``, or ``[B, M]`` with shared negatives.
        reduction: "mean" (over B, with or without ``weight``), "sum" or "none". The mean of no rows is NaN.
        backend: "auto", "triton" or "torch".

    Returns:
        float32 loss in nats: a scalar, or ``[B]`` for "none".

    Raises:
        ValueError: an argument's shape, dtype or device does not fit; or a positive is not in the catalogue (CPU, or
            debug mode).
        IndexError: an id is out of range (CPU, or debug mode).

    Example:
        >>> user, item = torch.tensor([[1.0]]), torch.tensor([[2.0], [-2.0]])
        >>> loss = sampled_bce(user, item, torch.tensor([0]), torch.tensor([0]), torch.tensor([[1]]))
        >>> round(float(loss), 4)  # 2 log(1 + exp(-2))
        0.2539
    """
    neg_weight = arguments.negative_weight(neg_weight)
    given = (user, item, user_id, pos_id, neg_id, item_bias, weight, neg_weight, log_q, neg_valid, reduction, backend)
    return _loss(ops.sampled_bce, ops.shared_bce, *given)


def sampled_ce(
    user: Tensor,
    item: Tensor,
    user_id: Tensor,
    pos_id: Tensor,
    neg_id: Tensor,
    *,
    item_bias: Tensor | None = None,
    weight: Tensor | None = None,
    log_q: Tensor | None = None,
    neg_valid: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Compute the softmax cross-entropy of one positive against sampled negatives: sampled softmax.

    Row loss: log(exp(s_pos) + sum over live k of exp(s_k)) - s_pos. Computes, without a ``[B, K, D]`` tensor, nor, for
    shared negatives, a ``[B, M]`` one, for ``log_q`` and masks left out::

        s = torch.cat([positive_logits[:, None], negative_logits], 1)
        F.cross_entropy(s, torch.zeros(len(s), dtype=torch.long))

    In-batch negatives are shared ones: ``neg_id=pos_id``, with ``log_q`` the log of each item's share of the
    interactions, and ``neg_valid=valid_negatives(pos_id, offsets, ids)`` for negatives that the row's user likes. A
    negative equal to its row's positive is never live, so a batch that holds an item twice is no mistake.

    Args:
        user: user rows, ``[n_users, D]``.
        item: item rows, ``[N, D]``.
        user_id: rows of ``user``, ``[B]``.
        pos_id: each row's positive item, ``[B]``.
        neg_id: negative items, ``[B, K]`` for each row its own, or ``[M]`` shared by all rows. Repeats count again.
        item_bias: added to every item's logits, ``[N]``; -inf: not in the catalogue, never a live negative.
        weight: factor of every row's loss, ``[B]``.
        log_q: log of the expected count of every item among a row's negatives, ``[N]``; subtracted from the logits of
            positives and negatives. With it the loss estimates the softmax over the whole catalogue.
        neg_valid: bool, True where a negative counts: shaped as ``neg_id``, or ``[B, M]`` with shared negatives.
        reduction: "mean" (over B, with or without ``weight``), "sum" or "none". The mean of no rows is NaN.
        backend: "auto", "triton" or "torch".

    Returns:
        float32 loss in nats: a scalar, or ``[B]`` for "none"; 0 for a row without a live negative.

    Raises:
        ValueError: an argument's shape, dtype or device does not fit; or a positive is not in the catalogue (CPU, or
            debug mode).
        IndexError: an id is out of range (CPU, or debug mode).

    Example:
        >>> user, item = torch.tensor([[1.0]]), torch.tensor([[2.0], [-2.0]])
        >>> loss = sampled_ce(user, item, torch.tensor([0]), torch.tensor([0]), torch.tensor([[1]]))
        >>> round(float(loss), 4)  # log(1 + exp(-4))
        0.0181
    """
    given = (user, item, user_id, pos_id, neg_id, item_bias, weight, 1.0, log_q, neg_valid, reduction, backend)
    return _loss(ops.sampled_ce, ops.shared_ce, *given)


def valid_negatives(neg_id: Tensor, offsets: Tensor, ids: Tensor) -> Tensor:
    """Mark the negatives that are not among their row's own items: ``neg_valid`` without the false negatives.

    Args:
        neg_id: negatives, ``[B, K]`` for each row its own, or ``[M]`` shared by all rows.
        offsets: where each row's items begin in ``ids``, ``[B + 1]``.
        ids: the rows' items, ``[T]``, ascending within a row.

    Returns:
        bool, ``[B, K]`` or ``[B, M]``; False where a row's list names the negative.

    Raises:
        ValueError: a shape or dtype does not fit.

    Example:
        >>> valid_negatives(torch.tensor([4, 7]), torch.tensor([0, 2, 2]), torch.tensor([1, 7])).tolist()
        [[True, False], [True, True]]
    """
    arguments.ids("neg_id", neg_id, neg_id, dims=(1, 2))
    arguments.ids("offsets", offsets, neg_id)
    arguments.ids("ids", ids, neg_id)
    B = len(offsets) - 1
    if B < 0 or (neg_id.ndim == 2 and len(neg_id) != B):
        raise ValueError(
            f"offsets must have one entry per row of neg_id and one more, got {len(offsets)} for {tuple(neg_id.shape)}"
        )
    if not len(ids):
        return torch.ones(B, neg_id.shape[-1], dtype=torch.bool, device=neg_id.device)
    low, high = offsets[:-1, None].long(), offsets[1:, None].long()
    wanted = neg_id.expand(B, -1) if neg_id.ndim == 1 else neg_id
    # every row searches its own stretch of the list
    low, high = low.expand(wanted.shape), high.expand(wanted.shape)
    end = high
    for _ in range(len(ids).bit_length()):
        middle = (low + high) // 2
        before = (low < high) & (ids[middle.clamp(max=len(ids) - 1)] < wanted)
        low, high = torch.where(before, middle + 1, low), torch.where(before, high, torch.minimum(high, middle))
    return ~((low < end) & (ids[low.clamp(max=len(ids) - 1)] == wanted))


def _loss(
    own: Any,
    shared: Any,
    user: Tensor,
    item: Tensor,
    user_id: Tensor,
    pos_id: Tensor,
    neg_id: Tensor,
    item_bias: Tensor | None,
    weight: Tensor | None,
    neg_weight: float,
    log_q: Tensor | None,
    neg_valid: Tensor | None,
    reduction: str,
    backend: str,
) -> Tensor:
    """Check the arguments and call the operator for negatives of each row's own, or for shared ones."""
    user, item, item_bias = arguments.matrices("user", user, item, item_bias)
    arguments.options(reduction, backend)
    arguments.ids("user_id", user_id, user)
    arguments.ids("pos_id", pos_id, user)
    B = len(user_id)
    if len(pos_id) != B:
        raise ValueError(f"user_id and pos_id must have one entry per row, got {B} and {len(pos_id)}")
    arguments.ids("neg_id", neg_id, user, dims=(1, 2))
    if neg_id.ndim == 2 and len(neg_id) != B:
        raise ValueError(
            f"neg_id must be [B, K] with B = {B} as user_id, or [M] shared by all rows, got {tuple(neg_id.shape)}"
        )
    if log_q is not None:
        arguments.vector("log_q", log_q, len(item), "one per item", user)
        log_q = log_q.contiguous()
    if neg_valid is not None:
        shapes = [neg_id.shape] if neg_id.ndim == 2 else [neg_id.shape, (B, len(neg_id))]
        if neg_valid.dtype != torch.bool or tuple(neg_valid.shape) not in [tuple(s) for s in shapes]:
            raise ValueError(
                f"neg_valid must be bool of shape {' or '.join(str(tuple(s)) for s in shapes)}, "
                f"got {neg_valid.dtype} {tuple(neg_valid.shape)}"
            )
        arguments.check_device("neg_valid", neg_valid, user)
        neg_valid = neg_valid.contiguous()
    weight = arguments.weights(weight, B, "one per row", user)
    ids = arguments.one_id_type(user_id, pos_id, neg_id)
    op = own if neg_id.ndim == 2 else shared
    need = arguments.need(user, item, item_bias)
    return ops.loss(op, user, item, item_bias, *ids, log_q, neg_valid, weight, neg_weight, reduction, need, backend)
