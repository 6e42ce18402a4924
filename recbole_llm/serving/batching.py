"""Batches without a timer: whatever waits when the worker is free is the next batch.

A lone request is served at once; under load batches grow by themselves. Results, errors and deadlines are per entry: one
bad entry, or a fault of the whole batch, leaves no caller waiting. Entries of high cost wait in a queue of their own and
run one at a time, in turn with batches of the others: they never stand before more than one of them.
"""

import asyncio
import math
import time
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from typing import Any, Generic, TypeVar

T = TypeVar("T")
R = TypeVar("R")
X = TypeVar("X")


class QueueFull(Exception):  # noqa: N818
    """More waits already than the worker gets done within a deadline."""


class DeadlineExceeded(Exception):  # noqa: N818
    """The answer did not come in time."""


class _Entry:
    __slots__ = ("cost", "expires", "future", "item", "since")

    def __init__(self, item: Any, future: "asyncio.Future[Any]", since: float, expires: float, cost: int) -> None:
        self.item, self.future, self.since, self.expires, self.cost = item, future, since, expires, cost


class _Call:
    __slots__ = ("function", "future")

    def __init__(self, function: Callable[[], Any], future: "asyncio.Future[Any]") -> None:
        self.function, self.future = function, future


class Batcher(Generic[T, R]):
    """Runs a function over batches on one thread of its own.

    Args:
        run: items to results, as many; a result that is an exception is raised to its caller.
        max_batch: most items of one batch.
        max_queue: most entries that wait.
        max_cost: most cost of one batch; an entry of a higher cost runs alone, in turn with batches of the others.
        inline: whether a batch is so small a work that it is done on the loop itself, at the end of the loop's turn: handing
            it to the thread and back costs a tenth of a millisecond. Never while the thread is at work.
        observe: called with (batch size, seconds waited by each entry) before each batch.
        name: of the thread.
    """

    def __init__(
        self,
        run: Callable[[list[T]], Sequence[R | BaseException]],
        *,
        max_batch: int = 64,
        max_queue: int = 256,
        max_cost: int = 1 << 62,
        inline: Callable[[list[T]], bool] | None = None,
        observe: Callable[[int, list[float]], None] | None = None,
        name: str = "batcher",
    ) -> None:
        self._run, self._observe, self._inline = run, observe, inline
        self.max_batch, self.max_queue, self.max_cost = max_batch, max_queue, max_cost
        self._pending: deque[_Entry | _Call] = deque()
        self._costly: deque[_Entry] = deque()
        self._running: list[_Entry] = []
        self._busy = self._kicked = False
        self._costly_next = False
        self._closed = False
        self._sweeper: asyncio.TimerHandle | None = None
        self._sweep_at = math.inf
        self._thread = ThreadPoolExecutor(1, thread_name_prefix=name)

    @property
    def waiting(self) -> int:
        """Entries that wait."""
        return len(self._pending) + len(self._costly)

    async def submit(self, item: T, seconds: float, cost: int = 0) -> R:
        """Wait for the result of one item.

        Args:
            item: what ``run`` takes.
            seconds: until the deadline; an entry that is late is not computed.
            cost: in the unit of ``max_cost``.

        Raises:
            QueueFull: at once, if ``max_queue`` entries of its kind wait.
            DeadlineExceeded: if the deadline passes.
        """
        queue: deque[Any] = self._pending if cost <= self.max_cost else self._costly
        if len(queue) >= self.max_queue or self._closed:
            raise QueueFull
        now = time.monotonic()
        entry = _Entry(item, asyncio.get_running_loop().create_future(), now, now + seconds, cost)
        queue.append(entry)
        if self._inline is None:
            self._kick()
        elif not self._kicked:  # what else comes in this turn of the loop is of the same batch
            self._kicked = True
            asyncio.get_running_loop().call_soon(self._kick)
        if not entry.future.done() and entry.expires < self._sweep_at:
            self._sweep()
        return await entry.future

    async def call(self, function: Callable[[], X]) -> X:
        """Run ``function`` on the worker's thread, alone, after what waits already; never refused.

        What waits at a high cost may come after it.
        """
        call = _Call(function, asyncio.get_running_loop().create_future())
        self._pending.append(call)
        self._kick()
        return await call.future

    def _kick(self) -> None:
        self._kicked = False
        if self._busy or self._closed:
            return
        now = time.monotonic()
        costly = self._next_costly(now) if self._costly_next or not self._pending else None
        self._costly_next = costly is None
        if costly is not None:
            self._begin([costly], now, alone=True)
            return
        batch: list[_Entry] = []
        cost = 0
        while self._pending and len(batch) < self.max_batch:
            head = self._pending[0]
            if isinstance(head, _Call):
                if not batch:
                    self._pending.popleft()
                    self._start(head.function, partial(_settle, head.future))
                    return
                break
            if batch and cost + head.cost > self.max_cost:
                break
            self._pending.popleft()
            if _is_wanted(head, now):
                batch.append(head)
                cost += head.cost
        if batch:
            self._begin(batch, now)
        elif self._costly:  # all that waited beside it was late
            self._kick()

    def _next_costly(self, now: float) -> _Entry | None:
        while self._costly:
            entry = self._costly.popleft()
            if _is_wanted(entry, now):
                return entry
        return None

    def _begin(self, batch: list[_Entry], now: float, alone: bool = False) -> None:
        if self._observe is not None:
            self._observe(len(batch), [now - entry.since for entry in batch])
        self._running = batch
        items = [entry.item for entry in batch]
        if alone or self._inline is None or not self._inline(items):
            self._start(partial(self._run, items), self._finish)
            return
        try:
            results: Any = self._run(items)
        except Exception as error:
            results = error
        self._finish(results)
        if (self._pending or self._costly) and not self._kicked:
            self._kicked = True
            asyncio.get_running_loop().call_soon(self._kick)

    def _start(self, function: Callable[[], Any], finish: Callable[[Any], None]) -> None:
        loop = asyncio.get_running_loop()
        self._busy = True

        def work() -> None:
            try:
                result = function()
            except BaseException as error:  # the thread must live, and the callers must hear of it
                result = error
            loop.call_soon_threadsafe(done, result)

        def done(result: Any) -> None:
            self._busy = False
            try:
                finish(result)
            finally:
                self._kick()

        self._thread.submit(work)

    def _finish(self, results: Any) -> None:
        batch, self._running = self._running, []
        if not isinstance(results, BaseException) and len(results) != len(batch):
            results = RuntimeError(f"{len(results)} results for a batch of {len(batch)}")
        if isinstance(results, BaseException):
            results = [results] * len(batch)
        for entry, result in zip(batch, results, strict=True):
            _settle(entry.future, result)

    def _sweep(self) -> None:
        """Tell late callers so, though the worker may be stuck in a batch."""
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._sweeper, self._sweep_at = None, math.inf
        now = time.monotonic()
        nearest = None
        for entry in (*self._running, *self._pending, *self._costly):
            if isinstance(entry, _Call) or entry.future.done():
                continue
            if entry.expires <= now:
                entry.future.set_exception(DeadlineExceeded())
            else:
                nearest = entry.expires if nearest is None else min(nearest, entry.expires)
        if nearest is not None:
            # not for every entry: deadlines are kept to 50 ms
            self._sweep_at = max(nearest, now + 0.05)
            self._sweeper = asyncio.get_running_loop().call_later(self._sweep_at - now, self._sweep)

    def close(self) -> None:
        """Refuse new entries and those that wait, and let the thread end after what it is doing."""
        self._closed = True
        for queue in (self._pending, self._costly):
            while queue:
                _settle(queue.popleft().future, QueueFull())
        if self._sweeper is not None:
            self._sweeper.cancel()
        self._thread.shutdown(wait=False, cancel_futures=True)


def _is_wanted(entry: _Entry, now: float) -> bool:
    """Whether somebody still waits for the entry; tells its caller so if it is late."""
    if entry.future.done():
        return False
    if entry.expires <= now:
        entry.future.set_exception(DeadlineExceeded())
        return False
    return True


def _settle(future: "asyncio.Future[Any]", result: Any) -> None:
    if future.done():
        return
    if isinstance(result, BaseException):
        future.set_exception(result if isinstance(result, Exception) else RuntimeError(repr(result)))
    else:
        future.set_result(result)
