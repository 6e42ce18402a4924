"""Who should get an item: the users to whom it is likeliest, found in one pass over all of them.

A user's score of an item is a sum over the history. So for a few items the sums are made from one number for each item of the
catalogue, <v_jb, w_ib>, and no user's query is ever formed: a pass reads the histories once, whatever the vectors' length. Only a
cosine block needs the lengths of its queries, and a block that reads the order of a history the queries themselves.

Shapes: M items asked for, N of the catalogue, U users, D columns.
"""

import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np

from recbole_llm.export.errors import UnknownItemError
from recbole_llm.export.manifest import Block
from recbole_llm.export.pooling import TINIEST, TINY
from recbole_llm.export.reader import Export
from recbole_llm.export.sequence import SCORING
from recbole_llm.retrieval.exact import best, top_rows
from recbole_llm.scoring.probability import ProbabilityMap

ENTRIES = 1 << 18  # of histories at once
ITEMS = 32  # asked for in one pass
CELLS = 1 << 22  # of the queries of cosine blocks at once


@dataclass(frozen=True, eq=False)
class AskedItem:
    """An item that somebody should get.

    Attributes:
        id: external id, or what to call it.
        title: its title.
        vector: ``[D]`` float32, target.
        bias: of it.
        row: in the export; ``None`` for one that the export does not hold.
        cold: whether it is known by its content alone.
    """

    id: str
    title: str
    vector: np.ndarray
    bias: float
    row: int | None = None
    cold: bool = True


@dataclass(frozen=True)
class Reached:
    """A user who should get an item: external id, score, and P(i|u)."""

    user: str
    score: float
    probability: float


def known_items(export: Export, ids: Sequence[str]) -> list[AskedItem]:
    """Items of an export.

    Args:
        export: of the model.
        ids: external ids.

    Raises:
        UnknownItemError: naming the ids that no item has.
    """
    row_of = {item_id: row for row, item_id in enumerate(export.item_ids)}
    unknown = [item_id for item_id in ids if item_id not in row_of]
    if unknown:
        raise UnknownItemError(", ".join(map(repr, unknown[:10])) + (" and others" if len(unknown) > 10 else ""))
    return [
        AskedItem(
            item_id,
            export.records[row].title,
            export.vector[row],
            float(export.bias[row]),
            row,
            not bool(export.trained[row]),
        )
        for item_id, row in ((item_id, row_of[item_id]) for item_id in ids)
    ]


def described_items(
    export: Export, ids: Sequence[str], titles: Sequence[str], text_vectors: np.ndarray
) -> list[AskedItem]:
    """Items known by their texts alone.

    Args:
        export: of the model; it must map texts.
        ids: what to call them.
        titles: of them.
        text_vectors: ``[M, F]`` float32 of the export's encoder.

    Raises:
        ValueError: if the export maps no texts.
    """
    if export.text_map is None:
        raise ValueError("text: this model places no items by their texts (no encoder, or cold_map none).")
    vector, _, bias = export.text_map.apply(text_vectors)
    made = zip(ids, titles, vector, bias.tolist(), strict=True)
    return [AskedItem(item_id, title, row, b) for item_id, title, row, b in made]


def top_users(
    export: Export, items: Sequence[AskedItem], k: int, *, exclude_seen: bool = True
) -> Iterator[list[Reached]]:
    """The k users to whom each item is likeliest, by P(i|u): scores of different users are on different scales.

    Args:
        export: of the model.
        items: what somebody should get.
        k: users for each; fewer where fewer may get it.
        exclude_seen: whether users who have the item in their history are left out. Those who dislike it always are.

    Yields:
        For each item in order, its users, the likeliest first, ties in the order of the export.

    Raises:
        ValueError: if ``k`` is below 1.
    """
    if k < 1:
        raise ValueError(f"k is {k}; expected at least 1 user.")
    for start in range(0, len(items), ITEMS):
        yield from _top_users(export, items[start : start + ITEMS], k, exclude_seen)


def _top_users(export: Export, items: Sequence[AskedItem], k: int, exclude_seen: bool) -> Iterator[list[Reached]]:
    manifest = export.manifest
    probability = manifest.probability or ProbabilityMap()
    vector = np.stack([item.vector for item in items])
    bias = np.array([item.bias for item in items])
    adds = [export.source[:, columns] @ vector[:, columns].T for columns in _columns(manifest.blocks)]
    rows = np.array([-1 if item.row is None else item.row for item in items])
    direct = _direct_adds(export, rows)
    for b, added in direct.items():
        adds[b] = adds[b] + added
    found: list[list[tuple[np.ndarray, np.ndarray, np.ndarray]]] = [[] for _ in items]
    for first, last in _chunks(export):
        scores = _scores(export, first, last, vector, adds, direct) + bias
        sizes = np.diff(export.history_offsets[first : last + 1])
        logit = probability.logit(scores, np.log(np.maximum(sizes, 1))[:, None])
        hidden = [(export.disliked_offsets, export.disliked_items)]
        if exclude_seen:
            hidden.append((export.history_offsets, export.history_items))
        for offsets, entries in hidden:
            _hide(logit, rows, offsets, entries, first, last)
        for m, parts in enumerate(found):
            own = logit[:, m]
            at = top_rows(own, k)
            at = at[best(at, own[at], k)]
            parts.append((at + first, own[at], scores[at, m]))
    for parts in found:
        if not parts:  # an export without users
            yield []
            continue
        users, logits, scores = (np.concatenate(columns) for columns in zip(*parts, strict=True))
        at = best(users, logits, k)
        chance = 0.5 + 0.5 * np.tanh(0.5 * logits[at])  # a sigmoid that does not overflow
        yield [
            Reached(export.user_ids[user], score, p)
            for user, score, p in zip(users[at].tolist(), scores[at].tolist(), chance.tolist(), strict=True)
        ]


def _direct_adds(export: Export, rows: np.ndarray) -> dict[int, np.ndarray]:
    """What direct rows of each block add from every item to the items ``rows`` ``[M]``, -1 for new ones: ``[N, M]`` float32."""
    found = {}
    for b, direct in export.direct.items():
        found[b] = np.zeros((len(export.item_ids), len(rows)), np.float32)
        for m, row in enumerate(rows.tolist()):
            if row >= 0:
                sources, values = direct.into(row)
                found[b][sources, m] = values
    return found


def _columns(blocks: Sequence[Block]) -> list[slice]:
    ends = np.cumsum([block.dim for block in blocks])
    return [slice(int(end) - block.dim, int(end)) for end, block in zip(ends, blocks, strict=True)]


def _chunks(export: Export) -> Iterator[tuple[int, int]]:
    """Users ``first`` to ``last`` whose histories have some ``ENTRIES`` entries; at least one user."""
    offsets, n_users = export.history_offsets, len(export.user_ids)
    widest = max((b.dim for b in export.manifest.blocks if b.scoring == "cosine"), default=0)
    entries = ENTRIES if not widest else max(CELLS // widest, 1)
    first = 0
    while first < n_users:
        last = int(np.searchsorted(offsets, offsets[first] + entries, side="right")) - 1
        last = min(max(last, first + 1), first + entries, n_users)
        yield first, last
        first = last


def _scores(
    export: Export,
    first: int,
    last: int,
    vector: np.ndarray,
    adds: Sequence[np.ndarray],
    direct: Mapping[int, np.ndarray],
) -> np.ndarray:
    """Scores without bias of users ``first`` to ``last``, ``[U, M]`` float64."""
    offsets = export.history_offsets[first : last + 1]
    span = slice(int(offsets[0]), int(offsets[-1]))
    items, begins = export.history_items[span], offsets - offsets[0]
    scores = np.zeros((last - first, len(vector)))
    parts = export.user_parts(first, last)
    blocks = zip(export.manifest.blocks, _columns(export.manifest.blocks), adds, strict=True)
    for b, (block, columns, add) in enumerate(blocks):
        if block.scoring == SCORING:
            assert export.sequence is not None and export.history_rank is not None
            ranks, target = export.history_rank[span], vector[:, columns].T.astype(np.float64)
            for rows, states in export.sequence.of_histories(export.source, columns, begins, items, ranks):
                scores[rows] += block.scale * (states.astype(np.float64) @ target)
            continue
        weight = export.history_weight[span]
        if block.decay is not None and export.history_rank is not None:
            weight = weight * np.exp(-export.history_rank[span] / np.float32(block.decay))
        total = np.maximum(_sums(weight.astype(np.float64)[:, None], begins), TINIEST)
        shrink = total**-block.exponent  # [U, 1]
        own = export.offset[columns][None] if parts is None else export.offset[columns] + parts[:, columns]
        x = _sums(add[items] * weight[:, None].astype(np.float64), begins) * shrink + own.astype(np.float64) @ vector[
            :, columns
        ].T.astype(np.float64)
        if b in direct and block.dislikes and export.disliked_offsets is not None and export.disliked_items is not None:
            bounds = export.disliked_offsets[first : last + 1]
            disliked = export.disliked_items[int(bounds[0]) : int(bounds[-1])]
            x -= block.dislikes * _sums(direct[b][disliked].astype(np.float64), bounds - bounds[0])
        if block.scoring == "cosine":
            queries = _sums(export.source[items, columns] * weight[:, None], begins) * shrink + own
            x /= np.maximum(np.linalg.norm(queries, axis=1, keepdims=True), TINY)
        scores += block.scale * x
    return scores


def _sums(values: np.ndarray, begins: np.ndarray) -> np.ndarray:
    """Sums of the rows from each of ``begins`` (``[U + 1]``) to the next; zero for none."""
    found = np.zeros((len(begins) - 1, values.shape[1]), values.dtype)
    filled = np.flatnonzero(np.diff(begins))
    if len(filled):
        found[filled] = np.add.reduceat(values, begins[filled], axis=0)
    return found


def _hide(
    logit: np.ndarray, rows: np.ndarray, offsets: np.ndarray | None, entries: np.ndarray | None, first: int, last: int
) -> None:
    """Set to -inf where a user's entries hold the row of the item."""
    if offsets is None or entries is None:
        return
    bounds = offsets[first : last + 1]
    items = entries[int(bounds[0]) : int(bounds[-1])]
    for m, row in enumerate(rows.tolist()):
        if row >= 0:
            at = np.flatnonzero(items == row) + int(bounds[0])
            logit[np.searchsorted(bounds, at, side="right") - 1, m] = -math.inf
