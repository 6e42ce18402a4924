"""What Windows lacks is not needed: no fork, no fcntl, no resource, no SIGHUP. Windows itself is not tested."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]
PROGRAM = """
import os, signal, sys, threading, random, logging, concurrent.futures, multiprocessing, subprocess
import torch
for name in ("fork", "register_at_fork", "getuid"):
    delattr(os, name)
del signal.SIGHUP, signal.SIGKILL
sys.modules["fcntl"] = sys.modules["resource"] = None
import recbole_llm, recbole_llm_kernels
import recbole_llm.importer, recbole_llm.recommend, recbole_llm.importing.cold_split, recbole_llm.content.features
from recbole_llm.bridge.training import interruption
from recbole_llm.bridge.experiments import comparison as compare
from recbole_llm.bridge.experiments import tuning
from recbole_llm.model import LLMTwoTower
print("imported", len([name for name in sys.modules if name.startswith("recbole_llm")]))
"""


def test_everything_imports_without_what_windows_lacks(tmp_path):
    pytest.importorskip("recbole")
    search = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    done = subprocess.run([sys.executable, "-c", PROGRAM], capture_output=True, text=True, env=env, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.startswith("imported")
