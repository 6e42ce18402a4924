"""A process that dies or is forked while a bar is drawn leaves the bars of the others usable; in fresh interpreters."""

import ast
import io
import os
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import LIMIT

ROOT = Path(__file__).resolve().parents[1]
OURS = """
import types
import torch
from recbole_llm.content.features import encode_texts
encoder = types.SimpleNamespace(
    modality="text", dim=2, batch_cost=None, fingerprint="f", describe=dict,
    prepare=lambda raw: [types.SimpleNamespace(text=text, size=1, cut=0) for text in raw],
    encode=lambda batch: torch.ones(len(batch), 2),
)
def draw():
    encode_texts(["a", "b"], encoder, show_progress=True)
"""
RECBOLE = """
import recbole_llm
from recbole.trainer import trainer
def draw():
    list(trainer.tqdm(range(2), ncols=100))
"""
RECBOLE_FIRST = """
from recbole.trainer import trainer
def draw():
    list(trainer.tqdm(range(2), ncols=100))
draw()
import recbole_llm
"""
DERIVED_FIRST = """
from tqdm.asyncio import tqdm
list(tqdm(range(2)))
import recbole_llm.progress
recbole_llm.progress.use_thread_lock()
def draw():
    list(tqdm(range(2)))
"""
# a stream that tells when something is written to it, and then does what a test needs
STREAM = """
import faulthandler, os, signal, sys, threading, time
faulthandler.dump_traceback_later(120, exit=True)
class Stream:
    encoding = "utf-8"
    def __init__(self, then):
        self.then = then
    def write(self, text):
        self.then()
    def flush(self):
        pass
"""
# a child that is killed as it draws, and one that is forked while a thread draws
KILLED_AND_FORKED = """
draw()  # the lock is there before the fork
reading, writing = os.pipe()
child = os.fork()
if child == 0:
    sys.stderr = Stream(lambda: (os.write(writing, b"!"), signal.pause()))
    draw()
    os._exit(1)
os.close(writing)
assert os.read(reading, 1) == b"!"  # the child is drawing
os.kill(child, signal.SIGKILL)
os.waitpid(child, 0)
draw()
if os.fork() == 0:
    signal.alarm(60)
    draw()
    os._exit(0)
killed = os.waitstatus_to_exitcode(os.wait()[1])
drawing = threading.Event()
stderr, sys.stderr = sys.stderr, Stream(lambda: (drawing.set(), time.sleep(0.2)))
thread = threading.Thread(target=draw)
thread.start()
drawing.wait()
sys.stderr = stderr
if os.fork() == 0:
    signal.alarm(60)
    draw()
    os._exit(0)
print(killed, os.waitstatus_to_exitcode(os.wait()[1]))
thread.join()
"""


def run(code):
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")])}
    done = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, env=environment, timeout=2 * LIMIT
    )
    assert done.returncode == 0, done.stderr
    return done.stdout.split()


@pytest.mark.skipif(not hasattr(os, "fork"), reason="needs fork")
@pytest.mark.parametrize(
    "bars",
    [OURS, RECBOLE, RECBOLE_FIRST, DERIVED_FIRST],
    ids=["ours", "RecBole's", "RecBole's, drawn before our import", "a derived class, drawn before"],
)
def test_bars_of_other_processes_go_on(bars):
    if "recbole.trainer" in bars:
        pytest.importorskip("recbole")
    assert run(STREAM + bars + KILLED_AND_FORKED) == ["0", "0"]


def test_a_lock_of_the_program_itself_stays():
    code = (
        "import threading; from tqdm import tqdm; lock = threading.Lock(); tqdm.set_lock(lock)\n"
        "from recbole_llm.progress import progress_bar\n"
        "print(list(progress_bar(range(3), disable=True)), progress_bar().get_lock() is lock)"
    )
    assert run(code) == ["[0,", "1,", "2]", "True"]


def test_a_log_file_keeps_few_states_of_a_bar(monkeypatch):
    from recbole_llm.progress import SECONDS_IN_A_FILE, progress_bar

    class Terminal(io.StringIO):
        def isatty(self):
            return True

    def interval(stream, **options):
        monkeypatch.setattr(sys, "stderr", stream)
        with progress_bar(total=2, **options) as bar:
            return bar.mininterval

    assert interval(io.StringIO()) == SECONDS_IN_A_FILE
    assert interval(Terminal()) == 0.1
    assert interval(Terminal(), file=io.StringIO()) == SECONDS_IN_A_FILE
    assert interval(io.StringIO(), mininterval=2.0) == 2.0


def test_every_bar_is_made_in_one_place():
    """Another use of tqdm would bring its default lock back."""
    makers = set()
    for path in sorted((ROOT / "recbole_llm").rglob("*.py")):
        for node in ast.walk(ast.parse(path.read_text(encoding="utf-8"))):
            names = [alias.name for alias in node.names] if isinstance(node, ast.Import) else []
            names += [node.module or ""] if isinstance(node, ast.ImportFrom) else []
            if any(name.split(".")[0] == "tqdm" for name in names):
                makers.add(path.relative_to(ROOT / "recbole_llm").as_posix())
    assert makers == {"progress.py"}
