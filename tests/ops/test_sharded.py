"""A catalogue in shards equals the whole one: two and three processes over gloo, started by torchrun."""

import os
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from waiting import LIMIT

from recbole_llm_kernels import sharded

WORKER = Path(__file__).with_name("sharded_worker.py")


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.slow
@pytest.mark.parametrize("processes", [2, 3])
def test_shards_equal_the_whole_catalogue(processes):
    command = ["-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={processes}", str(WORKER)]
    out = subprocess.run(
        [sys.executable, *command],
        capture_output=True,
        text=True,
        timeout=4 * LIMIT,
        env={**os.environ, "OMP_NUM_THREADS": "1"},
    )
    assert out.returncode == 0, out.stdout + out.stderr[-4000:]
    checks = ("losses", "ranking", "training", "repeats", "disorder", "mistakes")
    assert out.stdout.split() == [word for name in checks for word in (name, "passed")]


def test_without_a_process_group_it_says_how_to_start():
    x = torch.ones(2, 3)
    with pytest.raises(ValueError, match="start the script with torchrun"):
        sharded.score_topk(x, x, 1)
