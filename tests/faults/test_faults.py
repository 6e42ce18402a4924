"""Runs that are killed, stopped or out of disk lose nothing."""

import os
import re
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from waiting import LIMIT

pytest.importorskip("recbole")
pytestmark = pytest.mark.skipif(not hasattr(os, "fork"), reason="children are forked")

SCRIPT = Path(__file__).with_name("kill_and_resume.py")


def in_an_interpreter_of_its_own(code):
    """A process that is forked should have no threads."""
    lines = f"""
import sys
sys.path[:0] = [{str(SCRIPT.parent)!r}, {str(SCRIPT.parents[1])!r}]
import kill_and_resume as faults
from pathlib import Path
"""
    return subprocess.run([sys.executable, "-c", lines + code], capture_output=True, text=True, timeout=4 * LIMIT)


@pytest.mark.slow
def test_killed_runs_resume_to_the_same_bits_and_a_full_disk_leaves_the_earlier_checkpoint(tmp_path):
    """The limit on a file's size stands for the disk: it is lowered once the first checkpoint is there."""
    (tmp_path / "kills").mkdir()
    (tmp_path / "disk").mkdir()
    out = in_an_interpreter_of_its_own(f"""
import resource, signal
from recbole_llm.bridge.training import trainer
trainer.SECONDS_BETWEEN_CHECKPOINTS = 0.02  # some epochs are written, some are not
print(faults.compare_killed_runs(Path({str(tmp_path / "kills")!r}), 2, ["--epochs=6"]), "differ")
trainer.SECONDS_BETWEEN_CHECKPOINTS = 0
signal.signal(signal.SIGXFSZ, signal.SIG_IGN)
folder = Path({str(tmp_path / "disk")!r})
write = trainer.write_checkpoint
def filling(path, state, config):
    if state["epoch"] == 3:
        resource.setrlimit(resource.RLIMIT_FSIZE, (20_000, resource.RLIM_INFINITY))
    write(path, state, config)
trainer.write_checkpoint = filling
data = "--data_path=" + {str(tmp_path / "kills")!r}
code = faults.exit_code(faults.start(folder, [*faults.RUN, "--epochs=6", data]))
(last,) = folder.glob("saved/*-last.pth")
print(code, faults.read_checkpoint(last)["epoch"], faults.leftovers(folder))
trainer.write_checkpoint = write
code = faults.exit_code(faults.start(folder, ["--resume", str(last), data]))
print(code, faults.read_checkpoint(last)["epoch"] > 3)
""")
    assert out.returncode == 0, out.stdout + out.stderr[-3000:]
    log = (tmp_path / "disk" / "run.log").read_text()
    assert out.stdout.count("equal") >= 1
    assert out.stdout.splitlines()[-3:] == ["0 differ", "2 2 []", "0 True"], out.stdout + log[-2000:]
    assert re.search(r"error: The checkpoint .* could not be written", log)


@pytest.mark.slow
def test_ten_killed_and_terminated_runs_resume_to_the_same_bits(tmp_path):
    out = in_an_interpreter_of_its_own(f"""
import signal
signals = signal.SIGKILL, signal.SIGTERM
print(faults.compare_killed_runs(Path({str(tmp_path)!r}), 10, ["--epochs=8"], signals), "differ")
""")
    assert out.returncode == 0, out.stdout + out.stderr[-3000:]
    assert out.stdout.splitlines()[-1] == "0 differ", out.stdout


def test_a_postponed_signal_waits_and_a_second_one_does_not():
    from recbole_llm.bridge.training.interruption import Interruption

    done = []
    with pytest.raises(SystemExit), Interruption() as interruption:
        interruption.postpone()
        os.kill(os.getpid(), signal.SIGTERM)
        with interruption.held():
            done.append("saved the best")
        assert interruption.waiting
        done.append("end of the epoch")
        interruption.allow()
        done.append("not reached")
    assert done == ["saved the best", "end of the epoch"]
    with pytest.raises(KeyboardInterrupt), Interruption() as interruption:
        interruption.postpone()
        os.kill(os.getpid(), signal.SIGINT)
        os.kill(os.getpid(), signal.SIGINT)
        done.append("not reached")
    assert len(done) == 2


@pytest.mark.parametrize("name", ["SIGTERM", "SIGINT"])
def test_a_signal_during_a_save_waits_for_it(name):
    from recbole_llm.bridge.training.interruption import Interruption

    number, done = getattr(signal, name), []
    before = signal.getsignal(number)
    with pytest.raises(KeyboardInterrupt if name == "SIGINT" else SystemExit) as caught, Interruption() as interruption:
        with interruption.held():
            os.kill(os.getpid(), number)
            done.append("saved")
        done.append("not reached")
    assert done == ["saved"]
    assert name == "SIGINT" or caught.value.code == 128 + number
    assert signal.getsignal(number) is before
