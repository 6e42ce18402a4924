r"""Softmax cross-entropy of one positive against sampled negatives: sampled softmax.

    s_bk = <user[u_b], item[i_bk]> + bias - log_q,  i_b0 the positive, i_b1.. the negatives
    l_b  = softplus(n_b - s_b0),  n_b = log sum over live k of exp(s_bk)

which is log(exp(s_b0) + sum of exp(s_bk)) - s_b0 without its cancellation: a confident positive keeps its relative
precision in loss and slopes, -sigma(n_b - s_b0) and exp(s_bk - log Z_b). Negatives of a row's own: slopes [B, 1 + K] are
kept, and nothing of [B, K, D]. Negatives shared by the batch: a small catalogue, in tiles; no [B, M] is stored.
"""

from collections.abc import Callable

import torch
from torch import Tensor

from recbole_llm_kernels.signatures import Sampled
from recbole_llm_kernels.torch_ops.catalog import LOG2E, Grads, negatives_sum, reduce_loss, row_scale
from recbole_llm_kernels.torch_ops.pairs import gathered_dots, softplus
from recbole_llm_kernels.torch_ops.sampled import (
    excluded_from,
    sampled_bce_bwd,
    sampled_fwd,
    shared_columns,
    shift_of,
)
from recbole_llm_kernels.torch_ops.segment_sum import sort_segments, sum_rows, sum_segments, sum_values
from recbole_llm_kernels.torch_ops.tiles import Gradients, Sums, accumulate, cut_in_tiles, visit

sampled_ce_bwd = sampled_bce_bwd  # from slopes and the gathered queries' gradient on, nothing differs


def sampled_ce_fwd(args: Sampled) -> tuple[Tensor, Tensor, Tensor | None]:
    """Reduced loss, slopes d loss/ds [B, 1 + K] (positive first) and the gathered queries' gradient [B, D].

    Slopes and query gradient hold ``weight`` and, for "mean", 1/B. ``neg_id`` is [B, K].
    """
    return sampled_fwd(args, _slopes)


def _slopes(s: Tensor, dead: Tensor | None, scale: Tensor) -> Tensor:
    """Row losses [B] of logits [B, 1 + K], which become slopes times ``scale`` in place; NaN where the positive is dead."""
    positive = s[:, 0].clone()
    if dead is not None:
        s.masked_fill_(dead, -torch.inf)
    negatives = s[:, 1:]
    peak = negatives.amax(1) if s.shape[1] > 1 else torch.full_like(positive, -torch.inf)
    peak = peak.clamp_(min=torch.finfo(s.dtype).min)  # not -inf: -inf - -inf is NaN
    e = negatives.sub_(peak[:, None]).mul_(LOG2E).exp2_()
    total = e.sum(1)
    x = peak + total.log() - positive
    share = torch.sigmoid(x) * scale
    e.mul_((share / total.clamp(min=torch.finfo(s.dtype).tiny))[:, None])
    s[:, 0] = -share
    rows = softplus(x)
    if dead is not None:
        s[:, 0].masked_fill_(dead[:, 0], 0)
        negatives.masked_fill_(dead[:, :1], 0)
        rows.masked_fill_(dead[:, 0], torch.nan)
    return rows


def shared_ce_fwd(args: Sampled) -> tuple[Tensor, Tensor, Tensor]:
    """Reduced loss, slopes of the positives [B] with ``weight`` and, for "mean", 1/B, and log Z [B].

    ``neg_id`` is [M], ``neg_valid`` [M] or [B, M].
    """
    user, item, item_bias, user_id, pos_id, neg_id, log_q, _, weight, _, reduction, _, _ = args
    s = gathered_dots(user, item, user_id, pos_id)
    bias = None if item_bias is None else item_bias[pos_id].to(s.dtype)
    outside = None if bias is None else bias == -torch.inf
    shift = shift_of(pos_id, bias, log_q, s.dtype, False)
    s = s if shift is None else s + shift
    query = user.index_select(0, user_id).to(s.dtype)
    grid = cut_in_tiles(len(s), len(neg_id))
    peak, total = negatives_sum(query, shared_columns(args), grid, None, excluded_from(args))
    x = (peak + total.log() - s).to(s.dtype)
    scale = row_scale(weight, reduction, len(s), user)
    loss, slope = softplus(x), -torch.sigmoid(x) * scale
    if outside is not None:
        loss.masked_fill_(outside, torch.nan)  # on a CPU the caller has refused it
        slope.masked_fill_(outside, 0)
    return reduce_loss(loss.double(), weight, reduction, user), slope, s + softplus(x)


def shared_ce_bwd(grad: Tensor, slope: Tensor, log_z: Tensor, args: Sampled) -> Grads:
    """Gradients of (user, item, item_bias) in their dtypes from upstream ``grad``, [] or [B], and what the forward left."""
    user, item, item_bias, user_id, pos_id, neg_id, _, _, weight, _, reduction, need, _ = args
    scale = row_scale(weight, reduction, len(user_id), user) * grad
    slope = slope * grad
    query = user.index_select(0, user_id).to(slope.dtype)
    sums = _negatives(query, scale, log_z, args, excluded_from(args))
    grad_user = grad_item = grad_bias = None
    if need[0] and sums.query is not None:
        positive = item.index_select(0, pos_id).to(slope.dtype)
        positive = torch.where(slope[:, None] == 0, 0, slope[:, None] * positive)  # outside it may hold anything
        grad_user = sum_rows_of(user_id, sums.query.add_(positive), len(user)).to(user.dtype)
    if need[1] or need[2]:
        ids = torch.cat([pos_id, neg_id])
        by_item = sort_segments(ids, len(item))
        if need[1] and sums.columns is not None:
            rows = torch.cat([query, sums.columns])
            value = torch.cat([slope, torch.ones_like(sums.columns[:, 0])])
            order = torch.arange(len(ids), device=ids.device)
            grad_item = sum_segments(by_item, order, value, rows, item.dtype)
        if need[2] and item_bias is not None and sums.bias is not None:
            grad_bias = sum_values(by_item, torch.cat([slope, sums.bias]), item_bias.dtype)
    return grad_user, grad_item, grad_bias


def sum_rows_of(out_id: Tensor, rows: Tensor, n_out: int) -> Tensor:
    """``[n_out, D]`` sums of ``rows`` by ``out_id``."""
    if out_id.device.type == "cpu":
        return sum_rows(out_id.long(), rows, n_out)
    order = torch.arange(len(rows), device=rows.device)
    return sum_segments(sort_segments(out_id, n_out), order, rows.new_ones(len(rows)), rows, rows.dtype)


def _negatives(
    query: Tensor, scale: Tensor, log_z: Tensor, args: Sampled, excluded: Callable[[slice, slice], Tensor]
) -> Sums:
    """Scaled gradients of the negatives' part: of queries [B, D], vectors [M, D] and their bias [M]."""
    scaled = (query * scale[:, None]).T.contiguous()
    cols, grid = shared_columns(args), cut_in_tiles(len(query), len(args.neg_id))

    def work(sums: Sums, rows: range, column_starts: range) -> None:
        for block in visit(query, cols, grid, rows, column_starts):
            gradients = Gradients(sums, block, scaled, scale)
            for tile in block.tiles:
                p = tile.logits.masked_fill_(excluded(tile.rows, block.columns), -torch.inf)
                gradients.add(tile, p.sub_(log_z[tile.rows, None]).mul_(LOG2E).exp2_())
            gradients.finish()

    sums = accumulate(query, grid, args.need, work)
    if sums.query is not None:
        sums.query.mul_(scale[:, None])
    return sums
