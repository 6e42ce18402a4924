"""uvicorn's protocols under the rules of ``connections.py``."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Sequence
from contextlib import suppress
from functools import partial
from socket import SO_SNDBUF, SOL_SOCKET
from typing import TYPE_CHECKING, Any

from uvicorn.protocols.http.h11_impl import H11Protocol

from recbole_llm.serving.connections import HEALTH_PATHS, STATE_KEY, Connections, peer_of
from recbole_llm.serving.problem import MEDIA_TYPE, TITLES, Problem

MAX_HEAD_BYTES = 64 << 10
MAX_HEADERS = 200
SEND_BUFFER_BYTES = 256 << 10
CHUNK_OVERHEAD = 8  # raw bytes for a byte of a body; a chunk of one byte has six

App = Callable[[Any, Any, Any], Awaitable[None]]


def answer_bytes(problem: Problem) -> bytes:
    """Write a whole HTTP answer, after which the connection ends."""
    body = problem.body()
    head = (
        f"HTTP/1.1 {problem.status} {TITLES[problem.status]}\r\ncontent-type: {MEDIA_TYPE}\r\n"
        f"content-length: {len(body)}\r\nconnection: close\r\n\r\n"
    )
    return head.encode() + body


async def _health_only(app: App, scope: Any, receive: Any, send: Any) -> None:
    """Answer a connection beyond the limits, which may ask for /health alone."""

    async def send_and_close(message: Any) -> None:
        if message["type"] == "http.response.start":
            message["headers"] = [*message.get("headers", ()), (b"connection", b"close")]
        await send(message)

    if scope["path"] in HEALTH_PATHS:
        await app(scope, receive, send_and_close)
        return
    problem = Problem(503, "Too many connections; try again.", retry_after=1)
    body = problem.body()
    headers = {"content-type": MEDIA_TYPE, "content-length": str(len(body)), **problem.headers()}
    pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
    await send_and_close({"type": "http.response.start", "status": problem.status, "headers": pairs})
    await send_and_close({"type": "http.response.body", "body": body})


if TYPE_CHECKING:  # imported and not assigned, so that types are checked where uvicorn is not installed too
    from uvicorn.protocols.http.h11_impl import H11Protocol as Base
else:
    Base = object


class Guarded(Base):
    """uvicorn's protocol under the rules of :class:`Connections`; mixed in before the protocol.

    Attributes:
        peer: of :func:`peer_of`.
        head_since: when the head that has not arrived yet was begun; ``None`` if none is awaited.
        stalled_since: since when an answer waits for its client.
    """

    app: Any
    _connections: Connections | None = None
    peer = ""
    head_since: float | None = None
    stalled_since: float | None = None
    _received = 0  # since the last head

    def connection_made(self, transport: Any) -> None:
        """Find a place for the connection."""
        super().connection_made(transport)
        connections: Connections | None = self.app_state.get(STATE_KEY)
        if connections is None:
            return
        self.peer = peer_of(self.client[0]) if self.client else ""
        place = connections.add(self)
        if place == "refused":
            transport.abort()
            return
        self._connections = connections
        self.head_since = time.monotonic()
        sock = transport.get_extra_info("socket")
        if sock is not None:  # else the system would hold megabytes of an answer that nobody takes, out of our sight
            with suppress(OSError):
                sock.setsockopt(SOL_SOCKET, SO_SNDBUF, SEND_BUFFER_BYTES)
        if place == "health":
            self.app = partial(_health_only, self.app)

    def connection_lost(self, exc: Exception | None) -> None:
        """Give the place back."""
        if self._connections is not None:
            self._connections.remove(self)
            self._connections = None
        super().connection_lost(exc)

    def data_received(self, data: bytes) -> None:
        """Note whether a head came to its end."""
        cycle: Any = self.cycle
        super().data_received(data)
        if self.cycle is not cycle:
            if cycle is None and self._connections is not None:
                self._connections.greeted(self)
            self.head_since = self.stalled_since = None
            self._received = 0
            if len(self.headers) > MAX_HEADERS:
                self._refuse(Problem(431, f"The request has more than {MAX_HEADERS} headers."))
            return
        self._received += len(data)
        if cycle is None or cycle.response_complete:
            if self.head_since is None:
                self.head_since = time.monotonic()
            if self._received > MAX_HEAD_BYTES:
                self._refuse(Problem(431, f"The head of the request is larger than {MAX_HEAD_BYTES} bytes."))
        elif len(self.headers) > MAX_HEADERS or self._is_endless():
            self.transport.abort()

    def _is_endless(self) -> bool:
        """Return whether the bytes beside the body have no bound: sizes of chunks, a trailer."""
        return False  # h11 bounds it

    def send_400_response(self, msg: str) -> None:
        """Refuse what cannot be read; a request whose body it was part of is told, so that it says nothing after that."""
        cycle: Any = self.cycle
        if cycle is not None and not cycle.response_complete:
            cycle.disconnected = True
            cycle.message_event.set()
            if cycle.response_started:  # in the middle of an answer nothing else can be said
                self.transport.close()
                return
        super().send_400_response(msg)

    def on_response_complete(self) -> None:
        """Count anew from here."""
        self._received = 0
        super().on_response_complete()

    def is_idle(self) -> bool:
        """Return whether nobody waits for an answer here, and no answer is on its way."""
        cycle: Any = self.cycle
        return (cycle is None or cycle.response_complete) and not self.transport.get_write_buffer_size()

    def late(self) -> None:
        """End a connection whose head did not come."""
        if self._received:
            self._refuse(Problem(408, "The head of the request did not arrive in time."))
        else:  # an answer to nothing would be taken for that to the next request
            self.head_since = None
            self.transport.close()

    def _refuse(self, problem: Problem) -> None:
        self.head_since = None
        if not self.transport.is_closing():
            cycle: Any = self.cycle
            if cycle is None or not cycle.response_started or cycle.response_complete:
                self.transport.write(answer_bytes(problem))
            if cycle is not None and not cycle.response_complete:  # nobody reads what the application says now
                cycle.disconnected = True
                cycle.message_event.set()
            self.transport.close()


class GuardedH11(Guarded, H11Protocol):
    """uvicorn's protocol in Python."""


try:
    from uvicorn.protocols.http.httptools_impl import HttpToolsProtocol
except ModuleNotFoundError:  # no httptools: Windows
    ServeProtocol: type[asyncio.Protocol] = GuardedH11
else:

    class GuardedHttpTools(Guarded, HttpToolsProtocol):  # type: ignore[misc]
        """uvicorn's protocol on httptools."""

        _body = 0  # bytes of it since the last head
        _earlier: Sequence[Any] = ()  # requests before the last one, on the same connection

        def on_headers_complete(self) -> None:
            """Count anew from here, and remember a request that is still being answered: uvicorn forgets it."""
            cycle: Any = self.cycle
            self._body = 0
            super().on_headers_complete()
            if cycle is not None and not cycle.response_complete:
                self._earlier = [one for one in (*self._earlier, cycle) if not one.response_complete]

        def connection_lost(self, exc: Exception | None) -> None:
            """Tell every request that nobody hears its answer; uvicorn tells the last one."""
            for cycle in self._earlier:
                if not cycle.response_complete:
                    cycle.disconnected = True
                    cycle.message_event.set()
            super().connection_lost(exc)

        def on_body(self, body: bytes) -> None:
            """Count what is body among what comes."""
            self._body += len(body)
            super().on_body(body)

        def _is_endless(self) -> bool:
            return self._received > MAX_HEAD_BYTES + CHUNK_OVERHEAD * self._body

    ServeProtocol = GuardedHttpTools
