"""Servers in processes of their own, with the made encoder; imported by tests of whole processes."""

import os
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from ports import free_port
from waiting import LIMIT, wait_until

pytest.importorskip("fastapi", reason="extra 'serve'")
pytest.importorskip("uvicorn", reason="extra 'serve'")
pytest.importorskip("orjson", reason="extra 'serve'")
pytest.importorskip("httpx", reason="extra 'test': httpx")
import httpx

ROOT = Path(__file__).resolve().parents[2]
# the command's own code, with the made encoder in place of a transformer
PROGRAM = """
import argparse, sys
sys.path.insert(0, sys.argv.pop(1))
from recbole_llm.commands import serve as command
parser = argparse.ArgumentParser()
command.add_serve_arguments(parser)
try:
    sys.exit(command.run_serve(parser.parse_args()))
except (ValueError, OSError) as error:
    sys.exit(f"error: {error}")
"""


# imported by every interpreter that has it on its path, workers included
HOOK = """
import importlib.abc, importlib.util, os, sys
if os.environ.get("WITHOUT_HTTPTOOLS"):
    sys.modules["httptools"] = None
class Hook(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name != 'recbole_llm.serving.app': return None
        sys.meta_path.remove(self)
        spec = importlib.util.find_spec(name)
        load = spec.loader.exec_module
        def exec_module(module):
            load(module)
            import dataclasses, made_export
            def create(settings, stock=module.create_app):
                limits = dataclasses.replace(settings.limits, **made_export.PATIENCE)
                settings = dataclasses.replace(settings, limits=limits)
                return stock(settings, lambda folder, manifest: made_export.WordEncoder())
            module.create_app = create
        spec.loader.exec_module = exec_module
        return spec
sys.meta_path.insert(0, Hook())
"""


class Server:
    def __init__(self, folder, hook, *options, **environment):
        self.port = free_port()
        self.url = f"http://127.0.0.1:{self.port}"
        self.log = hook / f"{self.port}.log"  # not a pipe: one that nobody reads fills up, and the server waits
        own = [hook, Path(__file__).parent, ROOT / "tests"]
        path = os.pathsep.join(map(str, [ROOT, ROOT / "kernels", *own]))
        self.command = [sys.executable, "-c", PROGRAM, str(hook), str(folder), "--port", str(self.port), *options]
        self.environment = {**os.environ, "PYTHONPATH": path, **environment}
        self.start()

    def start(self):
        with self.log.open("a") as log:
            self.process = subprocess.Popen(self.command, env=self.environment, stderr=log, start_new_session=True)

    def is_ready(self):
        assert self.process.poll() is None, self.log.read_text()
        try:
            return httpx.get(self.url + "/health/ready", timeout=LIMIT).json()["encoder"] in ("ready", "none")
        except httpx.TransportError:
            return False

    def wait(self):
        wait_until(self.is_ready, "the server answers")
        return self

    def client(self):
        return httpx.Client(base_url=self.url, timeout=LIMIT)

    def kill(self, sign=signal.SIGKILL):
        os.killpg(self.process.pid, sign)  # its own session: the workers too
        self.process.wait(LIMIT)
