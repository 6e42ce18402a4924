r"""Binary cross-entropy of one positive against sampled negatives.

    s_bk = <user[u_b], item[i_bk]> + bias - log_q,  i_b0 the positive, i_b1.. the negatives
    l_b  = softplus(-s_b0) + neg_weight * sum over live k of softplus(s_bk)

Negatives of a row's own (``sampled_bce``): one gather of its items serves the logits, the slopes and the row's query
gradient; the item gradient is a segmented sum over (item, row, slope). Nothing of shape [B, K, D] is stored.
Negatives shared by the batch (``shared_bce``): a small catalogue, in tiles as in ``catalog``; no [B, M] is stored.
"""

import warnings
from collections.abc import Callable
from functools import cache, partial

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag

from recbole_llm_kernels.signatures import Sampled
from recbole_llm_kernels.torch_ops import threads
from recbole_llm_kernels.torch_ops.catalog import Grads, Needs, bce_pass, reduce_loss, row_scale
from recbole_llm_kernels.torch_ops.pairs import Rows, gathered_dots, softplus
from recbole_llm_kernels.torch_ops.positions import starts
from recbole_llm_kernels.torch_ops.segment_sum import accumulator, sort_segments, sum_segments, sum_values
from recbole_llm_kernels.torch_ops.tiles import Columns, Sums, columns, cut_in_tiles

GATHERED = 1 << 18  # elements of item rows gathered at a time: 1 MiB of float32
IN_PLACE = 1 << 16  # ids at a time where nothing is gathered


def sampled_bce_fwd(args: Sampled) -> tuple[Tensor, Tensor, Tensor | None]:
    """Reduced loss, slopes d loss/ds [B, 1 + K] (positive first) and the gathered queries' gradient [B, D].

    Slopes and query gradient hold ``weight``, ``neg_weight`` and, for "mean", 1/B. ``neg_id`` is [B, K].
    """
    return sampled_fwd(args, partial(_slopes, neg_weight=args.neg_weight))


def _slopes(s: Tensor, dead: Tensor | None, scale: Tensor, neg_weight: float) -> Tensor:
    """Row losses [B] of logits [B, 1 + K], which become slopes times ``scale`` in place; NaN where the positive is dead."""
    s[:, 0].neg_()
    terms, e = softplus(s), s.sigmoid_()
    if dead is not None:
        terms.masked_fill_(dead, 0)[:, 0].masked_fill_(dead[:, 0], torch.nan)
        e.masked_fill_(dead, 0)
    e[:, 0].neg_()
    if neg_weight != 1:
        e[:, 1:] *= neg_weight
    e *= scale[:, None]
    return torch.add(terms[:, 0], terms[:, 1:].sum(1), alpha=neg_weight)


def sampled_fwd(
    args: Sampled, slopes: Callable[[Tensor, Tensor | None, Tensor], Tensor]
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Reduced loss, slopes [B, 1 + K] and the gathered queries' gradient [B, D] of a loss of single rows.

    Args:
        args: of the operator; ``neg_id`` is [B, K].
        slopes: given logits [b, 1 + K], which of them are dead and each row's scale [b], returns the row losses [b] and
            turns the logits into slopes times the scale, in place.
    """
    user, item, item_bias, user_id, pos_id, neg_id, log_q, neg_valid, weight, _, reduction, need, _ = args
    dtype = accumulator(user.dtype)
    ids = torch.cat([pos_id[:, None], neg_id], 1)
    (B, W), D = ids.shape, user.shape[1]
    bias = None if item_bias is None else item_bias[ids].to(dtype)
    in_place = len(item) >= W and reads_items_in_place(item, bias)  # PyTorch wants no more entries than a matrix has
    dead = dead_entries(ids, bias, neg_valid)
    shift = shift_of(ids, bias, log_q, dtype, dead is None)  # overwrites bias
    slope = torch.empty(B, W, dtype=dtype, device=user.device)
    rows = torch.empty(B, dtype=dtype, device=user.device)
    grad_query = torch.empty(B, D, dtype=dtype, device=user.device) if need[0] else None
    scale = row_scale(weight, reduction, len(user_id), user)
    chunk = max(1, IN_PLACE // W if in_place else GATHERED // (W * D))

    def job(starts: range) -> None:
        users, items = Rows(user, min(chunk, B)), None if in_place else Rows(item, min(chunk, B) * W)
        for lo in starts:
            part = slice(lo, min(lo + chunk, B))
            query, term, s = users.take(user_id[part]), ids[part].reshape(-1), slope[part]
            none = None if dead is None else dead[part]
            if items is None:
                vectors = item.detach()
                s.view(-1).copy_(sampled_dots(query, vectors, term))
            else:
                vectors = items.take(term)
                if none is not None:
                    vectors.masked_fill_(none.reshape(-1, 1), 0)  # whatever an item outside the catalogue holds
                rows_of = vectors.view(-1, W, D)
                # 6 times as fast as rows_of @ query
                torch.bmm(query[:, None, :], rows_of.transpose(1, 2), out=s[:, None, :])
                term = torch.arange(len(term), device=term.device)
            if shift is not None:
                s += shift[part]
            rows[part] = slopes(s, none, scale[part])
            if grad_query is not None:
                begin = torch.arange(0, len(term), W, device=term.device)
                # for W = 2 in a tenth of bmm's time
                grad_query[part] = embedding_bag(
                    term.long(), vectors, begin, mode="sum", per_sample_weights=s.reshape(-1)
                )

    threads.run([partial(job, starts) for starts in threads.cut(range(0, B, chunk), user.device)])
    return reduce_loss(rows.double(), weight, reduction, user), slope, grad_query


def reads_items_in_place(item: Tensor, bias: Tensor | None) -> bool:
    """Whether no copy of the items' rows is needed: float on a CPU, and none of them outside the catalogue."""
    if item.device.type != "cpu" or item.dtype not in (torch.float32, torch.float64) or not has_sampled_dots():
        return False
    return bias is None or bool((bias != -torch.inf).all())


@cache
def has_sampled_dots() -> bool:
    """Whether this build of PyTorch has ``sampled_addmm`` on a CPU; its warning that sparse rows are new is kept quiet."""
    with warnings.catch_warnings():
        warnings.simplefilter("ignore")
        try:
            one = torch.ones(1, 1)
            return bool(sampled_dots(one, one, torch.zeros(1, dtype=torch.int64)).item() == 1)
        except RuntimeError:
            return False


def sampled_dots(query: Tensor, item: Tensor, ids: Tensor) -> Tensor:
    """<query_b, item[ids_bw]>, ``[B * W]``, for W ids ``[B * W]`` of each row: nothing is gathered."""
    begin = starts(len(query), len(ids) // max(len(query), 1)).to(ids.dtype)
    zero = torch.zeros(len(ids), dtype=query.dtype)
    rows = torch.sparse_csr_tensor(begin, ids, zero, (len(query), len(item)), check_invariants=False)
    return torch.sparse.sampled_addmm(rows, query, item.t(), beta=0.0).values()


def sampled_bce_bwd(grad: Tensor, slope: Tensor, grad_query: Tensor | None, args: Sampled) -> Grads:
    """Gradients of (user, item, item_bias) in their dtypes from upstream ``grad``, [] or [B]."""
    user, item, item_bias, user_id, pos_id, neg_id, *_ = args
    need = args.need
    B, W = slope.shape
    grad = grad.to(slope.dtype).expand(B)
    grad_user = grad_item = grad_bias = None
    if need[0]:
        assert grad_query is not None, "the forward was told that no gradient of user is needed"
        row = torch.arange(B, device=user.device)
        if user.device.type == "cpu" and len(user) == B and torch.equal(user_id, row.to(user_id.dtype)):
            grad_user = (grad_query * grad[:, None]).to(user.dtype)  # a tower's output, a row for each
        else:
            grad_user = sum_segments(sort_segments(user_id, len(user)), row, grad, grad_query, user.dtype)
    if need[1] or need[2]:
        ids = torch.cat([pos_id[:, None], neg_id], 1).view(-1)
        by_item = sort_segments(ids, len(item))
        value = (slope * grad[:, None]).view(-1)
        if need[1]:
            in_id = user_id[:, None].expand(B, W).reshape(-1)
            grad_item = sum_segments(by_item, in_id, value, user, item.dtype)
        if need[2] and item_bias is not None:
            if ids.device.type == "cpu":  # the same sums, in the terms' own order
                grad_bias = torch.bincount(ids, value.double(), len(item)).to(item_bias.dtype)
            else:
                grad_bias = sum_values(by_item, value, item_bias.dtype)
    return grad_user, grad_item, grad_bias


def dead_entries(ids: Tensor, bias: Tensor | None, neg_valid: Tensor | None) -> Tensor | None:
    """Entries that do not count, ``[B, 1 + K]``: outside the catalogue, invalid, or negatives that are the row's positive.

    None where a CPU has seen that there are none.
    """
    dead = ids == ids[:, :1]
    if neg_valid is not None:
        dead[:, 1:] |= ~neg_valid
    dead[:, 0] = False
    if bias is not None and (bias.device.type != "cpu" or not bool(bias.isfinite().all())):
        dead |= bias == -torch.inf
    return None if dead.device.type == "cpu" and not bool(dead.any()) else dead


def shift_of(ids: Tensor, bias: Tensor | None, log_q: Tensor | None, dtype: torch.dtype, inside: bool) -> Tensor | None:
    """Sum of the entries' bias, which is overwritten, and -log_q; 0 outside the catalogue, if not all are ``inside``."""
    if bias is not None and not inside:
        bias.masked_fill_(bias == -torch.inf, 0)
    if log_q is None:
        return bias
    correction = log_q[ids].to(dtype)
    return -correction if bias is None else bias - correction


def shared_bce_forms(reduction: str) -> tuple[bool, bool]:
    """Whether ``shared_bce_fwd`` forms the gradients of (queries, negatives); otherwise the backward does."""
    return reduction != "none", reduction != "none"


def shared_bce_fwd(args: Sampled) -> tuple[Tensor, Tensor, Tensor | None, Tensor | None, Tensor | None]:
    """Reduced loss, slopes of the positives [B] and, except for "none", gradients that lack only the upstream factor.

    Those: of the gathered queries [B, D], of the negatives' vectors [M, D] and of the negatives' bias [M], in float32
    (float64). They and the slopes hold ``weight``, ``neg_weight`` and, for "mean", 1/B. ``neg_id`` is [M],
    ``neg_valid`` [M] or [B, M].
    """
    user, item, item_bias, user_id, pos_id, _, log_q, _, weight, _, reduction, need, _ = args
    s = gathered_dots(user, item, user_id, pos_id)
    bias = None if item_bias is None else item_bias[pos_id].to(s.dtype)
    outside = None if bias is None else bias == -torch.inf
    shift = shift_of(pos_id, bias, log_q, s.dtype, False)
    s = s if shift is None else s + shift
    loss = softplus(-s)
    if outside is not None:
        loss.masked_fill_(outside, torch.nan)  # on a CPU the caller has refused it
    scale = row_scale(weight, reduction, len(user_id), user)
    slope = -torch.sigmoid(-s) * scale
    need = need if reduction != "none" else [False] * 3
    sums = _negatives(args, scale, need)
    grads = _with_positives(sums, item, pos_id, slope)
    return reduce_loss(loss.double() + sums.loss, weight, reduction, user), slope, *grads


def shared_bce_bwd(grad: Tensor, slope: Tensor, formed: Grads, args: Sampled) -> Grads:
    """Gradients of (user, item, item_bias) in their dtypes from upstream ``grad``, [] or [B]."""
    user, item, item_bias, user_id, pos_id, neg_id, _, _, weight, _, reduction, need, _ = args
    slope = slope * grad
    if reduction == "none":
        scale = row_scale(weight, reduction, len(user_id), user) * grad
        sums = _negatives(args, scale, need)
        formed, grad = _with_positives(sums, item, pos_id, slope), torch.ones_like(grad[:1])
    grad = grad.to(slope.dtype).reshape(1)
    grad_query, grad_vectors, grad_shift = formed
    grad_user = grad_item = grad_bias = None
    if need[0] and grad_query is not None:
        by_user = sort_segments(user_id, len(user))
        row = torch.arange(len(user_id), device=user.device)
        grad_user = sum_segments(by_user, row, grad.expand(len(row)), grad_query, user.dtype)
    if need[1] or need[2]:
        ids = torch.cat([pos_id, neg_id])
        by_item = sort_segments(ids, len(item))
        if need[1] and grad_vectors is not None:
            rows = torch.cat([user.index_select(0, user_id).to(slope.dtype), grad_vectors])
            value = torch.cat([slope, grad.expand(len(neg_id))])
            grad_item = sum_segments(by_item, torch.arange(len(ids), device=ids.device), value, rows, item.dtype)
        if need[2] and item_bias is not None:
            shifts = slope[:0] if grad_shift is None else grad_shift * grad  # None: there are no negatives
            grad_bias = sum_values(by_item, torch.cat([slope, shifts]), item_bias.dtype)
    return grad_user, grad_item, grad_bias


def _negatives(args: Sampled, scale: Tensor, need: Needs) -> Sums:
    """Row losses and scaled gradients of the shared negatives alone."""
    query = args.user.index_select(0, args.user_id).to(scale.dtype)
    grid = cut_in_tiles(len(query), len(args.neg_id))
    return bce_pass(query, scale, shared_columns(args), grid, args.neg_weight, None, excluded_from(args), need)


def shared_columns(args: Sampled) -> Columns:
    """The shared negatives as columns, with bias and -log_q; -inf where one is outside the catalogue or valid for no row."""
    user, item, item_bias, _, _, neg_id, log_q, neg_valid, *_ = args
    dtype = accumulator(user.dtype)
    bias = None if item_bias is None else item_bias[neg_id].to(dtype)
    dead = None if bias is None else bias == -torch.inf
    shift = shift_of(neg_id, bias, log_q, dtype, False)
    if neg_valid is not None and neg_valid.ndim == 1:
        dead = ~neg_valid if dead is None else dead | ~neg_valid
    if dead is not None:
        shift = (user.new_zeros(len(neg_id), dtype=dtype) if shift is None else shift).masked_fill(dead, -torch.inf)
    return columns(item, neg_id, shift)


def excluded_from(args: Sampled) -> Callable[[slice, slice], Tensor]:
    """Return a function of rows and columns: True where a shared negative is the row's positive, or not valid for it."""
    pos_id, neg_id, neg_valid = args.pos_id, args.neg_id, args.neg_valid

    def excluded(rows: slice, cols: slice) -> Tensor:
        hit = neg_id[None, cols] == pos_id[rows, None]
        return hit if neg_valid is None or neg_valid.ndim == 1 else hit | ~neg_valid[rows, cols]

    return excluded


def _with_positives(sums: Sums, item: Tensor, pos_id: Tensor, slope: Tensor) -> Grads:
    """The sums over negatives, with the positives' part of the query gradient added."""
    if sums.query is not None:
        sums.query.addcmul_(slope[:, None], item.index_select(0, pos_id).to(slope.dtype))
    return sums.query, sums.columns, sums.bias
