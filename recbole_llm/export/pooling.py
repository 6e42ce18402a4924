"""Turn users into query vectors, and take a query's score apart into reasons.

With history weights t_j, block b of the query is (:mod:`recbole_llm.export.reader`)

    q_b = f_b (sum_j t_j / T^e_b v_jb + offset_b + part_ub),    T = sum_j t_j,   f_b = scale_b [/ |x_b| for cosine]

so that <q, w_i> + bias_i = sum_j [sum_b f_b t_j / T^e_b <v_jb, w_ib>] + <f (offset + part), w_i> + bias_i: the bracket
is what item j of the history adds to the score of item i. A block with a decay has t_j times exp(-rank_j / decay). Direct rows
(:mod:`recbole_llm.export.direct`) add f_b t_j / T^e_b M_b,ji to the bracket; they are no part of q. The query of a block that
reads the order is that of :mod:`recbole_llm.export.sequence`. What it adds belongs to no item of the history alone.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from recbole_llm.export.direct import DirectRows
from recbole_llm.export.manifest import Block
from recbole_llm.export.reader import Export
from recbole_llm.export.sequence import SCORING, SequenceWeights

CELLS_AT_ONCE = 1 << 17  # contributions: 1 MiB of float64
TINY = np.float32(1e-12)
TINIEST = float(np.finfo(np.float32).tiny)
_NO_ROWS, _NO_VALUES = np.zeros(0, np.int64), np.zeros(0)


@dataclass(frozen=True, eq=False)
class Query:
    """A user, ready to score; h entries of history.

    Attributes:
        vector: ``[D]`` float32, q.
        source: ``[h, D]`` float32, the history's source vectors v_j.
        weights: ``[h, blocks]`` float32, f_b t_j / T^e_b; 0 in a block that reads the order.
        rows: ``[h]`` int64, rows of the history's items, where direct rows count; else empty.
        touched: ``[t]`` int64, ascending, the items that direct rows add to.
        adds: ``[t]`` float64, how much in all.
    """

    vector: np.ndarray
    source: np.ndarray
    weights: np.ndarray
    rows: np.ndarray = field(default_factory=lambda: _NO_ROWS)
    touched: np.ndarray = field(default_factory=lambda: _NO_ROWS)
    adds: np.ndarray = field(default_factory=lambda: _NO_VALUES)


class Pooling:
    """Turns histories into queries.

    Args:
        blocks: the columns.
        offset: ``[D]`` float32 of every user.
        sequence: of the block that reads the order of a history; ``None`` without one.
        direct: direct rows by the place of their block.

    Raises:
        ValueError: if there is such a block and no ``sequence``.
    """

    def __init__(
        self,
        blocks: Sequence[Block],
        offset: np.ndarray,
        sequence: SequenceWeights | None = None,
        direct: Mapping[int, DirectRows] | None = None,
    ) -> None:
        self.direct = dict(direct or {})
        ends = np.cumsum([block.dim for block in blocks])
        self.columns = [slice(int(end) - block.dim, int(end)) for end, block in zip(ends, blocks, strict=True)]
        self.blocks = list(blocks)
        self.offset, self.sequence = offset, sequence
        of_order = [at for at, block in zip(self.columns, blocks, strict=True) if block.scoring == SCORING]
        self._of_order = of_order[0] if of_order else None
        if of_order and sequence is None:
            raise ValueError(
                f"a block has scoring {SCORING!r}, and sequence is None; give the weights that it is read by."
            )

    @classmethod
    def of(cls, export: Export) -> "Pooling":
        """Make the pooling of an export."""
        return cls(export.manifest.blocks, export.offset, export.sequence, export.direct)

    def query(
        self,
        source: np.ndarray,
        times: np.ndarray,
        part: np.ndarray | None = None,
        ranks: np.ndarray | None = None,
        rows: np.ndarray = _NO_ROWS,
        disliked: np.ndarray = _NO_ROWS,
    ) -> Query:
        """Turn a history into a query.

        Args:
            source: ``[h, D]`` float32.
            times: ``[h]`` float32, t_j.
            part: ``[D]`` float32 of this user alone, or ``None``.
            ranks: ``[h]`` float32, 0 for the newest, by which blocks with a decay weigh too; ``None``: by ``times`` alone, the
                last entry being the newest where a block reads the order.
            rows: ``[h]`` int64, rows of the history's items, by which direct rows count; empty for what is no item.
            disliked: ``[m]`` int64, rows of this user's disliked items, already in ``part``.

        Example:
            >>> pooling = Pooling([Block("closed_form", dim=2, exponent=0.5, scale=3.0)], np.zeros(2, np.float32))
            >>> pooling.query(np.eye(2, dtype=np.float32), np.array([2.0, 2.0], np.float32)).vector.tolist()
            [3.0, 3.0]
        """
        vector = np.empty(source.shape[1], np.float32)
        weights = np.empty((len(source), len(self.blocks)), np.float32)
        for b, (block, columns) in enumerate(zip(self.blocks, self.columns, strict=True)):
            if self.sequence is not None and columns == self._of_order:
                vector[columns] = np.float32(block.scale) * self.sequence.state(source[:, columns], ranks)
                weights[:, b] = 0
                continue
            weight = times
            if block.decay is not None and ranks is not None:
                weight = times * np.exp(-ranks / np.float32(block.decay))
            total = max(float(weight.sum(dtype=np.float64)), TINIEST)
            pooled = weight * np.float32(np.float64(total) ** -block.exponent)
            x = pooled @ source[:, columns] + self.offset[columns]
            if part is not None:
                x += part[columns]
            factor = np.float32(block.scale)
            if block.scoring == "cosine":
                factor /= max(np.float32(np.linalg.norm(x)), TINY)
            vector[columns] = factor * x
            weights[:, b] = factor * pooled
        if not self.direct or not len(rows) + len(disliked):
            return Query(vector, source, weights)
        touched, adds = self._adds(rows, weights, disliked)
        return Query(vector, source, weights, rows, touched, adds)

    def _adds(self, rows: np.ndarray, weights: np.ndarray, disliked: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """The items that direct rows add to, ascending, and how much in all."""
        items, values = [_NO_ROWS], [_NO_VALUES]
        for b, direct in self.direct.items():
            block = self.blocks[b]
            if len(rows):
                position, item, value = direct.entries(rows)
                items.append(item)
                values.append(value.astype(np.float64) * weights[position, b])
            if len(disliked) and block.dislikes:
                _, item, value = direct.entries(disliked)
                items.append(item)
                values.append(value * np.float64(-block.dislikes * block.scale))
        touched, at = np.unique(np.concatenate(items), return_inverse=True)
        return touched, np.bincount(at.reshape(-1), np.concatenate(values), len(touched))

    def parts(self, query: Query, vector: np.ndarray, items: np.ndarray | None = None) -> dict[str, np.ndarray]:
        """Compute what each entry of the history adds to each score in each block, ``[n, h]`` float64 by block name.

        Args:
            query: of :meth:`query`.
            vector: target vectors ``[n, D]`` float32.
            items: ``[n]`` int64, rows of these targets, by which direct rows count; ``None`` for items that have none.
        """
        return {
            block.name: (
                vector[:, columns].astype(np.float64) @ query.source[:, columns].T + self._direct_part(b, query, items)
            )
            * query.weights[:, b]
            for b, (block, columns) in enumerate(zip(self.blocks, self.columns, strict=True))
        }

    def of_order(self, query: Query, vector: np.ndarray) -> np.ndarray | None:
        """Compute what the order of the history adds to each score, ``[n]`` float64; ``None`` where no block reads it.

        Arguments are those of :meth:`parts`.
        """
        at = self._of_order
        return None if at is None else vector[:, at].astype(np.float64) @ query.vector[at].astype(np.float64)

    def contributions(self, query: Query, vector: np.ndarray, items: np.ndarray | None = None) -> np.ndarray:
        """Compute what each entry of the history adds to each score in all blocks together, ``[n, h]`` float64.

        Arguments are those of :meth:`parts`.
        """
        return vector.astype(np.float64) @ self._weighted(query).T + self._direct(query, items)

    def _direct_part(self, b: int, query: Query, items: np.ndarray | None) -> np.ndarray | float:
        """What direct rows of a block hold of each target and entry, ``[n, h]``; 0 without any."""
        if b not in self.direct or items is None or not len(query.rows):
            return 0.0
        return self.direct[b].between(query.rows, items)

    def _direct(self, query: Query, items: np.ndarray | None) -> np.ndarray | float:
        """What direct rows of all blocks add, ``[n, h]``; 0 without any."""
        found: np.ndarray | float = 0.0
        for b in self.direct:
            found = found + self._direct_part(b, query, items) * query.weights[:, b]
        return found

    def _weighted(self, query: Query) -> np.ndarray:
        """The history's source vectors times their weights, ``[h, D]`` float64."""
        weighted = query.source.astype(np.float64)
        for b, columns in enumerate(self.columns):
            weighted[:, columns] *= query.weights[:, b, None]
        return weighted

    def largest(
        self, query: Query, vector: np.ndarray, limit: int, items: np.ndarray | None = None
    ) -> tuple[np.ndarray, np.ndarray]:
        """Return the entries of the history that add most to each score.

        Args:
            query: of :meth:`query`, with h entries.
            vector: target vectors ``[n, D]`` float32.
            limit: most entries per score.
            items: as of :meth:`parts`.

        Returns:
            Positions in the history ``[n, m]`` int64 and contributions ``[n, m]`` float64, m = min(limit, h). Each row
            falls; of equal contributions the earlier entry comes first.
        """
        m = min(limit, len(query.source))
        step = max(CELLS_AT_ONCE // max(len(query.source), 1), 1)
        weighted = self._weighted(query).T
        parts = [
            _largest_of_rows(
                vector[at : at + step].astype(np.float64) @ weighted
                + self._direct(query, None if items is None else items[at : at + step]),
                m,
            )
            for at in range(0, len(vector), step)
        ]
        if not parts:
            return np.zeros((0, m), np.int64), np.zeros((0, m))
        return np.concatenate([at for at, _ in parts]), np.concatenate([values for _, values in parts])


def _largest_of_rows(values: np.ndarray, m: int) -> tuple[np.ndarray, np.ndarray]:
    """Find the m largest of each row of ``[n, h]``, in the order of a stable sort, without sorting h."""
    n, h = values.shape
    if not m:
        return np.zeros((n, 0), np.int64), np.zeros((n, 0))
    if m < h:
        threshold = np.partition(values, h - m, axis=1)[:, h - m, None]
        chosen = values >= threshold
        tied = np.flatnonzero(chosen.sum(1) > m)
        if len(tied):  # the m-th value occurs again: the earlier entries are taken
            equal = values[tied] == threshold[tied]
            missing = m - (values[tied] > threshold[tied]).sum(1, keepdims=True)
            chosen[tied] &= ~equal | (np.cumsum(equal, axis=1, dtype=np.int32) <= missing)
        at = np.nonzero(chosen)[1].reshape(n, m)
    else:
        at = np.broadcast_to(np.arange(h), (n, h))
    found = np.take_along_axis(values, at, axis=1)
    order = np.argsort(-found, axis=1, kind="stable")
    return np.take_along_axis(at, order, axis=1), np.take_along_axis(found, order, axis=1)
