"""Questions to the recommender: what each costs, and in which order they are answered.

The loop answers small questions itself, in batches; a thread answers the others. A question's cost is known before any
work is done. What costs much is answered in pieces, each in turn with a batch of the others and turned into JSON on the
thread, so that the loop never waits for one and nobody waits for more than one.
"""

import asyncio
import time
from collections.abc import AsyncIterator, Callable, Iterator, Sequence
from contextlib import asynccontextmanager
from dataclasses import dataclass
from functools import partial
from typing import Any, NamedTuple

from recbole_llm.retrieval.boosts import MAX_PARTS
from recbole_llm.retrieval.recommender import Recommendation, Recommender, Request
from recbole_llm.serving.batching import Batcher, DeadlineExceeded
from recbole_llm.serving.bodies import waited
from recbole_llm.serving.metrics import Metrics
from recbole_llm.serving.settings import Limits

INLINE_PRODUCTS = 50_000_000  # 2 ms of a core, 32 requests to 10,000 items of 128 dimensions: the loop waits no longer
SEARCH_PRODUCTS = 25_000_000  # as long as a search takes beside its products
INLINE_ENTRIES = 1_000  # items and reasons of answers, 2 ms of Python
MAX_COST = 5_000  # microseconds of a batch beside its scores
RENDERED_AT_ONCE = 4  # large answers that are made, each up to 5 MB
# microseconds, measured on one core of an EPYC
ITEM_COST, REASON_COST = 2, 1
IDS_PER_COST = 5
EXPLAINED_PER_COST = 8_000  # (dimensions + 128) x items x entries of the history
FIND_ROWS_PER_COST = 6
PRODUCTS_PER_COST = INLINE_PRODUCTS // 2_000
COMPARED_PER_COST = 6_000  # dimensions of pairs that diversity compares
CALIBRATED_WIDTH = 500  # of a pair: what its logarithms cost
CHOICE_COST, CAP_COST, BOOST_COST = 15, 2, 1  # a place that diversity fills; a candidate that a cap or boosts look at
# one boost, by odds; one of the parts that boosts divide the catalogue into
ONE_BOOST_COST, ODDS_COST, PART_COST = 85, 60, 45
ROWS_PER_BOOST_COST, ROWS_PER_PART_COST = 400, 150
CANDIDATES = 4  # of them for every place, about
SEED_COST = 100
ROWS_PER_COST = 1_000  # of masks

Job = Request | Callable[[Recommender], Any]


@dataclass(frozen=True)
class Versioned:
    """An answer with the state it was made from.

    Attributes:
        value: the answer.
        model: ``export_id``.
        overlay_seq: last change applied.
    """

    value: Any
    model: str
    overlay_seq: int


class Rendered(NamedTuple):
    """A recommendation as JSON, with what the metrics count of it."""

    content: bytes
    ids: tuple[str, ...]
    cold: int
    unknown: int


class Reader:
    """Asks a recommender, for one event loop.

    Args:
        limits: bounds.
        metrics: to count in.
        recommender: the current one; its catalogue is changed by ``batcher.call`` only.
        inline: whether small questions may be answered on the loop: the retriever asks no server.
    """

    def __init__(
        self, limits: Limits, metrics: Metrics, recommender: Callable[[], Recommender], inline: bool = True
    ) -> None:
        self.limits, self.metrics = limits, metrics
        self._recommender = recommender
        self.batcher: Batcher[Job, Versioned] = Batcher(
            self._score,
            max_batch=limits.max_batch,
            max_queue=limits.queue,
            max_cost=MAX_COST,
            inline=self._is_small if inline else lambda jobs: False,
            observe=metrics.batch,
            name="scorer",
        )
        self._rendering = asyncio.Semaphore(RENDERED_AT_ONCE)

    def _score(self, jobs: list[Any]) -> list[Any]:
        """Answer a batch with one recommender."""
        recommender = self._recommender()
        model, seq = recommender.export.manifest.export_id, recommender.overlay_seq
        requests = [job for job in jobs if isinstance(job, Request)]
        answers = iter(recommender.recommend_many(requests)) if requests else iter(())
        results: list[Any] = []
        for job in jobs:
            try:
                value = next(answers) if isinstance(job, Request) else job(recommender)
            except (LookupError, ValueError) as error:
                value = error
            results.append(value if isinstance(value, Exception) else Versioned(value, model, seq))
        return results

    def _is_small(self, jobs: list[Any]) -> bool:
        if not all(type(job) is Request for job in jobs):
            return False
        recommender = self._recommender()
        searches = recommender.searches
        products = 0
        for job in jobs:
            asked = recommender.picture_searches if job.picture_vector is not None else searches
            is_search = job.text_vector is not None or job.picture_vector is not None or job.item is not None
            if is_search and asked is not None:
                products += len(recommender.catalog) * asked.width + SEARCH_PRODUCTS
            else:
                products += len(recommender.catalog) * recommender.export.manifest.dim
        return (
            products <= INLINE_PRODUCTS
            and sum(job.k * (1 + job.explain) for job in jobs) <= INLINE_ENTRIES
            and sum(self._cost_of_rules(job) for job in jobs if job.rules.rerank) <= ITEM_COST * INLINE_ENTRIES
        )

    def _cost_of_rules(self, request: Request) -> int:
        """Microseconds that rules take, further passes over the catalogue included."""
        rules, k, recommender = request.rules, request.k, self._recommender()
        catalog, pool = recommender.catalog, 0
        manifest = catalog.export.manifest
        cost = rules.scans() * (len(catalog) * manifest.dim // PRODUCTS_PER_COST + len(catalog) // ROWS_PER_COST)
        if rules.diversity is not None:
            pool = rules.diversity.pool(k)
            width = sum(table.shape[1] for table in catalog.export.content.values()) or manifest.dim
            if rules.diversity.attribute is not None:
                width = CALIBRATED_WIDTH
                cost += recommender.history_length(request)
            cost += k * CHOICE_COST + rules.comparisons(k) * width // COMPARED_PER_COST
        if rules.boosts:
            by_odds = sum(boost.odds is not None for boost in rules.boosts)
            parts = min(2 ** len(rules.boosts), MAX_PARTS)
            cost += len(rules.boosts) * (k + ONE_BOOST_COST + len(catalog) // ROWS_PER_BOOST_COST) + by_odds * ODDS_COST
            cost += parts * (PART_COST + len(catalog) // ROWS_PER_PART_COST)
        cost += (CANDIDATES * k + pool) * (CAP_COST * len(rules.caps) + BOOST_COST * bool(rules.boosts))
        return cost + (SEED_COST if rules.explore is not None else 0)

    def cost_of(self, request: Request) -> int:
        """Estimate the microseconds that an answer takes beside its scores, without doing any work."""
        cost = request.k * (ITEM_COST + REASON_COST * request.explain)
        if request.exclude:
            cost += len(request.exclude) // IDS_PER_COST
        if request.items is not None:
            cost += len(request.items) // IDS_PER_COST
        if request.filter:
            cost += sum(len(wanted) if isinstance(wanted, list) else 1 for wanted in request.filter.values())
        if request.rules.only is not None:
            cost += len(request.rules.only) // IDS_PER_COST
        if request.rules.rerank:
            cost += self._cost_of_rules(request)
            cost += sum(len(w) if isinstance(w, list) else 1 for b in request.rules.boosts for w in b.filter.values())
        if request.explain:
            recommender = self._recommender()
            width = recommender.export.manifest.dim + 128
            cost += request.k * recommender.history_length(request) * width // EXPLAINED_PER_COST
        return cost

    # ------------------------------------------------------------------ asking

    async def recommend(self, request: Request, cost: int | None = None) -> Versioned:
        """Answer a request; ``value`` is a :class:`Recommendation`.

        Args:
            request: one whose cost is above ``MAX_COST`` is better answered by :meth:`render`.
            cost: of :meth:`cost_of`, where it is known already.

        Raises:
            UnknownUserError, UnknownItemError, ValueError: as :meth:`Recommender.recommend`.
            QueueFull, DeadlineExceeded: as :meth:`Batcher.submit`.
        """
        if cost is None:
            cost = self.cost_of(request)
        answer = await self.batcher.submit(request, self.limits.request_seconds, cost)
        self._count(answer.value)
        return answer

    async def ask(self, job: Callable[[Recommender], Any], cost: int = 0) -> Versioned:
        """Answer anything else that reads the catalogue, such as ``lambda r: r.similar("50")``.

        Errors are those of :meth:`recommend`.

        Args:
            job: the question.
            cost: microseconds that it takes, about.
        """
        answer = await self.batcher.submit(job, self.limits.request_seconds, cost)
        if isinstance(answer.value, Recommendation):
            self._count(answer.value)
        return answer

    async def after_write(self, job: Callable[[Recommender], Any]) -> Versioned:
        """Ask what a change has come to; never refused and never late, for the change is made."""
        (answer,) = await self.batcher.call(lambda: self._score([job]))
        if isinstance(answer, Exception):
            raise answer
        versioned: Versioned = answer
        return versioned

    async def find(self, text: str, limit: int) -> Versioned:
        """Find items by their title; every title is looked at."""
        cost = len(self._recommender().catalog) // FIND_ROWS_PER_COST
        return await self.ask(lambda recommender: recommender.catalog.find(text, limit), cost)

    async def render(
        self, requests: Sequence[Request], render: Callable[[Recommendation], bytes], seconds: float
    ) -> Versioned:
        """Answer several requests from one state, in pieces that leave room for others.

        Args:
            requests: any number.
            render: makes JSON of an answer, on the thread.
            seconds: until all of them must be answered, less what their body has waited for its place; no piece is begun later.

        Returns:
            A list with JSON or an error for each.

        Raises:
            QueueFull: as :meth:`Batcher.submit`.
            DeadlineExceeded: if time is up.
        """
        deadline = time.monotonic() + seconds - waited.get()
        costs = [self.cost_of(request) for request in requests]
        total = sum(costs)
        async with self._turn(deadline):
            while True:
                answers: list[Any] = []
                states = []
                for piece in self._pieces(requests, costs):
                    left = deadline - time.monotonic()
                    if left <= 0:
                        raise DeadlineExceeded
                    part = await self.batcher.submit(partial(_render_all, piece, render), left, total)
                    for answer in part.value:
                        if isinstance(answer, Rendered):
                            self.metrics.answer(answer.ids, answer.cold)
                            self.metrics.unknown_ids.add(answer.unknown)
                            answers.append(answer.content)
                        else:
                            answers.append(answer)
                    states.append(part)
                if all(state.model == states[0].model for state in states):  # else an export was swapped in between
                    return Versioned(answers, states[-1].model, states[-1].overlay_seq)

    @asynccontextmanager
    async def _turn(self, deadline: float) -> AsyncIterator[None]:
        """Wait until few enough large answers are being made: each is held in memory until it is whole."""
        try:
            await asyncio.wait_for(self._rendering.acquire(), max(deadline - time.monotonic(), 0))
        except asyncio.TimeoutError:
            raise DeadlineExceeded from None
        try:
            yield
        finally:
            self._rendering.release()

    def _pieces(self, requests: Sequence[Request], costs: Sequence[int]) -> Iterator[list[Request]]:
        piece: list[Request] = []
        cost = 0
        for request, its in zip(requests, costs, strict=True):
            if piece and (len(piece) >= self.limits.max_batch or cost + its > MAX_COST):
                yield piece
                piece, cost = [], 0
            piece.append(request)
            cost += its
        yield piece  # an empty one too: it says which state answered

    def _count(self, answer: Recommendation) -> None:
        self.metrics.answer(tuple(item.id for item in answer.items), sum(item.cold for item in answer.items))
        if answer.unknown:
            self.metrics.unknown_ids.add(len(answer.unknown))


def _render_all(
    requests: list[Request], render: Callable[[Recommendation], bytes], recommender: Recommender
) -> list[Rendered | Exception]:
    return [
        answer
        if isinstance(answer, Exception)
        else Rendered(
            render(answer),
            tuple(item.id for item in answer.items),
            sum(item.cold for item in answer.items),
            len(answer.unknown),
        )
        for answer in recommender.recommend_many(requests)
    ]
