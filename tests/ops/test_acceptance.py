"""The acceptance on a card: it keeps to its time, keeps what was measured, and a step that hangs or fails stops no other."""

import json
import sys
import time
from pathlib import Path

import pytest
import torch

sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import acceptance_steps
import gpu_acceptance
import kernel_cases
from test_contract import Case

# what a step does, by its name: writes a row and hangs, whatever it is told; fails; writes half a line and hangs; is wrong
PROGRAM = """
import signal, sys, time
step, file = sys.argv[1], sys.argv[3]
def put(text):
    with open(file, "a") as out:
        out.write(text)
put('{"passed": true, "number": 1}\\n')
if step == "tests":
    signal.signal(signal.SIGTERM, signal.SIG_IGN)
    time.sleep(600)
if step == "repeats":
    raise SystemExit("cannot go on")
if step == "speed":
    put('{"passed": tr')
    time.sleep(600)
if step == "profile":
    put('{"passed": false, "operator": "pair_bce"}\\n')
"""


@pytest.fixture
def faults(tmp_path, monkeypatch):
    program = tmp_path / "program.py"
    program.write_text(PROGRAM)
    monkeypatch.setattr(gpu_acceptance, "PROGRAM", program)
    monkeypatch.setattr(gpu_acceptance, "GRACE", 0.2)
    return tmp_path / "out"


@pytest.mark.slow
def test_a_step_that_hangs_or_fails_stops_no_other(faults):
    began = time.monotonic()
    assert gpu_acceptance.main(["--out", str(faults), "--device", "cpu", "--limit", "12"]) == 1
    assert time.monotonic() - began < 12 + 2
    summary = json.loads((faults / "summary.json").read_text())
    assert summary["machine"]["passed"] and summary["number"] == 1
    for step in ("tests", "speed"):
        assert not summary[step]["passed"] and summary[step]["rows"] == 1 and "were over" in summary[step]["stopped"]
    assert summary["repeats"]["failed"][0] == "exit status 1" and "cannot go on" in summary["repeats"]["failed"][1]
    assert summary["profile"]["wrong"] == [{"passed": False, "operator": "pair_bce"}]
    assert summary["sanitizer"] == {"passed": False, "skipped": "needs a card"}


def test_time_that_a_step_leaves_goes_to_the_next():
    """And never what those to come are promised."""
    limit, steps = 540.0, list(gpu_acceptance.PLAN)
    for number, step in enumerate(steps):
        waiting, share = steps[number + 1 :], gpu_acceptance.PLAN[step].most * limit
        promised = sum(gpu_acceptance.PLAN[x].most for x in waiting) * limit
        assert gpu_acceptance.allowance(step, waiting, limit, limit) == pytest.approx(limit - promised)
        assert gpu_acceptance.allowance(step, waiting, promised + share, limit) == pytest.approx(share)
        assert gpu_acceptance.allowance(step, waiting, 5.0, limit) == pytest.approx(
            min(5.0, max(share, 5.0 - promised))
        )
    assert sum(share.most for share in gpu_acceptance.PLAN.values()) <= 1


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_nothing_is_run(tmp_path, capsys):
    assert gpu_acceptance.main(["--out", str(tmp_path / "out")]) == 2
    assert "nothing was run and nothing was written" in capsys.readouterr().out and not (tmp_path / "out").exists()


def test_every_operator_takes_part():
    names = {name for name, _ in acceptance_steps.calls("cpu", torch.float32, 16, 12, 300)}
    case = Case()
    assert names == {*case.calls(), *kernel_cases.steps(case, *case.leaves)}
    for _, call in acceptance_steps.calls("cpu", torch.float32, 16, 12, 300):
        assert all(x.isfinite().all() for x in call())


@pytest.mark.slow
def test_a_rehearsal_on_the_torch_backend(tmp_path):
    """Every step that a CPU has, with a compiler that takes its time, within a limit."""
    began = time.monotonic()
    given = ["--out", str(tmp_path), "--device", "cpu", "--limit", "240", "--slow-compiler", "0.3"]
    assert gpu_acceptance.main(given) == 0
    assert time.monotonic() - began < 240
    speed = gpu_acceptance.rows_of(tmp_path / "speed.jsonl")
    assert {row["dtype"] for row in speed} == {"bfloat16", "float32"}
    assert all(row["ours"]["full_ms"] > 0 for row in speed)
    assert any(row["eager"]["forward_ms"] > 0 for row in speed if "forward_ms" in row["eager"])
