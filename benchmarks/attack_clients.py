"""Clients of ``attacks.py``, each in a process of its own: honest ones, and those that ask for as much as they may.

    python benchmarks/attack_clients.py honest PORT SECONDS
    python benchmarks/attack_clients.py explain_batch PORT SECONDS

The honest one prints what it saw as JSON: 16 connections that ask for ten items and wait 20 ms after each answer, and a
probe that opens a connection for /health/live every 20 ms.
"""

import asyncio
import json
import random
import sys
import time
from collections import Counter
from collections.abc import Awaitable, Callable
from contextlib import suppress

HOST = "127.0.0.1"
HONEST = 16
PAUSE = 0.02
PROBE_SECONDS = 15.0  # until a probe gives up
N_USERS = 1000  # of the made catalogue
HEALTH = b"GET /health/live HTTP/1.1\r\nHost: localhost\r\nConnection: close\r\n\r\n"

Streams = tuple[asyncio.StreamReader, asyncio.StreamWriter]


def post(path: str, body: bytes, *headers: str, length: int | None = None) -> bytes:
    """The bytes of a request."""
    head = [f"POST {path} HTTP/1.1", "Host: localhost", "Content-Type: application/json", *headers]
    head.append(f"Content-Length: {len(body) if length is None else length}")
    return "\r\n".join(head).encode() + b"\r\n\r\n" + body


async def answer(reader: asyncio.StreamReader) -> tuple[int, int]:
    """Status of an answer, and bytes of its body."""
    head = (await reader.readuntil(b"\r\n\r\n")).decode("latin-1").lower()
    length = int(head.partition("content-length:")[2].split("\r\n")[0])
    await reader.readexactly(length)
    return int(head.split()[1]), length


def quantile(values: list[float], q: float) -> float:
    """A quantile in milliseconds."""
    ordered = sorted(values)
    return round(1000 * ordered[min(int(q * len(ordered)), len(ordered) - 1)], 2) if ordered else float("nan")


# ------------------------------------------------------------------ honest


async def honest(port: int, until: float) -> None:
    """Ask, wait, ask again; print statuses and times."""
    statuses: Counter[str] = Counter()
    times: list[float] = []
    health: list[float] = []
    refused: Counter[str] = Counter()

    async def ask(number: int) -> None:
        streams: Streams | None = None
        user = number
        while time.monotonic() < until:
            user = (user + HONEST) % N_USERS
            started = time.monotonic()
            try:
                if streams is None:
                    streams = await asyncio.open_connection(HOST, port)
                streams[1].write(post("/v1/recommend", b'{"user":"%d","k":10}' % user))
                status, _ = await asyncio.wait_for(answer(streams[0]), PROBE_SECONDS)
                statuses[str(status)] += 1
                if status == 200:
                    times.append(time.monotonic() - started)
                elif status == 503:
                    streams[1].close()
                    streams = None
            except (OSError, EOFError, asyncio.TimeoutError) as error:
                statuses[type(error).__name__] += 1
                streams = None
            await asyncio.sleep(PAUSE)

    async def probe() -> None:
        while time.monotonic() < until:
            started = time.monotonic()
            try:
                reader, writer = await asyncio.wait_for(asyncio.open_connection(HOST, port), PROBE_SECONDS)
                writer.write(HEALTH)
                status, _ = await asyncio.wait_for(answer(reader), PROBE_SECONDS)
                writer.close()
                if status != 200:
                    refused[str(status)] += 1
            except (OSError, EOFError, asyncio.TimeoutError) as error:
                refused[type(error).__name__] += 1
            health.append(time.monotonic() - started)
            await asyncio.sleep(PAUSE)

    await asyncio.gather(probe(), *(ask(number) for number in range(HONEST)))
    print(
        json.dumps(
            {
                "answers": dict(statuses),
                "p50_ms": quantile(times, 0.5),
                "p99_ms": quantile(times, 0.99),
                "probes": len(health),
                "probes_refused": dict(refused),
                "health_p50_ms": quantile(health, 0.5),
                "health_p99_ms": quantile(health, 0.99),
                "health_max_ms": quantile(health, 1.0),
            }
        )
    )


# ------------------------------------------------------------------ attackers


async def flood(port: int, until: float, connections: int, request: bytes) -> None:
    """Send one request again and again over many connections, and read the answers."""
    statuses: Counter[str] = Counter()
    largest = 0

    async def one() -> None:
        nonlocal largest
        while time.monotonic() < until:
            with suppress(OSError, EOFError):
                reader, writer = await asyncio.open_connection(HOST, port)
                while time.monotonic() < until:
                    writer.write(request)
                    status, n_bytes = await answer(reader)
                    statuses[str(status)] += 1
                    largest = max(largest, n_bytes)
            await asyncio.sleep(0.01)

    tasks = [asyncio.create_task(one()) for _ in range(connections)]
    await asyncio.sleep(until - time.monotonic())
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    print(json.dumps({"answers": dict(statuses), "largest_answer": largest, "request_bytes": len(request)}))


async def hold(port: int, until: float, connections: int, content: bytes, chunk: int = 1 << 16) -> None:
    """Open connections, send what is no whole request, and stay; a connection that is closed is opened again."""
    opened = ended = 0

    async def one() -> None:
        nonlocal opened, ended
        while time.monotonic() < until:
            with suppress(OSError, EOFError):
                reader, writer = await asyncio.open_connection(HOST, port)
                opened += 1
                for at in range(0, len(content), chunk):
                    writer.write(content[at : at + chunk])
                    await writer.drain()
                await reader.read(1 << 16)
                writer.close()
            ended += 1
            await asyncio.sleep(random.uniform(0.25, 0.75))

    tasks = [asyncio.create_task(one()) for _ in range(connections)]
    await asyncio.sleep(until - time.monotonic())
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)
    print(json.dumps({"opened": opened, "ended_by_the_server": ended}))


async def unread(port: int, until: float, connections: int, request: bytes) -> None:
    """Ask for large answers and take none."""

    async def one() -> None:
        while time.monotonic() < until:
            with suppress(OSError, EOFError):
                reader, writer = await asyncio.open_connection(HOST, port, limit=1)
                reader._transport.pause_reading()  # type: ignore[attr-defined]
                writer.write(request)
                await asyncio.sleep(until - time.monotonic())
                writer.close()

    await asyncio.gather(*(one() for _ in range(connections)))
    print(json.dumps({"connections": connections}))


IDS = [str(n) for n in range(1000)]
SINGLE = json.dumps({"items": IDS, "k": 1000, "explain": 2, "exclude_seen": False}).encode()
BATCH = json.dumps({"requests": [{"items": IDS[:110], "k": 50, "explain": 1, "exclude_seen": False}] * 256}).encode()
WIDE = json.dumps({"requests": [{"user": "1", "exclude": IDS[:110]}] * 256}).encode()
WRONG = json.dumps({"requests": [{"user": "1", "exclude": [0] * 110}] * 256}).encode()
TOO_MANY = b'{"requests":[' + b"0," * (4 << 20) + b"0]}"
FUTURE = post("/v1/recommend", b'{"user":"1"}', "X-Min-Seq: 9007199254740992")
HELD = post("/v1/items/batch", b" " * ((8 << 20) - 1), length=8 << 20)

CLIENTS: dict[str, Callable[[int, float], Awaitable[None]]] = {
    "honest": honest,
    "explain_single": lambda port, until: flood(port, until, 32, post("/v1/recommend", SINGLE)),
    "explain_batch": lambda port, until: flood(port, until, 32, post("/v1/recommend/batch", BATCH)),
    "wide_bodies": lambda port, until: flood(port, until, 32, post("/v1/recommend/batch", WIDE)),
    "wrong_bodies": lambda port, until: flood(port, until, 32, post("/v1/recommend/batch", WRONG)),
    "too_many_values": lambda port, until: flood(port, until, 32, post("/v1/recommend/batch", TOO_MANY)),
    "future_seq": lambda port, until: flood(port, until, 300, FUTURE),
    "silent": lambda port, until: hold(port, until, 1000, b""),
    "half_heads": lambda port, until: hold(port, until, 1000, b"GET / HTTP/1.1\r\nHost: localhost\r\nX: "),
    "bodies_held_back": lambda port, until: hold(port, until, 300, HELD),
    "answers_not_read": lambda port, until: unread(port, until, 300, post("/v1/recommend/batch", BATCH)),
}


if __name__ == "__main__":
    kind, port, seconds = sys.argv[1:]
    asyncio.run(CLIENTS[kind](int(port), time.monotonic() + float(seconds)))
