"""Requests that are none: whatever comes, the service answers by design and lives."""

import random

import pytest
from made_export import make_contents

from recbole_llm.export.writer import write_artifact
from tests.fuzz import requests


def attack(server, n, seed):
    draw = random.Random(seed)
    seen = requests.attack(server.port, [requests.mutated(draw) for _ in range(n)])
    assert server.process.poll() is None
    return seen


@pytest.fixture
def folder(tmp_path):
    for number, name in enumerate(("one", "two")):
        write_artifact(tmp_path / "exports" / name, make_contents(seed=number))
    return tmp_path / "exports"


PROTOCOLS = ["httptools", "h11"]


def begin(serve, folder, tmp_path, protocol):
    options = ["--state", str(tmp_path / "state"), "--no-access-log"]
    return serve(folder, *options, WITHOUT_HTTPTOOLS="1" if protocol == "h11" else "").wait()


def ends_well(server, seen):
    with server.client() as client:
        assert client.get("/health/ready").status_code == 200
        assert client.post("/v1/recommend", json={"user": "u1"}).status_code == 200
        assert client.put("/v1/items/last", json={"text": "sea", "title": "Last"}).status_code == 200
        assert client.get("/v1/items/last").json()["title"] == "Last"
    log = server.log.read_text()
    assert "Traceback" not in log and "failed" not in log, log[-3000:]
    assert seen[200] > 0 and seen[400] > 0 and seen[422] > 0, seen


@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_some_mutated_requests(serve, folder, tmp_path, protocol):
    server = begin(serve, folder, tmp_path, protocol)
    ends_well(server, attack(server, 150, seed=1))


@pytest.mark.slow
@pytest.mark.parametrize("protocol", PROTOCOLS)
def test_five_thousand_mutated_requests(serve, folder, tmp_path, protocol):
    server = begin(serve, folder, tmp_path, protocol)
    ends_well(server, attack(server, 5000, seed=2))
