"""Kill training runs at random moments, resume them, and compare with a run that was left alone.

``python tests/faults/kill_and_resume.py --kills 20`` from the repository root; prints one line per kill, exits 1 on a
difference. Each child is forked from this process, which has imported everything: a run takes a second, not ten.
"""

import argparse
import json
import os
import random
import signal
import sys
import time
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
ROOT = Path(__file__).resolve().parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "tests")]

import torch  # noqa: E402
from toy_data import write_dataset  # noqa: E402

import recbole_llm  # noqa: E402, F401
from recbole_llm import cli  # noqa: E402
from recbole_llm.bridge.checkpoint import read_checkpoint  # noqa: E402

SETTINGS = ["--gpu_id=", "--encoder=", "--embedding_size=16", "--train_batch_size=16", "--show_progress=False"]
RUN = ["-m", "LLMTwoTower", "-d", "toy", "--stopping_step=4", *SETTINGS]


def start(folder, arguments):
    """Fork a child that runs ``recbole-llm run`` in ``folder``; its process id."""
    child = os.fork()
    if child:
        return child
    code = 1
    try:
        os.chdir(folder)
        log = os.open("run.log", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
        os.dup2(log, 1)
        os.dup2(log, 2)
        code = cli.main(["run", *arguments, "--output", "result.json"])
    except SystemExit as stop:
        code = stop.code
    finally:
        sys.stdout.flush()
        os._exit(code)


def exit_code(child):
    return os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])


def arguments_of(folder, settings):
    """A fresh run, or the rest of the one whose checkpoint is in ``folder``."""
    last = sorted(folder.glob("saved/*-last.pth"))
    again = [setting for setting in settings if setting.startswith("--data_path=")]  # no path is taken of a file
    return ["--resume", str(last[0]), *again] if last else [*RUN, *settings]


def outcome(folder):
    """Everything that a finished run leaves: metrics, best weights with the blend, last weights, losses, optimizer."""
    result = json.loads((folder / "result.json").read_text())
    kept = {key: result[key] for key in ("best_valid_score", "best_valid_result", "test_result")}
    (last,) = folder.glob("saved/*-last.pth")
    best = read_checkpoint(str(last).replace("-last.pth", ".pth"))
    last = read_checkpoint(last)
    names = ("epoch", "cur_step", "best_valid_score", "state_dict", "other_parameter", "optimizer", "train_loss_dict")
    names += ("random_states",)
    return kept, {n: best[n] for n in names}, {n: last[n] for n in names}


def equal(a, b):
    if isinstance(a, torch.Tensor):
        return isinstance(b, torch.Tensor) and torch.equal(a, b)
    if isinstance(a, dict):
        return a.keys() == b.keys() and all(equal(a[key], b[key]) for key in a)
    if isinstance(a, (list, tuple)):
        return len(a) == len(b) and all(map(equal, a, b))
    return a == b


def leftovers(folder):
    return [path.name for path in folder.glob("saved/.*tmp*")]


def compare_killed_runs(folder, kills, settings, signals=(signal.SIGKILL,), seed=0, say=print):
    """Kill and resume until ``kills`` kills have hit a living run; the number of differing or lost runs."""
    write_dataset(folder)
    settings = [f"--data_path={folder}", *settings]
    whole = folder / "whole"
    whole.mkdir()
    began = time.perf_counter()
    assert exit_code(start(whole, [*RUN, *settings])) == 0, (whole / "run.log").read_text()[-3000:]
    seconds = time.perf_counter() - began
    expected, rng, hit, bad, trial = outcome(whole), random.Random(seed), 0, 0, 0
    while hit < kills:
        trial += 1
        part = folder / f"killed-{trial}"
        part.mkdir()
        moments = []
        for _ in range(rng.randint(1, 3)):
            child, moment = start(part, arguments_of(part, settings)), rng.uniform(0.05, 1.0) * seconds
            time.sleep(moment)
            if os.waitpid(child, os.WNOHANG) != (0, 0):
                break  # finished before
            number = rng.choice(signals)
            os.kill(child, number)
            code = exit_code(child)
            moments.append(f"{signal.Signals(number).name} after {moment:.2f} s, exit code {code}")
        hit += len(moments)
        code = exit_code(start(part, arguments_of(part, settings)))
        same = code == 0 and equal(outcome(part), expected) and not leftovers(part)
        bad += not same
        say(f"run {trial}: {'; '.join(moments) or 'not hit'}: {'equal' if same else 'DIFFERENT OR LOST'}")
    return bad


if __name__ == "__main__":
    import tempfile

    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--kills", type=int, default=20)
    parser.add_argument("--seed", type=int, default=0)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as place:
        sys.exit(
            compare_killed_runs(
                Path(place), options.kills, ["--epochs=12"], (signal.SIGKILL, signal.SIGTERM), options.seed
            )
            > 0
        )
