r"""How fast histories decay and how much each block counts, searched jointly, where interactions are split by time.

    score = closed_tau / s_tau + f next_tau' / s_tau' + l learned / s          s: standard deviation of a block's scores

Each block was tuned before the later ones existed. Once all three are present the best settings change: the closed form prefers a
faster decay, and the towers start to help. So tau, tau', f and l are searched again from a grid of all four. Weights are in
units of standard deviations, since a faster decay makes a block's scores smaller.

A validation split by time mostly holds one item a user, so that a choice is noisy. The value is therefore the mean of the metric
at k and at 2k places. Hundreds of blends are compared on a few hundred candidates a user, the best of each block. An item that no
block ranks high is rarely ranked high by a blend. docs/decisions/decays.md has the experiments.
"""

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace

import torch
from torch import Tensor

from recbole_llm.fitting.validation import CHUNK_ELEMENTS, TopKMetric, hide_seen
from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.score import Scorer

CLOSED_DECAYS = (None, 1.0, 2.0, 4.0, 10.0, 20.0, 50.0)  # tau; None: histories do not fade
FOLLOWING_DECAYS = (1.0, 2.0, 5.0, 8.0)  # tau'
FOLLOWS = (0.2, 0.5, 1.2)  # f beside 0
LEARNED = (0.0, 0.2, 0.5, 1.2, 2.0)  # l
CANDIDATES = 80  # of each block; 4k where that is more


@dataclass(frozen=True)
class Fading:
    """A choice of all blocks' histories and factors.

    Attributes:
        closed: tau; ``None`` for no decay.
        following: tau' of the next-item block; ``None`` where it does not count.
        follows: f.
        learned: l.
        factors: of the scores of the closed form, the next-item block and the learned block.
        value: on validation.
    """

    closed: float | None
    following: float | None
    follows: float
    learned: float
    factors: tuple[float, float, float]
    value: float

    def __str__(self) -> str:
        blocks = ["the closed form" + (f", histories fading by exp(-rank / {self.closed:g})" if self.closed else "")]
        if self.following is not None:
            blocks.append(f"{self.follows:g} of the next-item block, exp(-rank / {self.following:g})")
        if self.learned:
            blocks.append(f"{self.learned:g} of the learned block")
        return "; ".join(blocks)


@dataclass(frozen=True)
class _Candidates:
    """Scores of a chunk of users' candidates.

    Attributes:
        scores: per block ``[B, C]`` float; 0 where ``absent``, of the closed form -inf once they are in deviations.
        absent: ``[B, C]`` bool, beyond a row's candidates.
        relevant: ``[B, C]`` bool, targets.
        n_targets: ``[B]`` int64.
    """

    scores: list[Tensor]
    absent: Tensor
    relevant: Tensor
    n_targets: Tensor


def choose_fading(
    closed: Mapping[float | None, Scorer],
    following: Mapping[float, Scorer],
    learned: Scorer | None,
    targets: Rows,
    seen: Rows,
    metric: TopKMetric,
    excluded: Tensor,
) -> Fading:
    """Find the best decays and factors of the grid.

    The first of equals wins; with each tau fewer blocks come first.

    Args:
        closed: scores of the closed form by tau, rows those of ``targets``; -inf only where ``excluded``.
        following: scores of the next-item block by tau'; empty without one.
        learned: scores of the learned block; ``None`` without one.
        targets: the relevant items of each row, at least one row with one.
        seen: as many rows; items without a place, unless they are targets of the same row.
        metric: by which the best is chosen, at k and at 2k places.
        excluded: ``[n_items]`` bool, items without a place in any row; they do not count to deviations.
    """
    scorers: list[Scorer] = [*closed.values(), *following.values(), *([] if learned is None else [learned])]
    chunks, deviations = _gather(scorers, targets, seen, excluded, max(CANDIDATES, 4 * metric.k))
    units = [1 / s if s else 0.0 for s in deviations]
    for chunk in chunks:
        for scores, unit in zip(chunk.scores, units, strict=True):
            scores.mul_(unit)
        for scores in chunk.scores[: len(closed)]:
            scores[chunk.absent] = -math.inf
    beside: list[tuple[int, float | None, float]] = [(0, None, 0.0)]  # place among the scorers, tau', f
    beside += [(len(closed) + i, tau, f) for i, tau in enumerate(following) for f in FOLLOWS]
    best: Fading | None = None
    shares = (0.0,) if learned is None else LEARNED
    for (a, tau), (b, tau_next, f), weight in itertools.product(enumerate(closed), beside, shares):
        found = _value(chunks, a, [(b, f), (len(scorers) - 1, weight)], metric)
        if best is None or found > best.value:
            best = Fading(tau, tau_next, f, weight, (units[a], f * units[b], weight * units[-1]), found)
    assert best is not None
    return best


def _gather(
    scorers: Sequence[Scorer], targets: Rows, seen: Rows, excluded: Tensor, most: int
) -> tuple[list[_Candidates], list[float]]:
    """Each row's candidates, the first ``most`` items of every scorer and the targets, and the deviation of each scorer.

    Deviations are what :func:`recbole_llm.fitting.blend.score_deviation` gives, in the pass that finds the candidates.
    """
    n_items = len(excluded)
    sums = torch.zeros(len(scorers), 2, dtype=torch.float64)
    rows = torch.nonzero(targets.sizes).squeeze(1)
    chunks, counted = [], len(rows) * int((~excluded).sum())
    for ids in rows.split(max(1, CHUNK_ELEMENTS // 4 // n_items)):
        own, hidden = targets.select(ids), seen.select(ids)
        place = torch.zeros(len(ids), n_items, device=ids.device)
        relevant = hide_seen(place, hidden, own, excluded)
        assert relevant is not None
        placeless = place.isinf()
        chosen, scores = relevant.clone(), []
        for scorer, total in zip(scorers, sums, strict=True):
            found = scorer(ids)
            counts = found[:, ~excluded].double()
            total += torch.stack([counts.sum(), counts.square().sum()]).cpu()
            chosen.scatter_(1, found.masked_fill(placeless, -math.inf).topk(min(most, n_items), 1).indices, True)
            scores.append(found)
        chosen &= ~placeless
        row, item = torch.nonzero(chosen, as_tuple=True)
        sizes = chosen.sum(1)
        place = torch.arange(len(row), device=row.device) - (sizes.cumsum(0) - sizes)[row]
        padded = torch.zeros(len(ids), int(sizes.max()), dtype=torch.int64, device=row.device)
        padded[row, place] = item
        absent = torch.ones_like(padded, dtype=torch.bool)
        absent[row, place] = False
        # 0 where absent, not the -inf that excluded items may have: a unit of 0 times that is no number
        kept = [found.gather(1, padded).masked_fill_(absent, 0.0) for found in scores]
        chunks.append(_Candidates(kept, absent, relevant.gather(1, padded) & ~absent, own.sizes))
    mean = sums / max(counted, 1)
    return chunks, (mean[:, 1] - mean[:, 0].square()).clamp(min=0).sqrt().tolist()


def _value(chunks: Sequence[_Candidates], first: int, others: Sequence[tuple[int, float]], metric: TopKMetric) -> float:
    """Mean over the users of the metric at k and at 2k places, of a block's scores plus others' times their factors."""
    wide, total, users = replace(metric, k=2 * metric.k), 0.0, 0
    for chunk in chunks:
        score = chunk.scores[first]
        for block, factor in others:
            if factor:
                score = torch.add(score, chunk.scores[block], alpha=factor)
        top, at = score.topk(min(wide.k, score.shape[1]), 1)
        hits = chunk.relevant.gather(1, at) & (top > -math.inf)
        both = metric.of(hits[:, : metric.k], chunk.n_targets) + wide.of(hits, chunk.n_targets)
        total, users = total + float(both.sum()), users + len(both)
    return total / (2 * users)
