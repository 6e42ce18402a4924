"""The client of ``serving.py``: connections that each keep one request under way, in a process of its own.

    python benchmarks/serving_client.py PORT CLIENTS SECONDS PATIENCE POST|GET

prints what it saw as JSON. Answers are timed from the request's last byte to the answer's last; a server that closes its
connections after every answer is connected to again, outside the clock.
"""

import asyncio
import json
import sys
import time
from typing import Any

K = 10
N_USERS = 1000
HOST = "127.0.0.1"


def request_of(kind: str, user: int) -> bytes:
    """The bytes of a request for ten items; ``GET`` is cornac's route, ``POST`` ours, ``HEALTH`` the liveness check."""
    if kind == "HEALTH":
        return b"GET /health/live HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n"
    if kind == "GET":
        return b"GET /recommend?uid=%d&k=%d&remove_seen=true HTTP/1.1\r\nHost: 127.0.0.1\r\n\r\n" % (user, K)
    body = b'{"user":"%d","k":%d}' % (user, K)
    return (
        b"POST /v1/recommend HTTP/1.1\r\nHost: 127.0.0.1\r\nContent-Type: application/json\r\nContent-Length: %d\r\n\r\n"
        % len(body)
    ) + body


class Load:
    """Outcomes of many connections until a deadline; a lost connection counts as status 0."""

    def __init__(self, port: int, kind: str, seconds: float, patience: float) -> None:
        self.port, self.kind, self.patience = port, kind, patience
        self.loop = asyncio.get_running_loop()
        self.deadline = time.perf_counter() + seconds
        self.outcomes: list[tuple[int, float]] = []
        self.open = 0
        self.done = asyncio.Event()

    async def run(self, clients: int) -> list[tuple[int, float]]:
        """Open the connections and wait for the deadline and the answers that are under way then."""
        self.open = clients
        for number in range(clients):
            self.connect(number)
        await self.done.wait()
        return self.outcomes

    def connect(self, user: int) -> None:
        """Open a connection that begins with the request after ``user``'s."""
        task = self.loop.create_task(self.loop.create_connection(lambda: Connection(self, user), HOST, self.port))

        def refused(task: "asyncio.Task[Any]") -> None:
            if task.exception() is not None:
                self.outcomes.append((0, 0.0))
                self.loop.call_later(self.patience, self.again, user)

        task.add_done_callback(refused)

    def again(self, user: int) -> None:
        """Connect anew, unless time is up."""
        if time.perf_counter() < self.deadline:
            self.connect(user)
        else:
            self.leave()

    def leave(self) -> None:
        """One client is through."""
        self.open -= 1
        if not self.open:
            self.done.set()


class Connection(asyncio.Protocol):
    """Asks, reads the answer, asks again; waits for ``patience`` seconds after a refusal."""

    def __init__(self, load: Load, user: int) -> None:
        self.load, self.user = load, user
        self.waiting = self.through = False
        self.buffer = b""
        self.needed = 0

    def connection_made(self, transport: Any) -> None:
        """Begin."""
        self.transport = transport
        self.ask()

    def ask(self) -> None:
        """Send the next request, unless time is up."""
        if time.perf_counter() >= self.load.deadline:
            self.finish()
            return
        self.user = (self.user + 7) % N_USERS
        self.buffer, self.needed, self.waiting = b"", 0, True
        self.transport.write(request_of(self.load.kind, self.user))
        self.started = time.perf_counter()

    def finish(self) -> None:
        """Close; this client is through."""
        if not self.through:
            self.through = True
            self.transport.close()
            self.load.leave()

    def data_received(self, data: bytes) -> None:
        """Collect an answer; when it is whole, go on."""
        self.buffer += data
        if not self.needed:
            end = self.buffer.find(b"\r\n\r\n")
            if end < 0:
                return
            head = self.buffer[:end].lower()
            self.needed = end + 4 + int(head.split(b"content-length:")[1].split(b"\r\n")[0])
            self.closes = b"connection: close" in head or head.startswith(b"http/1.0")
        if len(self.buffer) < self.needed:
            return
        status = int(self.buffer[9:12])
        self.load.outcomes.append((status, time.perf_counter() - self.started))
        self.waiting = False
        if self.closes:
            self.through = True
            self.transport.close()
            self.load.loop.call_later(0 if status == 200 else self.load.patience, self.load.again, self.user)
        elif status == 200 and self.load.kind != "HEALTH":
            self.ask()
        else:
            self.load.loop.call_later(0.05 if self.load.kind == "HEALTH" else self.load.patience, self.ask)

    def connection_lost(self, error: Exception | None) -> None:
        """Count an answer that never came, and connect anew."""
        if self.through:
            return
        self.through = True
        if self.waiting:
            self.load.outcomes.append((0, time.perf_counter() - self.started))
        self.load.loop.call_later(self.load.patience, self.load.again, self.user)


def quantile(values: list[float], share: float) -> float | None:
    """A quantile of ascending values."""
    return values[min(len(values) - 1, int(share * len(values)))] if values else None


async def main(port: int, clients: int, seconds: float, patience: float, kind: str) -> dict[str, Any]:
    """What ``clients`` connections saw, and how long /health/live took meanwhile."""
    load = Load(port, kind, seconds, patience)
    tasks = [load.run(clients)]
    if kind == "POST":
        tasks.append(Load(port, "HEALTH", seconds, patience).run(1))
    outcomes, *health = await asyncio.gather(*tasks)
    good = sorted(1000 * took for status, took in outcomes if status == 200)
    counts: dict[int, int] = {}
    for status, _ in outcomes:
        counts[status] = counts.get(status, 0) + 1
    live = sorted(1000 * took for status, took in (health[0] if health else []) if status == 200)
    return {
        "rps": len(good) / seconds,
        "p50_ms": quantile(good, 0.5),
        "p99_ms": quantile(good, 0.99),
        "health_p50_ms": quantile(live, 0.5),
        "health_p99_ms": quantile(live, 0.99),
        "status": counts,
    }


if __name__ == "__main__":
    try:
        import uvloop

        uvloop.install()
    except ModuleNotFoundError:
        pass
    port, clients, seconds, patience, kind = sys.argv[1:]
    print(json.dumps(asyncio.run(main(int(port), int(clients), float(seconds), float(patience), kind))))
