"""What ``coverage.py`` searches: bytes become an input of the product; an error that nobody promised leaves ``run``."""

import io
import json
import logging
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from pathlib import Path
from typing import Any, Protocol

from tests.fuzz import checkpoints, exports, requests

FOLDER = Path(__file__).parents[1] / "tests" / "compatibility" / "0.1.0"
MOST_BYTES = 1 << 16  # of an input; longer ones reach nothing else


class Target(Protocol):
    """One kind of input."""

    def seeds(self) -> Iterator[bytes]:
        """Right inputs, to begin with."""
        ...

    def run(self, content: bytes) -> None:
        """Give an input to the product."""
        ...


class _InFolder(AbstractContextManager[Any]):
    def __init__(self) -> None:
        logging.disable(logging.CRITICAL)
        self.folder = Path(tempfile.mkdtemp())

    def __exit__(self, *_: object) -> None:
        logging.disable(logging.NOTSET)
        shutil.rmtree(self.folder)


class Exports(_InFolder):
    """A file of an export, the first byte says which, with sums and an id that fit."""

    def __init__(self) -> None:
        super().__init__()
        self.source, self.export = FOLDER / "export-time", self.folder / "export"
        shutil.copytree(self.source, self.export, copy_function=shutil.copyfile)
        self.files = sorted(path.name for path in self.source.iterdir() if path.is_file())

    def seeds(self) -> Iterator[bytes]:
        """Each file as it is."""
        for number, name in enumerate(self.files):
            yield bytes([number]) + (self.source / name).read_bytes()

    def run(self, content: bytes) -> None:
        """Load the export."""
        if not 1 <= len(content) <= MOST_BYTES:
            return
        name = self.files[content[0] % len(self.files)]
        manifest = self.source / "manifest.json"
        (self.export / name).write_bytes(content[1:])
        try:
            raw = json.loads((self.export / "manifest.json").read_bytes())
            if isinstance(raw, dict):
                exports.sign(self.export, raw)
        except (ValueError, RecursionError):
            pass  # what is no JSON cannot be signed
        exports.outcome(self.export)
        shutil.copyfile(self.source / name, self.export / name)
        shutil.copyfile(manifest, self.export / "manifest.json")


class Checkpoints(_InFolder):
    """The pickle of a checkpoint, its sum right."""

    def __init__(self) -> None:
        super().__init__()
        with zipfile.ZipFile(FOLDER / "both.pth") as archive:
            self.members = {name: archive.read(name) for name in archive.namelist()}

    def seeds(self) -> Iterator[bytes]:
        """Those of the committed checkpoints."""
        for path in sorted(FOLDER.glob("*.pth")):
            with zipfile.ZipFile(path) as archive:
                yield from (archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))

    def run(self, content: bytes) -> None:
        """Read the checkpoint."""
        target = io.BytesIO()
        with zipfile.ZipFile(target, "w") as archive:
            for name, member in self.members.items():
                archive.writestr(name, content[:MOST_BYTES] if name.endswith("data.pkl") else member)
        path = self.folder / "x.pth"
        path.write_bytes(target.getvalue())
        checkpoints.outcome(path)


ROUTES = [
    ("POST", "/v1/recommend"), ("POST", "/v1/recommend/batch"), ("PUT", "/v1/items/a"), ("POST", "/v1/items/batch"),
    ("POST", "/v1/admin/reload"),
]  # fmt: skip


class Requests(_InFolder):
    """The body of a request, the first byte says to which route."""

    def __init__(self) -> None:
        super().__init__()
        from fastapi.testclient import TestClient

        from recbole_llm.serving.app import create_app
        from recbole_llm.serving.settings import Settings

        settings = Settings(export=str(FOLDER / "export-time"), encoder=False, allowed_hosts=("*",))
        self.client = TestClient(create_app(settings), raise_server_exceptions=True)
        self.client.__enter__()

    def __exit__(self, *reason: object) -> None:
        self.client.__exit__(None, None, None)
        super().__exit__(*reason)

    def seeds(self) -> Iterator[bytes]:
        """Bodies of the seeds of ``requests.py``."""
        for seed in requests.SEEDS:
            head, _, body = seed.partition(b"\r\n\r\n")
            method, path = head.split(b" ")[:2]
            for number, (route_method, route) in enumerate(ROUTES):
                if body and (method.decode(), path.decode()) == (route_method, route):
                    yield bytes([number]) + body
        yield b"\x02" + json.dumps({"title": "ü", "text": "love", "attributes": {"year": 1990}}).encode()

    def run(self, content: bytes) -> None:
        """Ask the service."""
        if not 1 <= len(content) <= MOST_BYTES:
            return
        method, path = ROUTES[content[0] % len(ROUTES)]
        headers = {"content-type": "application/json"}
        answer = self.client.request(method, path, content=content[1:], headers=headers)
        assert answer.status_code in requests.BY_DESIGN, (answer.status_code, answer.text)


TARGETS: dict[str, Callable[[], Any]] = {"exports": Exports, "checkpoints": Checkpoints, "requests": Requests}
