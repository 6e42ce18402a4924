"""The allowed items in the order of their boosted scores, fetched from a search only as far as somebody looks.

A search answers "the n best of these rows" whatever stands behind it: a scan, an index or a server. Boosts change scores after the
search, so items whose boosts come to about as much are a part of their own. Of a part, what has not been fetched yet scores at most
what was fetched last, boosted as much as anything in the part. A candidate is handed out only when it lies above that bound.
A scan of everything needs no parts: it is told what is added, and ranks by the sum. Fetches grow fourfold.
"""

from collections.abc import Callable, Sequence
from typing import Any, NamedTuple, Protocol

import numpy as np

from recbole_llm.retrieval.boosts import Boosting
from recbole_llm.retrieval.exact import Hits, Lift, best

GROWTH = 4
_NO_ROWS = np.zeros(0, np.int64)


class Search(Protocol):
    """Finds the best rows."""

    def __call__(self, n: int, hidden: np.ndarray, allow: np.ndarray | None, /) -> Hits:
        """Find the n best without rows ``hidden``, among ``allow`` ``[N]`` bool; fewer only where fewer are allowed."""


class Source(NamedTuple):
    """What candidates come from.

    Attributes:
        search: finds the best rows.
        scan: searches as ``search`` by lifted scores; ``None`` where it cannot.
        score: the scores of rows ``[n]``, float64; ``None`` where only a search tells them.
    """

    search: Search
    scan: Callable[[int, np.ndarray, np.ndarray | None, Lift], Hits] | None = None
    score: Callable[[np.ndarray], np.ndarray] | None = None

    def scores(self, rows: np.ndarray, n_rows: int) -> np.ndarray:
        """Compute the scores of rows ``[n]``, each once and all allowed, of ``n_rows``: ``[n]`` float64."""
        if self.score is not None:
            return self.score(rows)
        allow = np.zeros(n_rows, bool)
        allow[rows] = True
        hits = self.search(len(rows), _NO_ROWS, allow)
        return hits.scores[np.argsort(hits.rows)][np.argsort(np.argsort(rows))]


class Ranked(NamedTuple):
    """Candidates in order: rows ``[n]`` int64, the model's scores and those with boosts ``[n]`` float64."""

    rows: np.ndarray
    scores: np.ndarray
    adjusted: np.ndarray


NOTHING = Ranked(_NO_ROWS, np.zeros(0), np.zeros(0))


class _Part:
    """Rows that are fetched together, and how far that has come."""

    __slots__ = ("added", "allow", "bound", "done", "n", "odds")

    def __init__(self, allow: np.ndarray | None, n: int, added: float = 0.0, odds: float = 0.0) -> None:
        self.allow, self.n, self.added, self.odds = allow, n, added, odds
        self.done, self.bound = False, np.inf


class Ranking:
    """The allowed items, best first.

    Args:
        source: of the candidates.
        hidden: rows without a place, ``[h]``.
        allow: rows with one, ``[N]`` bool; ``None`` for all.
        boosting: or ``None``.
        first: how many candidates the first fetch is to bring.
    """

    def __init__(
        self, source: Source, hidden: np.ndarray, allow: np.ndarray | None, boosting: Boosting | None, first: int
    ) -> None:
        self._source, self._hidden, self._boosting = source, hidden, boosting
        self._parts = [_Part(allow, first)]
        # what a scan is told
        self.lift = boosting if boosting is not None and source.scan is not None and boosting.scannable() else None
        self._bounded = boosting is not None and self.lift is None
        if self._bounded and boosting is not None:
            # a boosted score is handed out only above the bound
            parts = [_Part(m if allow is None else m & allow, first + 1, *most) for m, *most in boosting.parts()]
            self._parts = [part for part in parts if part.allow is not None and part.allow.any()]
        self._blocked: np.ndarray | None = None
        self._fetched = _NO_ROWS
        self._waiting = NOTHING

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
            part.bound = last
            if self._bounded and self._boosting is not None:
                part.bound = self._boosting.highest(last, part.added, part.odds)

    def _add(self, rows: np.ndarray, scores: np.ndarray) -> None:
        """Put candidates among those that wait."""
        adjusted = scores if self._boosting is None else self._boosting.adjusted(rows, scores)
        if not len(self._fetched):
            self._fetched = rows
        elif len(rows):
            self._fetched = np.concatenate([self._fetched, rows])
        if not len(self._waiting.rows) and not self._bounded:  # one part, in order as they come
            self._waiting = Ranked(rows, scores, adjusted)
            return
        merged = [np.concatenate(pair) for pair in zip(self._waiting, (rows, scores, adjusted), strict=True)]
        order = best(merged[0], merged[2], len(merged[0]))
        self._waiting = Ranked(*(values[order] for values in merged))

    def take(self, n: int) -> Ranked:
        """Take the next n candidates; fewer only if no more are allowed."""
        while True:
            open_parts = [part for part in self._parts if not part.done]
            ready = len(self._waiting.rows)
            if open_parts and self._bounded:
                bound = max(part.bound for part in open_parts)
                ready = int(np.searchsorted(-self._waiting.adjusted, -bound))  # strictly above it
            if ready >= n or not open_parts:
                break
            self._more(max(open_parts, key=lambda part: part.bound))
        waiting = self._waiting
        if n >= ready == len(waiting.rows):
            self._waiting = NOTHING
            return waiting
        taken = Ranked(*(values[: min(n, ready)] for values in waiting))
        self._waiting = Ranked(*(values[min(n, ready) :] for values in waiting))
        return taken

    def _more(self, part: _Part) -> None:
        part.n *= GROWTH
        allow = part.allow
        if self._blocked is not None:
            allow = ~self._blocked if allow is None else allow & ~self._blocked
        hidden = np.concatenate([self._hidden, self._fetched])
        if self.lift is None or self._source.scan is None:
            hits = self._source.search(part.n, hidden, allow)
        else:
            hits = self._source.scan(part.n, hidden, allow, self.lift)
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
