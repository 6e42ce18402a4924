"""Exact top-k of <q, w_i> + b_i over tables in memory.

    threshold = the k-th largest of the maxima over blocks of scores; what reaches it is sorted

reads the scores once and sorts a handful. Block c of m is every m-th score from c on: one pass over rows of m scores
finds all maxima, and neighbours in the catalogue lie in different blocks. Scores of a batch are made in tiles of items,
so that ``[B, N]`` is never allocated. The few candidates are scored again in float64, each row by itself: an answer does
not depend on what else was in its batch.
"""

from collections.abc import Sequence
from typing import NamedTuple, Protocol

import numpy as np

from recbole_llm.export.quantise import CodedTable

BLOCKS = (256, 64, 16)  # scores of a block; the largest that leaves twice as many blocks as results
FEW = 3  # queries that are multiplied one by one: a product of so few rows first copies the whole table
TILE = 16_384  # items; 64 queries x 16,384 float32 scores are 4 MiB
# candidates beyond k that are scored again: float32 products of 600 dimensions reorder near-equal scores only
MARGIN = 16
# an allow-list below this share of the catalogue is gathered, not masked
GATHER_SHARE = 0.05
# above this share the allowed ones are looked for among more of the best
SIEVE_SHARE = 0.25
SIEVE_SPARE = 1.3
MINUS_INFINITY = np.array(-np.inf, np.float32).view(np.int32)[()]  # its bits


class Segment(NamedTuple):
    """Rows of the catalogue that lie in one array; the first is row ``start``.

    Attributes:
        start: catalogue row of the first.
        vector: ``[n, D]`` float32, or a coded table.
        bias: ``[n]`` float32; -inf for rows that may not be recommended.
    """

    start: int
    vector: np.ndarray
    bias: np.ndarray


class Hits(NamedTuple):
    """A ranking, best first: catalogue rows int64 and scores float64, ``[k]`` or shorter where fewer are allowed."""

    rows: np.ndarray
    scores: np.ndarray


class Lift(Protocol):
    """What is added to scores of rows beside the product; ranks are by the sum."""

    @property
    def sums(self) -> np.ndarray | None:
        """What is added to each row's score, ``[N]`` float64; ``None`` where it depends on the score."""

    def kinds(self) -> list[np.ndarray]:
        """Rows within which lifted scores are in the order of scores, ``[N]`` bool; all rows together."""

    def adjusted(self, rows: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Lift the scores of rows, ``[n]`` float64."""


class Retriever(Protocol):
    """Anything that finds the best rows for queries."""

    def search(
        self,
        query: np.ndarray,
        k: Sequence[int],
        exclude: Sequence[np.ndarray],
        allow: Sequence[np.ndarray | None],
    ) -> list[Hits]:
        """Find the ``k[b]`` best rows for each query ``[B, D]``, without rows ``exclude[b]``, among ``allow[b]`` (bool)."""


def top_rows(scores: np.ndarray, k: int) -> np.ndarray:
    """Find the positions of at least the k largest finite scores, unsorted; more if the k-th is tied."""
    n = len(scores)
    if k >= n:
        return np.flatnonzero(scores > -np.inf)
    size = next((size for size in BLOCKS if n // size >= 2 * k), 1)
    blocks = n // size
    maxima = scores if size == 1 else scores[: blocks * size].reshape(size, blocks).max(0)
    threshold = np.partition(maxima, blocks - k)[blocks - k]
    if threshold == -np.inf:
        return np.flatnonzero(scores > -np.inf)
    return np.flatnonzero(scores >= threshold)


def _penalty(allowed: np.ndarray) -> np.ndarray:
    """0 for allowed rows and -inf for the others, ``[n]`` float32: the addition of it is ten times as fast as an assignment."""
    bits = allowed.astype(np.int32)
    bits -= 1  # 0, or all bits
    bits &= MINUS_INFINITY
    return bits.view(np.float32)


def _top_allowed(scores: np.ndarray, allowed: np.ndarray, k: int) -> np.ndarray:
    """Find what :func:`top_rows` finds among the allowed positions ``[n]`` bool, and perhaps more of them.

    Among so many of the best that k are allowed wherever conditions have nothing to do with scores; else among all.
    """
    count = np.count_nonzero(allowed)
    if count >= SIEVE_SHARE * len(scores):
        at = top_rows(scores, int(SIEVE_SPARE * k * len(scores) / count))
        at = at[allowed[at]]
        if len(at) >= k:
            return at
    return top_rows(scores + _penalty(allowed), k)


def _candidates(
    scores: np.ndarray, start: int, mask: np.ndarray | None, wanted: int, lift: Lift | None
) -> tuple[np.ndarray, np.ndarray]:
    """Find rows among which the best of a tile are, with scores: lifted ones where the lift has sums.

    Args:
        scores: of the tile, ``[n]`` float32.
        start: row of its first.
        mask: allowed rows ``[N]`` bool; ``None`` for all.
        wanted: how many of the best, at least.
        lift: or ``None``.
    """
    stop = start + len(scores)
    allowed = None if mask is None else mask[start:stop]
    if lift is None or lift.sums is not None:
        if lift is not None and lift.sums is not None:
            scores = scores + lift.sums[start:stop]  # in float64: a sum may be large beside the scores
        at = top_rows(scores, wanted) if allowed is None else _top_allowed(scores, allowed, wanted)
        return at + start, scores[at]
    found = []
    for kind in lift.kinds():
        here = kind[start:stop] if allowed is None else kind[start:stop] & allowed
        found.append(_top_allowed(scores, here, wanted))
    at = np.concatenate(found)
    return at + start, scores[at]


def best(rows: np.ndarray, scores: np.ndarray, k: int) -> np.ndarray:
    """Find the positions of the k best, by descending score; ties go to the smaller row.

    Example:
        >>> best(np.array([4, 7, 2]), np.array([1.0, 3.0, 1.0]), 2).tolist()
        [1, 2]
    """
    return np.lexsort((rows, -scores))[:k]


def _distinct(query: np.ndarray, some: Sequence[int]) -> list[list[int]]:
    """Put neighbours of ``some`` queries together that are the same: the parts of one request with boosts are."""
    found: list[list[int]] = []
    for b in some:
        if found and np.array_equal(query[found[-1][0]], query[b]):
            found[-1].append(b)
        else:
            found.append([b])
    return found


class ExactRetriever:
    """Scores everything.

    Args:
        segments: the catalogue, in row order.
    """

    def __init__(self, segments: Sequence[Segment]) -> None:
        for segment in segments:
            # a float64 operand would silently halve the speed
            if segment.vector.dtype != np.float32 or segment.bias.dtype != np.float32:
                raise ValueError(f"vector is {segment.vector.dtype} and bias {segment.bias.dtype}; expected float32.")
        self.segments = list(segments)

    def search(
        self,
        query: np.ndarray,
        k: Sequence[int],
        exclude: Sequence[np.ndarray],
        allow: Sequence[np.ndarray | None],
        lifts: Sequence[Lift | None] | None = None,
    ) -> list[Hits]:
        """Find the best rows for each query.

        Args:
            query: ``[B, D]`` float32.
            k: how many, per query.
            exclude: rows without a place, per query; any order, repeats allowed.
            allow: ``[N]`` bool per query, or ``None`` for all rows.
            lifts: by what the scores of each query are lifted before they are compared, or ``None``.

        Returns:
            One :class:`Hits` per query: exact up to scores that float32 cannot tell apart. Scores are without the lift.

        Example:
            >>> table = Segment(0, np.array([[1.0], [3.0], [2.0]], np.float32), np.zeros(3, np.float32))
            >>> query, seen = np.ones((1, 1), np.float32), np.array([1])
            >>> ExactRetriever([table]).search(query, [2], [seen], [None])[0].rows.tolist()
            [2, 0]
        """
        found: list[list[tuple[np.ndarray, np.ndarray]]] = [[] for _ in k]
        lifts = lifts or [None] * len(k)
        dense = []
        for b, mask in enumerate(allow):
            if mask is not None and np.count_nonzero(mask) < GATHER_SHARE * len(mask):
                self._gather(exclude[b], mask.copy(), found[b])
            else:
                dense.append(b)
        distinct = _distinct(query, dense)
        for segment in self.segments if dense else ():
            at_once = len(distinct) == 1 and not isinstance(segment.vector, CodedTable)
            step = len(segment.vector) if at_once else TILE
            for first in range(0, len(segment.vector), max(step, 1)):
                self._tile(segment, first, step, distinct, query, k, exclude, allow, lifts, found)
        return [self._finish(query[b], k[b], found[b], lifts[b]) for b in range(len(k))]

    def _gather(self, exclude: np.ndarray, mask: np.ndarray, found: list[tuple[np.ndarray, np.ndarray]]) -> None:
        mask[exclude] = False
        rows = np.flatnonzero(mask)
        # a mask is of the whole catalogue, the segments may be its last part
        rows = rows[np.searchsorted(rows, self.segments[0].start if self.segments else 0) :]
        # positions are only candidates here; _finish scores them
        found.append((rows, np.zeros(len(rows), np.float32)))

    def _tile(
        self,
        segment: Segment,
        first: int,
        step: int,
        distinct: list[list[int]],
        query: np.ndarray,
        k: Sequence[int],
        exclude: Sequence[np.ndarray],
        allow: Sequence[np.ndarray | None],
        lifts: Sequence[Lift | None],
        found: list[list[tuple[np.ndarray, np.ndarray]]],
    ) -> None:
        bias = segment.bias[first : first + step]
        start = segment.start + first
        few = [b for b, *_ in distinct]
        if isinstance(segment.vector, CodedTable):
            scores = segment.vector.dots(query[few], first, first + len(bias))
            self._keep(scores, bias, start, distinct, k, exclude, allow, lifts, found)
            return
        vector = segment.vector[first : first + step]
        if len(few) <= FEW:
            scores = np.empty((len(few), len(vector)), np.float32)
            for row, b in zip(scores, few, strict=True):
                np.matmul(vector, query[b], out=row)
        else:
            scores = query[few] @ vector.T
        self._keep(scores, bias, start, distinct, k, exclude, allow, lifts, found)

    @staticmethod
    def _keep(
        scores: np.ndarray,
        bias: np.ndarray,
        start: int,
        distinct: list[list[int]],
        k: Sequence[int],
        exclude: Sequence[np.ndarray],
        allow: Sequence[np.ndarray | None],
        lifts: Sequence[Lift | None],
        found: list[list[tuple[np.ndarray, np.ndarray]]],
    ) -> None:
        """Put the candidates of a tile down, whose ``scores`` ``[len(distinct), n]`` are still without bias."""
        stop = start + len(bias)
        scores += bias
        for plain, same in zip(scores, distinct, strict=True):
            for b in same:
                row = plain if b == same[-1] else plain.copy()
                hidden = exclude[b]
                if len(hidden):
                    row[hidden[(hidden >= start) & (hidden < stop)] - start] = -np.inf
                found[b].append(_candidates(row, start, allow[b], k[b] + MARGIN, lifts[b]))

    def _finish(
        self, query: np.ndarray, k: int, found: list[tuple[np.ndarray, np.ndarray]], lift: Lift | None = None
    ) -> Hits:
        rows = np.concatenate([rows for rows, _ in found]) if found else np.zeros(0, np.int64)
        scores = np.concatenate([scores for _, scores in found]) if found else np.zeros(0, np.float32)
        lifted_by_rows = lift is None or lift.sums is not None
        if len(found) > 1 and len(rows) > k + MARGIN and lifted_by_rows:
            rows = rows[best(rows, scores, k + MARGIN)]
        exact = self.score(query, rows)
        live = exact > -np.inf
        if not live.all():
            rows, exact = rows[live], exact[live]
        order = best(rows, exact if lift is None else lift.adjusted(rows, exact), k)
        return Hits(rows[order], exact[order])

    def score(self, query: np.ndarray, rows: np.ndarray) -> np.ndarray:
        """Compute <q, w_i> + b_i in float64, ``[n]``, each row summed by itself."""
        wide = query.astype(np.float64)
        if len(self.segments) == 1:
            return self._score_in(self.segments[0], rows, wide)
        scores = np.empty(len(rows), np.float64)
        for segment in self.segments:
            here = (rows >= segment.start) & (rows < segment.start + len(segment.vector))
            scores[here] = self._score_in(segment, rows[here], wide)
        return scores

    @staticmethod
    def _score_in(segment: Segment, rows: np.ndarray, query: np.ndarray) -> np.ndarray:
        local = rows - segment.start if segment.start else rows
        if len(local) <= TILE:
            return _dots(segment.vector, local, query) + segment.bias.take(local)
        parts = [local[at : at + TILE] for at in range(0, len(local), TILE)]
        return np.concatenate([_dots(segment.vector, part, query) + segment.bias.take(part) for part in parts])


def _dots(vector: np.ndarray, rows: np.ndarray, query: np.ndarray) -> np.ndarray:
    """<q, w_i> of rows in float64, ``[n]``; a product of each row alone, whose sum no other row changes."""
    some = vector[rows] if isinstance(vector, CodedTable) else vector.take(rows, 0)
    # [n, 1, D] times [D] is a product for each of n
    return np.matmul(some.astype(np.float64)[:, None], query)[:, 0]
