"""Two hundred hostile files: a good import or one line of ValueError, and not much memory."""

import json
import subprocess
import sys
from pathlib import Path

import pytest

pytest.importorskip("pyarrow", reason="the extra 'import'")

from made_files import environment

FILES = 200


@pytest.mark.slow
def test_hostile_files_are_imported_or_refused_in_little_memory():
    command = [sys.executable, "-W", "ignore", str(Path(__file__).with_name("hostile.py")), "0", str(FILES)]
    done = subprocess.run(command, capture_output=True, text=True, env=environment(), timeout=3000)
    assert done.returncode == 0, done.stderr[-2000:]
    found = json.loads(done.stdout.splitlines()[-1])
    assert found["odd"] == {}
    assert sum(found["counts"].values()) == FILES and min(found["counts"].values()) >= FILES // 10
    assert max(most["peak_mib"] for most in found["most_memory"].values()) < 1024  # beyond what was resident before
    assert found["process_peak_mib"] < 1024
