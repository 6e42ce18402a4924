"""What boosts add to scores.

Boosts over a catalogue (:class:`Lifts`) are the same for everybody and are kept. What odds come to in a score depends on who is
asked for (:class:`Boosting`).
"""

from collections.abc import Sequence
from functools import cached_property
from typing import NamedTuple

import numpy as np

from recbole_llm.retrieval.item_catalog import Catalog
from recbole_llm.retrieval.kept import key_of
from recbole_llm.retrieval.rules import Applied, Boost
from recbole_llm.scoring.probability import ProbabilityMap

MAX_PARTS = 8  # by what boosts come to


class Chance(NamedTuple):
    """How scores of one user become probabilities."""

    map: ProbabilityMap
    log_length: float

    def relevance(self, scores: np.ndarray) -> np.ndarray:
        """Turn scores into P(i|u), ``[n]`` float64."""
        return 0.5 + 0.5 * np.tanh(0.5 * self.map.logit(scores, self.log_length))


class Lifts:
    """Boosts over a catalogue.

    Args:
        boosts: at least one.
        masks: rows that each applies to, ``[N]`` bool.

    Attributes:
        by_odds: whether any boost is.
    """

    def __init__(self, boosts: Sequence[Boost], masks: Sequence[np.ndarray]) -> None:
        self.boosts, self.masks = boosts, masks
        self.labels = [boost.label for boost in boosts]
        # sums first: the map is monotone, so the order of the odds among themselves does not matter
        self.order = sorted(range(len(boosts)), key=lambda b: boosts[b].odds is not None)
        # the boosts of a row as bits of a number: what they come to is looked up, and not added up in every row
        self.code: np.ndarray | None = None
        holds = list(masks)
        if 2 ** len(boosts) <= MAX_PARTS:
            self.code = masks[0].view(np.uint8)
            for b in range(1, len(masks)):
                self.code = self.code | (masks[b].view(np.uint8) << np.uint8(b))
            numbers = np.arange(2 ** len(boosts))
            holds = [(numbers >> b & 1).astype(bool) for b in range(len(boosts))]
        self.added, odds = np.zeros(len(holds[0])), np.zeros(len(holds[0]))
        for b in self.order:
            total = self.added if boosts[b].odds is None else odds
            total += boosts[b].step * holds[b]
        self.by_odds = any(boost.odds is not None for boost in boosts)
        self.odds = odds if self.by_odds else None

    def nbytes(self) -> int:
        """Bytes of what is kept, or will be."""
        return sum(mask.nbytes for mask in self.masks) + (8 + 2 * MAX_PARTS) * len(self.masks[0])

    @cached_property
    def sums(self) -> np.ndarray | None:
        """What is added to each row's score, ``[N]`` float64; ``None`` where it depends on the score."""
        if self.by_odds:
            return None
        return self.added if self.code is None else self.added[self.code]

    @cached_property
    def parts(self) -> list[tuple[np.ndarray, float, float]]:
        """The catalogue divided by what boosts come to.

        Rows ``[N]`` bool, at least one, with the most that is added to a score of theirs, and to a logit. With a ``code`` all rows
        of a part have as much.
        """
        odds = self.odds
        if self.code is not None:
            masks = [self.code == code for code in range(len(self.added))]
            most_of = zip(masks, self.added.tolist(), (0 * self.added if odds is None else odds).tolist(), strict=True)
            return [part for part in most_of if part[0].any()]
        total = self.added if odds is None else self.added + odds
        low, high = float(total.min()), float(total.max())
        most = min(2 ** len(self.boosts), MAX_PARTS)
        if low == high or most < 2:
            masks = [np.ones(len(total), bool)]
        else:
            place = ((total - low) * (most / (high - low))).astype(np.int8)
            masks = [place == at for at in range(most - 1)] + [place >= most - 1]
        largest = lambda values, mask: float(np.where(mask, values, -np.inf).max())  # noqa: E731
        return [
            (mask, largest(self.added, mask), 0.0 if odds is None else largest(odds, mask))
            for mask in masks
            if mask.any()
        ]

    @cached_property
    def applied(self) -> list[tuple[Applied, ...]] | None:
        """What the boosts of each code do where they are sums; ``None`` elsewhere."""
        if self.by_odds or self.code is None:
            return None
        return [
            tuple(
                Applied(self.labels[b], boost.step)
                for b, boost in enumerate(self.boosts)
                if code >> b & 1 and boost.step
            )
            for code in range(len(self.added))
        ]


def lifts_of(catalog: Catalog, boosts: Sequence[Boost]) -> Lifts:
    """Make the boosts of a request over a catalogue, or take them from those that it keeps.

    Raises:
        ValueError: on a condition that does not fit the export's attributes.
    """
    key = tuple((key_of(boost.filter), boost.add, boost.odds) for boost in boosts)
    lifts: Lifts | None = catalog.kept.get(key)
    if lifts is None:
        lifts = Lifts(boosts, [_mask(catalog, boost) for boost in boosts])
        catalog.kept.put(key, lifts, lifts.nbytes())
    return lifts


def _mask(catalog: Catalog, boost: Boost) -> np.ndarray:
    try:
        mask = catalog.mask(boost.filter)
    except ValueError as error:
        raise ValueError(f"boost: {error}") from None
    assert mask is not None  # conditions of boosts are not empty
    return mask


class Boosting:
    """Boosts of a request.

    Args:
        lifts: over its catalogue.
        chance: ``None`` for scores that are no user's.

    Raises:
        ValueError: if a boost is by odds and there is no ``chance``.
    """

    def __init__(self, lifts: Lifts, chance: Chance | None) -> None:
        if chance is None and lifts.by_odds:
            raise ValueError("boost: odds needs a probability, and this answer's scores are none; give add.")
        self._lifts, self._chance = lifts, chance

    @property
    def sums(self) -> np.ndarray | None:
        """What is added to each row's score, as :attr:`Lifts.sums`."""
        return self._lifts.sums

    def adjusted(self, rows: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Add all boosts to scores, ``[n]`` float64."""
        lifts = self._lifts
        at = rows if lifts.code is None else lifts.code.take(rows)
        result = scores + lifts.added.take(at)
        return result if lifts.odds is None else self._lifted(result, lifts.odds.take(at))

    def told(self, rows: np.ndarray, scores: np.ndarray, adjusted: np.ndarray) -> list[tuple[Applied, ...]]:
        """Tell what each boost adds to each score; the sum over all is what is added in all.

        Args:
            rows: ``[n]``.
            scores: theirs, ``[n]`` float64.
            adjusted: what :meth:`adjusted` makes of them.
        """
        lifts = self._lifts
        if lifts.applied is not None and lifts.code is not None:
            return [lifts.applied[code] for code in lifts.code.take(rows).tolist()]
        found, before, summed = [], scores, scores
        odds = np.zeros(len(rows))
        for b in lifts.order:
            boost = lifts.boosts[b]
            step = np.where(lifts.masks[b][rows], boost.step, 0.0)
            if boost.odds is None:
                after = summed = before + step
            else:
                odds += step
                after = adjusted if b == lifts.order[-1] else self._lifted(summed, odds)
            found.append((lifts.labels[b], (after - before).tolist()))
            before = after
        return [tuple(Applied(label, values[at]) for label, values in found if values[at]) for at in range(len(rows))]

    def scannable(self) -> bool:
        """Whether a scan can rank by boosted scores: what is added is known by row, or as much in all rows of a part."""
        return not self._lifts.by_odds or self._lifts.code is not None

    def kinds(self) -> list[np.ndarray]:
        """Rows of each part, ``[N]`` bool."""
        return [mask for mask, _, _ in self._lifts.parts]

    def parts(self) -> list[tuple[np.ndarray, float, float]]:
        """Divide the catalogue as :attr:`Lifts.parts` says."""
        return self._lifts.parts

    def highest(self, score: float, added: float, odds: float) -> float:
        """Return what a score of that much becomes at most, by what :meth:`parts` tells of its part."""
        return float(self._lifted(np.array([score + added]), np.array([odds]))[0])

    def _lifted(self, scores: np.ndarray, odds: np.ndarray) -> np.ndarray:
        """Scores with so much more of a logit; those with none stay to the last digit."""
        if not odds.any():
            return scores
        assert self._chance is not None
        chance = self._chance
        lifted = chance.map.score(chance.map.logit(scores, chance.log_length) + odds, chance.log_length)
        return np.where(odds != 0, lifted, scores)
