"""The allowed items in the order of their boosted scores, fetched from a search only as far as somebody looks.

A search answers "the n best of these rows" whatever stands behind it: a scan, an index or a server. Boosts change scores after the
search, so items whose boosts come to about as much are a part of their own. Of a part, what has not been fetched yet scores at most
what was fetched last, boosted as much as anything in the part. A candidate is handed out only when it lies above that bound.
Fetches grow fourfold.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple

import numpy as np

from recbole_llm.retrieval.exact import Hits, best
from recbole_llm.retrieval.rules import Boost
from recbole_llm.scoring.probability import ProbabilityMap

GROWTH = 4
MAX_PARTS = 8  # by what boosts come to
# n, hidden rows [h], allowed rows [N] bool or None for all -> the n best, fewer only where fewer are allowed
Search = Callable[[int, np.ndarray, "np.ndarray | None"], Hits]
_NO_ROWS = np.zeros(0, np.int64)


class Chance(NamedTuple):
    """How scores of one user become probabilities."""

    map: ProbabilityMap
    log_length: float

    def relevance(self, scores: np.ndarray) -> np.ndarray:
        """Turn scores into P(i|u), ``[n]`` float64."""
        return 0.5 + 0.5 * np.tanh(0.5 * self.map.logit(scores, self.log_length))


class Boosting:
    """Boosts over a catalogue.

    Args:
        boosts: at least one.
        masks: rows that each applies to, ``[N]`` bool.
        chance: ``None`` for scores that are no user's.

    Raises:
        ValueError: if a boost is by odds and there is no ``chance``.
    """

    def __init__(self, boosts: Sequence[Boost], masks: Sequence[np.ndarray], chance: Chance | None) -> None:
        if chance is None and any(boost.odds is not None for boost in boosts):
            raise ValueError("boost: odds needs a probability, and this answer's scores are none; give add.")
        self.boosts, self.masks, self._chance = boosts, masks, chance
        # sums first: the map is monotone, so the order of the odds among themselves does not matter
        self._order = sorted(range(len(boosts)), key=lambda b: boosts[b].odds is not None)
        # the boosts of a row as bits of a number: what they come to is looked up, and not added up in every row
        self._code: np.ndarray | None = None
        holds = list(masks)
        if 2 ** len(boosts) <= MAX_PARTS:
            self._code = masks[0].view(np.uint8)
            for b in range(1, len(masks)):
                self._code = self._code | (masks[b].view(np.uint8) << np.uint8(b))
            numbers = np.arange(2 ** len(boosts))
            holds = [(numbers >> b & 1).astype(bool) for b in range(len(boosts))]
        self._added, by_odds = np.zeros(len(holds[0])), np.zeros(len(holds[0]))
        for b in self._order:
            total = self._added if boosts[b].odds is None else by_odds
            total += boosts[b].step * holds[b]
        self._by_odds = by_odds if any(boost.odds is not None for boost in boosts) else None

    def steps(self, rows: np.ndarray, scores: np.ndarray) -> list[tuple[str, np.ndarray]]:
        """Compute what each boost adds to each score, ``[n]`` float64 by its label; the sum over all is what is added in all."""
        found, before, summed = [], scores, scores
        odds = np.zeros(len(rows))
        for b in self._order:
            boost = self.boosts[b]
            step = np.where(self.masks[b][rows], boost.step, 0.0)
            if boost.odds is None:
                after = summed = before + step
            else:
                odds += step
                after = self._lifted(summed, odds)
            found.append((boost.label, after - before))
            before = after
        return found

    def adjusted(self, rows: np.ndarray, scores: np.ndarray) -> np.ndarray:
        """Add all boosts to scores, ``[n]`` float64."""
        at = rows if self._code is None else self._code[rows]
        result = scores + self._added[at]
        return result if self._by_odds is None else self._lifted(result, self._by_odds[at])

    def parts(self) -> list[tuple[np.ndarray, float, float]]:
        """Divide the catalogue by what boosts come to.

        Returns:
            Rows ``[N]`` bool, at least one, with the most that is added to a score of theirs, and to a logit.
        """
        odds = self._by_odds
        if self._code is not None:
            masks = [self._code == code for code in range(len(self._added))]
            most_of = zip(
                masks, self._added.tolist(), (0 * self._added if odds is None else odds).tolist(), strict=True
            )
            return [part for part in most_of if part[0].any()]
        total = self._added if odds is None else self._added + odds
        low, high = float(total.min()), float(total.max())
        most = min(2 ** len(self.boosts), MAX_PARTS)
        if low == high or most < 2:
            masks = [np.ones(len(total), bool)]
        else:
            place = ((total - low) * (most / (high - low))).astype(np.int8)
            masks = [place == at for at in range(most - 1)] + [place >= most - 1]
        largest = lambda values, mask: float(np.where(mask, values, -np.inf).max())  # noqa: E731
        return [
            (mask, largest(self._added, mask), 0.0 if odds is None else largest(odds, mask))
            for mask in masks
            if mask.any()
        ]

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


class Ranked(NamedTuple):
    """Candidates in order: rows ``[n]`` int64, the model's scores and those with boosts ``[n]`` float64."""

    rows: np.ndarray
    scores: np.ndarray
    adjusted: np.ndarray


_NOTHING = Ranked(_NO_ROWS, np.zeros(0), np.zeros(0))


class _Part:
    """Rows that are fetched together, and how far that has come."""

    __slots__ = ("added", "allow", "bound", "done", "n", "odds")

    def __init__(self, allow: np.ndarray | None, n: int, added: float = 0.0, odds: float = 0.0) -> None:
        self.allow, self.n, self.added, self.odds = allow, n, added, odds
        self.done, self.bound = False, np.inf


class Ranking:
    """The allowed items, best first.

    Args:
        search: finds the best rows.
        hidden: rows without a place, ``[h]``.
        allow: rows with one, ``[N]`` bool; ``None`` for all.
        boosting: or ``None``.
        first: how many candidates the first fetch is to bring.
    """

    def __init__(
        self, search: Search, hidden: np.ndarray, allow: np.ndarray | None, boosting: Boosting | None, first: int
    ) -> None:
        self._search, self._hidden, self._boosting = search, hidden, boosting
        self._parts = [_Part(allow, first)]
        if boosting is not None:
            # a boosted score is handed out only above the bound
            parts = [_Part(m if allow is None else m & allow, first + 1, *most) for m, *most in boosting.parts()]
            self._parts = [part for part in parts if part.allow is not None and part.allow.any()]
        self._blocked: np.ndarray | None = None
        self._fetched = _NO_ROWS
        self._waiting = _NOTHING

    def searches(self) -> list[tuple[int, np.ndarray | None]]:
        """List the first fetches, for one batch with those of others: how many, and the allowed rows."""
        return [(part.n, part.allow) for part in self._parts]

    def feed(self, hits: Sequence[Hits]) -> None:
        """Take the results of :meth:`searches`."""
        for part, found in zip(self._parts, hits, strict=True):
            self._reach(part, found)
        if hits:
            rows, scores = (np.concatenate(pair) for pair in zip(*hits, strict=True)) if len(hits) > 1 else hits[0]
            self._add(rows, scores)

    def _reach(self, part: _Part, hits: Hits) -> None:
        """Note how far a part has come."""
        part.done = len(hits.rows) < part.n
        if not part.done:
            last = float(hits.scores[-1])
            part.bound = last if self._boosting is None else self._boosting.highest(last, part.added, part.odds)

    def _add(self, rows: np.ndarray, scores: np.ndarray) -> None:
        """Put candidates among those that wait."""
        adjusted = scores if self._boosting is None else self._boosting.adjusted(rows, scores)
        if not len(self._fetched):
            self._fetched = rows
        elif len(rows):
            self._fetched = np.concatenate([self._fetched, rows])
        if not len(self._waiting.rows) and self._boosting is None:  # one part
            self._waiting = Ranked(rows, scores, adjusted)  # in order as they come
            return
        merged = [np.concatenate(pair) for pair in zip(self._waiting, (rows, scores, adjusted), strict=True)]
        order = best(merged[0], merged[2], len(merged[0]))
        self._waiting = Ranked(*(values[order] for values in merged))

    def take(self, n: int) -> Ranked:
        """Take the next n candidates; fewer only if no more are allowed."""
        while True:
            open_parts = [part for part in self._parts if not part.done]
            ready = len(self._waiting.rows)
            if open_parts and self._boosting is not None:
                bound = max(part.bound for part in open_parts)
                ready = int(np.searchsorted(-self._waiting.adjusted, -bound))  # strictly above it
            if ready >= n or not open_parts:
                break
            self._more(max(open_parts, key=lambda part: part.bound))
        waiting = self._waiting
        if n >= ready == len(waiting.rows):
            self._waiting = _NOTHING
            return waiting
        taken = Ranked(*(values[: min(n, ready)] for values in waiting))
        self._waiting = Ranked(*(values[min(n, ready) :] for values in waiting))
        return taken

    def _more(self, part: _Part) -> None:
        part.n *= GROWTH
        allow = part.allow
        if self._blocked is not None:
            allow = ~self._blocked if allow is None else allow & ~self._blocked
        hits = self._search(part.n, np.concatenate([self._hidden, self._fetched]), allow)
        self._reach(part, hits)
        self._add(*hits)

    def block(self, rows: np.ndarray) -> None:
        """Leave rows out from now on.

        Args:
            rows: ``[N]`` bool, with all that were blocked before.
        """
        self._blocked = rows
        kept = ~rows[self._waiting.rows]
        self._waiting = Ranked(*(values[kept] for values in self._waiting))


def allowed_rows(live: np.ndarray, hidden: np.ndarray, allow: np.ndarray | None) -> np.ndarray:
    """Select the rows that conditions leave, ascending ``[n]`` int64.

    Args:
        live: ``[N]`` bool.
        hidden: rows without a place.
        allow: ``[N]`` bool or ``None``.
    """
    left: Any = live.copy() if allow is None else live & allow
    left[hidden] = False
    return np.flatnonzero(left)
