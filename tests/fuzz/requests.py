"""Requests that are none: bytes of right ones, mutated, and what the service answers."""

import json
import socket
from collections import Counter
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from random import Random
from typing import Any

# what the service may say; 500 is a fault of ours, 503 and 504 are said when it is at its limits
BY_DESIGN = {
    100, 200, 206, 304, 307, 400, 401, 403, 404, 405, 408, 409, 411, 413, 415, 416, 417, 422, 429, 431, 501, 503, 504, 505,
}  # fmt: skip
CLIENTS = 8
QUIET_SECONDS = 0.2
ANSWER_SECONDS = 120  # a service that says nothing for so long has lost the request


def post(path: str, body: Any, method: str = "POST", *headers: str) -> bytes:
    """The bytes of a request with a body."""
    raw = body if isinstance(body, bytes) else json.dumps(body, ensure_ascii=False).encode()
    head = [f"{method} {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    return "\r\n".join([*head, f"Content-Length: {len(raw)}"]).encode() + b"\r\n\r\n" + raw


def get(path: str, *headers: str, method: str = "GET") -> bytes:
    """The bytes of a request without one."""
    return "\r\n".join([f"{method} {path} HTTP/1.1", "Host: localhost", *headers]).encode() + b"\r\n\r\n"


SEEDS = [
    post("/v1/recommend", {"user": "u1", "k": 5, "explain": 2, "filter": {"year": {"gte": 1990}}, "exclude": ["i1"]}),
    post("/v1/recommend", {"items": ["i1", "i2"], "weights": [1, 0.5], "filter": {"genre": ["space", "sea"]}}),
    post("/v1/recommend", {"text": "space story", "fallback": "popular"}, "POST", "X-Min-Seq: 0"),
    post("/v1/recommend/batch", {"requests": [{"user": "u1"}, {"items": ["i3"]}, {"user": "nobody"}]}),
    post("/v1/items/batch", {"items": [{"id": "a", "text": "sea"}, {"id": "i1", "op": "delete"}]}),
    post("/v1/items/new%2Fsimilar", {"title": "ü", "text": "love", "attributes": {"year": 1990, "kind": "x"}}, "PUT"),
    post("/v1/items/f", {"fields": {"title": "Moon", "genre": "sea"}, "refit": True}, "PUT"),
    post("/v1/admin/reload", {"export": "one"}),
    post("/v1/items/i5", b"", "DELETE"),
    get("/v1/items/i3/similar?k=4", "X-Request-Id: abc"),
    get("/v1/items/i%2F3", "X-API-Key: key", "Authorization: Bearer x"),
    get("/v1/items?search=title%201&limit=2"),
    get("/v1/model", "Origin: http://localhost", "X-Forwarded-For: 10.0.0.1"),
    get("/health/ready", "Connection: close"),
    get("/health/live", method="HEAD"),
    get("/metrics"),
    get("/static/app.js", "Range: bytes=0-10,20-30", "If-None-Match: x"),
    get("/", "Upgrade: websocket", "Connection: Upgrade"),
    get("/openapi.json", "Expect: 100-continue", "Accept-Encoding: gzip"),
    get("*", method="OPTIONS"),
    b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    b"c\r\n{\"user\":\"u1\"\r\n1\r\n}\r\n0\r\nX-Trailer: y\r\n\r\n",
]  # fmt: skip
PIECES = [
    b"\x00", b"\xff", b"\r\n", b"\n", b" ", b"%", b"%00", b"%ff", b"%2F", b"/../", b"//", b":", b"\"", b"\\u0000", b"\\ud800",
    b"{", b"}", b"[", b"]", b",", b"null", b"NaN", b"1e999", b"-0", b"9" * 400, b"true", b"0x10", b"\xf0\x9f\x8e\xac",
    b"Content-Length: 3\r\n", b"Transfer-Encoding: chunked\r\n", b"HTTP/1.0", b"HTTP/2.0", b"a" * 5000, b"[" * 2000,
    b"Expect: 100-continue\r\n", b"Host: evil\r\n", b"X-Min-Seq: 99\r\n", b"\r\n\r\n", b"?", b"#", b"&k=0", b"k=-1",
]  # fmt: skip


def mutated(draw: Random) -> bytes:
    """One request, or two after one another, with a few bytes changed, taken out, repeated, or put in."""
    raw = bytearray(b"".join(draw.choice(SEEDS) for _ in range(1 + (draw.random() < 0.1))))
    for _ in range(draw.choice([1, 1, 1, 2, 3, 8])):
        at = draw.randrange(len(raw) + 1)
        length = draw.choice([1, 1, 2, 5, 20])
        kind = draw.randrange(5)
        if kind == 0 and raw:
            raw[min(at, len(raw) - 1)] = draw.randrange(256)
        elif kind == 1:
            del raw[at : at + length]
        elif kind == 2:
            raw[at:at] = raw[at : at + length]
        elif kind == 3:
            raw[at:at] = draw.choice(PIECES)
        else:
            raw[at : at + length] = draw.choice(PIECES)
    return bytes(raw)


def statuses(port: int, raw: bytes) -> list[int]:
    """Statuses of the answers to bytes after which the client is quiet for a while, and then says no more."""
    received = b""
    with socket.create_connection(("127.0.0.1", port), timeout=QUIET_SECONDS) as client:
        try:
            client.sendall(raw)
            while part := client.recv(1 << 16):
                received += part
        except TimeoutError:
            client.settimeout(ANSWER_SECONDS)
            try:
                client.shutdown(socket.SHUT_WR)
                while part := client.recv(1 << 16):
                    received += part
            except OSError:
                pass
        except ConnectionError:
            pass
    found = [int(part[:3]) for part in received.split(b"HTTP/1.1 ")[1:] if part[:3].isdigit()]
    return found or [0]


def attack(port: int, requests: Iterable[bytes]) -> Counter[int]:
    """Send them, several at a time; statuses of the answers, 0 for a connection that ended without one.

    Raises:
        AssertionError: on a status that the service does not say by design.
    """
    sent, seen = list(requests), Counter[int]()
    with ThreadPoolExecutor(CLIENTS) as pool:
        for number, (raw, found) in enumerate(zip(sent, pool.map(partial(statuses, port), sent), strict=True)):
            if not set(found) <= {0, *BY_DESIGN}:
                raise AssertionError(f"request {number} was answered {found}: {raw!r}")
            seen.update(found)
    return seen
