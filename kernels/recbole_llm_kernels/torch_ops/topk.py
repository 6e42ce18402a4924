r"""The k best unseen items of every query; the ``[B, N]`` scores are never allocated.

    s_bn = <query_b, item_n> + bias_n,  -inf where n is seen by b or outside the catalogue

A tile of scores is computed, masked and reduced to the largest score of every group of 16 columns, at a tenth of the
product's time; ``torch.topk`` over whole rows would take longer than the product. The k groups with the largest maxima
hold the k best items: each has an item at least as good as any outside them. Only their 16 k items are looked at again;
their scores are kept where a block of rows has room for them, and computed anew in longer catalogues, whose groups are of
32 columns: the maxima are then most of the memory, 4 N / 32 bytes of float32 a row.

Order: descending score, then ascending id. ``torch.topk`` keeps an arbitrary one of equal scores, so a row whose k-th
and next scores are equal, among groups or among items, is selected again by counting.
"""

from functools import partial
from typing import NamedTuple

import torch
from torch import Tensor

from recbole_llm_kernels.torch_ops import threads
from recbole_llm_kernels.torch_ops.pairs import Rows
from recbole_llm_kernels.torch_ops.products import rows_by_rows
from recbole_llm_kernels.torch_ops.segment_sum import accumulator
from recbole_llm_kernels.torch_ops.tiles import Columns, columns, target_rows

ROWS, COLUMNS = 256, 2048  # a tile: 2 MiB of float32; 128 x 4096 takes a seventh longer, oneDNN packs it for fewer rows
GROUP = 16  # columns of a group; with 8 the selection of groups takes longer, with 32 that of their items
LARGE_GROUP = 32  # where scores are not kept: as fast there, and half of the maxima's memory
KEPT = 1 << 22  # scores kept by a block of rows: 16 MiB of float32
FEWEST_ROWS = 64  # in a block; where fewer rows' scores can be kept, none are: N = 100,000 is a quarter faster so
DIRECT = 4096  # items up to which torch.topk over the row is faster than groups
RESCORED = 1 << 18  # elements of item rows gathered at a time when scores are computed anew: 1 MiB of float32


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
    scores = torch.full((B, k), -torch.inf, dtype=dtype, device=query.device)
    ids = torch.full((B, k), -1, dtype=torch.int64, device=query.device)
    if B == 0 or N == 0:
        return scores, ids
    search = _Search(query.to(dtype), columns(item, None, item_bias), min(k, N), seen_offsets, seen_ids)
    share = -(-B // threads.workers(query.device))
    rows = min(share, ROWS, KEPT // N if search.keeps_scores else ROWS)

    def job(starts: range) -> None:
        for lo in starts:
            part = slice(lo, min(lo + rows, B))
            scores[part, : search.k], ids[part, : search.k] = search.best(part)

    threads.run([partial(job, starts) for starts in threads.cut(range(0, B, rows), query.device)])
    return scores, ids.masked_fill_(scores == -torch.inf, -1)


class _Seen(NamedTuple):
    """Seen items of a block of rows, by column tile."""

    row: Tensor  # [S] row within the block
    column: Tensor  # [S] column within the tile
    bounds: list[int]  # where each tile's entries begin
    key: Tensor  # [S] row * N + id, ascending


class _Search:
    def __init__(
        self, query: Tensor, cols: Columns, k: int, seen_offsets: Tensor | None, seen_ids: Tensor | None
    ) -> None:
        self.query, self.cols, self.k = query, cols, k
        self.seen_offsets, self.seen_ids = seen_offsets, seen_ids
        N = cols.total
        self.uses_groups = N > DIRECT and 2 * GROUP * (k + 1) < N
        self.keeps_scores = not self.uses_groups or KEPT // N >= FEWEST_ROWS
        self.width = DIRECT if N <= DIRECT else COLUMNS  # of a tile; a single one is no copy
        self.group = GROUP if self.keeps_scores or 2 * LARGE_GROUP * (k + 1) >= N else LARGE_GROUP
        if self.uses_groups:
            self.first, self.step = _members(N, self.group, query.device)

    def best(self, part: slice) -> tuple[Tensor, Tensor]:
        """Scores and ids of the k best, ``[rows, k]``, for a block of rows."""
        seen = self._seen(part)
        kept, maxima = self._scan(part, seen, keep=self.keeps_scores)
        if not self.uses_groups or maxima is None:
            assert kept is not None
            return select(kept, None, self.k)
        top = torch.topk(maxima, self.k + 1, dim=1)
        del maxima
        step = self.step[top.indices[:, :-1]][:, :, None]
        members = self.first[top.indices[:, :-1]][:, :, None] + torch.arange(self.group, device=step.device) * step
        ids = members.flatten(1)
        scores = self._again(part, ids, seen) if kept is None else kept.gather(1, ids)
        # a group of one column names it as often as the others have columns
        scores.view(members.shape)[:, :, 1:].masked_fill_(step == 0, -torch.inf)
        value, chosen = select(scores, ids, self.k)
        tied = (top.values[:, -2] == top.values[:, -1]) & (top.values[:, -1] != -torch.inf)
        for row in tied.nonzero()[:, 0].tolist():
            # an unselected group may hold an equal score with a smaller id
            one = slice(part.start + row, part.start + row + 1)
            whole, _ = self._scan(one, self._seen(one), keep=True)
            assert whole is not None
            value[row], chosen[row] = (x[0] for x in select(whole, None, self.k))
        return value, chosen

    def _scan(self, part: slice, seen: _Seen | None, keep: bool) -> tuple[Tensor | None, Tensor | None]:
        """Masked scores ``[rows, N]`` if they are to be kept, and group maxima."""
        query, N = self.query[part], self.cols.total
        kept = query.new_empty(len(query), N) if keep and self.width < N else None
        maxima = query.new_empty(len(query), len(self.first)) if self.uses_groups else None
        buffer, at = query.new_empty(len(query) * min(self.width, N)), 0
        for tile, lo in enumerate(range(0, N, self.width)):
            hi = min(lo + self.width, N)
            vectors, bias = self.cols.tile(lo, hi)
            s = rows_by_rows(query, vectors, buffer[: len(query) * (hi - lo)].view(-1, hi - lo))
            if bias is not None:
                s += bias
            if seen is not None:
                entries = slice(seen.bounds[tile], seen.bounds[tile + 1])
                s.view(-1).index_fill_(0, seen.row[entries] * (hi - lo) + seen.column[entries], -torch.inf)
            if kept is not None:
                kept[:, lo:hi] = s
            elif keep:
                kept = s
            if maxima is not None:
                groups = (hi - lo) // self.group
                whole = groups * self.group
                if groups:
                    torch.amax(s[:, :whole].unflatten(1, (self.group, -1)), 1, out=maxima[:, at : at + groups])
                maxima[:, at + groups : at + groups + hi - lo - whole] = s[:, whole:]
                at += groups + hi - lo - whole
            del s  # before the next
        return kept, maxima

    def _seen(self, part: slice) -> _Seen | None:
        if self.seen_offsets is None or self.seen_ids is None:
            return None
        offsets = self.seen_offsets[part.start : part.stop + 1]
        lo, hi = int(offsets[0]), int(offsets[-1])
        ids, row = self.seen_ids[lo:hi].long(), target_rows(offsets, hi - lo)
        if self.cols.total <= self.width:
            return _Seen(row, ids, [0, hi - lo], row * self.cols.total + ids)
        tile, order = torch.sort(ids.div(COLUMNS, rounding_mode="floor"), stable=True)
        edges = torch.arange(-(-self.cols.total // COLUMNS) + 1, device=ids.device)
        bounds = torch.searchsorted(tile, edges).tolist()
        return _Seen(row[order], (ids % COLUMNS)[order], bounds, row * self.cols.total + ids)

    def _again(self, part: slice, ids: Tensor, seen: _Seen | None) -> Tensor:
        """Masked scores of the items ``ids`` [rows, W]."""
        query = self.query[part]
        (R, W), D = ids.shape, query.shape[1]
        scores = torch.empty(R, W, dtype=query.dtype, device=query.device)
        chunk = max(1, RESCORED // (W * D))
        items = Rows(self.cols.item, min(chunk, R) * W)
        for lo in range(0, R, chunk):
            rows = slice(lo, min(lo + chunk, R))
            vectors = items.take(ids[rows].reshape(-1)).view(-1, W, D)
            torch.bmm(query[rows, None, :], vectors.transpose(1, 2), out=scores[rows, None, :])
        if self.cols.bias is not None:
            bias = self.cols.bias[ids]
            scores = torch.where(bias == -torch.inf, bias, scores + bias)
        if seen is not None and len(seen.key):
            key = torch.arange(R, device=ids.device)[:, None] * self.cols.total + ids
            place = torch.searchsorted(seen.key, key).clamp_(max=len(seen.key) - 1)
            scores.masked_fill_(seen.key[place] == key, -torch.inf)
        return scores


def _members(N: int, size: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """First column of every group of ``size``, and the step to its next; 0 for the columns left over, groups of their own.

    A tile's group takes every (width / size)-th of its columns: maxima of such slabs vectorise, those of neighbours not.
    """
    first, step = [], []
    for lo in range(0, N, COLUMNS):
        width = min(COLUMNS, N - lo)
        groups = width // size
        first += [torch.arange(lo, lo + groups), torch.arange(lo + groups * size, lo + width)]
        step += [torch.full((groups,), groups), torch.zeros(width - groups * size, dtype=torch.int64)]
    return torch.cat(first).to(device), torch.cat(step).to(device)


def select(s: Tensor, ids: Tensor | None, k: int) -> tuple[Tensor, Tensor]:
    """The ``k`` largest of each row of ``s`` [R, W], k <= W, ties to the smaller id: values and ids [R, k].

    ``ids`` [R, W] names the columns; None: by their number.
    """
    W = s.shape[1]
    value, place = torch.topk(s, min(k + 1, W), dim=1)
    chosen = place if ids is None else ids.gather(1, place)
    by_place = False
    if k < W:
        tied = ((value[:, k - 1] == value[:, k]) & (value[:, k] != -torch.inf)).nonzero()[:, 0]
        value, chosen = value[:, :k], chosen[:, :k]
        if len(tied):
            by_place = True  # those rows come in the order of their ids
            value[tied], chosen[tied] = _select_tied(s[tied], None if ids is None else ids[tied], value[tied, -1:], k)
    if by_place or bool((value[:, 1:] == value[:, :-1]).any()):
        chosen, by_id = chosen.sort(dim=1)
        value, by_value = value.gather(1, by_id).sort(dim=1, descending=True, stable=True)
        chosen = chosen.gather(1, by_value)
    return value, chosen


def _select_tied(s: Tensor, ids: Tensor | None, threshold: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Everything above the k-th value, and of those equal to it the smallest ids that fill up k."""
    if ids is not None:
        ids, order = ids.sort(dim=1)
        s = s.gather(1, order)
    above, equal = s > threshold, s == threshold
    room = k - above.sum(1, keepdim=True)
    place = (above | (equal & (equal.cumsum(1) <= room))).nonzero()[:, 1].view(-1, k)
    return s.gather(1, place), place if ids is None else ids.gather(1, place)
