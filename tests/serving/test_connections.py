"""Places of connections: who gives way, who may ask for /health only; and uvicorn's protocols under these rules."""

import asyncio
import json
import logging
import logging.handlers
import queue
import socket
import threading

import pytest

pytest.importorskip("uvicorn", reason="extra 'serve'")
pytest.importorskip("fastapi", reason="extra 'serve'")
pytest.importorskip("orjson", reason="extra 'serve'")
import uvicorn
from made_export import WordEncoder
from waiting import LIMIT, join, wait_until

from recbole_llm.serving import connections as module
from recbole_llm.serving.app import create_app
from recbole_llm.serving.connections import RESERVE, Connections, peer_of
from recbole_llm.serving.metrics import Metrics
from recbole_llm.serving.protocol import GuardedH11, ServeProtocol
from recbole_llm.serving.settings import Limits, Settings


@pytest.mark.parametrize(
    ("address", "peer"),
    [
        ("10.0.0.1", "10.0.0.1"),
        ("::ffff:10.0.0.1", "10.0.0.1"),
        ("2001:db8:1:2:3:4:5:6", "2001:db8:1:2::/64"),
        ("2001:db8:1:2::1", "2001:db8:1:2::/64"),
        ("2001:db8:1:3::1", "2001:db8:1:3::/64"),
        ("::1", "::/64"),
        ("testclient", "testclient"),
        ("", ""),
    ],
)
def test_what_counts_as_one_peer(address, peer):
    assert peer_of(address) == peer


class Transport:
    def __init__(self):
        self.closed = self.aborted = False
        self.unsent = 0

    def close(self):
        self.closed = True

    def abort(self):
        self.aborted = True

    def get_write_buffer_size(self):
        return self.unsent


class Made:
    """A connection that is what the test says."""

    def __init__(self, peer="a", idle=True, head_since=None):
        self.peer, self.idle, self.head_since = peer, idle, head_since
        self.transport, self.stalled_since, self.was_late = Transport(), None, False

    def is_idle(self):
        return self.idle

    def late(self):
        self.was_late, self.head_since = True, None


def add(book, one):
    """Let a connection in that, where it is not idle, asks for something at once."""
    place = book.add(one)
    if not one.idle:
        book.greeted(one)
    return place


def places(trusted=(), **limits):
    return Connections(Limits(**limits), Metrics(), trusted)


def test_an_address_gives_way_to_itself():
    book = places(connections=100, connections_per_address=3)
    first, second, third, fourth = made = [Made() for _ in range(4)]
    assert [book.add(one) for one in made] == ["open"] * 4
    assert [one.transport.closed for one in made] == [True, False, False, False]
    assert book.count == 3
    for one in made[1:]:
        one.idle = False
        book.greeted(one)
    fifth = Made()
    assert book.add(fifth) == "health" and not any(one.transport.closed for one in made[1:])
    assert book.add(Made("b")) == "open"  # another address has its own places
    assert book.add(Made()) == "health" and fifth.transport.closed  # what waits beyond the limit gives way as well
    for one in (first, second, second):
        book.remove(one)
    assert book.count == 4


def test_who_has_asked_for_something_gives_way_after_those_who_have_not():
    book = places(connections=100, connections_per_address=4)
    first, second, third, fourth = made = [Made() for _ in range(4)]
    for one in made:
        book.add(one)
    book.greeted(first)
    book.greeted(third)
    closed = []
    for _ in range(4):
        book.add(Made())
        closed.append([one.transport.closed for one in made])
    assert closed[0] == [False, True, False, False] and closed[1] == closed[3] == [False, True, False, True]
    for one in list(book._silent["a"]):
        book.greeted(one)
    assert book.add(Made()) == "open" and first.transport.closed and not third.transport.closed
    assert book.count == 4


def test_the_default_is_half_of_all_places():
    assert places(connections=1000).per_peer == 500 and places(connections=1).per_peer == 1


def test_when_all_places_are_taken_who_has_most_gives_way():
    book = places(connections=6, connections_per_address=5)
    crowd, few = [Made("crowd") for _ in range(4)], [Made("few") for _ in range(2)]
    for one in (*few, *crowd):
        assert book.add(one) == "open"
    assert book.add(Made("new")) == "open"
    assert crowd[0].transport.closed and not any(one.transport.closed for one in (*few, *crowd[1:]))
    assert book.count == 6


def test_busy_connections_leave_room_for_health_alone():
    book = places(connections=4, connections_per_address=4)
    for number in range(4):
        assert add(book, Made(f"busy{number}", idle=False)) == "open"
    extra = [Made(f"extra{number}", idle=False) for number in range(RESERVE)]
    assert {add(book, one) for one in extra} == {"health"}
    refused = Made("late", idle=False)
    assert add(book, refused) == "refused" and book.count == 4 + RESERVE
    assert "late" not in book._peers
    book.remove(refused)
    assert book.count == 4 + RESERVE
    extra[0].idle = True  # a probe was answered: nobody waits there
    book.remove(extra[0])
    assert book.add(Made("probe")) == "health"


@pytest.mark.parametrize("trusted", ["10.0.0.2", "10.0.0.0/24"])
def test_a_trusted_proxy_has_no_limit_of_its_own(trusted):
    book = places((trusted,), connections=100, connections_per_address=2)
    assert {add(book, Made("10.0.0.2", idle=False)) for _ in range(10)} == {"open"}
    assert [add(book, Made("10.0.1.2", idle=False)) for _ in range(3)] == ["open", "open", "health"]


def test_late_heads_and_answers_that_nobody_takes_end():
    book = places(head_seconds=10, answer_seconds=30, answers_bytes=100)
    silent, fresh, reader, stalled = Made(head_since=0.0), Made(head_since=8.0), Made(), Made()
    stalled.transport.unsent = 60
    for one in (silent, fresh, reader, stalled):
        book.add(one)
    book.sweep(11.0)
    assert silent.was_late and not fresh.was_late and stalled.stalled_since == 11.0
    book.sweep(40.0)
    assert fresh.was_late and not stalled.transport.aborted
    book.sweep(41.5)
    assert stalled.transport.aborted and not reader.transport.aborted


def test_an_answer_that_is_taken_is_not_late():
    book = places(answer_seconds=30)
    slow = Made()
    book.add(slow)
    for second, unsent in ((0.0, 50), (29.0, 0), (30.0, 50), (59.0, 50)):
        slow.transport.unsent = unsent
        book.sweep(second)
    assert not slow.transport.aborted
    book.sweep(61.0)
    assert slow.transport.aborted


def test_too_much_that_nobody_takes_ends_the_oldest():
    book = places(answer_seconds=1000, answers_bytes=100)
    made = [Made() for _ in range(3)]
    for second, one in enumerate(made):
        one.transport.unsent = 40
        book.add(one)
        if second < 2:
            book.sweep(float(second))
    assert not any(one.transport.aborted for one in made)
    book.sweep(2.0)
    assert [one.transport.aborted for one in made] == [True, False, False]


# ------------------------------------------------------------------ over sockets


@pytest.fixture(params=[ServeProtocol, GuardedH11], ids=["httptools", "h11"])
def server(request, shared_folder, monkeypatch):
    """A real server with few places and short deadlines."""
    monkeypatch.setattr(module, "SWEEP_SECONDS", 0.05)
    limits = Limits(
        connections=20, connections_per_address=8, head_seconds=0.5, body_seconds=1.0, answer_seconds=0.5,
        body_bytes=100_000,
    )  # fmt: skip
    app = create_app(Settings(export=str(shared_folder), limits=limits), lambda folder, manifest: WordEncoder())
    config = uvicorn.Config(
        app, port=0, log_level="error", ws="none", http=request.param, proxy_headers=False, timeout_keep_alive=5,
        h11_max_incomplete_event_size=1 << 16,
    )  # fmt: skip
    server = uvicorn.Server(config)
    thread = threading.Thread(target=server.run, daemon=True)
    thread.start()
    wait_until(lambda: server.started and app.state.service.text.state == "ready", "the server is ready")
    server.port = server.servers[0].sockets[0].getsockname()[1]
    server.metrics = app.state.service.metrics
    yield server
    server.should_exit = True
    join(thread)


POST = "POST {path} HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: {length}\r\n\r\n"


def connect(server, data=b""):
    client = socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT)
    if data:
        client.sendall(data)
    return client


def get(path, *headers):
    return "\r\n".join([f"GET {path} HTTP/1.1", "Host: localhost", *headers]).encode() + b"\r\n\r\n"


def read_all(client):
    """Everything until the server ends the connection."""
    parts = []
    while part := client.recv(1 << 16):
        parts.append(part)
    return b"".join(parts)


def read_answer(client):
    """One answer: status and body."""
    data = b""
    while b"\r\n\r\n" not in data:
        part = client.recv(1 << 16)
        assert part, data
        data += part
    head, _, body = data.partition(b"\r\n\r\n")
    length = int(head.lower().partition(b"content-length:")[2].split(b"\r\n")[0])
    while len(body) < length:
        body += client.recv(1 << 16)
    return int(head.split()[1]), body, head


def test_requests_on_one_connection(server):
    with connect(server) as client:
        for _ in range(3):
            client.sendall(get("/v1/items/i1"))
            assert read_answer(client)[0] == 200
        client.sendall(get("/health/live") * 2)  # pipelined
        data = b""
        while data.count(b"HTTP/1.1 200 OK") < 2:
            data += client.recv(1 << 16)


def test_silence_ends_without_an_answer_and_half_a_head_with_408(server):
    with connect(server) as silent, connect(server, b"GET /health/live HT") as half:
        assert read_all(silent) == b""
        answer = read_all(half)
        assert answer.startswith(b"HTTP/1.1 408 ") and json.loads(answer.partition(b"\r\n\r\n")[2])["status"] == 408


def test_a_head_that_trickles_on_a_kept_connection_ends(server):
    with connect(server, get("/health/live")) as client:
        assert read_answer(client)[0] == 200
        client.sendall(b"GET / HTTP/1.1\r\nX: ")
        client.settimeout(0.1)
        answer = b""
        for _ in range(10 * LIMIT):
            try:
                answer = client.recv(1 << 16)
                break
            except TimeoutError:
                client.sendall(b"a")
        assert answer.startswith(b"HTTP/1.1 408 ")


def test_silent_connections_give_way_to_the_next(server):
    silent = [connect(server) for _ in range(40)]
    with connect(server, get("/v1/items/i1")) as client:
        assert read_answer(client)[0] == 200
    with connect(server, get("/health/live")) as client:
        assert read_answer(client)[0] == 200
    for one in silent:
        one.close()


def test_when_all_are_busy_health_answers_and_the_rest_is_503(server):
    held = (
        b"PUT /v1/items/x HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 10\r\n\r\n{"
    )
    busy = [connect(server, held) for _ in range(8)]
    wait_until(lambda: sum(not one.is_idle() for one in server.server_state.connections) == 8, "all are busy")
    with connect(server, get("/v1/items/i1")) as client:
        status, body, head = read_answer(client)
        assert status == 503 and b"retry-after: 1" in head.lower() and json.loads(body)["status"] == 503
        assert client.recv(10) == b""
    for _ in range(5):
        with connect(server, get("/health/live")) as client:
            assert read_answer(client)[0] == 200 and client.recv(10) == b""
    for one in busy:
        assert read_answer(one)[0] == 408
        one.close()
    with connect(server, get("/v1/items/i1")) as client:  # and the places are free again
        assert read_answer(client)[0] == 200


@pytest.mark.parametrize(
    "head",
    [
        b"GET / HTTP/1.1\r\nHost: localhost\r\nX: " + b"a" * 200_000,
        b"GET /" + b"a" * 200_000,
        b"GET / HTTP/1.1\r\nHost: localhost\r\n" + b"X: y\r\n" * 40_000,
    ],
    ids=["value", "path", "many"],
)
def test_a_head_without_end_is_refused(server, head):
    with connect(server) as client:
        try:
            client.sendall(head)
            answer = read_all(client)
        except ConnectionError:
            answer = b""
        assert answer == b"" or answer.split()[1] in (b"431", b"400")
    with connect(server, get("/health/live")) as client:
        assert read_answer(client)[0] == 200


def test_too_many_headers_are_refused(server):
    with connect(server, get("/health/live", *[f"X-{n}: y" for n in range(300)])) as client:
        status, _, _ = read_answer(client)
        assert status == 431 and client.recv(10) == b""


def test_a_trailer_without_end_is_refused(server):
    head = b"POST /v1/recommend HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
    with connect(server, head + b"2\r\n{}\r\n0\r\n") as client:
        try:
            for _ in range(2000):
                client.sendall(b"X: y\r\n" * 1000)
            assert read_all(client) is not None
        except ConnectionError:
            pass
    with connect(server, get("/health/live")) as client:
        assert read_answer(client)[0] == 200


def test_an_answer_that_nobody_takes_is_dropped(server):
    body = json.dumps({"requests": [{"user": f"u{n % 12}", "k": 100} for n in range(256)]}).encode()
    head = POST.format(path="/v1/recommend/batch", length=len(body))
    client = socket.socket()
    client.setsockopt(socket.SOL_SOCKET, socket.SO_RCVBUF, 4096)
    client.connect(("127.0.0.1", server.port))
    client.sendall(head.encode() + body)
    wait_until(lambda: server.metrics.rejected.values.get((("reason", "answer"),)), "the answer is dropped")
    assert len(server.server_state.connections) <= 1
    client.close()


def test_a_body_that_is_too_large_can_still_read_its_answer(server):
    """Closed at once, the connection would be reset, and the client would see no 413."""
    size = 20 << 20
    head = POST.format(path="/v1/recommend", length=size)
    with connect(server, head.encode()) as client:
        for _ in range(size // (1 << 16)):
            client.sendall(b" " * (1 << 16))
        status, body, head = read_answer(client)
        assert status == 413 and json.loads(body)["status"] == 413 and b"connection: close" in head.lower()
        assert client.recv(10) == b""


def test_a_refused_body_that_waits_for_100_continue_is_told_at_once(server):
    head = (
        "POST /v1/recommend HTTP/1.1\r\nHost: evil.example\r\nContent-Type: application/json\r\nExpect: 100-continue\r\n"
        "Content-Length: 10\r\n\r\n"
    )
    with connect(server, head.encode()) as client:
        status, _, head = read_answer(client)
        assert status == 403 and b"connection: close" in head.lower() and client.recv(10) == b""


CHUNKED = (
    b"POST /v1/recommend HTTP/1.1\r\nHost: {}\r\nContent-Type: application/json\r\nTransfer-Encoding: chunked\r\n\r\n"
)


@pytest.fixture
def errors(server):
    """What uvicorn and asyncio say went wrong."""
    handler = logging.handlers.QueueHandler(queue.SimpleQueue())
    handler.setLevel(logging.ERROR)
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).addHandler(handler)
    yield handler.queue
    for name in ("uvicorn.error", "asyncio"):
        logging.getLogger(name).removeHandler(handler)


@pytest.mark.parametrize("host", [b"localhost", b"evil.example"], ids=["read", "refused unread"])
@pytest.mark.parametrize("at_once", [False, True])
def test_a_body_that_cannot_be_read_is_refused_once(server, errors, host, at_once):
    """The protocol answers 400; what the application says after that, or has said before, must not end in an error."""
    head, wrong = CHUNKED.replace(b"{}", host), b"no size\r\n"
    with connect(server, head + wrong if at_once else head + b"1\r\n{\r\n") as client:
        if not at_once and host == b"localhost":
            wait_until(lambda: any(not one.is_idle() for one in server.server_state.connections), "the body is awaited")
        if not at_once:
            client.sendall(wrong)
        answer = read_all(client)
    wait_until(lambda: not server.server_state.connections and not server.server_state.tasks, "nothing is left")
    assert answer.count(b"HTTP/1.1 ") == 1 and answer.split()[1] in {b"400", b"403" if host != b"localhost" else b"400"}
    assert errors.empty(), errors.get().getMessage()


def test_forwarded_addresses_of_anybody_are_not_believed(server):
    """By default no proxy is trusted: the peer's own address counts."""
    for number in range(3):
        with connect(server, get("/health/live", f"X-Forwarded-For: 10.0.0.{number}")) as client:
            assert read_answer(client)[0] == 200
    assert not any("10.0.0." in peer for peer in peers(server))


def peers(server):
    return {connection.peer for connection in server.server_state.connections}


def test_nothing_is_left_when_all_have_gone(server):
    clients = [connect(server, data) for data in (b"", b"GET", get("/health/live"), get("/v1/items/i1")) * 3]
    for client in clients:
        client.close()
    wait_until(lambda: not server.server_state.connections, "all connections have ended")
    book = server.lifespan.state["connections"]
    assert book.count == 0 and not book._peers and not book._silent


def test_watching_goes_on(monkeypatch):
    monkeypatch.setattr(module, "SWEEP_SECONDS", 0.001)
    book, seen = places(), []
    monkeypatch.setattr(book, "sweep", seen.append)

    async def work():
        task = asyncio.create_task(book.watch())
        while len(seen) < 3:
            await asyncio.sleep(0.001)
        task.cancel()

    asyncio.run(asyncio.wait_for(work(), LIMIT))
    assert seen == sorted(seen)
