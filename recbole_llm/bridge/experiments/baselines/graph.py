r"""The training-free graph heuristic, TGH.

An arrow runs from a to b where b followed a in a training history, n_ab times. Ring h of an item holds those that h arrows reach
and fewer do not. Within a ring items are ordered by

    <e_a, e_b> + alpha [h = 1] log(1 + n_ab) / max_c log(1 + n_ac)        e: content vectors of unit length

    TGH-1    of rings 1, 2, 3 of the newest item the first k1, k2, k3
    TGH-2    of rings 1, 2 of the newest item the first k1, k2, then of those of the item before it, without what is listed

A ring that is too small takes what the rings before it have left. A list that is still too short goes on with what all rings have
left, then with the items likest to its source. The ``LIKEST`` items likest to the newest one follow, so that a list from which
items of the history are struck is as long.

The method is that of Han et al., "An Embarrassingly Simple Graph Heuristic Reveals Shortcut-Solvable Benchmarks for Sequential
Recommendation" (arXiv 2605.07125). Its formula was read from the authors' program (github.com/haoyuhan1/GraphRec, with
``--semantic_pad``), whose budgets and alpha are the first choices that validation has here.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from recbole_llm.bridge.experiments.baselines.solved import Solved, content_of, refuse_many
from recbole_llm.bridge.experiments.leave_one_out import LeaveOneOut
from recbole_llm.fitting.next_item import prefixes_of
from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.score import Scorer

Budgets = tuple[int, ...]

RINGS = 3
LISTED = 10  # of a ring, and of a whole list
LIKEST = 100  # of each item, at the end of a list
ALPHAS = (0.5, 0.0, 2.0, 8.0)  # the authors' first
ONE_SOURCE: tuple[Budgets, ...] = ((7, 2, 1), (5, 3, 2), (10,))
TWO_SOURCES: tuple[tuple[Budgets, Budgets], ...] = (((5, 1), (3, 1)), ((6,), (4,)), ((7, 1), (2,)))
_ROWS = 512  # items whose rings are ordered at once


@dataclass(frozen=True)
class TghSetting:
    """Constants of one list.

    Attributes:
        alpha: weight of the counts in ring 1.
        newest: items taken of the rings of the newest item.
        before: items taken of the rings of the item before it; empty for TGH-1.
    """

    alpha: float
    newest: Budgets
    before: Budgets = ()

    def __str__(self) -> str:
        shown = " and ".join("/".join(map(str, budgets)) for budgets in (self.newest, self.before) if budgets)
        return f"TGH-{2 if self.before else 1}, {shown} of the rings, alpha {self.alpha:g}"


@dataclass(frozen=True)
class Ordered:
    """Items around each item, best first, 0 where there are fewer.

    Attributes:
        rings: by number of the ring from 0 and alpha (0.0 beyond the first ring), ``[N, LISTED]`` int64.
        likest: ``[N, LIKEST]`` int64, by content alone; an item is not its own likest.
    """

    rings: dict[tuple[int, float], np.ndarray]
    likest: np.ndarray


def graph_heuristic(rows: LeaveOneOut) -> Solved:
    """Rank by TGH; one source or two, the budgets and alpha by validation.

    Holds ``[512, N]`` float32 matrices and the first ``LISTED`` items of every ring.

    Raises:
        RefusedRowError: if the data set has more than ``MAX_ITEMS`` items, or no content.
    """
    refuse_many("TGH", rows.data.n_items, "compares every item with every other")
    content = content_of("TGH", rows)
    content = torch.nn.functional.normalize(content, dim=1)
    counts = followed(rows.data.history, rows.data.n_items)
    ordered = ordered_rings(counts, content, ALPHAS)
    some = rows.validation.subset(rows.data.n_items)

    def value(setting: TghSetting) -> float:
        return some.value(scorer_of(some.history, ordered, setting), rows.data.n_items, rows.padding)

    settings = [TghSetting(ALPHAS[0], budgets) for budgets in ONE_SOURCE]
    settings += [TghSetting(ALPHAS[0], *budgets) for budgets in TWO_SOURCES]
    values = {setting: value(setting) for setting in settings}
    best = max(values, key=lambda setting: values[setting])
    for alpha in ALPHAS[1:]:
        other = TghSetting(alpha, best.newest, best.before)
        values[other] = value(other)
    best = max(values, key=lambda setting: values[setting])
    valid = rows.validation.value(scorer_of(rows.data.history, ordered, best), rows.data.n_items, rows.padding)
    return Solved(str(best), valid, scorer_of(rows.later, ordered, best))


def followed(history: Rows, n_items: int) -> sparse.csr_matrix:
    """Count n_ab, ``[n_items, n_items]``: how often b came right after a."""
    pairs, ids = prefixes_of(history, 1, None), history.ids.numpy()
    shape = (n_items, n_items)
    counts = sparse.coo_matrix((np.ones(len(pairs.steps), np.float32), (ids[pairs.sources], ids[pairs.targets])), shape)
    return counts.tocsr()


def rings(counts: sparse.csr_matrix, sources: np.ndarray) -> Iterator[sparse.csr_matrix]:
    """Yield rings 1 to ``RINGS`` of some items as flags, sparse ``[B, n_items]`` float32 of ones."""
    arrows = counts.sign()
    here = sparse.csr_matrix(
        (np.ones(len(sources), np.float32), (np.arange(len(sources)), sources)), (len(sources), counts.shape[0])
    )
    met, ring = here, here
    for number in range(RINGS):
        reached = (ring @ arrows).sign()
        ring = reached if not number else reached - reached.multiply(met)
        ring.eliminate_zeros()
        met = (met + ring).sign()
        yield ring


def ordered_rings(counts: sparse.csr_matrix, content: Tensor, alphas: Sequence[float]) -> Ordered:
    """Order every ring of every item, and all items, and keep the first ones.

    Args:
        counts: n_ab.
        content: e, ``[N, f]``.
        alphas: weights of the counts in ring 1.
    """
    n = len(content)
    found = {(0, alpha): np.zeros((n, LISTED), np.int64) for alpha in alphas}
    found |= {(ring, 0.0): np.zeros((n, LISTED), np.int64) for ring in range(1, RINGS)}
    likest = np.zeros((n, LIKEST), np.int64)
    strength = counts.copy()
    strength.data = np.log1p(strength.data)
    most = strength.max(axis=1).toarray().ravel()
    strength = (sparse.diags(1 / np.where(most > 0, most, 1)) @ strength).tocsr()
    for start in range(0, n, _ROWS):
        sources = np.arange(start, min(start + _ROWS, n))
        likeness = content[start : start + _ROWS] @ content.T
        everything = torch.ones_like(likeness, dtype=torch.bool)
        everything[:, 0] = False
        everything[torch.arange(len(sources)), torch.from_numpy(sources)] = False
        _keep_best(likest, sources, likeness, everything)
        bonus = torch.from_numpy(strength[sources].toarray().astype(np.float32))
        for number, ring in enumerate(rings(counts, sources)):
            inside = torch.from_numpy(ring.toarray() > 0)
            for alpha in alphas if not number else (0.0,):
                _keep_best(found[number, alpha], sources, likeness + alpha * bonus if alpha else likeness, inside)
    return Ordered(found, likest)


def _keep_best(table: np.ndarray, sources: np.ndarray, scores: Tensor, inside: Tensor) -> None:
    """Write the best items ``inside`` (``[B, N]`` bool) into rows of a table."""
    top, items = scores.masked_fill(~inside, -torch.inf).topk(min(table.shape[1], scores.shape[1]), dim=1)
    table[sources, : items.shape[1]] = torch.where(top > -torch.inf, items, 0).numpy()


def fill(ordered: Sequence[Sequence[int]], budgets: Sequence[int]) -> tuple[list[int], list[int]]:
    """Take items of rings by the authors' rule.

    Args:
        ordered: items of each ring, best first.
        budgets: how many of each; rings beyond them are not read.

    Returns:
        What was taken, in order, and what was left, in order.
    """
    taken: list[int] = []
    left: list[int] = []
    for ring, budget in zip(ordered, budgets, strict=False):
        lent = left[: max(0, budget - len(ring))]
        left = left[len(lent) :]
        taken += lent
        taken += ring[: budget - len(lent)]
        left += ring[budget - len(lent) :]
    return taken, left


def newest_items(history: Rows, back: int) -> np.ndarray:
    """Return the item of rank ``back`` of each history, ``[U]`` int64; 0 where there is none."""
    assert history.ranks is not None
    found = torch.zeros(len(history.sizes), dtype=torch.int64)
    at = history.ranks == back
    found[history.row_of_entry()[at]] = history.ids[at]
    return found.numpy()


def scorer_of(histories: Rows, ordered: Ordered, setting: TghSetting) -> Scorer:
    """Return a scorer whose order is that of the list; items beyond it have 0.

    Args:
        histories: with ranks.
        ordered: items around each item.
        setting: the constants.
    """
    newest, before = newest_items(histories, 0), newest_items(histories, 1)

    def scorer(users: Tensor) -> Tensor:
        chosen = users.numpy()
        scores = torch.zeros(len(chosen), len(ordered.likest))
        for row, (last, previous) in enumerate(zip(newest[chosen], before[chosen], strict=True)):
            listed = tgh_list(ordered, int(last), int(previous), setting)
            scores[row, listed] = torch.arange(len(listed), 0, -1, dtype=scores.dtype)
        return scores

    return scorer


def tgh_list(ordered: Ordered, newest: int, before: int, setting: TghSetting) -> list[int]:
    """List the items of one user, then what the rings have left, then the likest items.

    Args:
        ordered: items around each item.
        newest: the newest item; 0 for none.
        before: the one before it; 0 for none.
        setting: the constants.
    """
    tables = [ordered.rings[number, setting.alpha if not number else 0.0] for number in range(RINGS)]
    listed: list[int] = []
    left: list[int] = []
    for item, budgets in ((newest, setting.newest), (before, setting.before)):
        if not item or not budgets:
            continue
        known = set(listed)
        around = [[other for other in table[item].tolist() if other and other not in known] for table in tables]
        taken, others = fill(around, budgets)
        own, others = (taken + others)[: sum(budgets)], (taken + others)[sum(budgets) :]
        missing = sum(budgets) - len(own)
        if missing:
            own += [each for each in ordered.likest[item].tolist() if each and each not in {*listed, *own}][:missing]
        listed += own
        left += others
    rest = [item for item in ordered.likest[newest].tolist() if item] if newest else []
    return list(dict.fromkeys([*listed, *left, *rest]))
