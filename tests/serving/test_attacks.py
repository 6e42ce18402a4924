"""Whole processes under attack, and killed: what ``recbole-llm serve`` sets up holds."""

import os
import random
import re
import signal
import socket
import threading
import time
from pathlib import Path

import pytest
from made_export import make_contents
from made_server import httpx
from waiting import LIMIT, wait_until

from recbole_llm.export.writer import write_artifact

PASSWORD = "a secret/of the:database"


@pytest.fixture
def folder(tmp_path):
    write_artifact(tmp_path / "exports" / "one", make_contents())
    return tmp_path / "exports"


def connect(server, data=b""):
    client = socket.create_connection(("127.0.0.1", server.port), timeout=LIMIT)
    if data:
        client.sendall(data)
    return client


def rss_mib(server):
    return int(Path(f"/proc/{server.process.pid}/status").read_text().partition("VmRSS:")[2].split()[0]) / 1024


def ask(server, headers=None):
    return httpx.get(f"{server.url}/v1/items/i1", headers=headers, timeout=LIMIT).status_code


def test_addresses_that_anybody_may_claim_are_no_way_around_the_rate(serve, folder, tmp_path):
    server = serve(folder, "--state", str(tmp_path / "state"), "--rate", "0.001").wait()
    codes = [ask(server, {"x-forwarded-for": f"10.0.0.{n}"}) for n in range(105)]
    assert codes.count(200) == 100 and codes[100:] == [429] * 5


def test_a_trusted_proxy_names_the_client(serve, folder, tmp_path):
    options = ["--state", str(tmp_path / "state"), "--rate", "0.001", "--trusted-proxy", "127.0.0.0/8"]
    server = serve(folder, *options).wait()
    assert [ask(server, {"x-forwarded-for": "10.0.0.1"}) for _ in range(101)] == [200] * 100 + [429]
    assert ask(server, {"x-forwarded-for": "10.0.0.2"}) == 200
    # what the client put before what the proxy added is not believed
    assert ask(server, {"x-forwarded-for": "10.0.0.2, 10.0.0.1"}) == 429


def test_a_thousand_silent_connections_keep_nobody_out(serve, folder, tmp_path):
    server = serve(folder, "--state", str(tmp_path / "state"), "--limit-concurrency", "300").wait()
    silent = [connect(server, data) for data in (b"", b"GET / HTTP/1.1\r\nX: ") * 500]
    for path in ("/health/live", "/health/ready", "/v1/items/i1"):
        assert httpx.get(server.url + path, timeout=LIMIT).status_code == 200
    for one in silent:
        one.close()
    assert "Traceback" not in server.log.read_text()


def test_bodies_held_back_take_bounded_memory_that_is_given_back(serve, folder, tmp_path):
    server = serve(folder, "--state", str(tmp_path / "state")).wait()
    before, stop = rss_mib(server), threading.Event()
    head = b"POST /v1/items/batch HTTP/1.1\r\nHost: localhost\r\nContent-Type: application/json\r\nContent-Length: 8388608\r\n\r\n"

    def hold():
        try:
            with connect(server, head) as client:
                for _ in range(127):
                    client.sendall(b" " * (1 << 16))
                while not stop.is_set():
                    time.sleep(0.05)
        except OSError:
            pass

    threads = [threading.Thread(target=hold) for _ in range(60)]  # 480 MiB; 64 MiB are allowed
    for thread in threads:
        thread.start()
    peak, dropped = before, 0
    while dropped < 40:
        peak = max(peak, rss_mib(server))
        text = httpx.get(f"{server.url}/metrics", timeout=LIMIT).text
        dropped = int(next(iter(re.findall(r'rejected_total\{reason="bodies"\} (\d+)', text)), 0))
        time.sleep(0.05)
    answer = httpx.post(f"{server.url}/v1/items/batch", json={"items": [{"id": "a", "text": "sea"}]}, timeout=LIMIT)
    assert answer.status_code == 200
    stop.set()
    for thread in threads:
        thread.join(LIMIT)
    assert peak - before < 250
    wait_until(lambda: rss_mib(server) - before < 40, "the memory is given back")


def test_a_database_password_is_in_no_command_line_and_no_log(serve, folder, tmp_path):
    (tmp_path / "password").write_text(PASSWORD + "\n")
    options = ["--state", "postgresql://u@127.0.0.1:1/db", "--state-password-file", str(tmp_path / "password")]
    server = serve(folder, *options)
    line = wait_until(Path(f"/proc/{server.process.pid}/cmdline").read_bytes, "the process has its command line")
    assert b"postgresql://u@127.0.0.1" in line and b"secret" not in line
    server.process.wait(LIMIT)  # nothing listens there
    log = server.log.read_text()
    assert "state postgresql" in log and "secret" not in log and "Traceback" not in log


def test_a_password_on_the_command_line_is_warned_of(serve, folder):
    server = serve(folder, "--state", "postgresql://u:visible@127.0.0.1:1/db")
    server.process.wait(LIMIT)
    assert "visible" not in server.log.read_text()


# ------------------------------------------------------------------ kills


def exports_of(folder, n):
    return {
        f"e{number}": write_artifact(folder / f"e{number}", make_contents(seed=number)).export_id for number in range(n)
    }


@pytest.mark.slow
def test_kill_9_in_reloads_loses_nothing_and_leaves_nothing_half(serve, tmp_path):
    """Killed at any moment of a reload, with changes under way: the next start serves a whole export and every change."""
    folder, draw = tmp_path / "exports", random.Random(0)
    manifests = exports_of(folder, 3)
    server = serve(folder, "--state", str(tmp_path / "state"), "--no-access-log")
    acknowledged = {}
    for number in range(12):
        server.wait()
        stop = threading.Event()

        def write(number=number, stop=stop):
            with server.client() as client:
                at = 0
                while not stop.is_set():
                    item_id = f"k{number}-{at}"
                    try:
                        answer = client.put(f"/v1/items/{item_id}", json={"text": f"space {at}", "title": item_id})
                    except httpx.TransportError:
                        return
                    if answer.status_code == 200:
                        acknowledged[item_id] = f"space {at}"
                    at += 1

        def reload(stop=stop):
            with server.client() as client:
                while not stop.is_set():
                    try:
                        client.post("/v1/admin/reload", json={"export": draw.choice(sorted(manifests))})
                    except httpx.TransportError:
                        return

        threads = [threading.Thread(target=write), threading.Thread(target=reload)]
        for thread in threads:
            thread.start()
        wait_until(lambda number=number: f"k{number}-3" in acknowledged, "changes are acknowledged")
        time.sleep(draw.uniform(0, 0.5))
        os.killpg(server.process.pid, signal.SIGKILL)
        server.process.wait(LIMIT)
        stop.set()
        for thread in threads:
            thread.join(LIMIT)
        server.start()
        server.wait()
        with server.client() as client:
            ready = client.get("/health/ready").json()
            assert ready["model"] in manifests.values() and "skipped_rows" not in ready
            answer = client.post("/v1/recommend", json={"items": ["i1"], "k": 1000}).json()
            assert {item["id"] for item in answer["items"]} >= acknowledged.keys() and answer["model"] == ready["model"]
            for item_id in draw.sample(sorted(acknowledged), min(20, len(acknowledged))):
                item = client.get(f"/v1/items/{item_id}").json()
                assert (item["text"], item["title"]) == (acknowledged[item_id], item_id)
    assert len(acknowledged) >= 48
    assert {path.name for path in folder.iterdir()} == set(manifests)  # nothing was left over
    assert "Traceback" not in server.log.read_text()
