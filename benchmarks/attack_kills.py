"""kill -9 at random moments of run, compare, tune, import and reload: what is there after it, and after the same again.

Part of ``attacks.py``. A kill takes the whole group of processes. Afterwards every file with a final name must be whole, and
the same command, begun again, must end as the one that nobody killed.
"""

import argparse
import json
import os
import random
import shutil
import signal
import subprocess
import sys
import threading
import time
import urllib.error
import urllib.request
import zipfile
from collections.abc import Callable
from contextlib import suppress
from functools import partial
from pathlib import Path
from typing import Any

Result = dict[str, Any]
COMMAND = "import sys; from recbole_llm.cli import main; sys.exit(main())"
SETTINGS = ["--gpu_id=", "--encoder=", "--embedding_size=16", "--train_batch_size=16", "--show_progress=False"]
DATA = ["-d", "toy", "--data_path=..", *SETTINGS]
COMMANDS: dict[str, list[str]] = {
    "run": ["run", "-m", "LLMTwoTower", *DATA, "--epochs=12", "--output", "result.json"],
    "compare": ["compare", "-m", "LLMTwoTower,EASE", *DATA, "--epochs=2", "--output", "out"],
    "tune": ["tune", "-m", "EASE", *DATA, "--epochs=1", "--params_file", "../space.hyper", "--output", "out"],
    "import": ["import", "../orders.csv", "--items", "../items.csv", "--dataset", "shop", "--quiet"],
}
AGAIN = {"run": [], "compare": [], "tune": [], "import": ["--overwrite"]}


def prepare(folder: Path) -> None:
    """Write what the commands read."""
    from conftest import write_dataset  # of the tests

    write_dataset(folder)
    (folder / "space.hyper").write_text("reg_weight choice [1.0, 100.0]\n")
    draw = random.Random(0)
    rows = [f"c{draw.randrange(3000)},p{draw.randrange(900)},2024-01-{1 + n % 28:02d}\n" for n in range(60_000)]
    (folder / "orders.csv").write_text("customer,product,date\n" + "".join(rows))
    (folder / "items.csv").write_text("product,title\n" + "".join(f"p{n},thing {n}\n" for n in range(900)))


def begin(source: str, folder: Path, arguments: list[str]) -> "subprocess.Popen[bytes]":
    """Start a command in a group of its own."""
    path = os.pathsep.join([source, str(Path(source) / "kernels")])
    environment = {**os.environ, "PYTHONPATH": path, "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    with (folder / "output.txt").open("ab") as log:
        return subprocess.Popen(
            [sys.executable, "-c", COMMAND, *arguments],
            cwd=folder, env=environment, stdout=log, stderr=log, start_new_session=True,
        )  # fmt: skip


def whole(folder: Path) -> list[str]:
    """Names of files that bear a final name and cannot be read."""
    from recbole_llm.bridge.checkpoint import read_checkpoint

    half = []
    for path in sorted(folder.rglob("*")):
        if path.name.startswith(".") or any(part.startswith(".") for part in path.relative_to(folder).parts):
            continue
        try:
            if path.suffix == ".json":
                json.loads(path.read_text())
            elif path.suffix == ".pth":
                with zipfile.ZipFile(path) as archive:
                    if archive.testzip() is not None:
                        raise ValueError("a sum is wrong")
                if path.name.startswith("LLMTwoTower"):  # files of stock models are RecBole's to read
                    read_checkpoint(path)
        except (ValueError, zipfile.BadZipFile) as error:
            half.append(f"{path.name}: {error}"[:200])
    return half


def left_of(command: str, folder: Path) -> Any:
    """What a finished command says, without its times."""
    if command == "run":
        result = json.loads((folder / "result.json").read_text())
        return {key: result[key] for key in ("best_valid_score", "best_valid_result", "test_result")}
    if command == "compare":
        rows = json.loads((folder / "out" / "comparison.json").read_text())["rows"]
        return [{key: row[key] for key in ("model", "mean", "p", "seeds")} for row in rows]
    if command == "tune":
        trials = json.loads((folder / "out" / "tuning.json").read_text())["trials"]
        return sorted(json.dumps([trial["params"], trial["score"], trial["test"]]) for trial in trials)
    return {path.name: path.read_bytes() for path in (folder / "dataset" / "shop").glob("shop.*")}


def arguments_of(command: str, folder: Path) -> list[str]:
    """The command anew, or the rest of a run whose checkpoint is there."""
    last = sorted(folder.glob("saved/*-last.pth")) if command == "run" else []
    if last:
        return ["run", "--resume", str(last[0]), "--data_path=..", "--output", "result.json"]
    return COMMANDS[command] + (AGAIN[command] if (folder / "dataset" / "shop").is_dir() else [])


def trials_of(folder: Path) -> list[str]:
    """The trials of a search that are written."""
    path = folder / "out" / "trials.jsonl"
    return path.read_text().splitlines()[1:] if path.is_file() else []


def killed(command: str, source: str, place: Path, times: int, say: Callable[..., None] = print) -> Result:
    """Kill a command so many times, each in a folder of its own."""
    kept = place / f"{command}-whole"
    kept.mkdir()
    started = time.monotonic()
    if begin(source, kept, COMMANDS[command]).wait():
        raise SystemExit(f"{command} fails of itself: {(kept / 'log').read_text()[-2000:]}")
    seconds, expected = time.monotonic() - started, left_of(command, kept)
    draw, hit, half, lost = random.Random(command), 0, [], []
    for number in range(4 * times):
        if hit == times:
            break
        folder = place / f"{command}-{number}"
        folder.mkdir()
        process = begin(source, folder, COMMANDS[command])
        with suppress(subprocess.TimeoutExpired):
            process.wait(draw.uniform(0.3, 1.0) * seconds)
        if process.poll() is not None:
            continue  # it was faster than the one that was measured
        os.killpg(process.pid, signal.SIGKILL)
        process.wait()
        hit += 1
        half += whole(folder)
        before = trials_of(folder)
        if begin(source, folder, arguments_of(command, folder)).wait():
            lost.append((folder / "output.txt").read_text()[-500:])
        elif left_of(command, folder) != expected or not set(before) <= set(trials_of(folder)):
            lost.append(f"{folder.name} ended otherwise")
        say(command, number, f"half {len(half)}, lost {len(lost)}", flush=True)
    return {"kills": hit, "half": half, "lost": lost}


def ask(server: Any, method: str, path: str, body: Any = None) -> Any:
    """Answer of a service."""
    url, data = f"http://127.0.0.1:{server.port}{path}", None if body is None else json.dumps(body).encode()
    request = urllib.request.Request(url, data, {"content-type": "application/json"}, method=method)
    with urllib.request.urlopen(request, timeout=60) as answer:
        return json.loads(answer.read())


def delete_items(server: Any, stop: threading.Event, first: int, acknowledged: set[str]) -> None:
    """Delete one item after another until the service is gone."""
    while not stop.is_set():
        try:
            ask(server, "DELETE", f"/v1/items/{first}")
        except OSError:  # HTTPError too: the change was not acknowledged
            return
        acknowledged.add(str(first))
        first += 1


def reload_exports(server: Any, stop: threading.Event, draw: random.Random) -> None:
    """Swap exports until the service is gone."""
    while not stop.is_set():
        try:
            ask(server, "POST", "/v1/admin/reload", {"export": draw.choice(["one", "two"])})
        except urllib.error.HTTPError:  # another swap is under way
            continue
        except OSError:
            return


def look(server: Any, deleted: list[str]) -> tuple[list[str], list[str]]:
    """What a service answers after a kill: what is half, and which deleted items are there."""
    half, lost = [], []
    if not ask(server, "POST", "/v1/recommend", {"user": "1", "k": 5})["items"]:
        half.append("an export that answers nothing")
    for item in deleted:
        try:
            ask(server, "GET", f"/v1/items/{item}")
            lost.append(item)
        except urllib.error.HTTPError as error:
            if error.code != 404:
                half.append(f"{item}: {error.code}")
    return half, lost


def killed_in_reloads(make_server: Callable[[], Any], times: int) -> Result:
    """Kill a service in reloads, with changes under way.

    Args:
        make_server: starts one on the same exports and the same log of changes.
        times: kills.
    """
    draw = random.Random(0)
    acknowledged: set[str] = set()
    report: Result = {"kills": times, "half": [], "lost": []}
    for number in range(times):
        server, stop = make_server(), threading.Event()
        threads = [
            threading.Thread(target=delete_items, args=(server, stop, 1000 * number, acknowledged)),
            threading.Thread(target=reload_exports, args=(server, stop, draw)),
        ]
        for thread in threads:
            thread.start()
        time.sleep(draw.uniform(0.3, 1.5))
        server.process.kill()
        server.process.wait()
        stop.set()
        for thread in threads:
            thread.join()
        server = make_server()
        half, lost = look(server, draw.sample(sorted(acknowledged), min(100, len(acknowledged))))
        report["half"] += half
        report["lost"] += lost
        server.stop()
    return report | {"acknowledged": len(acknowledged)}


def kills(folder: Path, options: argparse.Namespace, make_server: Callable[..., Any]) -> Result:
    """Kill every command that was asked for.

    Args:
        folder: an export.
        options: of ``attacks.py``.
        make_server: of ``attacks.py``.
    """
    place = folder.parent / "kills"
    place.mkdir()
    prepare(place)
    report: Result = {}
    for command in options.commands.split(","):
        if command == "reload":
            exports = place / "exports"
            exports.mkdir()
            for name in ("one", "two"):
                shutil.copytree(folder, exports / name)
            report[command] = killed_in_reloads(
                partial(make_server, exports, Path(options.source), "--state", str(place / "state")),
                options.kills,
            )
        else:
            report[command] = killed(command, options.source, place, options.kills)
    return report
