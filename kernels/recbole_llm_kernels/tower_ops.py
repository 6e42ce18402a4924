"""What a two-tower model computes beside the scores: pooled histories, rows of a table, a loss from the parts of a query.

Each function chooses its implementation by the tensors' device. On a CPU the gradients order ids by counting; on a GPU
histories are pooled in Triton, and PyTorch's own operations do the rest.
"""

from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_llm_kernels import arguments
from recbole_llm_kernels.backends import default_backend, launchers
from recbole_llm_kernels.sampled_losses import sampled_bce
from recbole_llm_kernels.torch_ops import pool as on_cpu
from recbole_llm_kernels.torch_ops.sampled import has_sampled_dots
from recbole_llm_kernels.torch_ops.scaled_bce import scaled_sampled_bce as fused_bce

__all__ = ["fuses_scaled_bce", "pool_rows", "pool_rows_without_own", "scaled_rows", "scaled_sampled_bce"]


def pool_rows(vectors: Tensor, offsets: Tensor, ids: Tensor, weights: Tensor, backend: str = "auto") -> Tensor:
    """Weighted sums of the rows that ragged lists name, differentiable in ``vectors``.

    Args:
        vectors: ``[N, D]``.
        offsets: where each list begins in ``ids``, ``[B + 1]`` int64, from 0.
        ids: rows of ``vectors``, ``[E]`` int64.
        weights: factor of each entry, ``[E]`` float32 (float64 with float64 vectors).
        backend: "auto", "triton" or "torch".

    Returns:
        ``[B, D]`` in the dtype of ``vectors``; 0 for an empty list, NaN for one with an id out of range on a GPU.

    Raises:
        ValueError: ``backend`` is unknown, or cannot run on these tensors.

    Example:
        >>> table = torch.tensor([[1.0, 0.0], [0.0, 2.0]])
        >>> pool_rows(table, torch.tensor([0, 2, 2]), torch.tensor([0, 1]), torch.ones(2)).tolist()
        [[1.0, 2.0], [0.0, 0.0]]
    """
    arguments.check_backend(backend)
    return cast(Tensor, _Pool.apply(vectors, offsets, ids, weights, backend))


class _Pool(torch.autograd.Function):
    @staticmethod
    def forward(ctx: Any, vectors: Tensor, offsets: Tensor, ids: Tensor, weights: Tensor, backend: str) -> Tensor:
        ctx.save_for_backward(offsets, ids, weights)
        ctx.run, ctx.rows, ctx.dtype = launchers("pool", vectors, backend), len(vectors), vectors.dtype
        return cast(Tensor, ctx.run.pool_fwd(vectors.contiguous(), offsets, ids, weights))

    @staticmethod
    @torch.autograd.function.once_differentiable
    def backward(ctx: Any, grad: Tensor) -> tuple[Tensor | None, ...]:
        return ctx.run.pool_bwd(grad, *ctx.saved_tensors, ctx.rows, ctx.dtype), None, None, None, None


def pool_rows_without_own(
    vectors: Tensor,
    offsets: Tensor,
    ids: Tensor,
    weights: Tensor,
    of_pair: Tensor,
    own_id: Tensor,
    own: Tensor,
    norm: Tensor,
    row: Tensor | None = None,
) -> Tensor:
    """For each pair, the weighted sum of a list without one of its entries, differentiable in ``vectors``.

    Computes ``norm_p * (pool_rows(...)[of_pair_p] - own_p * vectors[own_id_p])``.

    Args:
        vectors: ``[N, D]``.
        offsets: where each list begins in ``ids``, ``[L + 1]`` int64.
        ids: rows of ``vectors``, ``[E]`` int64.
        weights: factor of each entry, ``[E]``.
        of_pair: the list of each pair, ``[P]`` int64.
        own_id: the row that each pair leaves out, ``[P]`` int64.
        own: its weight in the list, ``[P]``; 0 where it is not in the list.
        norm: factor of each pair's sum, ``[P]``.
        row: the list of each entry, ``[E]`` int64, where it is known already.

    Returns:
        ``[P, D]``.
    """
    if vectors.is_cuda:
        total = pool_rows(vectors, offsets, ids, weights)
        return (total[of_pair] - own[:, None] * vectors[own_id]) * norm[:, None]
    if row is None:
        lists = torch.arange(len(offsets) - 1, device=ids.device)
        row = torch.repeat_interleave(lists, offsets.diff(), output_size=len(ids))
    return on_cpu.pool_without_own(vectors, ids, offsets, row, weights, of_pair, own_id, own, norm)


def scaled_rows(table: Tensor, ids: Tensor, offset: Tensor, scale: Tensor) -> Tensor:
    """``scale * (table[ids] + offset)``, differentiable in all but ``ids``.

    Args:
        table: ``[N, D]``.
        ids: rows of ``table``, ``[B]`` int64.
        offset: added to every row, ``[D]``.
        scale: a factor other than 0, ``[]``.

    Returns:
        ``[B, D]``.
    """
    if table.is_cuda:
        return (F.embedding(ids, table) + offset) * scale
    return on_cpu.scaled_rows(table, ids, offset, scale)


def scaled_sampled_bce(
    user: Tensor,
    offset: Tensor | None,
    log_scale: Tensor,
    item: Tensor,
    item_bias: Tensor,
    user_id: Tensor | None,
    item_id: Tensor,
    neg_weight: float = 1.0,
    backend: str = "auto",
) -> Tensor:
    """Mean of :func:`recbole_llm_kernels.sampled_bce`'s row losses for queries ``exp(log_scale) * (user + offset)``.

    On a CPU the loss and its gradients are formed from these parts in one pass, without the queries' own gradients.

    Args:
        user: a vector for each row, ``[B, D]``, or with ``user_id`` a table, ``[U, D]``.
        offset: added to every user's vector, ``[D]``, or ``None``.
        log_scale: logarithm of the scale, ``[]``.
        item: items, ``[N, D]``.
        item_bias: ``[N]``, finite for every item that occurs.
        user_id: rows of ``user``, ``[B]`` int64; ``None`` where row b is the b-th.
        item_id: rows of ``item``, ``[B, 1 + K]`` int64, contiguous: the positive, then negatives that all count.
        neg_weight: factor of the negatives' part.
        backend: ``"auto"``, ``"triton"`` or ``"torch"``.

    Returns:
        A scalar, float32 (float64 for float64 operands), differentiable in all tensors but the ids.

    Raises:
        IndexError: if an id is out of range (CPU).
    """
    if fuses_scaled_bce(user.device, backend) and item_id.shape[1] <= len(item):
        return fused_bce(user, offset, log_scale, item, item_bias, user_id, item_id, neg_weight)
    query = user if user_id is None else F.embedding(user_id, user)
    query = (query if offset is None else query + offset) * log_scale.exp()
    row = torch.arange(len(item_id), device=item_id.device)
    positive, negative = item_id[:, 0].contiguous(), item_id[:, 1:].contiguous()
    return sampled_bce(
        query, item, row, positive, negative, item_bias=item_bias, neg_weight=neg_weight, backend=backend
    )


def fuses_scaled_bce(device: torch.device | str, backend: str = "auto") -> bool:
    """Whether :func:`scaled_sampled_bce` runs in one pass there: on a CPU, outside autocast, on the torch backend."""
    if torch.device(device).type != "cpu" or torch.is_autocast_enabled("cpu"):
        return False
    return "triton" not in (backend, default_backend(device)) and has_sampled_dots()
