"""What ``serving.py`` serves, and the servers that serve it: ours, a tutorial's, and cornac's."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
import urllib.error
import urllib.request
from collections.abc import Sequence
from pathlib import Path
from typing import Any

import numpy as np

ROOT = Path(__file__).resolve().parents[1]
N_USERS = 1000
HISTORY = 50
K = 10
F = 32  # of the made encoder
CLOCK = os.sysconf("SC_CLK_TCK")
SLOWS_NUMPY = ("OPENBLAS_CORETYPE", "OPENBLAS_L2_SIZE")
FLASK, GUNICORN = "cornac flask", "cornac gunicorn"


class WordEncoder:
    """Texts as sums of fixed random vectors of their words, in place of a transformer."""

    fingerprint = "words"

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Vectors ``[n, F]`` float32 and zeros ``[n]``."""
        rows = np.zeros((len(texts), F), np.float32)
        for row, text in zip(rows, texts, strict=True):
            for word in text.split():
                row += np.random.default_rng(list(word.encode())).standard_normal(F).astype(np.float32)
        return rows, np.zeros(len(texts), np.int64)


def made_histories(n_items: int, seed: int = 0) -> np.ndarray:
    """``[N_USERS, HISTORY]`` ascending item rows."""
    rng = np.random.default_rng(seed)
    return np.stack([np.sort(rng.choice(n_items, HISTORY, replace=False)) for _ in range(N_USERS)])


def write_catalogue(folder: Path, n_items: int, dim: int, seed: int = 0) -> None:
    """A made model: vectors drawn around 100 centres, and a map for texts of :class:`WordEncoder`."""
    from recbole_llm.export.manifest import Block, EncoderSpec
    from recbole_llm.export.reader import ItemRecord
    from recbole_llm.export.text_map import TextMap
    from recbole_llm.export.writer import ExportContents, write_artifact

    rng = np.random.default_rng(seed)
    normal = lambda *shape: rng.standard_normal(shape, dtype=np.float32)  # noqa: E731
    write_artifact(
        folder,
        ExportContents(
            item_ids=[str(i) for i in range(n_items)],
            user_ids=[str(u) for u in range(N_USERS)],
            records=[ItemRecord(f"Item number {i}", None, {}) for i in range(n_items)],
            vector=normal(100, dim)[rng.integers(0, 100, n_items)] + normal(n_items, dim),
            source=normal(n_items, dim),
            bias=normal(n_items),
            trained=np.ones(n_items, bool),
            blocks=(Block("learned", dim, 0.5, 1.0),),
            history_offsets=np.arange(N_USERS + 1) * HISTORY,
            history_items=made_histories(n_items).ravel(),
            text_map=TextMap(
                kind="linear", center=np.zeros(F, np.float32), vector=normal(F, dim), source=normal(F, dim),
                bias=normal(F), vector_offset=np.zeros(dim, np.float32), source_offset=np.zeros(dim, np.float32),
            ),
            encoder=EncoderSpec("words", None, {}, F, WordEncoder.fingerprint),
        ),
    )  # fmt: skip


def clustered_contents(n_items: int, dim: int, seed: int = 0) -> Any:
    """A catalogue as towers make it: items around sqrt(N) centres, and users who like three neighbourhoods.

    Returns:
        ``ExportContents`` whose source vectors are its targets.
    """
    from recbole_llm.export.manifest import Block
    from recbole_llm.export.writer import ExportContents

    rng = np.random.default_rng(seed)
    n_centres = int(n_items**0.5)
    centres = rng.standard_normal((n_centres, dim), dtype=np.float32)
    centre_of = np.sort(rng.integers(0, n_centres, n_items))
    vector = rng.standard_normal((n_items, dim), dtype=np.float32)
    vector *= np.float32(0.7)
    for start in range(0, n_items, 1 << 16):  # a piece at a time: centres[centre_of] is as large as the table
        vector[start : start + (1 << 16)] += centres[centre_of[start : start + (1 << 16)]]
    bounds = np.searchsorted(centre_of, np.arange(n_centres + 1))
    histories = []
    for _ in range(N_USERS):
        liked = [rng.integers(bounds[c], bounds[c + 1], HISTORY // 2) for c in rng.integers(0, n_centres, 3)]
        histories.append(np.sort(rng.permutation(np.unique(np.concatenate(liked)))[:HISTORY]))
    return ExportContents(
        item_ids=[str(i) for i in range(n_items)],
        user_ids=[str(u) for u in range(N_USERS)],
        vector=vector,
        source=vector,
        bias=rng.standard_normal(n_items, dtype=np.float32),
        trained=np.ones(n_items, bool),
        blocks=(Block("learned", dim, 0.5, 1.0),),
        history_offsets=np.concatenate([[0], np.cumsum([len(history) for history in histories])]),
        history_items=np.concatenate(histories),
    )


# run by cornac's own interpreter: the model of its README, BPR, of the catalogue's size
CORNAC_MODEL = """
import json, sys
import numpy as np
import cornac
target, n_items, dim, histories = sys.argv[1], int(sys.argv[2]), int(sys.argv[3]), np.load(sys.argv[4])
rows = [(str(user), str(item), 1.0) for user, items in enumerate(histories) for item in items]
# every item once, so that the catalogue has its size
rows += [("everyone", str(item), 1.0) for item in range(n_items)]
data = cornac.data.Dataset.from_uir(rows)
model = cornac.models.BPR(k=dim, max_iter=1, seed=0, num_threads=1).fit(data)
assert model.total_items == n_items
path = model.save(target, save_trainset=True)
print(json.dumps({"model": path, "cornac": cornac.__version__}))
"""


def make_cornac_model(python: str, folder: Path, n_items: int, dim: int) -> dict[str, str]:
    """Fit and save cornac's BPR; its file and cornac's version."""
    folder.mkdir()
    np.save(folder / "histories.npy", made_histories(n_items))
    command = [python, "-c", CORNAC_MODEL, str(folder), str(n_items), str(dim), str(folder / "histories.npy")]
    printed = subprocess.run(command, capture_output=True, text=True, check=True).stdout
    found: dict[str, str] = json.loads(printed.splitlines()[-1])
    return found


def naive_app() -> Any:
    """The service of a tutorial, on the same export."""
    import fastapi
    from pydantic import BaseModel

    from recbole_llm.export.reader import load_export

    export = load_export(os.environ["BENCHMARK_EXPORT"])
    rows = {user: row for row, user in enumerate(export.user_ids)}
    app = fastapi.FastAPI()

    class Ask(BaseModel):
        user: str
        k: int = K

    class Item(BaseModel):
        id: str
        title: str
        score: float

    class Answer(BaseModel):
        items: list[Item]

    @app.post("/v1/recommend", response_model=Answer)
    def recommend(ask: Ask) -> Answer:
        start, stop = export.history_offsets[rows[ask.user] : rows[ask.user] + 2]
        seen = export.history_items[start:stop]
        scores = export.vector @ (export.source[seen].sum(0) / np.float32(len(seen) ** 0.5)) + export.bias
        scores[seen] = -np.inf
        top = np.argpartition(-scores, ask.k)[: ask.k]
        top = top[np.argsort(-scores[top])]
        return Answer(items=[Item(id=export.item_ids[i], title=export.records[i].title, score=scores[i]) for i in top])

    @app.get("/health/live")
    @app.get("/health/ready")
    def ready() -> dict[str, str]:
        return {"status": "ok"}

    return app


def our_app() -> Any:
    """The service, with :class:`WordEncoder` where the settings ask for an encoder."""
    from recbole_llm.serving.app import SETTINGS_VARIABLE, create_app
    from recbole_llm.serving.settings import Settings

    return create_app(Settings.from_json(os.environ[SETTINGS_VARIABLE]), lambda folder, manifest: WordEncoder())


class Server:
    """A server process on a free port.

    Args:
        name: ``naive``, ``cornac flask``, ``cornac gunicorn``, or ours under any other name.
        export: what it serves; for cornac the file of its model.
        python: interpreter that runs it.
        limits: of ours.
        settings: of ours.
    """

    def __init__(
        self,
        name: str,
        export: Path | str,
        *,
        python: str = sys.executable,
        limits: dict[str, Any] | None = None,
        **settings: Any,
    ) -> None:
        self.name = name
        self.kind = "GET" if name in (FLASK, GUNICORN) else "POST"
        with socket.socket() as probe:
            probe.bind(("127.0.0.1", 0))
            self.port = probe.getsockname()[1]
        one_thread = {name: "1" for name in ("OMP_NUM_THREADS", "OPENBLAS_NUM_THREADS", "MKL_NUM_THREADS")}
        self.environment = {**os.environ, **one_thread, "BENCHMARK_EXPORT": str(export)}
        for variable in SLOWS_NUMPY:
            self.environment.pop(variable, None)
        address = f"127.0.0.1:{self.port}"
        if self.kind == "GET":
            model = {"MODEL_PATH": str(export), "TRAIN_SET": f"{export}.trainset", "MODEL_CLASS": "cornac.models.BPR"}
            self.environment.update(model)
            self.environment.pop("PYTHONPATH", None)
            flask = ["flask", "--app", "cornac.serving.app", "run", "--host", "127.0.0.1", "--port", str(self.port)]
            gunicorn = ["gunicorn", "--workers", "1", "--threads", "4", "--bind", address, "cornac.serving.app:app"]
            command = [python, "-m", *(flask if name == FLASK else gunicorn)]
        else:
            path = os.pathsep.join([str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")])
            self.environment["PYTHONPATH"] = path
            if name != "naive":
                from recbole_llm.serving.app import SETTINGS_VARIABLE
                from recbole_llm.serving.settings import Limits, Settings

                ours = Settings(export=str(export), limits=Limits(**(limits or {})), **{"encoder": False, **settings})
                self.environment[SETTINGS_VARIABLE] = ours.to_json()
            target = f"serving_servers:{'naive_app' if name == 'naive' else 'our_app'}"
            command = [python, "-m", "uvicorn", "--factory", target, "--port", str(self.port)]
            command += ["--no-access-log", "--log-level", "warning"]
        self.command = command
        self.start()

    def start(self) -> None:
        """Start the process and wait for its first answer; seconds in ``seconds_to_ready``."""
        quiet = subprocess.DEVNULL
        started = time.perf_counter()
        self.process = subprocess.Popen(self.command, env=self.environment, stdout=quiet, stderr=quiet)
        while True:
            try:
                self.get("/recommend?uid=0&k=1" if self.kind == "GET" else "/health/ready")
                break
            except OSError:
                if self.process.poll() is not None or time.perf_counter() - started > 120:
                    raise SystemExit(f"the server {self.name} did not start") from None
                time.sleep(0.01)
        self.seconds_to_ready = time.perf_counter() - started

    def get(self, path: str) -> Any:
        """The JSON of an answer."""
        return json.loads(urllib.request.urlopen(f"http://127.0.0.1:{self.port}{path}", timeout=10).read())

    def put(self, path: str, body: Any) -> Any:
        """The JSON of the answer to a change."""
        return self.post(path, body, "PUT")

    def knows(self, item_id: str) -> bool:
        """Whether the server has an item."""
        try:
            return bool(self.get(f"/v1/items/{item_id}")["id"] == item_id)
        except urllib.error.HTTPError:
            return False

    def post(self, path: str, body: Any, method: str = "POST") -> Any:
        """The JSON of the answer to a JSON body."""
        url, headers = f"http://127.0.0.1:{self.port}{path}", {"content-type": "application/json"}
        request = urllib.request.Request(url, json.dumps(body).encode(), headers, method=method)
        return json.loads(urllib.request.urlopen(request, timeout=60).read())

    def ids(self, user: str) -> list[str]:
        """What the server recommends to a user."""
        if self.kind == "GET":
            answer: list[str] = self.get(f"/recommend?uid={user}&k={K}&remove_seen=true")["recommendations"]
            return answer
        return [item["id"] for item in self.post("/v1/recommend", {"user": user, "k": K})["items"]]

    def cpu_seconds(self) -> float:
        """User and system time of the process and its workers."""
        return sum(cpu_seconds_of(pid) for pid in _family(self.process.pid))

    def kill(self) -> None:
        """End the process by kill -9."""
        self.process.kill()
        self.process.wait()

    def stop(self) -> None:
        """End the process."""
        self.process.send_signal(signal.SIGTERM)
        try:
            self.process.wait(20)
        except subprocess.TimeoutExpired:
            self.kill()


def cpu_seconds_of(pid: int) -> float:
    """User and system time of a process."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / CLOCK


def _family(pid: int) -> list[int]:
    children = [int(child) for child in Path(f"/proc/{pid}/task/{pid}/children").read_text().split()]
    return [pid, *(one for child in children for one in _family(child))]
