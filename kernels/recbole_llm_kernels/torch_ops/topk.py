r"""The k best unseen items of every query; the ``[B, N]`` scores are never allocated.

    s_bn = <query_b, item_n> + bias_n,  -inf where n is seen by b or outside the catalogue

Order: descending score, then ascending id. ``torch.topk`` keeps an arbitrary one of equal scores, so a row whose k-th
and next scores are equal is selected again by counting.
"""

import torch
from torch import Tensor

from recbole_llm_kernels.torch_ops.segment_sum import accumulator
from recbole_llm_kernels.torch_ops.tiles import target_rows

SCORES = 1 << 22  # elements of the score buffer: 16 MiB of float32
ROWS = 64


def score_topk(
    query: Tensor,
    item: Tensor,
    k: int,
    item_bias: Tensor | None,
    seen_offsets: Tensor | None,
    seen_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scores [B, k] in float32 (float64) and ids [B, k] int64; places without a candidate hold -inf and -1."""
    dtype = accumulator(query.dtype)
    B, N = len(query), len(item)
    vectors = item.to(dtype)
    bias = None if item_bias is None else item_bias.to(dtype)
    if bias is not None:
        vectors = vectors.masked_fill((bias == -torch.inf)[:, None], 0)
    scores = torch.full((B, k), -torch.inf, dtype=dtype, device=query.device)
    ids = torch.full((B, k), -1, dtype=torch.int64, device=query.device)
    rows = max(1, min(ROWS, SCORES // max(1, N)))
    bounds = seen_offsets[::rows].tolist() if seen_offsets is not None else None
    for block, lo in enumerate(range(0, B, rows)):
        part = slice(lo, min(lo + rows, B))
        s = query[part].to(dtype) @ vectors.T
        if bias is not None:
            s += bias
        if seen_offsets is not None and seen_ids is not None and bounds is not None:
            first = bounds[block]
            offsets = seen_offsets[lo : part.stop + 1]
            last = int(offsets[-1])
            row = target_rows(offsets, last - first)
            s.view(-1).index_fill_(0, row * N + seen_ids[first:last].long(), -torch.inf)
        scores[part, : min(k, N)], ids[part, : min(k, N)] = select(s, min(k, N))
    return scores, ids.masked_fill_(scores == -torch.inf, -1)


def select(s: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row of ``s`` [R, N], k <= N, ties to the smaller column: values and columns [R, k]."""
    N = s.shape[1]
    value, column = torch.topk(s, min(k + 1, N), dim=1, sorted=True)
    if k < N:
        tied = (value[:, k - 1] == value[:, k]).nonzero()[:, 0]
        value, column = value[:, :k], column[:, :k]
        if len(tied):
            value[tied], column[tied] = _select_tied(s[tied], value[tied, -1:], k)
    column, by_column = column.sort(1)
    value, by_value = value.gather(1, by_column).sort(dim=1, descending=True, stable=True)
    return value, column.gather(1, by_value)


def _select_tied(s: Tensor, threshold: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Everything above the k-th value, and of those equal to it the first columns that fill up k."""
    above, equal = s > threshold, s == threshold
    room = k - above.sum(1, keepdim=True)
    chosen = above | (equal & (equal.cumsum(1) <= room))
    column = chosen.nonzero()[:, 1].view(-1, k)
    return s.gather(1, column), column
