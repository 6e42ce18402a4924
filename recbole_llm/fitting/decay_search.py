r"""How fast histories decay and how much each block counts, searched jointly, where interactions are split by time.

    score = closed_tau / s_tau + f (next_tau' + c content_tau'') / s_tau' + l learned / s + q sequence / s
    s: deviation of a block's scores

Each block was tuned before the later ones existed. Once all are present the best settings change: the closed form prefers a
faster decay, and the towers start to help. So tau, tau', f and l are searched again from a grid of all four, with tau'' = tau'
c = 1 and q = 0. Where the next-item block reads content, or there is a sequence block, all are then changed one after the other
while the value rises, as content may remember longer than transitions. Weights are in units of standard deviations, since a faster
decay makes a block's scores smaller.

A validation split by time mostly holds one item a user, so that a choice is noisy. The value is therefore the mean of the metric
at k and at 2k places. Hundreds of blends are compared on a few hundred candidates a user, the best of each block. An item that no
block ranks high is rarely ranked high by a blend. docs/decisions/decays.md has the experiments.
"""

import itertools
import math
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from typing import NamedTuple

import torch
from torch import Tensor

from recbole_llm.fitting.blend import deviation_of
from recbole_llm.fitting.validation import CHUNK_ELEMENTS, TopKMetric, hide_seen
from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.score import Scorer

CLOSED_DECAYS = (None, 1.0, 2.0, 4.0, 10.0, 20.0, 50.0)  # tau; None: histories do not fade
FOLLOWING_DECAYS = (1.0, 2.0, 5.0, 8.0)  # tau'
CONTENT_DECAYS = (1.0, 2.0, 3.0, 5.0, 8.0)  # tau' and tau'' where the next-item block reads content
FOLLOWS = (0.2, 0.5, 1.2)  # f beside 0
FURTHER = (*FOLLOWS, 2.0, 3.5, 8.0)  # f where blocks are changed one after the other
CONTENT = (0.0, 0.5, 0.7, 1.0, 1.5)  # c
LEARNED = (0.0, 0.2, 0.5, 1.2, 2.0)  # l
SEQUENCE = (0.0, 0.3, 0.7, 1.2, 2.0, 4.0, 8.0)  # q
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
        content: tau''; ``None`` where the content of the next-item block does not count.
        content_factor: of its scores.
        sequence: q.
        sequence_factor: of the sequence block's scores.
    """

    closed: float | None
    following: float | None
    follows: float
    learned: float
    factors: tuple[float, float, float]
    value: float
    content: float | None = None
    content_factor: float = 0.0
    sequence: float = 0.0
    sequence_factor: float = 0.0

    def __str__(self) -> str:
        blocks = ["the closed form" + (f", histories fading by exp(-rank / {self.closed:g})" if self.closed else "")]
        if self.following is not None:
            blocks.append(f"{self.follows:g} of the next-item block, exp(-rank / {self.following:g})")
        if self.content is not None:
            share = self.content_factor / (self.factors[1] or 1.0)
            blocks.append(f"its content times {share:g}, exp(-rank / {self.content:g})")
        if self.learned:
            blocks.append(f"{self.learned:g} of the learned block")
        if self.sequence:
            blocks.append(f"{self.sequence:g} of the sequence block")
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


class _Choice(NamedTuple):
    """A blend, by places in the grid."""

    closed: int = 0
    following: int | None = None
    follows: float = 0.0
    content: int = 0
    content_weight: float = 0.0
    learned: float = 0.0
    sequence: float = 0.0


@dataclass(frozen=True)
class _Grid:
    """The blends of a grid and their values.

    Attributes:
        chunks: candidates with their scores; in deviations, but for those of content.
        units: of every scorer, 1 / deviation.
        n_closed: scorers of the closed form, which come first.
        n_following: of the next-item block, the next ones.
        n_content: of its content, the next ones; 0 or ``n_following``.
        has_learned: whether the learned block is the next one.
        has_sequence: whether the sequence block is the last one.
        metric: by which blends are compared.
    """

    chunks: Sequence[_Candidates]
    units: Sequence[float]
    n_closed: int
    n_following: int
    n_content: int
    has_learned: bool
    has_sequence: bool
    metric: TopKMetric

    @property
    def learned(self) -> int:
        """Place of the learned block's scorer."""
        return self.n_closed + self.n_following + self.n_content

    def others(self, choice: _Choice) -> list[tuple[int, float]]:
        """Return the place and the factor of every scorer beside the closed form's."""
        found = []
        if choice.following is not None:
            at = self.n_closed + choice.following
            found.append((at, choice.follows))
            if self.n_content:
                content = self.n_closed + self.n_following + choice.content
                found.append((content, choice.follows * self.units[at] * choice.content_weight))
        if self.has_learned:
            found.append((self.learned, choice.learned))
        if self.has_sequence:
            found.append((len(self.units) - 1, choice.sequence))
        return found

    def value(self, choice: _Choice) -> float:
        """Return the value of a blend."""
        return _value(self.chunks, choice.closed, self.others(choice), self.metric)

    def all_together(self) -> Iterator[_Choice]:
        """Yield every blend in which content fades as transitions do, those with fewer blocks first."""
        beside: list[tuple[int | None, float]] = [(None, 0.0)]
        beside += [(place, f) for place in range(self.n_following) for f in FOLLOWS]
        shares = LEARNED if self.has_learned else (0.0,)
        for a, (b, f), share in itertools.product(range(self.n_closed), beside, shares):
            yield _Choice(a, b, f, b or 0, float(b is not None and bool(self.n_content)), share)

    def neighbours(self, choice: _Choice) -> Iterator[_Choice]:
        """Yield every blend that differs in the closed form, in the next-item block, in its content or in the learned block."""
        for a in range(self.n_closed):
            yield choice._replace(closed=a)
        if choice.following is not None:
            for b, f in itertools.product(range(self.n_following), FURTHER):
                yield choice._replace(following=b, follows=f)
            for c, weight in itertools.product(range(self.n_content), CONTENT):
                yield choice._replace(content=c, content_weight=weight)
        if self.has_learned:
            for share in LEARNED:
                yield choice._replace(learned=share)
        if self.has_sequence:
            for share in SEQUENCE:
                yield choice._replace(sequence=share)


def choose_fading(
    closed: Mapping[float | None, Scorer],
    following: Mapping[float, Scorer],
    learned: Scorer | None,
    targets: Rows,
    seen: Rows,
    metric: TopKMetric,
    excluded: Tensor,
    content: Mapping[float, Scorer] | None = None,
    sequence: Scorer | None = None,
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
        content: scores of the content of the next-item block by tau'', for the decays of ``following``, in its units; empty or
            ``None`` without one.
        sequence: scores of the sequence block; ``None`` without one.

    Raises:
        ValueError: if ``content`` has other decays than ``following``.
    """
    content = content or {}
    if content and list(content) != list(following):
        raise ValueError(f"content has the decays {list(content)}; expected those of following, {list(following)}.")
    own = [scorer for scorer in (learned, sequence) if scorer is not None]
    scorers: list[Scorer] = [*closed.values(), *following.values(), *content.values(), *own]
    chunks, deviations = _gather(scorers, targets, seen, excluded, max(CANDIDATES, 4 * metric.k))
    units = [1 / s if s else 0.0 for s in deviations]
    raw = range(len(closed) + len(following), len(closed) + len(following) + len(content))
    for chunk in chunks:
        for place, (scores, unit) in enumerate(zip(chunk.scores, units, strict=True)):
            if place not in raw:
                scores.mul_(unit)
        for scores in chunk.scores[: len(closed)]:
            scores[chunk.absent] = -math.inf
    there = learned is not None, sequence is not None
    grid = _Grid(chunks, units, len(closed), len(following), len(content), *there, metric)
    best, value = _Choice(), -1.0
    for choice in grid.all_together():
        if (found := grid.value(choice)) > value:
            best, value = choice, found
    risen = bool(content) or sequence is not None
    while risen:
        before = value
        for choice in list(grid.neighbours(best)):
            if (found := grid.value(choice)) > value:
                best, value = choice, found
        risen = value > before
    return _fading(grid, best, value, list(closed), list(following))


def _fading(
    grid: _Grid, best: _Choice, value: float, closed: Sequence[float | None], following: Sequence[float]
) -> Fading:
    factors = dict(grid.others(best))
    at = None if best.following is None else grid.n_closed + best.following
    learned = best.learned * grid.units[grid.learned] if grid.has_learned else 0.0
    content = factors.get(grid.n_closed + grid.n_following + best.content, 0.0) if grid.n_content and at else 0.0
    return Fading(
        closed[best.closed],
        None if best.following is None else following[best.following],
        best.follows,
        best.learned,
        (grid.units[best.closed], 0.0 if at is None else best.follows * grid.units[at], learned),
        value,
        following[best.content] if content else None,
        content,
        best.sequence,
        best.sequence * grid.units[-1],
    )


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
    means = (sums / max(counted, 1)).tolist()
    return chunks, [deviation_of(mean, mean_square) for mean, mean_square in means]


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
