"""Recommendations from an export, as plain Python.

recommender = Recommender(load_export("EXPORT"))
recommender.recommend(Request(user="196", k=10, explain=3))
"""

import math
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from itertools import repeat
from logging import getLogger
from typing import Any

import numpy as np

from recbole_llm.export.errors import UnknownItemError, UnknownUserError
from recbole_llm.export.pooling import Pooling, Query
from recbole_llm.export.reader import Export
from recbole_llm.retrieval import direct
from recbole_llm.retrieval.alike import alike
from recbole_llm.retrieval.answers import Reason, Recommendation, Recommended
from recbole_llm.retrieval.boosts import Chance
from recbole_llm.retrieval.cosines import Cosines
from recbole_llm.retrieval.exact import Hits, Lift, Retriever, best, top_rows
from recbole_llm.retrieval.item_catalog import Catalog, MappedItem
from recbole_llm.retrieval.own_retriever import own_retriever
from recbole_llm.retrieval.ranking import Source
from recbole_llm.retrieval.request import Request
from recbole_llm.retrieval.reranking import Chosen, Reranking, Subject, reranked, short_note, subject_name
from recbole_llm.retrieval.rules import NO_RULES, Applied, Rules
from recbole_llm.retrieval.searches import Asked, Searches, picture_searches_of, searches_of
from recbole_llm.retrieval.thumbnails import with_thumbnails
from recbole_llm.retrieval.users import Users
from recbole_llm.scoring.probability import ProbabilityMap

log = getLogger(__name__)
NOT_FINITE = "The numbers of the model give no finite score here; export a model whose training ended well."
_NO_ROWS = np.zeros(0, np.int64)


@dataclass(frozen=True, eq=False)
class _Prepared:
    """A request turned into a query, its hidden rows and its mask; ``rows`` and ``times`` are those of the history."""

    query: Query
    rows: np.ndarray
    times: np.ndarray
    hidden: np.ndarray
    mask: np.ndarray | None
    source: str
    unknown: tuple[str, ...]


class Recommender:
    """Answers requests from an export and its catalogue.

    Not safe for several threads at once: the service runs it on one.

    Args:
        export: the model.
        make_retriever: makes what finds the best rows of this export in its catalogue; ``None``: the export's index where
            it has one (extra ``ann``), else everything is scored.
    """

    def __init__(
        self, export: Export, make_retriever: Callable[[Export, Catalog], Retriever | None] | None = None
    ) -> None:
        self.export = export
        self.catalog = Catalog(export)
        self.overlay_seq = 0
        self.users = Users(export, self.catalog)
        self._user_row = {user_id: row for row, user_id in enumerate(export.user_ids)}
        self._pooling = Pooling.of(export)
        self._probability = export.manifest.probability or ProbabilityMap()
        self._retriever = (make_retriever or own_retriever)(export, self.catalog)
        self._searched = partial(direct.search, self._retriever, self.catalog)
        self.searches = searches_of(export, self.catalog)
        self.picture_searches = picture_searches_of(export, self.catalog)
        self._popularity: np.ndarray | None = None
        self._cosines = Cosines(export, self.catalog)

    def close(self) -> None:
        """Let go of what the retriever holds open."""
        close = getattr(self._retriever, "close", None)
        if close is not None:
            close()

    def history_length(self, request: Request) -> int:
        """Return the most history entries that a request is answered from; 0 for an unknown user and for a text."""
        if request.items is not None:
            return len(request.items)
        if request.item is not None:
            return 1
        row = None if request.user is None else self._user_row.get(request.user)
        return 0 if row is None else int(self.export.history_offsets[row + 1] - self.export.history_offsets[row])

    # ------------------------------------------------------------------ answers

    def recommend(self, request: Request) -> Recommendation:
        """Answer one request.

        Raises:
            UnknownUserError: if the user is unknown and there is no fallback.
            UnknownItemError: if none of ``items`` is known and there is no fallback.
            ValueError: on a filter that does not fit the export's attributes.
        """
        answer = self.recommend_many([request])[0]
        if isinstance(answer, Exception):
            raise answer
        return answer

    def recommend_many(self, requests: Sequence[Request]) -> list[Recommendation | Exception]:
        """Answer several requests in one pass over the catalogue; what is wrong with one is its own answer."""
        answers: list[Recommendation | Exception | None] = [None] * len(requests)
        ready: list[tuple[int, _Prepared, Reranking | None]] = []
        for at, request in enumerate(requests):
            try:
                if request.picture_vector is not None:
                    answers[at] = self._found(request, request.picture_vector, self.picture_searches)
                    continue
                if request.text_vector is not None and self.searches is not None and self.searches.takes_texts:
                    answers[at] = self._found(request, request.text_vector, self.searches)
                    continue
                if request.item is not None:
                    answers[at] = self._like(request, request.item)
                    continue
                prepared = self._prepare(request)
                if prepared is None:
                    answers[at] = self._popular(request)
                else:
                    ready.append((at, prepared, self._reranking(request, prepared)))
            except (LookupError, ValueError) as error:
                answers[at] = error
        searches = [
            (prepared, n, mask, None if reranking is None else reranking.lift)
            for at, prepared, reranking in ready
            for n, mask in ([(requests[at].k, prepared.mask)] if reranking is None else reranking.searches())
        ]
        found: Iterator[Hits] = iter(())
        if searches:
            found = iter(
                self._searched(
                    [prepared.query for prepared, _, _, _ in searches],
                    [n for _, n, _, _ in searches],
                    [prepared.hidden for prepared, _, _, _ in searches],
                    [mask for _, _, mask, _ in searches],
                    [lift for _, _, _, lift in searches],
                )
            )
        for at, prepared, reranking in ready:
            if reranking is None:
                answers[at] = self._answer(requests[at], prepared, next(found))
            else:
                chosen = reranking.chosen([next(found) for _ in reranking.searches()])
                answers[at] = self._answer(requests[at], prepared, Hits(chosen.rows, chosen.scores), chosen)
        return with_thumbnails(self.catalog, answers)  # type: ignore[arg-type]

    def _reranking(self, request: Request, prepared: _Prepared) -> Reranking | None:
        """The rules of a request that change the order; ``None`` where there are none."""
        if not request.rules.rerank:
            return None

        def search(n: int, hidden: np.ndarray, allow: np.ndarray | None, lift: Lift | None = None) -> Hits:
            return self._searched([prepared.query], [n], [hidden], [allow], [lift])[0]

        scores = partial(direct.scores, self.catalog, prepared.query)
        source = Source(search, None if self._retriever is not None else search, scores)

        chance = Chance(self._probability, math.log(max(len(prepared.query.source), 1)))
        vector = request.text_vector if request.profile_vector is None else request.profile_vector
        name = subject_name(request.user, request.items, vector)
        subject = Subject(prepared.rows, prepared.times, chance, name)
        return Reranking(request.rules, request.k, self.catalog, source, prepared.hidden, prepared.mask, subject)

    def _found(self, request: Request, vector: np.ndarray, searches: Searches | None) -> Recommendation:
        if searches is None:
            raise ValueError("This model has no pictures, or none can be asked for: export again with its pictures.")
        hidden, mask, unknown = self._conditions(request)
        asked = Asked(vector, request.text, request.by, request.explain)
        answer = searches.text(asked, request.k, hidden, mask, request.rules)
        return replace(answer, unknown=tuple(unknown))

    def _prepare(self, request: Request) -> _Prepared | None:
        """``None`` for the fallback."""
        catalog = self.catalog
        unknown: list[str] = []
        part = ranks = None
        disliked = _NO_ROWS
        if request.user is not None:
            user = self._user_row.get(request.user)
            if user is None:
                if request.fallback == "popular":
                    return None
                raise UnknownUserError(request.user)
            span = slice(*self.export.history_offsets[user : user + 2])
            rows, times = self.export.history_items[span].astype(np.int64), self.export.history_weight[span]
            part, disliked = self.export.part_of(user), self.export.disliked_of(user)
            ranks = None if self.export.history_rank is None else self.export.history_rank[span]
            source, kind = catalog.source(rows), "history"
        elif request.items is not None:
            rows, times, unknown = self._listed(request.items, request.weights)
            if not len(rows):
                if request.fallback == "popular":
                    return None
                raise UnknownItemError(", ".join(unknown[:3]) or "no item was given")
            if request.weights is None:  # given weights are meant for every block
                ranks = np.arange(len(rows) - 1, -1, -1, dtype=np.float32)
            source, kind = catalog.source(rows), "items"
        elif request.profile_vector is not None:
            rows, times, kind = _NO_ROWS, np.zeros(0, np.float32), "profile"
            part, source = self.export.part_of_profile(request.profile_vector), catalog.source(rows)
        else:
            assert request.text_vector is not None
            if request.by != "both":
                raise ValueError(f"by is {request.by!r}, and this export holds no content vectors: export again.")
            rows, times, kind = _NO_ROWS, np.ones(1, np.float32), "text"
            source = self._text_map_of(request.text_vector[None])[1]
        query = self._pooling.query(source, times, part, ranks, rows, disliked)
        if not (np.isfinite(query.vector).all() and np.isfinite(query.weights).all()):
            raise ValueError(NOT_FINITE)
        hidden, mask, unnamed = self._conditions(request)
        if request.exclude_seen:
            hidden = np.concatenate([hidden, self._with_successors(rows)])
        hidden = np.concatenate([hidden, self._disliked(request.user)])
        return _Prepared(query, rows, times, hidden, mask, kind, (*unknown, *unnamed))

    def _conditions(self, request: Request) -> tuple[np.ndarray, np.ndarray | None, list[str]]:
        """Rows without a place, a mask of those with one or ``None``, and unknown ids."""
        rules = request.rules
        hidden, unknown = self._rows_of([*request.exclude, *rules.exclude] if rules.exclude else request.exclude)
        mask = self.catalog.mask(request.filter)
        if rules.filter:
            own = self.catalog.mask(rules.filter)
            mask = own if mask is None else mask & own
        if rules.only is not None:
            rows, unnamed = self._rows_of(rules.only)
            unknown += unnamed
            only = np.zeros(len(self.catalog), bool)
            only[rows] = True
            mask = only if mask is None else only & mask
        if request.only_new:
            mask = self.catalog.new_items() if mask is None else mask & self.catalog.new_items()
        return hidden, mask, unknown

    def _disliked(self, user_id: str | None) -> np.ndarray:
        """Rows that a user has seen and not liked; no answer holds them, whether items of the history may come back or not."""
        row = None if user_id is None else self._user_row.get(user_id)
        return _NO_ROWS if row is None else self._with_successors(self.export.disliked_of(row))

    def _listed(
        self, items: Sequence[str], weights: Sequence[float] | None
    ) -> tuple[np.ndarray, np.ndarray, list[str]]:
        """Return the rows of the known items, each once (the last mention counts), their weights, and the unknown ids."""
        weight_of: dict[int, float] = {}
        unknown = []
        for at, item_id in enumerate(items):
            row = self.catalog.row_of.get(item_id)
            if row is None:
                unknown.append(item_id)
                continue
            weight_of.pop(row, None)
            weight_of[row] = 1.0 if weights is None else weights[at]
        rows = np.fromiter(weight_of, np.int64, len(weight_of))
        times = np.fromiter(weight_of.values(), np.float32, len(weight_of))
        decay = self.export.manifest.history_decay
        if weights is None and decay is not None:
            times = np.exp(-np.arange(len(rows) - 1, -1, -1, dtype=np.float32) / np.float32(decay))
        return rows, times, unknown

    def _rows_of(self, ids: Sequence[str]) -> tuple[np.ndarray, list[str]]:
        found = [self.catalog.row_of.get(item_id) for item_id in ids]
        unknown = [item_id for item_id, row in zip(ids, found, strict=True) if row is None]
        return np.array([row for row in found if row is not None], np.int64), unknown

    def _with_successors(self, rows: np.ndarray) -> np.ndarray:
        """Return the rows of a history, and the rows that took the place of some of them."""
        moved = self.catalog.successor
        if not moved:
            return rows
        return np.concatenate([rows, np.array([moved[row] for row in rows.tolist() if row in moved], np.int64)])

    def _answer(
        self, request: Request, prepared: _Prepared, hits: Hits, chosen: Chosen | None = None
    ) -> Recommendation:
        catalog = self.catalog
        rows = hits.rows.tolist()
        length = max(len(prepared.query.source), 1)
        logits = self._probability.logit(hits.scores, math.log(length))
        probability = (0.5 + 0.5 * np.tanh(0.5 * logits)).tolist()  # a sigmoid that does not overflow
        if request.explain:
            items = tuple(self._explained(request.explain, prepared, hits, probability))
            items = items if chosen is None else chosen.told(items)
        else:
            scores = hits.scores.tolist()
            applied: Iterable[tuple[Applied, ...]] = repeat(())
            if chosen is not None:
                scores, applied = chosen.adjusted.tolist(), chosen.applied
            items = tuple(
                Recommended(catalog.ids[row], catalog.records[row].title, score, catalog.is_cold(row), p, rules=rules)
                for row, score, p, rules in zip(rows, scores, probability, applied, strict=False)
            )
        note = short_note(len(rows), request.k) if chosen is None else chosen.note
        return Recommendation(items, prepared.source, prepared.unknown, note)

    def _explained(
        self, limit: int, prepared: _Prepared, hits: Hits, probability: Sequence[float]
    ) -> Iterator[Recommended]:
        catalog = self.catalog
        bias = catalog.bias(hits.rows)
        if prepared.source == "text":  # one entry, the text itself
            at = np.zeros((len(hits.rows), 0), np.int64)
            added = np.zeros((len(hits.rows), 0))
        else:
            at, added = self._pooling.largest(prepared.query, catalog.vector(hits.rows), limit, hits.rows)
        order = self._pooling.of_order(prepared.query, catalog.vector(hits.rows))
        # only what speaks for an item is a reason for it
        counts = (added > 0).sum(1)
        rest = hits.scores - bias - np.where(added > 0, added, 0.0).sum(1) - (0.0 if order is None else order)
        orders: Iterator[float | None] = repeat(None) if order is None else iter(order.tolist())
        seen = prepared.rows[at] if at.size else at
        for row, score, p, b, rows, values, count, remainder in zip(
            hits.rows.tolist(), hits.scores.tolist(), probability, bias.tolist(), seen.tolist(), added.tolist(),
            counts.tolist(), rest.tolist(), strict=True,
        ):  # fmt: skip
            shares = alike(self.export.content, row, rows[:count], catalog.unpainted)
            reasons = tuple(
                Reason(catalog.ids[source], catalog.records[source].title, value, shared)
                for source, value, shared in zip(rows[:count], values[:count], shares, strict=True)
            )
            title = catalog.records[row].title
            yield Recommended(
                catalog.ids[row], title, score, catalog.is_cold(row), p, reasons, remainder, b, order=next(orders)
            )

    # ------------------------------------------------------------------ popularity, similarity

    def _popular(self, request: Request) -> Recommendation:
        """Rank items by number of training interactions; new items count 0."""
        if self._popularity is None:
            self._popularity = np.bincount(self.export.history_items, minlength=self.catalog.n_base).astype(np.float32)
        scores = np.zeros(len(self.catalog), np.float32)
        scores[: len(self._popularity)] = self._popularity
        hidden, mask, unknown = self._conditions(request)
        asked = request.items if request.item is None else [request.item]
        _, _, unlisted = self._listed(asked or (), None)
        subject = Subject(_NO_ROWS, np.zeros(0), None, subject_name(request.user, asked))
        return self._of_scores(request, scores, hidden, mask, "popular", (*unlisted, *unknown), subject)

    def _of_scores(
        self,
        request: Request,
        scores: np.ndarray,
        hidden: np.ndarray,
        mask: np.ndarray | None,
        source: str,
        unknown: Sequence[str],
        subject: Subject,
    ) -> Recommendation:
        """The best by one row of scores, and by rules; may change ``scores``."""
        chosen = None
        if request.rules.rerank:
            search = lambda n, hidden, allow: self._rank(scores.copy(), n, hidden, allow)  # noqa: E731
            chosen = reranked(request.rules, request.k, self.catalog, search, hidden, mask, subject)
            hits = Hits(chosen.rows, chosen.scores)
        else:
            hits = self._rank(scores, request.k, hidden, mask)
        items = tuple(
            Recommended(self.catalog.ids[row], self.catalog.records[row].title, score, self.catalog.is_cold(row))
            for row, score in zip(hits.rows.tolist(), hits.scores.tolist(), strict=True)
        )
        if chosen is None:
            return Recommendation(items, source, tuple(unknown), short_note(len(items), request.k))
        return Recommendation(chosen.told(items), source, tuple(unknown), chosen.note)

    def _rank(self, scores: np.ndarray, k: int, hidden: np.ndarray, mask: np.ndarray | None) -> Hits:
        """Rank one row of scores over the live catalogue; changes ``scores``."""
        for segment in self.catalog.segments():
            scores[segment.start : segment.start + len(segment.bias)][segment.bias == -np.inf] = -np.inf
        if mask is not None:
            scores[~mask] = -np.inf
        scores[hidden] = -np.inf
        rows = top_rows(scores, k)
        rows = rows[best(rows, scores[rows], k)]
        return Hits(rows, scores[rows].astype(np.float64))

    def similar(
        self,
        item_id: str,
        k: int = 10,
        filter: Mapping[str, Any] | None = None,
        by: str = "both",
        explain: int = 0,
        rules: Rules = NO_RULES,
    ) -> Recommendation:
        """Find items like one: by their content, then by what its buyers and those of its like bought.

        An export without content vectors compares target vectors by cosine, or source vectors where the manifest's
        ``similar_by`` says so.

        Args:
            item_id: a live item, or one that the model knows and does not rank; it is not in its own answer.
            k: how many.
            filter: attribute conditions.
            by: one of :data:`recbole_llm.retrieval.search.BY`.
            explain: reasons per item.
            rules: what else decides about the list; what a rule reads of a history it reads of the item.

        Raises:
            UnknownItemError: if there is no such item.
            ValueError: on conditions that do not fit the export's attributes, a boost by odds, or where ``by`` cannot be had.
        """
        return self.recommend(Request(item=item_id, k=k, filter=filter or {}, by=by, explain=explain, rules=rules))

    def _like(self, request: Request, item_id: str) -> Recommendation:
        try:
            row = self.catalog.shown(item_id)
        except UnknownItemError:
            if request.fallback == "popular":
                return self._popular(request)
            raise
        hidden, mask, unknown = self._conditions(request)
        if self.searches is not None:
            answer = self.searches.similar(row, request.k, hidden, mask, request.by, request.explain, request.rules)
            return replace(answer, unknown=tuple(unknown))
        if request.by != "both":
            raise ValueError(f"by is {request.by!r}, and this export holds no content vectors: export again.")
        subject = Subject(np.array([row]), np.ones(1), None, subject_name(None, [item_id]))
        return self._of_scores(
            request, self._cosines.of(row), np.append(hidden, row), mask, "similar", unknown, subject
        )

    # ------------------------------------------------------------------ texts

    def map_text(self, text_vector: np.ndarray) -> MappedItem:
        """Map the vector of a text, ``[F]`` float32, to vectors of an item.

        Raises:
            ValueError: if the export holds no text map, or the vector is not of its encoder.
        """
        vector, source, bias = self._text_map_of(text_vector[None])
        return MappedItem(vector[0], source[0], float(bias[0]), text_vector)

    def _text_map_of(self, text_vectors: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        if self.export.text_map is None:
            raise ValueError("This export maps no texts: its model has no encoder, or no map was fitted.")
        return self.export.text_map.apply(text_vectors)
