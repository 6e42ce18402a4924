"""The gate before every route: who may ask, how much, and whether there is room, decided before the body is read."""

import itertools
import json
import re
import time
from collections import OrderedDict
from collections.abc import Awaitable, Callable
from logging import getLogger
from uuid import uuid4

from recbole_llm.serving.bodies import FREE_BYTES, Bodies, Body, Incoming, Message, Receive, Scope
from recbole_llm.serving.connections import HEALTH_PATHS, peer_of
from recbole_llm.serving.media_types import MEDIA_TYPES
from recbole_llm.serving.metrics import Metrics
from recbole_llm.serving.problem import MEDIA_TYPE, Problem
from recbole_llm.serving.responses import problem_of
from recbole_llm.serving.settings import Settings

Headers = dict[bytes, bytes]
Send = Callable[[Message], Awaitable[None]]
App = Callable[[Scope, Receive, Send], Awaitable[None]]

_REQUEST_ID = re.compile(r"[A-Za-z0-9_.-]{1,64}")
_OPEN_PATHS = frozenset({"/", *HEALTH_PATHS})
_ITEMS_PATH = "/v1/items/"
_PICTURE_PATH = "/v1/recommend/image"
_SCORED_PATHS = frozenset({"/v1/recommend", "/v1/recommend/batch", _PICTURE_PATH})
_READING_POSTS = _SCORED_PATHS
_BATCH_PATHS = frozenset({"/v1/recommend/batch", "/v1/items/batch"})
_WITH_BODY = frozenset({"POST", "PUT", "PATCH", "DELETE"})
MAX_BUCKETS = 10_000
MAX_SEQ_DIGITS = 18
SECURITY_HEADERS = [
    (b"x-content-type-options", b"nosniff"),
    (b"referrer-policy", b"no-referrer"),
    (
        b"content-security-policy",
        b"default-src 'self'; img-src 'self' blob:; frame-ancestors 'none'; base-uri 'none'; form-action 'self'; "
        b"object-src 'none'",
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
        bodies: reads bodies.
        wait_for: waits until a change is applied; raises what :func:`problem_of` knows.
    """

    def __init__(
        self, app: App, settings: Settings, metrics: Metrics, bodies: Bodies, wait_for: Callable[[int], Awaitable[None]]
    ) -> None:
        self.app, self.settings, self.metrics, self.bodies, self._wait_for = app, settings, metrics, bodies, wait_for
        self.in_flight = {"read": 0, "write": 0}
        self._room = {"read": settings.limits.queue, "write": settings.limits.writes}
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
        answer = _Answer(send, self._request_id(headers), self.bodies)
        admitted = body = None
        has_body = scope["method"] in _WITH_BODY
        incoming = Incoming(receive)
        try:
            _with_raw_path(scope)
            writes = has_body and scope["path"] not in _READING_POSTS
            self._check(scope, headers, writes)
            if b"x-min-seq" in headers:
                await self._insist(headers[b"x-min-seq"])
            admitted = self._admit(scope, writes)
            inner = receive
            if has_body:
                scope["bodies"] = self.bodies
                body, inner = await self._with_body(scope, headers, incoming)
            await self.app(scope, inner, answer.send)
        except Problem as problem:
            self._leave(admitted)
            admitted = None  # the rest of the body may take its time
            await answer.problem(problem, incoming if has_body and not incoming.over else None, headers)
        except Exception:
            log.exception("request %s failed", answer.request_id)
            await answer.problem(Problem(500, "The service failed; its log has the request id."))
        finally:
            if body is not None:
                self.bodies.release(body)
            self._leave(admitted)
            self._record(scope, answer, time.perf_counter() - started)

    async def _insist(self, wanted: bytes) -> None:
        """Honour ``X-Min-Seq``: answer only when that change is known. Waiting takes no place from others."""
        if not wanted.isdigit() or len(wanted) > MAX_SEQ_DIGITS:
            raise Problem(422, "X-Min-Seq must be the seq of a change.")
        try:
            await self._wait_for(int(wanted))
        except Exception as error:
            problem = problem_of(error)
            if problem is None:
                raise
            raise problem from None

    def _admit(self, scope: Scope, writes: bool) -> str | None:
        """Take a place for what is computed; ``None`` for what takes none."""
        path = scope["path"]
        if writes:
            kind = "write"
        elif path in _SCORED_PATHS or path.endswith("/similar"):
            kind = "read"
        else:
            return None
        if self.in_flight[kind] >= self._room[kind]:
            self.metrics.rejected.add(reason="queue")
            raise Problem(503, "The service is at its limit; try again.", retry_after=1)
        self.in_flight[kind] += 1
        return kind

    def _leave(self, kind: str | None) -> None:
        """Give the place of :meth:`_admit` back."""
        if kind is not None:
            self.in_flight[kind] -= 1

    def _request_id(self, headers: Headers) -> str:
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

    def _check(self, scope: Scope, headers: Headers, writes: bool) -> None:
        self._check_host(headers)
        if scope["path"] in HEALTH_PATHS:
            return
        origin = headers.get(b"origin")
        if origin is not None and scope["method"] in _WITH_BODY and not self._own(origin, headers):
            self.metrics.rejected.add(reason="origin")
            raise Problem(403, "Pages of this origin may not call the service; --cors-origin allows one.")
        caller = self._check_key(scope, headers, "write" if writes else "read")
        self._check_rate(caller)
        if writes and self.settings.read_only:
            raise Problem(403, "The service is read-only.")

    def _check_host(self, headers: Headers) -> None:
        allowed = self.settings.allowed_hosts
        host = re.sub(r":\d+$", "", headers.get(b"host", b"").decode("latin-1").lower()).strip("[]")
        if "*" not in allowed and host not in allowed:
            self.metrics.rejected.add(reason="host")
            raise Problem(403, "This host name is not served; --allowed-host adds one.")

    def _own(self, origin: bytes, headers: Headers) -> bool:
        text = origin.decode("latin-1")
        return (
            text.split("://")[-1] == headers.get(b"host", b"").decode("latin-1") or text in self.settings.cors_origins
        )

    def _check_key(self, scope: Scope, headers: Headers, needed: str) -> str:
        path = scope["path"]
        is_open = path in _OPEN_PATHS or path.startswith("/static/") or scope["method"] == "OPTIONS"
        if path == "/metrics":
            is_open = not self.settings.metrics_need_key
        if not self.settings.keys or is_open:
            return f"address {_peer(scope)}"
        key = headers.get(b"x-api-key")
        bearer = headers.get(b"authorization", b"")
        if key is None and bearer[:7].lower() == b"bearer ":
            key = bearer[7:].strip()
        scope_of_key = None if key is None else self.settings.scope_of(key)
        if scope_of_key is None:
            self._check_rate(f"address {_peer(scope)}")  # guesses are counted too
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
            raise Problem(429, "Too many requests.", retry_after=max(1, round((1 - tokens) / rate)))

    # ------------------------------------------------------------------ body

    def _limit(self, scope: Scope) -> int:
        """The most bytes of a request's body."""
        limits, path = self.settings.limits, scope["path"]
        if _holds_picture(scope):
            return limits.image_bytes
        if scope["method"] == "PUT" and path.startswith(_ITEMS_PATH):
            return self.settings.item_bytes
        return limits.batch_body_bytes if path in _BATCH_PATHS else limits.body_bytes

    async def _with_body(self, scope: Scope, headers: Headers, incoming: Incoming) -> tuple[Body, Receive]:
        """Read the body within its bounds, and hand it on as one message."""
        limit, is_picture = self._limit(scope), _holds_picture(scope)
        length = headers.get(b"content-length", b"0")
        if length.isdigit() and int(length) > limit:
            self.metrics.rejected.add(reason="size")
            raise Problem(413, f"The body is larger than {limit} bytes.")
        body = await self.bodies.read(_peer(scope), incoming, limit, parsed=not is_picture)
        kind = headers.get(b"content-type", b"").split(b";")[0].strip().lower().decode("latin-1")
        if body.content and kind not in (MEDIA_TYPES if is_picture else ("application/json",)):
            self.bodies.release(body)
            what = f"a picture: {', '.join(MEDIA_TYPES)}" if is_picture else "application/json"
            raise Problem(415, f"The body must be {what}.")
        given = False

        async def replay() -> Message:
            nonlocal given
            if given:
                return await incoming.next()
            given = True
            return {"type": "http.request", "body": body.content, "more_body": False}

        return body, replay


def _holds_picture(scope: Scope) -> bool:
    """Return whether the body is a picture's file."""
    path = scope["path"]
    puts = scope["method"] == "PUT" and path.startswith(_ITEMS_PATH) and path.endswith("/image")
    return puts or path == _PICTURE_PATH


def _peer(scope: Scope) -> str:
    return peer_of((scope.get("client") or ("",))[0])


def _is_long(headers: Headers) -> bool:
    """Return whether more of a body may be on its way than a server's buffer holds."""
    length = headers.get(b"content-length")
    return b"transfer-encoding" in headers if length is None else not length.isdigit() or int(length) > FREE_BYTES


def _with_raw_path(scope: Scope) -> None:
    """Route items by the path as it was sent: there a slash of an id is ``%2F``, and stays one."""
    if scope["path"].startswith(_ITEMS_PATH) and (raw := scope.get("raw_path")) is not None:
        scope["path"] = raw.partition(b"?")[0].decode("latin-1")


class _Answer:
    """The answer on its way out: its status, and the headers that every answer has."""

    def __init__(self, send: Send, request_id: str, bodies: Bodies) -> None:
        self._send, self.request_id, self._bodies = send, request_id, bodies
        self._headers = [(b"x-request-id", request_id.encode()), *SECURITY_HEADERS]
        self.status = 0

    async def send(self, message: Message) -> None:
        if message["type"] == "http.response.start":
            self.status = message["status"]
            message["headers"] = [*message.get("headers", ()), *self._headers]
        await self._send(message)

    async def problem(self, problem: Problem, unread: Incoming | None = None, headers: Headers | None = None) -> None:
        """Send an error.

        Args:
            problem: which.
            unread: where more of the request's body comes from.
            headers: of the request.
        """
        if self.status:  # the head is out; nothing can be said any more
            return
        body = problem.body()
        fields = {"content-type": MEDIA_TYPE, "content-length": str(len(body)), **problem.headers()}
        held_back = unread is not None and b"expect" in (headers or {})
        linger = unread is not None and not held_back and _is_long(headers or {})
        if problem.status in (408, 413) or held_back or linger:
            fields["connection"] = "close"  # the rest of the body is not wanted
        pairs = [(name.encode(), value.encode()) for name, value in fields.items()]
        await self.send({"type": "http.response.start", "status": problem.status, "headers": pairs})
        if unread is not None and linger:
            await self.send({"type": "http.response.body", "body": body, "more_body": True})
            await self._bodies.drain(unread.next)  # closed at once, the connection is reset and the answer lost
            body = b""
        await self.send({"type": "http.response.body", "body": body})
