"""Several processes give one answer: said once, with the figures of one process, and its proposals run."""

import json
import os
import re
import shlex
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from waiting import LIMIT

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
if not torch.distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)
from recbole_llm import cli
from recbole_llm.bridge.checkpoint import read_checkpoint
from recbole_llm.checkpoints import newest_checkpoint

ROOT = Path(__file__).resolve().parents[2]


def answer(out):
    """The words and the two tables."""
    return re.search(r"^Of 100 held-out .+?(?=\n\nlog: )", out, re.M | re.S)[0]


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_two_processes_of_torchrun_answer_once_as_one_process_does(toy_path, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    quick = ["--gpu_id=", "--encoder=", "--epochs=2", "--embedding_size=16", "--history_dropout=0.0"]

    def command(name):
        given = [f"--data_path={toy_path}", "--train_batch_size=25", f"--checkpoint_dir={tmp_path / name}"]
        return ["run", "--dataset", "toy", *given, *quick, "--output", f"{name}.json"]

    assert cli.main(command("alone")) == 0
    alone = capfd.readouterr().out
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "recbole_llm", *command("two")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=4 * LIMIT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count("held-out purchases") == 1 and done.stdout.count("written: two.json") == 1
    assert answer(done.stdout) == answer(alone)
    # a line a stage, of one process
    stages = [line.split("█")[0].strip() for line in done.stderr.splitlines() if "█" in line]
    assert len(stages) == len(set(stages)) == 7
    records = [json.loads(Path(f"{name}.json").read_text())["report"] for name in ("alone", "two")]
    history, expected = records[1].pop("history"), records[0].pop("history")
    assert records[0] == records[1]
    assert history["loss"] == pytest.approx(expected["loss"], rel=1e-5) and history["valid"] == expected["valid"]
    kept = read_checkpoint(newest_checkpoint(tmp_path / "two"))["report"]
    assert {name: kept[name] for name in records[1]} == records[1]
    # what is proposed needs no id to be put in
    lines = [
        shlex.split(line)[2:] for line in done.stdout.splitlines() if line.startswith("next: recbole-llm recommend")
    ]
    assert cli.main(lines[0]) == 0
    rows = Path("recommendations.csv").read_text().splitlines()
    assert len({row.split(",")[0] for row in rows[1:]}) == 60
