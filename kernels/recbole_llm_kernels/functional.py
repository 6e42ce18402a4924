"""The public functions: checked arguments in, differentiable tensors out.

Common to all of them:

- A score is s = <q, w_i> + bias_i. An item whose bias is -inf is not in the catalogue: it has no loss, no gradient and
  no place in a top-k; as a target it is an error on a CPU and a NaN loss on a GPU.
- Matrices are float32, bfloat16, float16 or, on the torch backend, float64, on one device and of one dtype; under
  autocast they are cast to its dtype. Sums and losses are kept in float32 (float64); gradients stay in float32, are
  multiplied by the upstream gradient and then rounded once to the input's dtype. Float32 products follow
  ``torch.get_float32_matmul_precision()``.
- Ids are int32 or int64. An id out of range is an IndexError on a CPU and with RECBOLE_LLM_KERNELS_DEBUG=1; on a GPU
  the access is masked and the loss is NaN, without a synchronisation.
- Row lists (targets, seen items) ascend within a row; equal neighbours count once. A descending pair is a ValueError
  where ids are looked at; elsewhere its row is NaN.
- Results are bitwise repeatable for a device, dtype and thread count. First derivatives only.
- ``backend="auto"`` goes by the device of the tensors, or by RECBOLE_LLM_KERNELS_BACKEND where that is set.
"""

from typing import NamedTuple

import torch
from torch import Tensor

from recbole_llm_kernels import arguments, ops, pair_ops

__all__ = ["TopK", "catalog_bce", "catalog_ce", "pair_bce", "pair_dot", "pair_sigmoid", "score_topk"]


class TopK(NamedTuple):
    """The best items of every query."""

    scores: Tensor  # [B, k] float32 (float64 for float64), descending; -inf where no candidate is left
    ids: Tensor  # [B, k] int64; -1 where no candidate is left


def pair_dot(
    user: Tensor,
    item: Tensor,
    user_id: Tensor,
    item_id: Tensor,
    *,
    item_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute the logits of (user, item) pairs.

    Computes, without allocating a ``[P, D]`` tensor, ``(user[user_id] * item[item_id]).sum(-1) + item_bias[item_id]``.

    Args:
        user: user rows, ``[n_users, D]``; a table or a tower's output.
        item: item rows, ``[N, D]``.
        user_id: rows of ``user``, ``[P]``.
        item_id: rows of ``item``, ``[P]``.
        item_bias: added to every item's logits, ``[N]``; -inf: not in the catalogue.
        backend: "auto", "triton" or "torch".

    Returns:
        float32 logits, ``[P]``; -inf, with gradient 0, where the item is not in the catalogue.

    Raises:
        ValueError: an argument's shape, dtype or device does not fit; names it, what was given and what is expected.
        IndexError: an id is out of range (CPU, or debug mode).

    Example:
        >>> user, item = torch.tensor([[1.0, 0.0]]), torch.tensor([[2.0, 5.0], [3.0, 5.0]])
        >>> pair_dot(user, item, torch.tensor([0, 0]), torch.tensor([0, 1])).tolist()
        [2.0, 3.0]
    """
    user, item, item_bias = arguments.matrices("user", user, item, item_bias)
    arguments.check_backend(backend)
    user_id, item_id = arguments.pair_ids(user_id, item_id, user)
    return pair_ops.pair_dot(user, item, user_id, item_id, item_bias, backend)


def pair_sigmoid(
    user: Tensor,
    item: Tensor,
    user_id: Tensor,
    item_id: Tensor,
    *,
    item_bias: Tensor | None = None,
    backend: str = "auto",
) -> Tensor:
    """Compute the probabilities P(i|u) = sigma(<user_u, item_i> + bias_i) of (user, item) pairs.

    As ``torch.sigmoid(pair_dot(...))``, but a confident pair's slope keeps its relative precision: sigma(s) sigma(-s)
    instead of p (1 - p), which is 0 from s = 17 on.

    Args:
        user: user rows, ``[n_users, D]``.
        item: item rows, ``[N, D]``.
        user_id: rows of ``user``, ``[P]``.
        item_id: rows of ``item``, ``[P]``.
        item_bias: added to every item's logits, ``[N]``; -inf: not in the catalogue.
        backend: "auto", "triton" or "torch".

    Returns:
        float32 probabilities, ``[P]``; 0, with gradient 0, where the item is not in the catalogue.

    Raises:
        ValueError: an argument's shape, dtype or device does not fit.
        IndexError: an id is out of range (CPU, or debug mode).

    Example:
        >>> user, item = torch.tensor([[1.0, 0.0]]), torch.tensor([[0.0, 5.0]])
        >>> pair_sigmoid(user, item, torch.tensor([0]), torch.tensor([0])).tolist()
        [0.5]
    """
    user, item, item_bias = arguments.matrices("user", user, item, item_bias)
    arguments.check_backend(backend)
    user_id, item_id = arguments.pair_ids(user_id, item_id, user)
    return pair_ops.pair_sigmoid(user, item, user_id, item_id, item_bias, backend)[0]


def pair_bce(
    user: Tensor,
    item: Tensor,
    user_id: Tensor,
    item_id: Tensor,
    label: Tensor,
    *,
    item_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Compute the binary cross-entropy of (user, item) pairs, fused from lookup to loss.

    Computes, without allocating a ``[P, D]`` tensor::

        s = (user[user_id] * item[item_id]).sum(-1) + item_bias[item_id]
        loss = (weight * F.binary_cross_entropy_with_logits(s, label, reduction="none")).mean()

    Args:
        user: user rows, ``[n_users, D]``.
        item: item rows, ``[N, D]``.
        user_id: rows of ``user``, ``[P]``; repeats are summed in a fixed order.
        item_id: rows of ``item``, ``[P]``.
        label: targets in [0, 1], ``[P]``; bool, integer or floating point.
        item_bias: added to every item's logits, ``[N]``; -inf: not in the catalogue, the pair has no loss.
        weight: factor of every pair's loss, ``[P]``.
        reduction: "mean" (over P, with or without ``weight``), "sum" or "none". The mean of no pairs is NaN.
        backend: "auto", "triton" or "torch".

    Returns:
        float32 loss in nats: a scalar, or ``[P]`` for "none".

    Raises:
        ValueError: an argument's shape, dtype or device does not fit; or a pair with a label above 0 names an item
            that is not in the catalogue (CPU, or debug mode).
        IndexError: an id is out of range (CPU, or debug mode).

    Example:
        >>> user, item = torch.tensor([[0.0]]), torch.tensor([[1.0], [1.0]])
        >>> loss = pair_bce(user, item, torch.tensor([0, 0]), torch.tensor([0, 1]), torch.tensor([1.0, 0.0]))
        >>> round(float(loss), 4)
        0.6931
    """
    user, item, item_bias = arguments.matrices("user", user, item, item_bias)
    arguments.options(reduction, backend)
    user_id, item_id = arguments.pair_ids(user_id, item_id, user)
    arguments.vector("label", label, len(user_id), "one per pair", user)
    weight = arguments.weights(weight, len(user_id), "one per pair", user)
    return pair_ops.pair_bce(user, item, user_id, item_id, item_bias, label.contiguous(), weight, reduction, backend)[0]


def catalog_bce(
    query: Tensor,
    item: Tensor,
    target_offsets: Tensor,
    target_ids: Tensor,
    *,
    item_bias: Tensor | None = None,
    weight: Tensor | None = None,
    neg_weight: float = 1.0,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Compute the binary cross-entropy of every query against the whole catalogue.

    Row loss: sum over its targets of softplus(-s) + neg_weight * sum over all other items of softplus(s). Computes,
    without allocating the ``[B, N]`` logits, for ``neg_weight=1``::

        s = query @ item.T + item_bias
        F.binary_cross_entropy_with_logits(s, multi_hot, reduction="none").sum(1).mean()

    Args:
        query: one vector per row, ``[B, D]``.
        item: item rows, ``[N, D]``.
        target_offsets: where each row's targets begin in ``target_ids``, ``[B + 1]``, from 0 to T.
        target_ids: the rows' positive items, ``[T]``, ascending within a row; equal neighbours count once.
        item_bias: added to every item's logits, ``[N]``; -inf: not in the catalogue.
        weight: factor of every row's loss, ``[B]``.
        neg_weight: factor of the negatives' part.
        reduction: "mean" (over B, with or without ``weight``), "sum" or "none". The mean of no rows is NaN.
        backend: "auto", "triton" or "torch".

    Returns:
        float32 loss in nats: a scalar, or ``[B]`` for "none".

    Raises:
        ValueError: an argument's shape, dtype or device does not fit; or (CPU, or debug mode) offsets or targets are
            not in order, or a target is not in the catalogue.
        IndexError: a target is out of range (CPU, or debug mode).

    Example:
        >>> query, item = torch.tensor([[1.0]]), torch.tensor([[0.0], [0.0], [0.0]])
        >>> round(float(catalog_bce(query, item, torch.tensor([0, 1]), torch.tensor([2]))), 4)  # 3 log 2
        2.0794
    """
    query, item, item_bias = arguments.matrices("query", query, item, item_bias)
    arguments.options(reduction, backend)
    neg_weight = arguments.negative_weight(neg_weight)
    targets = arguments.row_lists("target_offsets", target_offsets, "target_ids", target_ids, query)
    weight = arguments.weights(weight, len(query), "one per row", query)
    need = arguments.need(query, item, item_bias)
    options = (weight, neg_weight, reduction, need, backend)
    return ops.loss(ops.catalog_bce, query, item, item_bias, *targets, *options)


def catalog_ce(
    query: Tensor,
    item: Tensor,
    target_offsets: Tensor,
    target_ids: Tensor,
    *,
    item_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
    backend: str = "auto",
) -> Tensor:
    """Compute the softmax cross-entropy of every query against the whole catalogue.

    Row loss: -sum over its targets of log softmax(s); equals ``F.cross_entropy(query @ item.T + item_bias, multi_hot)``
    without allocating the ``[B, N]`` logits. A row without targets gives 0.

    Args:
        query: one vector per row, ``[B, D]``.
        item: item rows, ``[N, D]``.
        target_offsets: where each row's targets begin in ``target_ids``, ``[B + 1]``, from 0 to T.
        target_ids: the rows' positive items, ``[T]``, ascending within a row; equal neighbours count once.
        item_bias: added to every item's logits, ``[N]``; -inf: not in the catalogue.
        weight: factor of every row's loss, ``[B]``.
        reduction: "mean" (over B, with or without ``weight``), "sum" or "none". The mean of no rows is NaN.
        backend: "auto", "triton" or "torch".

    Returns:
        float32 loss in nats: a scalar, or ``[B]`` for "none".

    Raises:
        ValueError: an argument's shape, dtype or device does not fit; or (CPU, or debug mode) offsets or targets are
            not in order, or a target is not in the catalogue.
        IndexError: a target is out of range (CPU, or debug mode).

    Example:
        >>> query, item = torch.tensor([[1.0]]), torch.tensor([[0.0], [0.0], [0.0]])
        >>> round(float(catalog_ce(query, item, torch.tensor([0, 1]), torch.tensor([2]))), 4)  # log 3
        1.0986
    """
    query, item, item_bias = arguments.matrices("query", query, item, item_bias)
    arguments.options(reduction, backend)
    targets = arguments.row_lists("target_offsets", target_offsets, "target_ids", target_ids, query)
    weight = arguments.weights(weight, len(query), "one per row", query)
    need = arguments.need(query, item, item_bias)
    return ops.loss(ops.catalog_ce, query, item, item_bias, *targets, weight, reduction, need, backend)


def score_topk(
    query: Tensor,
    item: Tensor,
    k: int,
    *,
    item_bias: Tensor | None = None,
    seen_offsets: Tensor | None = None,
    seen_ids: Tensor | None = None,
    backend: str = "auto",
) -> TopK:
    """Find the ``k`` best unseen items of every query, exactly.

    As masking seen items in ``query @ item.T + item_bias`` and ``torch.topk``, without allocating the ``[B, N]``
    scores; equal scores are ordered by the smaller id. Not differentiable.

    Args:
        query: one vector per row, ``[B, D]``.
        item: item rows, ``[N, D]``.
        k: places per row; may exceed N.
        item_bias: added to every item's scores, ``[N]``; -inf: not in the catalogue.
        seen_offsets: where each row's seen items begin in ``seen_ids``, ``[B + 1]``; None: nothing is seen.
        seen_ids: items that get no place in the row, ascending within a row; equal neighbours count once.
        backend: "auto", "triton" or "torch".

    Returns:
        Scores and ids, ``[B, k]`` each; where a row has fewer candidates, -inf and -1. On a GPU a row whose seen ids
        descend or are out of range holds NaN and -1.

    Raises:
        ValueError: an argument's shape, dtype or device does not fit; or (CPU, or debug mode) seen ids are not in order.
        IndexError: a seen id is out of range (CPU, or debug mode).

    Example:
        >>> query, item = torch.tensor([[1.0]]), torch.tensor([[1.0], [3.0], [2.0]])
        >>> best = score_topk(query, item, 2, seen_offsets=torch.tensor([0, 1]), seen_ids=torch.tensor([1]))
        >>> best.ids.tolist(), best.scores.tolist()
        ([[2, 0]], [[2.0, 1.0]])
    """
    query, item, item_bias = arguments.matrices("query", query, item, item_bias)
    arguments.check_backend(backend)
    if isinstance(k, bool) or not isinstance(k, (int, torch.SymInt)) or k < 1:
        raise ValueError(f"k must be a whole number of at least 1, got {k!r}")
    if (seen_offsets is None) != (seen_ids is None):
        given, missing = ("seen_ids", "seen_offsets") if seen_offsets is None else ("seen_offsets", "seen_ids")
        raise ValueError(f"{given} was given without {missing}; both describe the seen items, give both or neither")
    if seen_offsets is not None and seen_ids is not None:
        seen_offsets, seen_ids = arguments.row_lists("seen_offsets", seen_offsets, "seen_ids", seen_ids, query)
    with torch.no_grad():
        return TopK(*ops.score_topk(query, item, k, item_bias, seen_offsets, seen_ids, backend))
