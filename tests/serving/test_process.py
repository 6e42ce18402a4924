"""Real server processes: killed, in pairs, and swapping under load."""

import argparse
import asyncio
import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from made_export import make_contents

pytest.importorskip("fastapi", reason="extra 'serve'")
pytest.importorskip("uvicorn", reason="extra 'serve'")
pytest.importorskip("orjson", reason="extra 'serve'")
pytest.importorskip("httpx", reason="extra 'test': httpx")
import httpx

from recbole_llm.serving import command
from recbole_llm.serving.artifact_writer import write_artifact

ROOT = Path(__file__).resolve().parents[2]
# the command's own code, with the made encoder in place of a transformer
PROGRAM = """
import argparse, sys
sys.path.insert(0, sys.argv.pop(1))
from recbole_llm.serving import command
parser = argparse.ArgumentParser()
command.add_serve_arguments(parser)
try:
    sys.exit(command.run_serve(parser.parse_args()))
except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
"""


def free_port():
    with socket.socket() as probe:
        probe.bind(("127.0.0.1", 0))
        return probe.getsockname()[1]


class Server:
    def __init__(self, folder, hook, *options):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(hook), str(Path(__file__).parent)])
        self.command = [sys.executable, "-c", PROGRAM, str(hook), str(folder), "--port", str(self.port), *options]
        self.environment = {**os.environ, "PYTHONPATH": path}
        self.start()

    def start(self):
        self.process = subprocess.Popen(
            self.command, env=self.environment, stderr=subprocess.PIPE, text=True, start_new_session=True
        )

    def wait(self, seconds=30):
        deadline = time.monotonic() + seconds
        while True:
            try:
                if httpx.get(self.url + "/health/ready").json()["encoder"] in ("ready", "none"):
                    return self
            except httpx.TransportError:
                pass
            assert self.process.poll() is None, self.process.stderr.read()
            assert time.monotonic() < deadline
            time.sleep(0.02)

    def kill(self, sign=signal.SIGKILL):
        os.killpg(self.process.pid, sign)  # its own session: the workers too
        self.process.wait(20)
        self.process.stderr.close()


@pytest.fixture
def serve(tmp_path):
    servers = []
    hook = tmp_path / "hook"
    hook.mkdir()
    # imported by every interpreter that has it on its path, workers included
    (hook / "sitecustomize.py").write_text(
        "import importlib.abc, importlib.util, sys\n"
        "class Hook(importlib.abc.MetaPathFinder):\n"
        "    def find_spec(self, name, path=None, target=None):\n"
        "        if name != 'recbole_llm.serving.app': return None\n"
        "        sys.meta_path.remove(self)\n"
        "        spec = importlib.util.find_spec(name)\n"
        "        load = spec.loader.exec_module\n"
        "        def exec_module(module):\n"
        "            load(module)\n"
        "            import made_export\n"
        "            create = module.create_app\n"
        "            module.create_app = lambda settings: create(settings, lambda f, m: made_export.WordEncoder())\n"
        "        spec.loader.exec_module = exec_module\n"
        "        return spec\n"
        "sys.meta_path.insert(0, Hook())\n"
    )

    def begin(folder, *options):
        server = Server(folder, hook, *options)
        servers.append(server)
        return server

    yield begin
    for server in servers:
        if server.process.poll() is None:
            server.kill()


@pytest.fixture
def folder(tmp_path):
    write_artifact(tmp_path / "exports" / "one", make_contents())
    return tmp_path / "exports"


def put(client, item_id, text):
    return client.put(f"/v1/items/{item_id}", json={"text": text, "title": f"Title of {item_id}"})


def test_kill_9_during_writes_loses_no_acknowledged_change(serve, folder, tmp_path):
    server = serve(folder, "--state", str(tmp_path / "state"))
    acknowledged, ready = {}, []
    for round_ in range(3):
        server.wait()
        with httpx.Client(base_url=server.url, timeout=10) as client:
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
        server.process.wait(10)
        server.process.stderr.close()
        started = time.monotonic()
        server.start()
        server.wait()
        ready.append(time.monotonic() - started)
        with httpx.Client(base_url=server.url, timeout=10) as client:
            for item_id, text in acknowledged.items():
                item = client.get(f"/v1/items/{item_id}").json()
                assert (item["text"], item["title"]) == (text, f"Title of {item_id}")
            answer = client.post("/v1/recommend", json={"items": ["i1"], "k": 1000}).json()
            assert acknowledged.keys() <= {item["id"] for item in answer["items"]}
    assert len(acknowledged) == 75
    assert min(ready) < 10


def test_two_workers_see_each_others_changes_within_a_second(serve, folder, tmp_path):
    server = serve(folder, "--state", str(tmp_path / "state"), "--workers", "2").wait(60)
    workers, deadline = set(), time.monotonic() + 30
    while (
        len(workers) < 2
    ):  # each connection goes to one of the two; request ids tell nothing, so count the log's readers
        assert time.monotonic() < deadline
        workers = {pid for pid in children(server.process.pid) if b"spawn" in Path(f"/proc/{pid}/cmdline").read_bytes()}
        time.sleep(0.1)
    time.sleep(1)
    took = []
    for n in range(3):
        with httpx.Client(base_url=server.url) as writer:
            seq = put(writer, f"new{n}", "sea").json()["seq"]
        started, seen = time.monotonic(), 0
        while seen < 12:  # fresh connections: both workers answer some of them
            with httpx.Client(base_url=server.url) as reader:
                answer = reader.get(f"/v1/items/new{n}")
            seen = seen + 1 if answer.status_code == 200 else 0
            assert time.monotonic() - started < 5
        took.append(time.monotonic() - started)
        with httpx.Client(base_url=server.url) as reader:
            assert reader.get(f"/v1/items/new{n}", headers={"x-min-seq": str(seq)}).status_code == 200
    assert min(took) < 1  # on a machine that other tests use too


def children(pid):
    return [int(p) for p in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]


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

        async with httpx.AsyncClient(base_url=server.url, timeout=20) as client:
            tasks = [asyncio.create_task(ask(client, n)) for n in range(8)]
            swaps = []
            for name in ("one", "two", "three", "two", "one"):
                await asyncio.sleep(0.2)
                swaps.append((await client.post("/v1/admin/reload", json={"export": name})).json()["to"])
            stop.set()
            await asyncio.gather(*tasks)
        return answers, swaps

    answers, swaps = asyncio.run(load())
    assert {status for status, _, _ in answers} == {200} and len(answers) > 50
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
    deadline = time.monotonic() + 10
    while httpx.get(server.url + "/health/ready").json()["model"] != manifest.export_id:
        assert time.monotonic() < deadline
        time.sleep(0.05)
    server.process.terminate()
    assert server.process.wait(15) in (0, -signal.SIGTERM)
    log = server.process.stderr.read()
    assert "recbole-llm serves" in log and "Traceback" not in log


def test_a_mistake_is_one_line(serve, folder):
    server = serve(folder, "--state", "/dev/null/x")
    assert server.process.wait(30) != 0
    log = server.process.stderr.read()
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
