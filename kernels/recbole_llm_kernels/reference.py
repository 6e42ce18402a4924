"""Oracles: every operator in the fewest lines of plain PyTorch that say what it means.

Slow and allocating; for tests and benchmarks. Run them in float64: they compute in the dtype they are given. Names,
arguments and meanings are those of :mod:`recbole_llm_kernels.functional`; PyTorch differentiates them, twice if asked.
"""

import torch
from torch import Tensor
from torch.nn.functional import logsigmoid, pad


def _softplus(s: Tensor) -> Tensor:
    return -logsigmoid(-s)  # PyTorch's own softplus is the identity from 20 on


def _reduce(rows: Tensor, weight: Tensor | None, reduction: str) -> Tensor:
    rows = rows if weight is None else rows * weight
    if reduction == "none":
        return rows
    return rows.sum() / rows.numel() if reduction == "mean" else rows.sum()


def _inside(s: Tensor, item_bias: Tensor | None, ids: Tensor) -> tuple[Tensor, Tensor]:
    """Logits with the bias of ``ids`` added, 0 at items outside the catalogue, and the mask of those inside."""
    if item_bias is None:
        return s, torch.ones_like(s, dtype=torch.bool)
    bias = item_bias[ids.long()].to(s.dtype).expand_as(s)
    inside = bias != -torch.inf
    return torch.where(inside, s + torch.where(inside, bias, 0), 0), inside


def _multi_hot(offsets: Tensor, ids: Tensor, B: int, N: int) -> Tensor:
    hot = torch.zeros(B, N, dtype=torch.bool, device=ids.device)
    hot[torch.repeat_interleave(torch.arange(B, device=ids.device), offsets.diff().long()), ids.long()] = True
    return hot


def pair_dot(
    user: Tensor, item: Tensor, user_id: Tensor, item_id: Tensor, *, item_bias: Tensor | None = None
) -> Tensor:
    """s_p = <user[u_p], item[i_p]> + bias[i_p]; -inf outside the catalogue."""
    s, inside = _inside((user[user_id.long()] * item[item_id.long()]).sum(-1), item_bias, item_id)
    return torch.where(inside, s, -torch.inf)


def pair_sigmoid(
    user: Tensor, item: Tensor, user_id: Tensor, item_id: Tensor, *, item_bias: Tensor | None = None
) -> Tensor:
    """P(i|u) = sigma(s_p)."""
    s, inside = _inside((user[user_id.long()] * item[item_id.long()]).sum(-1), item_bias, item_id)
    # PyTorch's own sigmoid has the slope p (1 - p), in which a confident p cancels
    return torch.where(inside, logsigmoid(s).exp(), 0)


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
) -> Tensor:
    """Loss y softplus(-s) + (1 - y) softplus(s)."""
    s, inside = _inside((user[user_id.long()] * item[item_id.long()]).sum(-1), item_bias, item_id)
    y = label.to(s.dtype)
    return _reduce(torch.where(inside, y * _softplus(-s) + (1 - y) * _softplus(s), 0), weight, reduction)


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
) -> Tensor:
    """softplus(-s_pos) + neg_weight * sum over live negatives of softplus(s_k)."""
    s, live = _sampled_logits(user, item, user_id, pos_id, neg_id, item_bias, log_q, neg_valid)
    rows = _softplus(-s[:, 0]) + neg_weight * torch.where(live[:, 1:], _softplus(s[:, 1:]), 0).sum(1)
    return _reduce(rows, weight, reduction)


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
) -> Tensor:
    """-log softmax of the positive among itself and the live negatives, as softplus(log sum of theirs - s_pos)."""
    s, live = _sampled_logits(user, item, user_id, pos_id, neg_id, item_bias, log_q, neg_valid)
    some = live[:, 1:].any(1)
    others = torch.where(some[:, None], torch.where(live[:, 1:], s[:, 1:], -torch.inf), 0)
    rows = torch.where(some, _softplus(others.logsumexp(1) - s[:, 0]), 0)
    return _reduce(rows, weight, reduction)


def _sampled_logits(
    user: Tensor,
    item: Tensor,
    user_id: Tensor,
    pos_id: Tensor,
    neg_id: Tensor,
    item_bias: Tensor | None,
    log_q: Tensor | None,
    neg_valid: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Logits [B, 1 + K], the positive first, and which entries count."""
    ids = torch.cat([pos_id[:, None], neg_id.expand(len(pos_id), -1)], 1).long()
    s, live = _inside((item[ids] @ user[user_id.long()][:, :, None])[:, :, 0], item_bias, ids)
    s = s if log_q is None else s - log_q[ids].to(s.dtype)
    live = live & torch.cat([torch.ones_like(pos_id[:, None], dtype=torch.bool), ids[:, 1:] != ids[:, :1]], 1)
    if neg_valid is not None:
        live = live & torch.cat([live[:, :1], neg_valid.expand(len(pos_id), -1)], 1)
    return s, live


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
) -> Tensor:
    """Sum over targets of softplus(-s) + neg_weight * sum over all others of softplus(s)."""
    B, N = len(query), len(item)
    s, inside = _inside(query @ item.T, item_bias, torch.arange(N, device=item.device))
    hot = _multi_hot(target_offsets, target_ids, B, N)
    rows = torch.where(inside, torch.where(hot, _softplus(-s), neg_weight * _softplus(s)), 0).sum(1)
    return _reduce(rows, weight, reduction)


def catalog_ce(
    query: Tensor,
    item: Tensor,
    target_offsets: Tensor,
    target_ids: Tensor,
    *,
    item_bias: Tensor | None = None,
    weight: Tensor | None = None,
    reduction: str = "mean",
) -> Tensor:
    """-sum over targets of log softmax(s)."""
    B, N = len(query), len(item)
    s, inside = _inside(query @ item.T, item_bias, torch.arange(N, device=item.device))
    hot = _multi_hot(target_offsets, target_ids, B, N)
    log_z = torch.where(inside, s, -torch.inf).logsumexp(1, keepdim=True)
    return _reduce(torch.where(hot, log_z - s, 0).sum(1), weight, reduction)


def score_topk(
    query: Tensor,
    item: Tensor,
    k: int,
    *,
    item_bias: Tensor | None = None,
    seen_offsets: Tensor | None = None,
    seen_ids: Tensor | None = None,
) -> tuple[Tensor, Tensor]:
    """The k best unseen items: descending score, ties to the smaller id, then (-inf, -1)."""
    B, N = len(query), len(item)
    s, inside = _inside(query @ item.T, item_bias, torch.arange(N, device=item.device))
    if seen_offsets is not None and seen_ids is not None:
        inside = inside & ~_multi_hot(seen_offsets, seen_ids, B, N)
    scores, ids = torch.where(inside, s, -torch.inf).sort(dim=1, descending=True, stable=True)
    scores = pad(scores[:, :k], (0, max(0, k - N)), value=-torch.inf)
    ids = pad(ids[:, :k], (0, max(0, k - N)), value=-1)
    return scores, torch.where(scores == -torch.inf, -1, ids)


def pool_rows(vectors: Tensor, offsets: Tensor, ids: Tensor, weights: Tensor) -> Tensor:
    """Sum over the entries e of list b of weight_e * vectors[ids_e]."""
    row = torch.repeat_interleave(torch.arange(len(offsets) - 1, device=ids.device), offsets.diff().long())
    terms = vectors[ids.long()] * weights[:, None].to(vectors.dtype)
    return vectors.new_zeros(len(offsets) - 1, vectors.shape[1]).index_add(0, row, terms)


def rowwise_adagrad(
    table: Tensor, state: Tensor, ids: Tensor, grad: Tensor, *, lr: float, eps: float = 1e-10
) -> tuple[Tensor, Tensor]:
    """Table and state after a step of row-wise Adagrad on the dense gradient."""
    g = torch.zeros_like(table).index_add(0, ids.long(), grad)
    state = state + g.square().mean(1)
    return table - lr * g / (state.sqrt() + eps)[:, None], state
