"""Applies the rules of one request to the candidates that a search finds, and tells what each rule did."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from hashlib import sha256
from typing import Any, NamedTuple, TypeVar

import numpy as np

from recbole_llm.retrieval.diversity import Calibrated, MarginalRelevance, TradeOff, mix_of
from recbole_llm.retrieval.exact import Hits
from recbole_llm.retrieval.item_catalog import Catalog
from recbole_llm.retrieval.ranking import Boosting, Chance, Ranked, Ranking, Search, allowed_rows
from recbole_llm.retrieval.rules import Rules

SPARE = 16  # candidates that a list with caps looks at beside twice k
DRAWN_AT_ONCE = 32

X = TypeVar("X", bound=Any)


class Applied(NamedTuple):
    """What a rule did to an item of an answer.

    Attributes:
        rule: ``boost ...``, ``cap ATTRIBUTE``, ``diversity``, ``calibration ATTRIBUTE`` or ``exploration``.
        contribution: what it added to the score; 0 for rules that change places only.
        place: the item's place by score, where a rule changed it and the place is known; 1 for the best.
    """

    rule: str
    contribution: float = 0.0
    place: int | None = None

    def __str__(self) -> str:
        added = f" {self.contribution:+.3g}" if self.contribution else ""
        return self.rule + added + (f", from place {self.place}" if self.place else "")


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
        search: finds the best rows.
        hidden: rows without a place.
        allow: rows that conditions leave, ``[N]`` bool; ``None`` for all.
        subject: who is asked for.

    Raises:
        ValueError: if a rule does not fit the export's attributes, or the subject.
    """

    def __init__(
        self,
        rules: Rules,
        k: int,
        catalog: Catalog,
        search: Search,
        hidden: np.ndarray,
        allow: np.ndarray | None,
        subject: Subject,
    ) -> None:
        rules.check(catalog.export.manifest.attributes)
        self._rules, self._k, self._catalog, self._search = rules, k, catalog, search
        self._hidden, self._allow, self._subject = hidden, allow, subject
        self._boosting = None
        if rules.boosts:
            masks = [_mask(catalog, boost.filter) for boost in rules.boosts]
            self._boosting = Boosting(rules.boosts, masks, subject.chance)
        self._caps = _Caps(rules.caps, catalog)
        self._notes: list[str] = []
        self._list: list[tuple[int, float, float, tuple[Applied, ...]]] = []
        self._pool = rules.diversity.pool(k) if rules.diversity is not None else k
        self._first = max(self._pool, 2 * k + SPARE) if rules.caps else self._pool
        self._ranking = Ranking(search, hidden, allow, self._boosting, self._first)

    def searches(self) -> list[tuple[int, np.ndarray | None]]:
        """List the first searches: how many items, and the allowed rows."""
        return self._ranking.searches()

    def chosen(self, hits: Sequence[Hits]) -> Chosen:
        """Choose the list from the results of :meth:`searches`."""
        self._ranking.feed(hits)
        draw, explored = self._draw()
        if self._rules.diversity is None:
            self._by_score(self._k - explored)
        else:
            self._by_trade_off(self._k - explored)
        if draw is not None:
            self._explore(draw, explored)
        rows = np.array([entry[0] for entry in self._list], np.int64)
        scores = np.array([entry[1] for entry in self._list], np.float64)
        adjusted = np.array([entry[2] for entry in self._list], np.float64)
        applied = [entry[3] for entry in self._list]
        if self._boosting is not None:
            applied = self._with_boosts(rows, scores, applied)
        if len(rows) < self._k:
            allowed = len(allowed_rows(self._catalog.live(), self._hidden, self._allow))
            self._notes.insert(0, short_note(len(rows), self._k, allowed))
        return Chosen(rows, scores, adjusted, applied, " ".join(self._notes))

    def _with_boosts(
        self, rows: np.ndarray, scores: np.ndarray, applied: Sequence[tuple[Applied, ...]]
    ) -> list[tuple[Applied, ...]]:
        assert self._boosting is not None
        steps = [(label, values.tolist()) for label, values in self._boosting.steps(rows, scores)]
        return [
            (*(Applied(label, values[at]) for label, values in steps if values[at]), *others)
            for at, others in enumerate(applied)
        ]

    # ------------------------------------------------------------------ by score

    def _by_score(self, k: int) -> None:
        """Fill the list in the order of scores, as far as the caps allow."""
        place, step = 0, self._first
        whole = True  # whether every candidate has been counted
        while len(self._list) < k:
            taken = self._ranking.take(step)
            if not len(taken.rows):
                return
            values = self._caps.of(taken.rows)
            numbers = zip(*(values.tolist() for values in taken), strict=True)
            for at, (row, score, adjusted) in enumerate(numbers):
                place += 1
                if self._caps.take(values, at):
                    caps = [Applied(f"cap {name}", place=place if whole else None) for name in self._caps.refused]
                    self._list.append((row, score, adjusted, tuple(caps)))
                    if len(self._list) == k:
                        return
            full = self._caps.full_rows()
            if full is not None:
                whole = False
                self._ranking.block(full)
            step *= 2

    # ------------------------------------------------------------------ by a trade-off

    def _by_trade_off(self, k: int) -> None:
        """Fill the list by diversity, the pool growing where the caps leave too little of it."""
        trade_off, rule, extend = self._trade_off()
        if trade_off is None:
            self._by_score(k)
            return
        caps = self._caps
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
            for known, new in zip(values, caps.of(taken.rows), strict=True):
                known += new
            is_open += b"\1" * len(taken.rows)
            for _ in range(is_open.count(1)):
                at = int(trade_off.gains().argmax())
                is_open[at] = 0
                if not caps.take(values, at):
                    trade_off.close(at)
                    continue
                place = at + 1 if at < counted else None
                moved = len(picked) >= at + 1 or is_open.find(1, 0, at) >= 0
                applied = (Applied(rule, 0.0, place),) if moved else ()
                if caps.refused:
                    applied = (*(Applied(f"cap {name}", 0.0, place) for name in caps.refused), *applied)
                picked.append(at)
                told.append(applied)
                if len(picked) == k:
                    break
                trade_off.choose(at)
            full = caps.full_rows() if len(picked) < k else None
            if full is not None:
                self._ranking.block(full)
        if picked:
            whole = pool[0] if len(pool) == 1 else [np.concatenate(parts) for parts in zip(*pool, strict=True)]
            at_all = np.array(picked)
            self._list += zip(*(numbers.take(at_all).tolist() for numbers in whole), told, strict=True)

    def _trade_off(self) -> tuple[TradeOff | None, str, Callable[[np.ndarray, np.ndarray], None]]:
        """What gains are, the rule's name, and what adds candidates by their rows and relevance; ``None`` without a mix."""
        diversity, catalog = self._rules.diversity, self._catalog
        assert diversity is not None
        if diversity.attribute is None:
            unlike = MarginalRelevance(diversity.weight)
            return unlike, "diversity", lambda rows, relevance: unlike.extend(relevance, catalog.content(rows))
        name = diversity.attribute
        values = lambda rows: catalog.values_of(rows, name)  # noqa: E731
        mix = mix_of(values(self._subject.rows), self._subject.weights)
        if not mix:
            self._notes.append(f"Not calibrated: the history holds no item with a {name}.")
            return None, "", lambda rows, relevance: None
        calibrated = Calibrated(diversity.weight, mix)
        rule = f"calibration {name}"
        return calibrated, rule, lambda rows, relevance: calibrated.extend(relevance, values(rows))

    def _relevance(self, ranked: Ranked) -> np.ndarray:
        chance = self._subject.chance
        return np.maximum(ranked.adjusted, 0) if chance is None else chance.relevance(ranked.adjusted)

    # ------------------------------------------------------------------ exploration

    def _draw(self) -> tuple[np.random.Generator | None, int]:
        """A generator of this seed and subject, and how many places are given away."""
        explore = self._rules.explore
        if explore is None:
            return None, 0
        draw = seeded(explore.seed, self._subject.name)
        return draw, int(explore.share * self._k + draw.random())

    def _explore(self, draw: np.random.Generator, n: int) -> None:
        """Draw n of the allowed items that are left, and give them places drawn at random."""
        listed = np.array([entry[0] for entry in self._list], np.int64)
        left = allowed_rows(self._catalog.live(), np.concatenate([self._hidden, listed]), self._allow)
        found: list[int] = []
        at_once = n + DRAWN_AT_ONCE
        while len(left) and len(found) < n:
            drawn = draw.choice(len(left), min(at_once, len(left)), replace=False)
            values = self._caps.of(left[drawn])
            for at, row in enumerate(left[drawn].tolist()):
                if len(found) < n and self._caps.take(values, at):
                    found.append(row)
            if len(found) == n:
                break
            full = self._caps.full_rows()
            left = np.delete(left, drawn)
            if full is not None:
                left = left[~full[left]]
            at_once *= 2
        if not found:
            return
        allow = np.zeros(len(self._catalog), bool)
        allow[found] = True
        hits = self._search(len(found), np.zeros(0, np.int64), allow)
        adjusted = hits.scores if self._boosting is None else self._boosting.adjusted(*hits)
        numbers = dict(zip(hits.rows.tolist(), zip(hits.scores.tolist(), adjusted.tolist(), strict=True), strict=True))
        places = np.sort(draw.choice(len(self._list) + len(found), len(found), replace=False))
        for place, row in zip(places.tolist(), found, strict=True):
            self._list.insert(place, (row, *numbers[row], (Applied("exploration"),)))


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
    reranking = Reranking(rules, k, catalog, search, hidden, allow, subject)
    return reranking.chosen([search(n, hidden, mask) for n, mask in reranking.searches()])


def _mask(catalog: Catalog, condition: Mapping[str, Any]) -> np.ndarray:
    try:
        mask = catalog.mask(condition)
    except ValueError as error:
        raise ValueError(f"boost: {error}") from None
    assert mask is not None  # conditions of boosts are not empty
    return mask


def seeded(seed: int, name: bytes) -> np.random.Generator:
    """The generator ``default_rng([seed, *words])`` with the words of a name's hash, made in a sixth of its time.

    Args:
        seed: from 0.
        name: of a subject.
    """
    words = [seed >> at & 0xFFFFFFFF for at in range(0, max(seed.bit_length(), 1), 32)]
    state = np.concatenate([np.array(words, np.uint32), np.frombuffer(sha256(name).digest(), np.uint32)])
    return np.random.Generator(np.random.PCG64(np.random.SeedSequence(state)))  # type: ignore[arg-type]


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
