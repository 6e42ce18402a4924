"""The interpreted Triton tests, in a process of their own: Triton interprets for a whole process or not at all."""

import os
import subprocess
import sys
from importlib.metadata import version
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.skipif(find_spec("triton") is None, reason="Triton is not installed")
@pytest.mark.skipif(os.environ.get("TRITON_INTERPRET") == "1", reason="this process interprets already")
@pytest.mark.slow
@pytest.mark.parametrize("part", ["catalogue", "not catalogue"])
def test_interpreted_kernels(part):
    if version("triton").startswith("3.2."):
        pytest.skip(
            "Triton 3.2's interpreter knows no int1, nor the places where later ones are watched; it is compiled with"
        )
    environment = os.environ | {
        "TRITON_INTERPRET": "1",
        "PYTEST_ADDOPTS": f"-k '{part}'",
        "CUDA_VISIBLE_DEVICES": "",
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels")]),
        "OMP_NUM_THREADS": "1",
    }
    tests = [
        str(ROOT / "tests" / "ops" / name)
        for name in ("test_triton_interpreted.py", "test_interpreter_checks.py", "test_row_lists.py")
    ]
    command = [sys.executable, "-m", "pytest", "-q", "--tb=short", "-p", "no:cacheprovider", *tests]
    done = subprocess.run(command, cwd=ROOT, env=environment, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout[-6000:] + done.stderr[-2000:]
    assert " passed" in done.stdout and "skipped" not in done.stdout, done.stdout[-2000:]
