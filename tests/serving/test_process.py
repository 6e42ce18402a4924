"""Real server processes: killed, in pairs, and swapping under load."""

import argparse
import asyncio
import json
import os
import signal
from pathlib import Path

import pytest
from made_export import make_contents
from made_server import httpx
from waiting import LIMIT, wait_until

from recbole_llm.commands import serve as command
from recbole_llm.export.writer import write_artifact


@pytest.fixture
def folder(tmp_path):
    write_artifact(tmp_path / "exports" / "one", make_contents())
    return tmp_path / "exports"


def put(client, item_id, text):
    return client.put(f"/v1/items/{item_id}", json={"text": text, "title": f"Title of {item_id}"})


@pytest.mark.slow
def test_kill_9_during_writes_loses_no_acknowledged_change(serve, folder, tmp_path):
    server = serve(folder, "--state", str(tmp_path / "state"))
    acknowledged = {}
    for round_ in range(3):
        server.wait()
        with server.client() as client:
            for n in range(25):
                item_id, text = f"n{round_}-{n}", f"space w{round_}x{n}"
                answer = put(client, item_id, text)
                assert answer.status_code == 200
                acknowledged[item_id] = text
            pid = server.process.pid
            os.kill(pid, signal.SIGKILL)  # with requests going on
            with pytest.raises(httpx.TransportError):
                while True:
                    n += 1
                    put(client, f"n{round_}-{n}", "unacknowledged")
        server.process.wait(LIMIT)
        server.start()
        server.wait()
        with server.client() as client:
            for item_id, text in acknowledged.items():
                item = client.get(f"/v1/items/{item_id}").json()
                assert (item["text"], item["title"]) == (text, f"Title of {item_id}")
            answer = client.post("/v1/recommend", json={"items": ["i1"], "k": 1000}).json()
            assert acknowledged.keys() <= {item["id"] for item in answer["items"]}
    assert len(acknowledged) == 75


def test_two_workers_see_each_others_changes(serve, folder, tmp_path):
    server = serve(folder, "--state", str(tmp_path / "state"), "--workers", "2").wait()
    wait_until(lambda: len(readers_of_the_log(server.process.pid)) == 2, "both workers have the log")
    for n in range(3):
        with server.client() as writer:
            seq = put(writer, f"new{n}", "sea").json()["seq"]

        def is_seen(n=n):
            for _ in range(12):  # fresh connections: each goes to one of the workers, which does not say so
                with server.client() as reader:
                    if reader.get(f"/v1/items/new{n}").status_code != 200:
                        return False
            return True

        wait_until(is_seen, "both workers have the change")
        with server.client() as reader:
            assert reader.get(f"/v1/items/new{n}", headers={"x-min-seq": str(seq)}).status_code == 200


def readers_of_the_log(pid):
    """Children of a process that have the log of changes open."""
    found = set()
    for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split():
        try:
            files = [os.readlink(file) for file in Path(f"/proc/{child}/fd").iterdir()]
        except FileNotFoundError:  # closed meanwhile
            continue
        found |= {child for file in files if file.endswith("overlay.sqlite3")}
    return found


def test_no_request_fails_during_swaps(serve, folder, tmp_path):
    manifests = {
        write_artifact(folder / name, make_contents(seed=seed)).export_id for seed, name in ((5, "two"), (6, "three"))
    }
    server = serve(folder, "--state", str(tmp_path / "state"), "--no-access-log").wait()

    async def load():
        answers, stop = [], asyncio.Event()

        async def ask(client, n):
            while not stop.is_set():
                answer = await client.post("/v1/recommend", json={"user": f"u{n % 12}", "k": 5})
                answers.append((answer.status_code, n % 12, answer.text))

        async with httpx.AsyncClient(base_url=server.url, timeout=LIMIT) as client:
            tasks = [asyncio.create_task(ask(client, n)) for n in range(8)]
            swaps = []
            for name in ("one", "two", "three", "two", "one"):
                before = len(answers)
                while len(answers) < before + 20:  # of each export
                    assert not any(task.done() for task in tasks)
                    await asyncio.sleep(0.01)
                swaps.append((await client.post("/v1/admin/reload", json={"export": name})).json()["to"])
            stop.set()
            await asyncio.gather(*tasks)
        return answers, swaps

    answers, swaps = asyncio.run(load())
    assert {status for status, _, _ in answers} == {200} and len(answers) >= 100
    assert set(swaps) >= manifests
    seen = {}
    for _, user, text in answers:  # every answer is that of exactly one export
        body = json.loads(text)
        assert seen.setdefault((user, body["model"]), body["items"]) == body["items"]
    assert len({model for _, model in seen}) == 3


def test_hangup_loads_the_newest_and_term_drains(serve, folder, tmp_path):
    server = serve(folder, "--state", str(tmp_path / "state")).wait()
    manifest = write_artifact(folder / "two", make_contents(seed=5))
    os.kill(server.process.pid, signal.SIGHUP)
    with server.client() as client:
        served = lambda: client.get("/health/ready").json()["model"]  # noqa: E731
        wait_until(lambda: served() == manifest.export_id, "the newest export is served")
    server.process.terminate()
    assert server.process.wait(LIMIT) in (0, -signal.SIGTERM)
    log = server.log.read_text()
    assert "recbole-llm serves" in log and "Traceback" not in log


def test_a_mistake_is_one_line(serve, folder):
    server = serve(folder, "--state", "/dev/null/x")
    assert server.process.wait(LIMIT) != 0
    log = server.log.read_text()
    assert "state /dev/null/x" in log and "Traceback" not in log


@pytest.mark.parametrize(
    ("options", "message"),
    [
        (["--host", "0.0.0.0"], "no key is set: give --api-key-file"),
        (["--workers", "0"], "--workers is 0"),
        (["--workers", "2", "--read-only"], "--workers needs a log"),
        (["--api-key-file", "/nowhere"], "nowhere"),
    ],
)
def test_mistakes_are_found_before_anything_starts(folder, options, message):
    parser = argparse.ArgumentParser()
    command.add_serve_arguments(parser)
    with pytest.raises((ValueError, OSError), match=message):
        command.settings_of(parser.parse_args([str(folder), *options]))
