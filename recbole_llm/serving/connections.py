"""The open connections of a process: deadlines for heads and for taking answers, places per peer, room for /health.

uvicorn has no deadline until a request is whole and counts silent connections against its limit, so a thousand of them
would shut everybody out. Here a connection in which nothing happens gives way to the next one, the oldest of the peer
that has most; where all are busy, the next one may still ask for /health. ``protocol.py`` puts these rules around
uvicorn's protocols.
"""

import asyncio
import time
from collections.abc import Sequence
from functools import lru_cache
from ipaddress import ip_address, ip_network
from typing import Any, Protocol

from recbole_llm.serving.metrics import Metrics
from recbole_llm.serving.settings import Limits

HEALTH_PATHS = frozenset({"/health/live", "/health/ready"})
STATE_KEY = "connections"  # in the state of the application's lifespan, where protocols find these rules
RESERVE = 64  # connections beyond the limit, for /health
SWEEP_SECONDS = 1.0
IPV6_PEER_BITS = 64  # a customer is given a network of this size at least


@lru_cache(4096)
def peer_of(address: str) -> str:
    """Return what counts as one peer: an IPv4 address, or an IPv6 network of 64 bits.

    Example:
        >>> peer_of("2001:db8::1") == peer_of("2001:db8::2")
        True
    """
    try:
        parsed = ip_address(address)
    except ValueError:
        return address[:64]
    if parsed.version == 4:
        return address
    if parsed.ipv4_mapped is not None:
        return str(parsed.ipv4_mapped)
    return str(ip_network((int(parsed), IPV6_PEER_BITS), strict=False))


class Connection(Protocol):
    """An open connection.

    Attributes:
        peer: of :func:`peer_of`.
        transport: of asyncio.
        head_since: when the head that has not arrived yet was begun; ``None`` if none is awaited.
        stalled_since: since when an answer waits for its client.
    """

    peer: str
    transport: Any
    head_since: float | None
    stalled_since: float | None

    def is_idle(self) -> bool:
        """Return whether nobody waits for an answer here, and no answer is on its way."""

    def late(self) -> None:
        """End a connection whose head did not come."""


class Connections:
    """Who is connected.

    Args:
        limits: bounds.
        metrics: to count refusals in.
        trusted: addresses and networks of proxies, which have no limit of their own.
    """

    def __init__(self, limits: Limits, metrics: Metrics, trusted: Sequence[str] = ()) -> None:
        self.limits, self.metrics = limits, metrics
        self.per_peer = limits.connections_per_address or max(limits.connections // 2, 1)
        self._trusted = [ip_network(address) for address in trusted]
        self._peers: dict[str, dict[Connection, None]] = {}  # in the order of arrival
        self._silent: dict[str, dict[Connection, None]] = {}  # those of them that have asked for nothing yet
        self.count = 0

    def _is_trusted(self, peer: str) -> bool:
        try:
            address = ip_address(peer)
        except ValueError:
            return False
        return any(address in network for network in self._trusted)

    def add(self, connection: Connection) -> str:
        """Let a connection in.

        Returns:
            ``open``, ``health`` if it may ask for /health only, or ``refused``.
        """
        peer = connection.peer
        own = self._peers.get(peer, {})
        reason = self._crowded(peer, own)
        if reason is not None:
            self._evict(peer if reason == "address" else max(self._peers, key=lambda one: len(self._peers[one])))
            own = self._peers.get(peer, {})
            reason = self._crowded(peer, own)
        place = "open" if reason is None else "health"
        if reason is not None:
            self.metrics.rejected.add(reason=reason)
            if self.count >= self.limits.connections + RESERVE:
                return "refused"
        own[connection] = None
        self._peers[peer] = own
        self._silent.setdefault(peer, {})[connection] = None
        self.count += 1
        return place

    def greeted(self, connection: Connection) -> None:
        """Note that a connection has asked for something."""
        _drop(self._silent, connection)

    def _crowded(self, peer: str, own: dict[Connection, None]) -> str | None:
        """Name the limit that another connection would pass."""
        if len(own) >= self.per_peer and not self._is_trusted(peer):
            return "address"
        return "connections" if self.count >= self.limits.connections else None

    def _evict(self, peer: str) -> None:
        """Close the connection of a peer that has been silent longest, or else one in which nothing happens now."""
        silent = self._silent.get(peer)
        idle = iter(silent) if silent else (one for one in self._peers[peer] if one.is_idle())
        connection = next(idle, None)
        if connection is not None:
            self.metrics.rejected.add(reason="idle")
            self.remove(connection)
            connection.transport.close()

    def remove(self, connection: Connection) -> None:
        """Forget a connection, if it is known."""
        _drop(self._silent, connection)
        self.count -= _drop(self._peers, connection)

    async def watch(self) -> None:
        """Keep the deadlines; runs until it is cancelled."""
        while True:
            await asyncio.sleep(SWEEP_SECONDS)
            self.sweep(time.monotonic())

    def sweep(self, now: float) -> None:
        """End connections whose head is late, and those whose client does not take its answer.

        Args:
            now: ``time.monotonic()``.
        """
        stalled: list[tuple[float, int, Connection]] = []
        for connection in [one for group in self._peers.values() for one in group]:
            if connection.head_since is not None and now - connection.head_since > self.limits.head_seconds:
                self.metrics.rejected.add(reason="head")
                connection.late()
            waiting = connection.transport.get_write_buffer_size()
            if not waiting:
                connection.stalled_since = None
                continue
            if connection.stalled_since is None:
                connection.stalled_since = now
            stalled.append((connection.stalled_since, waiting, connection))
        total = sum(waiting for _, waiting, _ in stalled)
        for since, waiting, connection in sorted(stalled, key=lambda one: one[0]):
            if now - since > self.limits.answer_seconds or total > self.limits.answers_bytes:
                self.metrics.rejected.add(reason="answer")
                total -= waiting
                connection.transport.abort()


def _drop(groups: dict[str, dict[Connection, None]], connection: Connection) -> bool:
    """Take a connection out of its peer's group; return whether it was there."""
    group = groups.get(connection.peer, {})
    if connection not in group:
        return False
    del group[connection]
    if not group:
        del groups[connection.peer]
    return True
