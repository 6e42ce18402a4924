r"""Losses of every query against the whole catalogue, whose ``[B, N]`` logits are never allocated.

    S = Q C^T + bias
    catalog_bce: l_b = sum over targets t of softplus(-s_bt) + neg_weight * sum over the others n of softplus(s_bn)
    catalog_ce:  l_b = sum over targets t of (log Z_b - s_bt),  Z_b = sum over n of exp(s_bn)

A tile of S lives in the cache. ``catalog_bce`` forms the gradients while it is there, three matrix products in all,
unless the upstream gradient is a row's own ("none"). ``catalog_ce`` needs Z first: one product forward, three backward.
Targets are taken out of the tile before anything is summed: adding them as negatives and correcting later would lose
a confident target's loss and slope to cancellation.
"""

from collections.abc import Callable, Sequence
from functools import partial

import torch
from torch import Tensor

from recbole_llm_kernels.torch_ops import threads
from recbole_llm_kernels.torch_ops.pairs import softplus
from recbole_llm_kernels.torch_ops.segment_sum import Segments, accumulator, sum_values
from recbole_llm_kernels.torch_ops.tiles import (
    Columns,
    Gradients,
    Grid,
    Sums,
    Targets,
    accumulate,
    columns,
    cut_in_tiles,
    group_targets,
    split,
    target_rows,
    visit,
)

Needs = Sequence[bool]  # are the gradients of (query, item, item_bias) wanted
Grads = tuple[Tensor | None, Tensor | None, Tensor | None]


def catalog_bce_forms(reduction: str) -> tuple[bool, bool]:
    """Whether ``catalog_bce_fwd`` forms the gradients of (query, item and bias); otherwise the backward does."""
    return reduction != "none", reduction != "none"


def catalog_bce_fwd(
    query: Tensor,
    item: Tensor,
    target_offsets: Tensor,
    target_ids: Tensor,
    item_bias: Tensor | None,
    weight: Tensor | None,
    neg_weight: float,
    reduction: str,
    need: Needs,
) -> tuple[Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Reduced loss and, except for "none", the gradients of that loss in float32 (float64)."""
    need = need if reduction != "none" else [False] * 3
    scale = row_scale(weight, reduction, len(query), query)
    sums = _bce(query, item, target_offsets, target_ids, item_bias, neg_weight, scale, need)
    return reduce_loss(sums.loss, weight, reduction, query), sums.query, sums.columns, sums.bias


def catalog_bce_bwd(
    grad: Tensor,
    query: Tensor,
    item: Tensor,
    target_offsets: Tensor,
    target_ids: Tensor,
    item_bias: Tensor | None,
    weight: Tensor | None,
    neg_weight: float,
    reduction: str,
    formed: Grads,
    need: Needs,
) -> Grads:
    """Gradients in the inputs' dtypes from upstream ``grad``, [] or [B], and what the forward formed."""
    if reduction != "none":
        return scale_formed(grad, formed, need, (query, item, item_bias))
    scale = row_scale(weight, reduction, len(query), query) * grad
    sums = _bce(query, item, target_offsets, target_ids, item_bias, neg_weight, scale, need)
    one = torch.ones((), device=grad.device)
    return scale_formed(one, (sums.query, sums.columns, sums.bias), need, (query, item, item_bias))


def _bce(
    query: Tensor,
    item: Tensor,
    target_offsets: Tensor,
    target_ids: Tensor,
    item_bias: Tensor | None,
    neg_weight: float,
    scale: Tensor,
    need: Needs,
) -> Sums:
    grid = cut_in_tiles(len(query), len(item))
    targets = group_targets(target_offsets, target_ids, grid, accumulator(query.dtype))
    cols = columns(item, None, item_bias)
    sums = bce_pass(query.to(accumulator(query.dtype)), scale, cols, grid, neg_weight, targets, None, need)
    loss = softplus(-targets.logits).double()
    # outside the catalogue a target has no loss; on a CPU the caller has refused it
    loss.masked_fill_(targets.logits == -torch.inf, torch.nan)
    by_row = Segments(torch.arange(len(loss), device=loss.device), target_offsets)
    return sums._replace(loss=sums.loss + sum_values(by_row, loss, torch.float64))


def bce_pass(
    query: Tensor,
    scale: Tensor,
    cols: Columns,
    grid: Grid,
    neg_weight: float,
    targets: Targets | None,
    excluded: Callable[[slice, slice], Tensor | None] | None,
    need: Needs,
) -> Sums:
    """Row losses and gradients of binary cross-entropy in one pass over the tiles.

    Args:
        query: ``[B, D]`` in the accumulator's dtype.
        scale: factor of each row's loss in the gradients, ``[B]``.
        cols: the columns.
        grid: the tiles.
        neg_weight: factor of every negative.
        targets: positive entries; None where the caller treats positives itself.
        excluded: for a slice of rows and of columns, True where an entry is no negative; or None.
        need: which gradients are wanted.
    """
    scaled = (query * scale[:, None]).T.contiguous()

    def work(sums: Sums, rows: range, column_starts: range) -> None:
        spare = query.new_empty(min(grid.rows, grid.B) * min(grid.columns, grid.M))
        for block in visit(query, cols, grid, rows, column_starts):
            gradients = Gradients(sums, block, scaled, scale)
            for tile in block.tiles:
                s = tile.logits
                p = spare[: s.numel()].view_as(s)
                mask = excluded(tile.rows, block.columns) if excluded is not None else None
                if mask is not None:
                    s.masked_fill_(mask, -torch.inf)
                found = targets.take(tile.number, s) if targets is not None else None
                if neg_weight != 0:
                    sums.loss[tile.rows] += softplus_sums(s, p).mul_(neg_weight)
                if any(need):
                    torch.sigmoid(s, out=p)
                    if neg_weight != 1:
                        p *= neg_weight
                    if found is not None:
                        flat, s_target = found
                        p.view(-1).index_copy_(0, flat, -torch.sigmoid(-s_target))
                    gradients.add(tile, p)
            gradients.finish()

    sums = accumulate(query, grid, need, work)
    if sums.query is not None:
        sums.query.mul_(scale[:, None])
    return sums


LOG2E = 1.4426950408889634
FACTORS = 64  # each at most 2, so that their product stays below 2**64


def softplus_sums(s: Tensor, spare: Tensor) -> Tensor:
    """Float64 row sums of log(1 + exp(s)), with one logarithm for up to 64 terms; ``spare`` is overwritten.

    With z = exp(-|s|), softplus(s) = max(s, 0) + log(1 + z), and a product of (1 + z) is kept as the excess over 1:
    (1 + a)(1 + b) - 1 = a + b + a b loses nothing where all z are tiny, as they are in a trained catalogue.
    """
    # PyTorch's exp2 takes a quarter of its exp's time
    z = torch.abs(s, out=spare).mul_(-LOG2E).exp2_()
    width, factors = s.shape[1], 1
    while width > 1 and factors < FACTORS:
        half = (width + 1) // 2
        a, b = z[:, : width - half], z[:, half:width]
        a.addcmul_(a, b).add_(b)
        width, factors = half, 2 * factors
    total = z[:, :width].log1p().sum(1).double()
    return total.add_(torch.clamp(s, min=0, out=spare).sum(1))


def row_scale(weight: Tensor | None, reduction: str, rows: int, like: Tensor) -> Tensor:
    """Factor of each row in the reduced loss, ``[rows]``, in the accumulator's dtype of ``like``."""
    dtype = accumulator(like.dtype)
    scale = like.new_ones(rows, dtype=dtype) if weight is None else weight.to(dtype, copy=True)
    return scale.div_(rows) if reduction == "mean" else scale


def reduce_loss(rows: Tensor, weight: Tensor | None, reduction: str, query: Tensor) -> Tensor:
    """Weight and reduce float64 row losses, then round to the accumulator's dtype."""
    rows = rows if weight is None else rows * weight
    if reduction == "mean":
        rows = rows.sum() / len(rows)
    elif reduction == "sum":
        rows = rows.sum()
    return rows.to(accumulator(query.dtype))


def scale_formed(grad: Tensor, formed: Grads, need: Needs, inputs: Grads) -> Grads:
    """Gradients formed in the forward times the scalar upstream gradient, rounded once to the inputs' dtypes."""
    scaled: list[Tensor | None] = []
    for value, wanted, like in zip(formed, need, inputs, strict=True):
        assert not wanted or value is not None or like is None or 0 in like.shape, "the forward did not form a gradient"
        scaled.append((value * grad).to(like.dtype) if wanted and value is not None and like is not None else None)
    return scaled[0], scaled[1], scaled[2]


def catalog_ce_forms(reduction: str) -> tuple[bool, bool]:
    """Whether ``catalog_ce_fwd`` forms the gradients of (query, item and bias); otherwise the backward does."""
    return False, False


def catalog_ce_fwd(
    query: Tensor,
    item: Tensor,
    target_offsets: Tensor,
    target_ids: Tensor,
    item_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    need: Needs,
) -> tuple[Tensor, Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Reduced loss, log Z [B], slopes of the targets' logits in their row's loss [T], and no gradients yet."""
    parts = ce_parts(query, item, target_offsets, target_ids, item_bias)
    rows, log_z, slope = ce_rows(*parts, target_offsets)
    return reduce_loss(rows, weight, reduction, query), log_z, slope, None, None, None


def ce_parts(
    query: Tensor, item: Tensor, target_offsets: Tensor, target_ids: Tensor, item_bias: Tensor | None
) -> tuple[Tensor, Tensor, Tensor]:
    """Each row's largest negative logit [B], the float64 sum of exp(s - largest) over negatives [B], target logits [T]."""
    q = query.to(accumulator(query.dtype))
    cols, grid = columns(item, None, item_bias), cut_in_tiles(len(q), len(item))
    targets = group_targets(target_offsets, target_ids, grid, q.dtype)
    return *negatives_sum(q, cols, grid, targets), targets.logits


def ce_rows(peak: Tensor, others: Tensor, logits: Tensor, target_offsets: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """Row losses [B] float64, log Z [B] and the targets' slopes [T] from what :func:`ce_parts` gives."""
    row = target_rows(target_offsets, len(logits))
    by_row = Segments(torch.arange(len(row), device=row.device), target_offsets)
    peak, before = peak.scatter_reduce(0, row, logits, "amax"), peak
    others = others * torch.exp(before - peak)
    e = torch.exp(logits - peak[row])
    z_targets = sum_values(by_row, e, torch.float64)
    z = others + z_targets
    # Z without the target itself, as a sum: Z - e would lose it where the target is confident
    rest = others[row] + (z_targets[row] - e)
    loss = torch.where(e > rest, torch.log1p(rest / e), (peak + z.log())[row] - logits)
    # outside the catalogue; on a CPU the caller has refused it
    loss = loss.masked_fill_(logits == -torch.inf, torch.nan)
    count = target_offsets.diff()
    slope = ((count[row] - 1) * e - rest) / z[row]
    rows = sum_values(by_row, loss, torch.float64)
    return rows, (peak + z.log()).to(logits.dtype), slope.to(logits.dtype)


def catalog_ce_bwd(
    grad: Tensor,
    query: Tensor,
    item: Tensor,
    target_offsets: Tensor,
    target_ids: Tensor,
    item_bias: Tensor | None,
    weight: Tensor | None,
    reduction: str,
    log_z: Tensor,
    target_slope: Tensor,
    formed: Grads,
    need: Needs,
    count: Tensor | None = None,
) -> Grads:
    """Gradients in the inputs' dtypes from upstream ``grad``, [] or [B], and what the forward left.

    ``count``: how many targets each row has, [B]; None: as many as are given, that is, all are in ``item``.
    """
    q = query.to(accumulator(query.dtype))
    cols, grid = columns(item, None, item_bias), cut_in_tiles(len(q), len(item))
    targets = group_targets(target_offsets, target_ids, grid, q.dtype)
    scale = row_scale(weight, reduction, len(query), query) * grad
    scaled = (q * scale[:, None]).T.contiguous()
    # a negative's slope is T_b exp(s - log Z_b); without targets it is 0, whatever log Z_b is
    count = (target_offsets.diff() if count is None else count).to(q.dtype)
    shift = torch.where(count == 0, torch.inf, log_z - count.log())[:, None]
    slope = target_slope.index_select(0, targets.order)

    def work(sums: Sums, rows: range, column_starts: range) -> None:
        for block in visit(q, cols, grid, rows, column_starts):
            gradients = Gradients(sums, block, scaled, scale)
            for tile in block.tiles:
                p = tile.logits.sub_(shift[tile.rows]).mul_(LOG2E).exp2_()
                if (found := targets.of(tile.number, p.shape[1])) is not None:
                    p.view(-1).index_copy_(0, found[1], slope[found[0]])
                gradients.add(tile, p)
            gradients.finish()

    sums = accumulate(q, grid, need, work)
    grad_query = None if sums.query is None else sums.query.mul_(scale[:, None])
    one = torch.ones((), device=grad.device)
    return scale_formed(one, (grad_query, sums.columns, sums.bias), need, (query, item, item_bias))


def negatives_sum(
    query: Tensor,
    cols: Columns,
    grid: Grid,
    targets: Targets | None,
    excluded: Callable[[slice, slice], Tensor] | None = None,
) -> tuple[Tensor, Tensor]:
    """Each row's largest negative logit and the float64 sum of exp(s - largest); the targets' logits go to ``targets``.

    A row without negatives has the sum 0. ``excluded``: for a slice of rows and of columns, True where an entry is no
    negative.
    """
    B, lowest = len(query), torch.finfo(query.dtype).min  # not -inf: exp(-inf - -inf) is NaN

    def job(rows: range, column_starts: range) -> tuple[Tensor, Tensor]:
        peak = query.new_full((B,), lowest)
        total = torch.zeros(B, dtype=torch.float64, device=query.device)

        for block in visit(query, cols, grid, rows, column_starts):
            for tile in block.tiles:
                s = tile.logits
                if excluded is not None:
                    s.masked_fill_(excluded(tile.rows, block.columns), -torch.inf)
                if targets is not None:
                    targets.take(tile.number, s)
                old = peak[tile.rows]
                new = torch.maximum(old, s.amax(1))
                terms = s.sub_(new[:, None]).mul_(LOG2E).exp2_().sum(1)
                total[tile.rows] = total[tile.rows] * (old - new).exp_() + terms
                peak[tile.rows] = new
        return peak, total

    peak = query.new_full((B,), lowest)
    total = torch.zeros(B, dtype=torch.float64, device=query.device)
    for part, terms in threads.run([partial(job, *span) for span in split(grid, query.device)]):
        new = torch.maximum(peak, part)
        total = total * (peak - new).exp_() + terms * (part - new).exp_()
        peak = new
    return peak, total
