"""The gate before every route: who may ask, how much, and whether there is room, decided before the body is read."""

import asyncio
import itertools
import json
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable, Coroutine, MutableMapping
from logging import getLogger
from typing import Any, TypeVar
from uuid import uuid4

from recbole_llm.serving.metrics import Metrics
from recbole_llm.serving.problem import MEDIA_TYPE, Problem
from recbole_llm.serving.settings import Settings

Scope = MutableMapping[str, Any]
Message = MutableMapping[str, Any]
Receive = Callable[[], Awaitable[Message]]
Send = Callable[[Message], Awaitable[None]]
X = TypeVar("X")
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_OPEN_PATHS = frozenset({"/", "/health/live", "/health/ready"})
_SCORED_PATHS = frozenset({"/v1/recommend", "/v1/recommend/batch"})
_READING_POSTS = _SCORED_PATHS
_BATCH_PATHS = frozenset({"/v1/recommend/batch", "/v1/items/batch"})
_WITH_BODY = frozenset({"POST", "PUT", "PATCH", "DELETE"})
MAX_BUCKETS = 10_000
SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'self'; frame-ancestors 'none'; base-uri 'none'; form-action 'self'; object-src 'none'",
    ),
]

access = getLogger("recbole_llm.serving.access")
log = getLogger(__name__)


class Gate:
    """ASGI middleware: host, origin, key, rate, room, body; and the access log, metrics and headers of every answer.

    Args:
        app: what is behind it.
        settings: limits, keys, hosts.
        metrics: to count in.
    """

    def __init__(self, app: App, settings: Settings, metrics: Metrics) -> None:
        self.app, self.settings, self.metrics = app, settings, metrics
        self.in_flight = 0
        # unique without asking the system for random bytes at every request
        self._request_ids = map(f"{uuid4().hex[:10]}-{{:x}}".format, itertools.count(1))
        self._buckets: OrderedDict[str, tuple[float, float]] = OrderedDict()

    async def __call__(self, scope: Scope, receive: Receive, send: Send) -> None:  # noqa: D102
        if scope["type"] != "http":
            if scope["type"] == "lifespan":
                await self.app(scope, receive, send)
            return
        started = time.perf_counter()
        headers = dict(scope["headers"])
        answer = _Answer(send, self._request_id(headers))
        scored = scope["path"] in _SCORED_PATHS or scope["path"].endswith("/similar")
        admitted = False
        try:
            self._check(scope, headers)
            if scored:
                if self.in_flight >= self.settings.limits.queue:
                    self.metrics.rejected.add(reason="queue")
                    raise Problem(503, "The service is at its limit; try again.", retry_after=1)
                self.in_flight += 1
                admitted = True
            if scope["method"] in _WITH_BODY:
                receive = await self._with_body(scope, headers, receive)
            await self.app(scope, receive, answer.send)
        except Problem as problem:
            await answer.problem(problem)
        except Exception:
            log.exception("request %s failed", answer.request_id)
            await answer.problem(Problem(500, "The service failed; its log has the request id."))
        finally:
            if admitted:
                self.in_flight -= 1
            self._record(scope, answer, time.perf_counter() - started)

    def _request_id(self, headers: dict[bytes, bytes]) -> str:
        given = headers.get(b"x-request-id")
        if given is not None and _REQUEST_ID.fullmatch(text := given.decode("latin-1")):
            return text
        return next(self._request_ids)

    def _record(self, scope: Scope, answer: "_Answer", seconds: float) -> None:
        route = getattr(scope.get("route"), "path", "other")
        self.metrics.requests.add(route=route, status=str(answer.status))
        self.metrics.seconds.observe(seconds)
        if self.settings.access_log:
            line = {
                "id": answer.request_id,
                "method": scope["method"],
                "route": route,
                "status": answer.status,
                "ms": round(1000 * seconds, 2),
            }
            access.info(json.dumps(line))

    # ------------------------------------------------------------------ who

    def _check(self, scope: Scope, headers: dict[bytes, bytes]) -> None:
        self._check_host(headers)
        writes = scope["method"] in _WITH_BODY and scope["path"] not in _READING_POSTS
        origin = headers.get(b"origin")
        if origin is not None and scope["method"] in _WITH_BODY and not self._own(origin, headers):
            self.metrics.rejected.add(reason="origin")
            raise Problem(403, "Pages of this origin may not call the service; --cors-origin allows one.")
        caller = self._check_key(scope, headers, "write" if writes else "read")
        self._check_rate(caller)
        if writes and self.settings.read_only:
            raise Problem(403, "The service is read-only.")

    def _check_host(self, headers: dict[bytes, bytes]) -> None:
        allowed = self.settings.allowed_hosts
        host = re.sub(r":\d+$", "", headers.get(b"host", b"").decode("latin-1").lower()).strip("[]")
        if "*" not in allowed and host not in allowed:
            self.metrics.rejected.add(reason="host")
            raise Problem(403, "This host name is not served; --allowed-host adds one.")

    def _own(self, origin: bytes, headers: dict[bytes, bytes]) -> bool:
        text = origin.decode("latin-1")
        return (
            text.split("://")[-1] == headers.get(b"host", b"").decode("latin-1") or text in self.settings.cors_origins
        )

    def _check_key(self, scope: Scope, headers: dict[bytes, bytes], needed: str) -> str:
        address = (scope.get("client") or ("",))[0]
        path = scope["path"]
        is_open = path in _OPEN_PATHS or path.startswith("/static/") or scope["method"] == "OPTIONS"
        if path == "/metrics":
            is_open = not self.settings.metrics_need_key
        if not self.settings.keys or is_open:
            return f"address {address}"
        key = headers.get(b"x-api-key")
        bearer = headers.get(b"authorization", b"")
        if key is None and bearer[:7].lower() == b"bearer ":
            key = bearer[7:].strip()
        scope_of_key = None if key is None else self.settings.scope_of(key.decode("latin-1"))
        if scope_of_key is None:
            self.metrics.rejected.add(reason="key")
            raise Problem(401, "A valid key is needed, in the header X-API-Key or as a bearer token.")
        if needed == "write" and scope_of_key != "write":
            self.metrics.rejected.add(reason="scope")
            raise Problem(403, "This key may read only.")
        return f"key {key!r}"

    def _check_rate(self, caller: str) -> None:
        rate = self.settings.limits.requests_per_second
        if not rate:
            return
        now, burst = time.monotonic(), float(self.settings.limits.burst)
        tokens, since = self._buckets.pop(caller, (burst, now))
        tokens = min(burst, tokens + (now - since) * rate)
        self._buckets[caller] = (max(tokens - 1, 0.0) if tokens >= 1 else tokens, now)
        if len(self._buckets) > MAX_BUCKETS:
            self._buckets.popitem(last=False)
        if tokens < 1:
            self.metrics.rejected.add(reason="rate")
            raise Problem(429, "Too many requests with this key.", retry_after=max(1, round((1 - tokens) / rate)))

    # ------------------------------------------------------------------ body

    async def _with_body(self, scope: Scope, headers: dict[bytes, bytes], receive: Receive) -> Receive:
        """Read the body within its bounds, and hand it on as one message."""
        limits = self.settings.limits
        limit = limits.batch_body_bytes if scope["path"] in _BATCH_PATHS else limits.body_bytes
        too_large = Problem(413, f"The body is larger than {limit} bytes.")
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            self.metrics.rejected.add(reason="size")
            raise too_large
        try:
            body = await _in_time(_read(receive, limit), limits.body_seconds)
        except asyncio.TimeoutError:
            self.metrics.rejected.add(reason="slow")
            raise Problem(408, f"The body did not arrive within {limits.body_seconds:g} seconds.") from None
        if body is None:
            self.metrics.rejected.add(reason="size")
            raise too_large
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower()
        if body and kind != b"application/json":
            raise Problem(415, "The body must be application/json.")
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await receive()
            given = True
            return {"type": "http.request", "body": body, "more_body": False}

        return replay


async def _in_time(work: Coroutine[Any, Any, X], seconds: float) -> X:
    """As ``asyncio.wait_for``, in the calling task: a task of its own would cost a turn of the loop for every body.

    Raises:
        asyncio.TimeoutError: if the work takes longer.
    """
    task = asyncio.current_task()
    assert task is not None
    late = False

    def cancel() -> None:
        nonlocal late
        late = True
        task.cancel()

    timer = asyncio.get_running_loop().call_later(seconds, cancel)
    try:
        return await work
    except asyncio.CancelledError:
        if not late:
            raise
        if hasattr(task, "uncancel"):  # Python 3.11
            task.uncancel()
        raise asyncio.TimeoutError from None
    finally:
        timer.cancel()


async def _read(receive: Receive, limit: int) -> bytes | None:
    """The whole body, ``None`` if it is larger than ``limit``."""
    parts, size = [], 0
    while True:
        message = await receive()
        if message["type"] != "http.request":
            raise Problem(400, "The client closed the connection.")
        part = message.get("body", b"")
        size += len(part)
        if size > limit:
            return None
        parts.append(part)
        if not message.get("more_body"):
            return b"".join(parts)


class _Answer:
    """The answer on its way out: its status, and the headers that every answer has."""

    def __init__(self, send: Send, request_id: str) -> None:
        self._send, self.request_id = send, request_id
        self._headers = [(b"x-request-id", request_id.encode()), *SECURITY_HEADERS]
        self.status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *self._headers]
        await self._send(message)

    async def problem(self, problem: Problem) -> None:
        if self.status:  # the head is out; nothing can be said any more
            return
        body = problem.body()
        headers = {"content-type": MEDIA_TYPE, "content-length": str(len(body)), **problem.headers()}
        if problem.status in (408, 413):
            headers["connection"] = "close"  # the rest of the body is not wanted
        pairs = [(name.encode(), value.encode()) for name, value in headers.items()]
        await self.send({"type": "http.response.start", "status": problem.status, "headers": pairs})
        await self.send({"type": "http.response.body", "body": body})
