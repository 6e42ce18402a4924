"""Applies the rules of one request to the candidates that a search finds, and tells what each rule did."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from typing import Any, NamedTuple, TypeVar

import numpy as np

from recbole_llm.retrieval.boosts import Boosting, Chance, lifts_of
from recbole_llm.retrieval.diversity import Calibrated, MarginalRelevance, TradeOff
from recbole_llm.retrieval.draws import Draws
from recbole_llm.retrieval.exact import Hits
from recbole_llm.retrieval.item_catalog import Catalog
from recbole_llm.retrieval.mixes import Mix
from recbole_llm.retrieval.ranking import NOTHING, Ranked, Ranking, Search, Source, allowed_rows
from recbole_llm.retrieval.rules import Applied, Rules

SPARE = 16  # candidates that a list with caps looks at beside twice k
TRIES = 64  # draws
LEAST_SHARE = 0.25  # of them that bring an item; below, the items that are left are looked for

X = TypeVar("X", bound=Any)


class Chosen(NamedTuple):
    """A list.

    Attributes:
        rows: in the order of the list, ``[n]`` int64.
        scores: of the model, ``[n]`` float64.
        adjusted: with boosts, ``[n]`` float64.
        applied: what rules did to each.
        note: what must be said of the list; empty for nothing.
    """

    rows: np.ndarray
    scores: np.ndarray
    adjusted: np.ndarray
    applied: list[tuple[Applied, ...]]
    note: str

    def told(self, items: Sequence[X]) -> tuple[X, ...]:
        """Describe the items of an answer (:class:`Recommended`) with their boosted scores, and what rules did to them."""
        if not any(self.applied):
            return tuple(items)
        return tuple(
            replace(item, score=score, rules=applied) if applied else item
            for item, score, applied in zip(items, self.adjusted.tolist(), self.applied, strict=True)
        )


class Subject(NamedTuple):
    """Who is asked for.

    Attributes:
        rows: of the history, ``[h]`` int64.
        weights: of them, ``[h]``.
        chance: how scores become probabilities; ``None`` where they are no user's.
        name: what exploration draws by, beside its seed.
    """

    rows: np.ndarray
    weights: np.ndarray
    chance: Chance | None
    name: bytes


class _Caps:
    """Counts values of capped attributes in a list."""

    def __init__(self, limits: Mapping[str, int], catalog: Catalog) -> None:
        self._catalog = catalog
        self._counts: list[tuple[str, int, dict[Any, int]]] = [(name, most, {}) for name, most in limits.items()]
        self.refused: dict[str, None] = {}

    def of(self, rows: np.ndarray) -> list[list[Sequence[Any]]]:
        """List the values of every row by capped attribute."""
        return [self._catalog.values_of(rows, name) for name, _, _ in self._counts]

    def take(self, values: list[list[Sequence[Any]]], at: int) -> bool:
        """Count the item at a place of what :meth:`of` lists if it fits; else note by which attributes it does not."""
        fits, own = True, []
        for (name, most, counts), of_name in zip(self._counts, values, strict=True):
            for value in of_name[at]:
                count = counts.get(value, 0)
                if count >= most:
                    self.refused[name] = None
                    fits = False
                    break
                own.append((counts, value, count + 1))
        if fits:
            for counts, value, count in own:
                counts[value] = count
        return fits

    def full_rows(self) -> np.ndarray | None:
        """Rows that no longer fit, ``[N]`` bool; ``None`` for none."""
        masks = []
        for name, most, counts in self._counts:
            full = [value for value, count in counts.items() if count == most]
            if full:
                masks.append(self._catalog.rows_with(name, full))
        return np.logical_or.reduce(masks) if masks else None


class Reranking:
    """The rules of one request over one catalogue.

    Args:
        rules: with something to do beside conditions.
        k: how many items.
        catalog: of the items.
        source: of the candidates.
        hidden: rows without a place.
        allow: rows that conditions leave, ``[N]`` bool; ``None`` for all.
        subject: who is asked for.

    Attributes:
        lift: by what :meth:`searches` are to lift scores before they compare them; ``None`` for nothing.

    Raises:
        ValueError: if a rule does not fit the export's attributes, or the subject.
    """

    def __init__(
        self,
        rules: Rules,
        k: int,
        catalog: Catalog,
        source: Source,
        hidden: np.ndarray,
        allow: np.ndarray | None,
        subject: Subject,
    ) -> None:
        rules.check(catalog.export.manifest.attributes)
        self._rules, self._k, self._catalog, self._source = rules, k, catalog, source
        self._hidden, self._allow, self._subject = hidden, allow, subject
        self._boosting = Boosting(lifts_of(catalog, rules.boosts), subject.chance) if rules.boosts else None
        self._caps = _Caps(rules.caps, catalog)
        self._notes: list[str] = []
        self._listed = NOTHING
        self._applied: list[tuple[Applied, ...]] = []
        self._pool = rules.diversity.pool(k) if rules.diversity is not None else k
        self._first = max(self._pool, 2 * k + SPARE) if rules.caps else self._pool
        self._ranking = Ranking(source, hidden, allow, self._boosting, self._first)
        self.lift = self._ranking.lift

    def searches(self) -> list[tuple[int, np.ndarray | None]]:
        """List the first searches: how many items, and the allowed rows."""
        return self._ranking.searches()

    def chosen(self, hits: Sequence[Hits]) -> Chosen:
        """Choose the list from the results of :meth:`searches`."""
        self._ranking.feed(hits)
        draw, explored = self._draw()
        if self._rules.diversity is not None:
            self._by_trade_off(self._k - explored)
        elif self._rules.caps:
            self._by_score(self._k - explored)
        else:
            self._keep([self._ranking.take(self._k - explored)], None, None)
        if draw is not None and explored:
            self._explore(draw, explored)
        rows, scores, adjusted = self._listed
        applied = self._applied
        if self._boosting is not None:
            lifted = self._boosting.told(rows, scores, adjusted)
            applied = [(*first, *others) for first, others in zip(lifted, applied, strict=True)]
        if len(rows) < self._k:
            allowed = len(allowed_rows(self._catalog.live(), self._hidden, self._allow))
            self._notes.insert(0, short_note(len(rows), self._k, allowed))
        return Chosen(rows, scores, adjusted, applied, " ".join(self._notes))

    def _keep(
        self, pool: Sequence[Ranked], picked: Sequence[int] | None, told: list[tuple[Applied, ...]] | None
    ) -> None:
        """Make a list of places of a pool, or of all of it."""
        listed = pool[0] if len(pool) == 1 else Ranked(*(np.concatenate(parts) for parts in zip(*pool, strict=True)))
        if picked is not None:
            at = np.array(picked, np.int64)
            listed = Ranked(*(values.take(at) for values in listed))
        self._listed = listed
        self._applied = [()] * len(listed.rows) if told is None else told

    # ------------------------------------------------------------------ by score

    def _by_score(self, k: int) -> None:
        """Fill the list in the order of scores, as far as the caps allow."""
        step, caps = self._first, self._caps
        pool: list[Ranked] = []
        picked: list[int] = []
        told: list[tuple[Applied, ...]] = []
        seen = 0
        whole = True  # whether every candidate has been counted
        while len(picked) < k:
            taken = self._ranking.take(step)
            if not len(taken.rows):
                break
            pool.append(taken)
            values = caps.of(taken.rows)
            for at in range(len(taken.rows)):
                if caps.take(values, at):
                    place = seen + at + 1 if whole else None
                    told.append(
                        tuple(Applied(f"cap {name}", 0.0, place) for name in caps.refused) if caps.refused else ()
                    )
                    picked.append(seen + at)
                    if len(picked) == k:
                        break
            seen += len(taken.rows)
            full = caps.full_rows() if len(picked) < k else None
            if full is not None:
                whole = False
                self._ranking.block(full)
            step *= 2
        if picked:
            self._keep(pool, picked, told)

    # ------------------------------------------------------------------ by a trade-off

    def _by_trade_off(self, k: int) -> None:
        """Fill the list by diversity, the pool growing where the caps leave too little of it."""
        trade_off, rule, extend = self._trade_off()
        if trade_off is None:
            self._by_score(k)
            return
        caps, refused = self._caps if self._rules.caps else None, self._caps.refused
        best_relevance: float | None = None
        pool: list[Ranked] = []
        values: list[list[Sequence[Any]]] = [[] for _ in self._rules.caps]
        is_open = bytearray()
        picked: list[int] = []
        told: list[tuple[Applied, ...]] = []
        counted = 0  # candidates whose place by score is known
        while len(picked) < k:
            taken = self._ranking.take(self._pool)
            if not len(taken.rows):
                break
            relevance = self._relevance(taken)
            if best_relevance is None:
                best_relevance = float(relevance[0])
                counted = len(taken.rows)
            extend(taken.rows, relevance / best_relevance if best_relevance > 0 else relevance)
            pool.append(taken)
            is_open += b"\1" * len(taken.rows)
            if caps is not None:
                for known, new in zip(values, caps.of(taken.rows), strict=True):
                    known += new
            for _ in range(is_open.count(1)):
                at = int(trade_off.gains().argmax())
                is_open[at] = 0
                if caps is not None and not caps.take(values, at):
                    trade_off.close(at)
                    continue
                # not where its score would have it: something better waits, or went elsewhere
                moved = len(picked) > at or is_open.find(1, 0, at) >= 0
                told.append(
                    self._told(rule if moved else None, at + 1 if at < counted else None) if moved or refused else ()
                )
                picked.append(at)
                if len(picked) == k:
                    break
                trade_off.choose(at)
            full = caps.full_rows() if caps is not None and len(picked) < k else None
            if full is not None:
                self._ranking.block(full)
        if picked:
            self._keep(pool, picked, told)

    def _told(self, rule: str | None, place: int | None) -> tuple[Applied, ...]:
        """Tell which caps, and which rule, moved an item from its place."""
        applied = () if rule is None else (Applied(rule, 0.0, place),)
        if not self._caps.refused:
            return applied
        return (*(Applied(f"cap {name}", 0.0, place) for name in self._caps.refused), *applied)

    def _trade_off(self) -> tuple[TradeOff | None, str, Callable[[np.ndarray, np.ndarray], None]]:
        """What gains are, the rule's name, and what adds candidates by their rows and relevance; ``None`` without a mix."""
        diversity, catalog = self._rules.diversity, self._catalog
        assert diversity is not None
        if diversity.attribute is None:
            unlike = MarginalRelevance(diversity.weight)
            return unlike, "diversity", lambda rows, relevance: unlike.extend(relevance, catalog.content(rows))
        name = diversity.attribute
        mix = Mix(*catalog.codes(self._subject.rows, name), self._subject.weights)
        if not len(mix.p):
            self._notes.append(f"Not calibrated: the history holds no item with a {name}.")
            return None, "", lambda rows, relevance: None
        calibrated = Calibrated(diversity.weight, mix)
        rule = f"calibration {name}"
        return calibrated, rule, lambda rows, relevance: calibrated.extend(relevance, catalog.codes(rows, name)[0])

    def _relevance(self, ranked: Ranked) -> np.ndarray:
        chance = self._subject.chance
        return np.maximum(ranked.adjusted, 0) if chance is None else chance.relevance(ranked.adjusted)

    # ------------------------------------------------------------------ exploration

    def _draw(self) -> tuple[Draws | None, int]:
        """What is drawn from for this seed and subject, and how many places are given away."""
        explore = self._rules.explore
        if explore is None:
            return None, 0
        draws = Draws(explore.seed, self._subject.name)
        return draws, int(explore.share * self._k + draws.random())

    def _explore(self, draws: Draws, n: int) -> None:
        """Draw n of the allowed items that are left, and give them places drawn at random."""
        rows = np.array(self._drawn(draws, n), np.int64)
        if not len(rows):
            return
        scores = self._source.scores(rows, len(self._catalog))
        adjusted = scores if self._boosting is None else self._boosting.adjusted(rows, scores)
        m = len(self._listed.rows)
        places: set[int] = set()
        while len(places) < len(rows):
            places.add(draws.below(m + len(rows)))
        order = list(range(m))
        for at, place in enumerate(sorted(places), m):
            order.insert(place, at)
        told = [*self._applied, *[(Applied("exploration"),)] * len(rows)]
        self._keep([self._listed, Ranked(rows, scores, adjusted)], order, [told[at] for at in order])

    def _drawn(self, draws: Draws, n: int) -> list[int]:
        """Draw at most n allowed rows that fit, each of those that are left as likely as any other.

        Rows of the catalogue are drawn until n are allowed. Where few of them are, only those that are left are drawn from.
        """
        live, allow, caps = self._catalog.live(), self._allow, self._caps
        closed = {*self._hidden.tolist(), *self._listed.rows.tolist()}
        found: list[int] = []
        left: np.ndarray | None = None
        while len(found) < n:
            before = len(found)
            for _ in range(TRIES):
                row = draws.below(len(live)) if left is None else int(left[draws.below(len(left))])
                if row in closed or not live[row] or not (allow is None or allow[row]):
                    continue
                closed.add(row)
                if not self._rules.caps or caps.take(caps.of(np.array([row])), 0):
                    found.append(row)
                    if len(found) == n:
                        return found
            if len(found) - before < TRIES * LEAST_SHARE:
                left = allowed_rows(live, np.fromiter(closed, np.int64, len(closed)), allow)
                full = caps.full_rows()
                if full is not None:
                    left = left[~full[left]]
                if not len(left):
                    return found
        return found


def reranked(
    rules: Rules,
    k: int,
    catalog: Catalog,
    search: Search,
    hidden: np.ndarray,
    allow: np.ndarray | None,
    subject: Subject,
) -> Chosen:
    """Choose the list of one request whose search is no part of a batch; arguments and errors as :class:`Reranking`."""
    reranking = Reranking(rules, k, catalog, Source(search), hidden, allow, subject)
    return reranking.chosen([search(n, hidden, mask) for n, mask in reranking.searches()])


def short_note(n: int, k: int, allowed: int | None = None) -> str:
    """Say why a list is short; nothing of one that is not.

    Args:
        n: its length.
        k: what was asked for.
        allowed: items that conditions leave, where caps may leave fewer.
    """
    if n >= k:
        return ""
    if allowed is not None and n < allowed:
        return f"{n} of {k}: {allowed} items meet the conditions, and the caps leave no more of them."
    return f"{n} of {k}: the history, exclusions and filters leave no more."


def subject_name(user: str | None, items: Sequence[str] | None = None, text_vector: np.ndarray | None = None) -> bytes:
    """Name what exploration draws by for a subject: the same for the same one."""
    if text_vector is not None:
        return text_vector.tobytes()
    told = user if user is not None else "\n".join(items or ())
    return told.encode("utf-8", "surrogatepass")
