"""What is asked of the files of a version, in the working directory: by ``make.py`` once, by the tests ever after.

Only commands, HTTP routes and the functions that exports and the README name are used.
"""

import json
import os
import signal
import subprocess
import sys
import time
import urllib.error
import urllib.request
from contextlib import contextmanager
from pathlib import Path

from ports import free_port

K = 5
SERVED = 12  # items in an answer of the service
ITEMS = ("i2", "i10", "i4")
USERS = ("u0", "u1", "u2", "u17", "u29")
TEXT = "a space story of rocket comet moon"
RELATIVE = 1e-5


def call(*arguments):
    """A command in this process."""
    from recbole_llm.cli import main

    code = main([str(argument) for argument in arguments])
    assert code == 0, f"recbole-llm {arguments[0]} gave {code}; the message is on standard error"


# ------------------------------------------------------------------ recommendations


def paths_of(name):
    """The paths that a run was given, by key: no checkpoint is asked for them, so commands are given them again."""
    if name == "time":
        return {"data_path": "data", "item_features_file": "data/shop/vectors.npy"}
    return {"data_path": "data", "encoder": "encoder", "feature_cache_dir": "features"}


def answers(model, name):
    """By ``recbole-llm recommend`` and ``similar`` from a checkpoint or an export: for every user, some items, a text.

    Args:
        model: file or folder.
        name: of the run.

    Returns:
        Who asks -> rows of item, score, probability and whether it is cold.
    """
    paths = paths_of(name)
    if Path(model).is_dir():  # that of "both" holds its encoder
        paths = {"encoder": "encoder"} if name == "cold" else {}
    given = [f"--{key}={value}" for key, value in paths.items()]
    if not Path(model).is_dir():
        given += ["--history", "train"]  # as they were recorded
    found = _rows("recommend", model, *given)
    found |= {f"items {who}": rows for who, rows in _rows("recommend", model, "--items", *ITEMS, *given).items()}
    found |= {f"similar {who}": rows for who, rows in _rows("similar", model, "--item", ITEMS[0], *given).items()}
    if name != "time":
        found |= {f"text {who}": rows for who, rows in _rows("recommend", model, "--text", TEXT, *given).items()}
    return found


def _rows(command, model, *options):
    call(command, model, *options, "--k", K, "--output", "answers.jsonl")
    found = {}
    for row in map(json.loads, Path("answers.jsonl").read_text().splitlines()):
        found.setdefault(row["user"], []).append([row["item"], row["score"], row["probability"], row["cold"]])
    Path("answers.jsonl").unlink()
    return found


def explained(folder):
    """The snippet of an export's model card, with the reasons."""
    from recbole_llm.serving.artifact import load_export
    from recbole_llm.serving.recommend import Recommender, Request

    recommender = Recommender(load_export(folder))
    found = {}
    for user in USERS:
        items = recommender.recommend(Request(user=user, k=2, explain=3)).items
        found[user] = [
            [item.id, item.score, item.rest, item.bias, [[r.id, r.contribution] for r in item.reasons]]
            for item in items
        ]
    return found


def resume(last, *options):
    """Losses of the epochs and test metrics of ``recbole-llm run --resume`` with four more; the files stay as they are."""
    Path("resumed").mkdir()
    for name in (last, last.replace("-last", "")):
        Path("resumed", name).write_bytes(Path(name).read_bytes())
    epochs = len(losses("resumed/" + last)) + 4
    given = [f"--{key}={value}" for key, value in paths_of("both").items()]
    call(
        "run", "--resume", f"resumed/{last}", "--output", "resumed/result.json", f"--epochs={epochs}", *given, *options
    )
    result = json.loads(Path("resumed/result.json").read_text())
    return {"losses": losses("resumed/" + last)} | {name: float(value) for name, value in result["test_result"].items()}


def losses(last):
    """Of the epochs behind a checkpoint of the last epoch."""
    import torch

    import recbole_llm  # noqa: F401

    found = torch.load(last, weights_only=False)["train_loss_dict"]
    return [float(found[epoch]) for epoch in sorted(found)]


# ------------------------------------------------------------------ the service


@contextmanager
def service(export, state, *options):
    """``recbole-llm serve`` in a process; gives a function of method, path and body that answers status and content."""
    port = free_port()
    options = ["--state", str(state), "--port", str(port), "--no-access-log", *options]
    import recbole_llm
    import recbole_llm_kernels

    paths = [str(Path(package.__file__).parents[1]) for package in (recbole_llm, recbole_llm_kernels)]  # this process's
    paths.append(os.environ.get("PYTHONPATH", ""))
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    with Path("serve.log").open("w") as log:
        process = subprocess.Popen(
            [sys.executable, "-m", "recbole_llm", "serve", export, *options], stdout=log, stderr=log, env=environment
        )

    def ask(method, path, body=None):
        data = None if body is None else json.dumps(body).encode()
        headers = {"content-type": "application/json"} if data else {}
        request = urllib.request.Request(f"http://127.0.0.1:{port}{path}", data, headers, method=method)
        try:
            with urllib.request.urlopen(request, timeout=120) as answer:
                return answer.status, json.loads(answer.read())
        except urllib.error.HTTPError as error:
            return error.code, json.loads(error.read())

    try:
        _wait(ask, process)
        yield ask
    finally:
        process.send_signal(signal.SIGTERM)
        process.wait(120)
    Path("serve.log").unlink()


def _wait(ask, process):
    """Until the service is ready and its encoder too."""
    deadline = time.monotonic() + 120
    while True:
        try:
            if ask("GET", "/health/ready")[1]["encoder"] in ("ready", "none"):
                return
        except (urllib.error.URLError, ConnectionError):
            pass
        assert process.poll() is None and time.monotonic() < deadline, Path("serve.log").read_text()
        time.sleep(0.05)


def service_answers(ask):
    """What a service with the log of changes answers: users, items, texts, a filter, and each item that was changed."""
    asked = {f"user {user}": {"user": user} for user in USERS}
    asked["new items"] = {"items": ["new1", "i2"]}
    asked["refitted"] = {"items": ["i7"]}
    asked["deleted in the history"] = {"items": ["i3", "i4"]}
    asked["text"] = {"text": TEXT}
    asked["filter"] = {"user": "u0", "filter": {"genre": "farm"}}
    asked["year"] = {"user": "u0", "filter": {"year": {"gte": 2001}}}
    found = {}
    for what, body in asked.items():
        status, content = ask("POST", "/v1/recommend", {"k": SERVED, **body})
        assert status == 200, content
        rows = [[item[key] for key in ("id", "score", "probability", "cold", "title")] for item in content["items"]]
        found[what] = {
            "items": rows,
            "source": content["source"],
            "unknown": content["unknown"],
            "seq": content["overlay_seq"],
        }
    for item in ("new1", "new2", "new3", "new4", "i3", "i5", "i7"):
        status, content = ask("GET", f"/v1/items/{item}")
        fields = ("title", "text", "attributes", "cold", "added_at")
        found[f"item {item}"] = [status, {key: content[key] for key in fields} if status == 200 else {}]
    return found


# ------------------------------------------------------------------ comparing


def differences(found, expected, what=""):
    """Sentences, one per difference: equal ids, words and shapes, numbers within ``RELATIVE``."""
    if isinstance(expected, dict) and isinstance(found, dict):
        told = [f"{what}/{key} is missing" for key in expected if key not in found]
        return told + [
            t for key in expected if key in found for t in differences(found[key], expected[key], f"{what}/{key}")
        ]
    if isinstance(expected, list) and isinstance(found, list) and len(expected) == len(found):
        return [
            t for n, pair in enumerate(zip(found, expected, strict=True)) for t in differences(*pair, f"{what}/{n}")
        ]
    if isinstance(expected, float) and isinstance(found, (int, float)):
        # a score near 0 is a difference of larger numbers
        return (
            []
            if abs(found - expected) <= RELATIVE * max(abs(expected), 1.0)
            else [f"{what}: {found!r} for {expected!r}"]
        )
    return [] if found == expected else [f"{what}: {found!r} for {expected!r}"]
