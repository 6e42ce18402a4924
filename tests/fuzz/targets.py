"""What ``coverage.py`` searches: bytes become an input of the product; an error that nobody promised leaves ``run``."""

import io
import json
import logging
import shutil
import tempfile
import zipfile
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager, suppress
from pathlib import Path
from random import Random
from typing import Any, Protocol
from urllib.parse import quote_from_bytes

from tests.fuzz import exports, requests

FOLDER = Path(__file__).parents[1] / "compatibility" / "0.1.0"
MOST_BYTES = 1 << 16  # of an input; longer ones reach nothing else


class Target(Protocol):
    """One kind of input."""

    def seeds(self) -> Iterator[bytes]:
        """Right inputs, to begin with."""
        ...

    def run(self, content: bytes) -> None:
        """Give an input to the product."""
        ...

    def mutate(self, content: bytes, draw: Random) -> bytes:
        """Change what an input says and leave its form: bytes changed at random are refused before anything reads them."""
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

    def mutate(self, content: bytes, draw: Random) -> bytes:
        """Change a value of JSON, a line, or the header or the numbers of a tensor file."""
        name, path = self.files[content[0] % len(self.files)], self.folder / "changed"
        if name == "manifest.json":
            return content[:1] + changed_json(content[1:], draw)
        path.write_bytes(content[1:])
        tensors = (exports.change_header, exports.change_numbers)
        draw.choice(tensors if name.endswith(".safetensors") else [exports.change_lines])(path, draw)
        return content[:1] + path.read_bytes()

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
        from tests.fuzz import checkpoints  # with torch, which the other targets do without

        self.made = checkpoints
        with zipfile.ZipFile(FOLDER / "both.pth") as archive:
            self.members = {name: archive.read(name) for name in archive.namelist()}

    def seeds(self) -> Iterator[bytes]:
        """Those of the committed checkpoints."""
        for path in sorted(FOLDER.glob("*.pth")):
            with zipfile.ZipFile(path) as archive:
                yield from (archive.read(name) for name in archive.namelist() if name.endswith("data.pkl"))

    def mutate(self, content: bytes, draw: Random) -> bytes:
        """Change operations of the pickle."""
        return self.made.change_pickle(content, draw)

    def run(self, content: bytes) -> None:
        """Read the checkpoint."""
        target = io.BytesIO()
        with zipfile.ZipFile(target, "w") as archive:
            for name, member in self.members.items():
                archive.writestr(name, content[:MOST_BYTES] if name.endswith("data.pkl") else member)
        path = self.folder / "x.pth"
        path.write_bytes(target.getvalue())
        self.made.outcome(path)


ROUTES = [
    ("POST", "/v1/recommend"), ("POST", "/v1/recommend/batch"), ("PUT", "/v1/items/a"), ("POST", "/v1/items/batch"),
    ("POST", "/v1/admin/reload"), ("GET", "/v1/items/1/similar"), ("GET", "/v1/items"), ("GET", "/v1/items/"),
]  # fmt: skip
QUERIES = [b"k=4&explain=2", b"search=love%20story&limit=2", b"i%2F3"]  # seeds of the last three


def changed_json(content: bytes, draw: Random) -> bytes:
    """Change one to three places of a JSON value."""
    value = [json.loads(content)]
    for _ in range(draw.choice([1, 1, 3])):
        exports.change_tree(value, draw)
    return json.dumps(value[0] if value else None).encode()


class Requests(_InFolder):
    """The body of a request, its query or the end of its path; the first byte says to which route."""

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
        for number, query in enumerate(QUERIES, len(ROUTES) - len(QUERIES)):
            yield bytes([number]) + query
        yield b"\x02" + json.dumps({"title": "ü", "text": "love", "attributes": {"year": 1990}}).encode()

    def mutate(self, content: bytes, draw: Random) -> bytes:
        """Change a value of the body, or put a piece into the query."""
        if ROUTES[content[0] % len(ROUTES)][0] != "GET":
            return content[:1] + changed_json(content[1:], draw)
        at = draw.randrange(1, len(content) + 1)
        return content[:at] + draw.choice(requests.PIECES) + content[at + draw.randrange(3) :]

    def run(self, content: bytes) -> None:
        """Ask the service."""
        if not 1 <= len(content) <= MOST_BYTES:
            return
        method, path = ROUTES[content[0] % len(ROUTES)]
        if method == "GET":  # whatever stands in a query is characters of ASCII by then
            asked = quote_from_bytes(content[1:], safe="=&%+/")
            answer = self.client.get(path + asked if path.endswith("/") else f"{path}?{asked}")
        else:
            headers = {"content-type": "application/json"}
            answer = self.client.request(method, path, content=content[1:], headers=headers)
        assert answer.status_code in requests.BY_DESIGN, (answer.status_code, answer.text)


def mutated(target: Target, content: bytes, most: int, draw: Random) -> bytes | None:
    """Return what :meth:`Target.mutate` makes of an input; ``None`` where the input has no such form, or it grows too long."""
    # a change of what an earlier one left may find nothing that it can change
    with suppress(OSError, ValueError, TypeError, AttributeError, LookupError, RecursionError):
        made = target.mutate(content, draw)
        if made != content and len(made) <= most:
            return made
    return None


TARGETS: dict[str, Callable[[], Any]] = {"exports": Exports, "checkpoints": Checkpoints, "requests": Requests}
