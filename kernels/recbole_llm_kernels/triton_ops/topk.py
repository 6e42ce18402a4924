r"""The k best unseen items of every query; the ``[B, N]`` scores are never allocated.

    s_bn = <query_b, item_n> + bias_n,  -inf where n is seen by b or outside the catalogue

A pass over tiles keeps the best score of each group of consecutive items. The k best groups hold the k best items: with
order (descending score, ascending id) each group before an item's own holds an item before it. These groups are scored
again in float32 and sorted. Groups are chosen by a 32-step search for the k-th largest of their int32 keys, equal ones in
ascending order; items travel as int64 keys that hold the id too, so that no two are equal. Up to ``tuning.FEW_ROWS``
queries, as a service asks, tiles have as few rows, and many parts of columns read the items at once. Bytes: 4 B N / group
of keys, 8 B k group of candidates; products 2 B N D flops.
"""

import torch
import triton
import triton.language as tl
from torch import Tensor

from recbole_llm_kernels.triton_ops import tuning
from recbole_llm_kernels.triton_ops.math import rank_key
from recbole_llm_kernels.triton_ops.targets import TILE, Marks, mark, mark_at_or_behind
from recbole_llm_kernels.triton_ops.tiles import MOST, Axis, tile_pass

KEYS = 1 << 24  # keys held at a time: 128 MiB


@triton.jit(do_not_specialize=["N", "G"])
def _group_score_kernel(
    query_ptr,  # [B, D]
    item_ptr,  # [N, D]
    bias_ptr,  # [N] or None
    group_ptr,  # [B, G] int64, or None: 0, 1, 2, ...
    mark_start_ptr,  # [B] or None: seen items, as in targets.Marks
    mark_end_ptr,
    mark_tile_ptr,
    mark_bit_ptr,
    key_ptr,  # [B, G, BLOCK_N] out
    N,
    G,
    MARKED: tl.constexpr,  # columns of one mark
    D: tl.constexpr,
    BLOCK_N: tl.constexpr,  # items of a group
    BLOCK_D: tl.constexpr,
):
    place = tl.program_id(0).to(tl.int64)
    b = place // G
    group = place % G
    if group_ptr is not None:
        group = tl.load(group_ptr + place)
    n = group * BLOCK_N + tl.arange(0, BLOCK_N)
    inside = n < N
    bias = tl.zeros([BLOCK_N], dtype=tl.float32)
    if bias_ptr is not None:
        bias = tl.load(bias_ptr + n, mask=inside, other=float("-inf")).to(tl.float32)
        inside = inside & (bias != float("-inf"))
    if mark_start_ptr is not None:
        begin = tl.load(mark_start_ptr + b).to(tl.int64)
        end = tl.load(mark_end_ptr + b)
        tile = group * BLOCK_N // MARKED
        mark = mark_at_or_behind(mark_tile_ptr, begin, end, tile, end - begin)
        here = tl.load(mark_tile_ptr + mark, mask=mark < end, other=-1) == tile
        bits = tl.load(mark_bit_ptr + mark, mask=here, other=0)
        inside = inside & (((bits >> (n % MARKED)) & 1) == 0)
    s = tl.zeros([BLOCK_N], dtype=tl.float32)
    for start in range(0, D, BLOCK_D):
        d = start + tl.arange(0, BLOCK_D)
        q = tl.load(query_ptr + b * D + d, mask=d < D, other=0.0).to(tl.float32)
        at = n[:, None] * D + d[None, :]
        i = tl.load(item_ptr + at, mask=inside[:, None] & (d < D)[None, :], other=0.0).to(tl.float32)
        s += tl.sum(q[None, :] * i, axis=1)
    s = tl.where(inside, s + bias, float("-inf"))
    tl.store(key_ptr + place * BLOCK_N + tl.arange(0, BLOCK_N), rank_key(s, n))


@triton.jit
def _above(key_ptr, held, bound, G, HELD: tl.constexpr, BLOCK_G: tl.constexpr):
    """How many of G keys are above ``bound``; HELD: all of them are in ``held``."""
    if HELD:
        return tl.sum((held > bound).to(tl.int32), axis=0)
    found = 0
    for start in range(0, G, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)
        key = tl.load(key_ptr + g, mask=g < G, other=-(2**31))
        found += tl.sum((key > bound).to(tl.int32), axis=0)
    return found


@triton.jit(do_not_specialize=["G", "k"])
def _select_kernel(
    key_ptr,  # [B, G] int32
    out_ptr,  # [B, k] int64 out: places of the k largest keys of a row in ascending order, the first of equal ones
    G,
    k,  # 1 to G
    HELD: tl.constexpr,  # all keys of a row fit in a block
    BLOCK_G: tl.constexpr,
):
    row = tl.program_id(0).to(tl.int64)
    key_ptr += row * G
    g = tl.arange(0, BLOCK_G)
    # the lowest key of all is above no bound
    held = tl.load(key_ptr + g, mask=g < G, other=-(2**31))
    low = tl.full([], -(2**31), dtype=tl.int64)
    high = tl.full([], 2**31 - 1, dtype=tl.int64)
    for _ in range(32):  # the largest bound that k keys reach
        middle = (low + high + 1) >> 1
        reach = _above(key_ptr, held, (middle - 1).to(tl.int32), G, HELD, BLOCK_G) >= k
        low = tl.where(reach, middle, low)
        high = tl.where(reach, high, middle - 1)
    bound = low.to(tl.int32)
    equal = k - _above(key_ptr, held, bound, G, HELD, BLOCK_G)  # so many of those that equal the bound
    chosen = 0
    for start in range(0, G, BLOCK_G):
        g = start + tl.arange(0, BLOCK_G)
        key = tl.load(key_ptr + g, mask=g < G, other=-(2**31))
        is_equal = (key == bound) & (g < G)
        nth = tl.cumsum(is_equal.to(tl.int32), axis=0)
        take = ((key > bound) | (is_equal & (nth <= equal))) & (g < G)
        at = chosen + tl.cumsum(take.to(tl.int32), axis=0) - 1
        tl.store(out_ptr + row * k + at, g.to(tl.int64), mask=take)
        equal -= tl.sum(is_equal.to(tl.int32), axis=0)
        chosen += tl.sum(take.to(tl.int32), axis=0)


def largest(keys: Tensor, k: int) -> Tensor:
    """Places of the ``k`` largest of int32 ``keys [B, G]`` in ascending order, ``[B, k]`` int64, the first of equal ones."""
    B, G = keys.shape
    found = torch.empty(B, k, dtype=torch.int64, device=keys.device)
    # 8 keys a thread: beyond 4,096 groups a row's keys are read again at each step, from the first-level cache
    block = min(max(128, triton.next_power_of_2(G)), 1 << 12)
    with torch.cuda.device_of(keys):
        _select_kernel[(B,)](
            keys, found, G, k, HELD=block >= G, BLOCK_G=block, num_warps=max(4, block // 256),
            enable_fp_fusion=True,
        )  # fmt: skip
    return found


def score_topk(
    query: Tensor,
    item: Tensor,
    k: int,
    item_bias: Tensor | None,
    seen_offsets: Tensor | None,
    seen_ids: Tensor | None,
) -> tuple[Tensor, Tensor]:
    """Scores [B, k] in float32 and ids [B, k] int64; places without a candidate hold -inf and -1.

    Raises:
        ValueError: beyond 2^31 - 2^16 rows or items; a key holds the id in 32 bits.
    """
    B, N, D = len(query), len(item), query.shape[1]
    if max(B, N) > MOST:
        raise ValueError(
            f'the triton backend takes at most {MOST:,} rows and items, got {B:,} and {N:,}; use backend="torch"'
        )
    scores = torch.full((B, k), -torch.inf, dtype=torch.float32, device=query.device)
    ids = torch.full((B, k), -1, dtype=torch.int64, device=query.device)
    if B == 0 or N == 0:
        return scores, ids
    on = tuning.target(query.device)
    precision = tuning.dot_precision(query.dtype, on, exact=True)
    size = tuning.tiles(D, query.dtype, precision.logits, on).BLOCK_C
    groups = triton.cdiv(N, size)
    chosen = min(k, groups)
    marks = None
    if seen_offsets is not None and seen_ids is not None:
        marks = mark(seen_offsets, seen_ids, N)
    rows = max(1, KEYS // max(groups, chosen * size))
    for lo in range(0, B, rows):
        part = slice(lo, min(lo + rows, B))
        seen = None if marks is None else marks._replace(starts=marks.starts[part], ends=marks.ends[part])
        best = None
        if chosen < groups:
            keys = tile_pass("group_max", Axis(query[part]), Axis(item, bias=item_bias), marks=seen).value
            assert keys is not None
            best = largest(keys, chosen)
        keys = _score_groups(query[part], item, item_bias, best, seen, chosen, size)
        found = min(k, chosen * size)
        scores[part, :found], ids[part, :found] = _from_keys(keys.topk(found, dim=1).values)
    if marks is not None and marks.bad is not None:
        scores.masked_fill_(marks.bad[:, None], torch.nan)
        ids.masked_fill_(marks.bad[:, None], -1)
    return scores, ids


def _score_groups(
    query: Tensor, item: Tensor, bias: Tensor | None, groups: Tensor | None, seen: Marks | None, count: int, size: int
) -> Tensor:
    """Keys of all items of the groups, ``[B, count * size]``."""
    B, D = query.shape
    keys = torch.empty(B, count * size, dtype=torch.int64, device=query.device)
    with torch.cuda.device_of(query):
        _group_score_kernel[(B * count,)](
            query, item, bias, groups, *((None,) * 4 if seen is None else seen[:4]), keys, len(item), count,
            TILE, D, BLOCK_N=size, BLOCK_D=min(tuning.padded(D), 64), num_warps=4, enable_fp_fusion=True,
        )  # fmt: skip
    return keys


def _from_keys(keys: Tensor) -> tuple[Tensor, Tensor]:
    ordered = (keys >> 32).int()
    scores = torch.where(ordered < 0, ordered ^ 0x7FFFFFFF, ordered).view(torch.float32)
    return scores, (0xFFFFFFFF - (keys & 0xFFFFFFFF)).masked_fill_(scores == -torch.inf, -1)
