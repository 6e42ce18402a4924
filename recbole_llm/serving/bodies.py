"""Reading bodies within bounds of size, time and, all together, of memory.

Small bodies are free: the number of connections bounds them. Each byte of a large one is taken from one budget as it
arrives, and so is what it is parsed to. When the budget is used up, the body that has been arriving longest from the
address that holds most gives way: a client that holds its bodies back pays for it, and one that sends at once is served.
"""

import asyncio
import time
import types
from collections import Counter as Tally
from collections import deque
from collections.abc import AsyncIterator, Awaitable, Callable, Coroutine, Iterator, MutableMapping
from contextlib import asynccontextmanager, suppress
from contextvars import ContextVar
from functools import partial
from typing import Any, TypeVar

import numpy as np

from recbole_llm.serving.batching import DeadlineExceeded
from recbole_llm.serving.metrics import Metrics
from recbole_llm.serving.problem import Problem
from recbole_llm.serving.settings import Limits

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
X = TypeVar("X")

FREE_BYTES = 16 << 10  # of a body that the budget does not count: 16 MiB for a thousand connections
MAX_VALUES = (
    50_000  # of a body, numbers and strings: 8 ms to parse and as much to check, during which nobody is answered
)
COUNTED_AT_ONCE = 1 << 18
PARTS_A_TURN = 4  # parts of large bodies, up to 256 KiB each
DRAINED_BYTES = 64 << 20  # of a body that nobody wants, so that its client can read the answer
DRAIN_SECONDS = 2.0
VALUE_BYTES = 64  # that a parsed value takes, about
PARSED_AT_ONCE = 8  # large bodies of questions, each up to 3 MB of objects; twice as many as are answered at a time

# seconds that the question of this task has waited for its place
waited: ContextVar[float] = ContextVar("waited", default=0.0)


class Interrupted(Exception):  # noqa: N818
    """Work was ended by its :class:`Interruptible`; ``args[0]`` is the reason."""


class Interruptible:
    """Work of the calling task that a callback may end.

    A task of its own would cost a turn of the loop for every body.
    """

    def __init__(self) -> None:
        task = asyncio.current_task()
        assert task is not None
        self._task = task
        self._reason: Any = None

    def interrupt(self, reason: Any) -> None:
        """End the work with :class:`Interrupted`; only while it runs."""
        if self._reason is None:
            self._reason = reason
            self._task.cancel()

    async def run(self, work: Awaitable[X]) -> X:
        """Do the work.

        Raises:
            Interrupted: if :meth:`interrupt` was called.
        """
        try:
            return await work
        except asyncio.CancelledError:
            if self._reason is None:
                raise
            if hasattr(self._task, "uncancel"):  # Python 3.11
                self._task.uncancel()
            raise Interrupted(self._reason) from None


async def in_time(work: Coroutine[Any, Any, X], seconds: float) -> X:
    """Do what ``asyncio.wait_for`` does, in the calling task.

    Raises:
        Interrupted: if the work takes longer.
    """
    running = Interruptible()
    timer = asyncio.get_running_loop().call_later(seconds, running.interrupt, "late")
    try:
        return await running.run(work)
    finally:
        timer.cancel()


class Incoming:
    """The parts of a body on their way in.

    Args:
        receive: of the request.

    Attributes:
        over: whether the last part was read.
    """

    def __init__(self, receive: Receive) -> None:
        self._receive = receive
        self._here: Message | None = None
        self._begun: Any = None
        self.over = False

    def whole(self, limit: int) -> bytes | None:
        """Return the body without waiting, if all of it has arrived in one part of at most ``limit`` bytes.

        A deadline and what belongs to it cost as much as all else that is done before a request is answered.
        """
        work: Any = self._receive()
        try:
            self._begun = _resumed(work, work.send(None))
            return None
        except StopIteration as done:
            message = done.value
        if message["type"] == "http.request" and not message.get("more_body"):
            content: bytes = message.get("body", b"")
            if len(content) <= limit:
                self.over = True
                return content
        self._here = message
        return None

    async def next(self) -> Message:
        """Receive the next part."""
        here, self._here = self._here, None
        begun, self._begun = self._begun, None
        message: Message = here or await (begun or self._receive())
        self.over = not message.get("more_body")
        return message


@types.coroutine
def _resumed(work: Any, awaited: Any) -> Iterator[Any]:
    """Continue a coroutine that waits for something."""
    while True:
        try:
            sent = yield awaited
        except BaseException as error:
            step = partial(work.throw, error)
        else:
            step = partial(work.send, sent)
        try:
            awaited = step()
        except StopIteration as done:
            return done.value


class Body:
    """A body, as far as it has arrived; ``content`` is whole after :meth:`Bodies.read`."""

    __slots__ = ("address", "content", "held", "running")

    def __init__(self, address: str) -> None:
        self.address, self.content, self.held = address, b"", 0
        self.running: Interruptible | None = None


class Bodies:
    """The bodies of one process.

    Args:
        limits: bounds.
        metrics: to count refusals in.
    """

    def __init__(self, limits: Limits, metrics: Metrics) -> None:
        self.limits, self.metrics = limits, metrics
        self.held = 0  # bytes of the budget that are taken
        self._arriving: dict[Body, None] = {}  # those that hold some of it, in the order of their first large part
        self._one_a_turn = asyncio.Lock()
        self._places = asyncio.Semaphore(PARSED_AT_ONCE)
        self._parts_left = PARTS_A_TURN
        self._paced: deque[asyncio.Future[None]] = deque()

    @asynccontextmanager
    async def turn(self, content: bytes) -> AsyncIterator[None]:
        """Wait for a turn of the loop in which no other long body is worked on: others have their share in between."""
        if len(content) <= FREE_BYTES:
            yield
            return
        async with self._one_a_turn:
            try:
                yield
            finally:
                await asyncio.sleep(0)

    @asynccontextmanager
    async def place(self) -> AsyncIterator[None]:
        """Wait for a place among the large bodies that are parsed, and hold it until the question is answered.

        A body in bytes takes a tenth of what its values take as objects. What the interpreter once took for small objects
        it gives back only where a whole megabyte is free.

        Raises:
            DeadlineExceeded: if no place is free in time.
        """
        began = time.monotonic()
        try:
            await in_time(self._places.acquire(), self.limits.batch_seconds)
        except Interrupted:
            raise DeadlineExceeded from None
        before = waited.set(time.monotonic() - began)
        try:
            yield
        finally:
            waited.reset(before)
            self._places.release()

    async def _pace(self) -> None:
        """Wait until another part of a large body may be read.

        Hundreds of them in one turn of the loop would take longer than everything else in it, and a turn lets one new
        connection in.
        """
        if self._parts_left == PARTS_A_TURN:
            asyncio.get_running_loop().call_soon(self._next_turn)
        if self._parts_left:
            self._parts_left -= 1
            return
        place: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._paced.append(place)
        await place

    def _next_turn(self) -> None:
        self._parts_left = PARTS_A_TURN
        while self._paced and self._parts_left:
            place = self._paced.popleft()
            if not place.done():
                place.set_result(None)
                self._parts_left -= 1
        if self._parts_left < PARTS_A_TURN:
            asyncio.get_running_loop().call_soon(self._next_turn)

    async def drain(self, receive: Receive) -> None:
        """Read and forget what a client still sends, so that it can read its answer before the connection ends."""
        with suppress(Interrupted):
            await in_time(self._forget(receive), DRAIN_SECONDS)

    async def _forget(self, receive: Receive) -> None:
        left = DRAINED_BYTES
        while left > 0:
            await self._pace()
            message = await receive()
            if message["type"] != "http.request" or not message.get("more_body"):
                return
            left -= len(message.get("body", b""))

    async def read(self, address: str, incoming: Incoming, limit: int, parsed: bool = True) -> Body:
        """Read a whole body. Call :meth:`release` when its request is done.

        Args:
            address: of the peer, as :class:`Connections` counts it.
            incoming: of the request.
            limit: most bytes.
            parsed: whether it holds values that are parsed, and counted before.

        Raises:
            Problem: 408, 413 or 503; nothing is held then.
        """
        body = Body(address)
        content = incoming.whole(min(FREE_BYTES, limit))
        if content is not None:  # as nearly always: there is nothing to watch over
            body.content = content
            return body
        try:
            body.content = await self._in_time(body, incoming.next, limit)
            if body.held and parsed:
                async with self.turn(body.content):
                    values = check_values(body.content)
                self._take(body, VALUE_BYTES * values)
        except BaseException:
            self.release(body)
            raise
        return body

    async def _in_time(self, body: Body, receive: Receive, limit: int) -> bytes:
        body.running = Interruptible()
        seconds = self.limits.body_seconds
        timer = asyncio.get_running_loop().call_later(seconds, body.running.interrupt, "slow")
        try:
            return await body.running.run(self._collect(body, receive, limit))
        except Interrupted as interrupted:
            reason = interrupted.args[0]
            self.metrics.rejected.add(reason=reason)
            late = reason == "slow"
            problem = Problem(408, f"The body did not arrive within {seconds:g} seconds.") if late else _full()
            raise problem from None
        finally:
            timer.cancel()
            self._arriving.pop(body, None)
            body.running = None

    def release(self, body: Body) -> None:
        """Give back what the body held."""
        self.held -= body.held
        body.held, body.content = 0, b""

    async def _collect(self, body: Body, receive: Receive, limit: int) -> bytes:
        parts: list[bytes] = []
        message: Message = {}
        size = 0
        try:
            while True:
                message = await receive()
                if message["type"] != "http.request":
                    raise Problem(400, "The client closed the connection.")
                parts.append(message.get("body", b""))
                size += len(parts[-1])
                if size > limit:
                    self.metrics.rejected.add(reason="size")
                    raise Problem(413, f"The body is larger than {limit} bytes.")
                if size > FREE_BYTES:
                    self._take(body, size - body.held)
                if not message.get("more_body"):
                    return parts[0] if len(parts) == 1 else b"".join(parts)
                if size > FREE_BYTES:
                    await self._pace()
        finally:
            parts.clear()  # an error holds this frame, and what it names, until its answer is sent
            message = {}

    def _take(self, body: Body, n_bytes: int) -> None:
        while self.held + n_bytes > self.limits.bodies_bytes:
            if not self._make_room(body):
                self.metrics.rejected.add(reason="bodies")
                raise _full()
        self.held += n_bytes
        body.held += n_bytes
        if body.running is not None:
            self._arriving[body] = None

    def _make_room(self, taker: Body) -> bool:
        """Interrupt a body that arrives, other than the taker's own; return whether there was one."""
        total: Tally[str] = Tally()
        for body in self._arriving:
            total[body.address] += body.held
        if not total:
            return False
        most = max(total, key=total.__getitem__)
        victim = next(body for body in self._arriving if body.address == most)
        if victim is taker or victim.running is None:
            return False
        self._arriving.pop(victim)
        victim.running.interrupt("bodies")
        self.held -= victim.held  # its parts are gone with the next turn of the loop
        victim.held = 0
        return True


def _full() -> Problem:
    return Problem(503, "Too many large bodies are arriving; try again.", retry_after=1)


def check_values(content: bytes) -> int:
    """Count the values of a body before it is parsed: the parser lets nobody else run.

    Returns:
        At least their number, at most ``MAX_VALUES``.

    Raises:
        Problem: 413 for more.
    """
    commas = _count(content, b",", MAX_VALUES)
    if commas < MAX_VALUES:
        return commas + 1
    # commas within strings are none between values
    quotes = _count(content, b'"', 4 * MAX_VALUES)
    if quotes < 2 or quotes >= 4 * MAX_VALUES or _commas_between(content) >= MAX_VALUES:
        raise Problem(413, f"The body holds more than {MAX_VALUES} values; send it in parts.")
    return MAX_VALUES


def _count(content: bytes, character: bytes, enough: int) -> int:
    """Count a byte until there are ``enough``; ``bytes.count`` is slow for a frequent byte."""
    found, array = 0, np.frombuffer(content, np.uint8)
    for at in range(0, len(array), COUNTED_AT_ONCE):
        found += int(np.count_nonzero(array[at : at + COUNTED_AT_ONCE] == character[0]))
        if found >= enough:
            break
    return found


def _commas_between(content: bytes) -> int:
    """Count the commas outside of strings."""
    plain = content.replace(b"\\\\", b"").replace(b'\\"', b"")
    return sum(part.count(b",") for part in plain.split(b'"')[::2])
