"""Two hundred hostile files imported: good tables, clean refusals, anything else, and the most memory of each kind.

    python benchmarks/hostile_imports.py --output benchmarks/results/hostile_imports.json

The files are those of ``tests/importing/hostile.py``. Memory is what an import took at most (VmHWM) beyond what was resident
when it began, so that it is Linux alone that can tell. ``--first`` and ``--last`` run a part; a file that exists is gone on
with.
"""

import argparse
import json
import os
import platform
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
FILES, PART = 200, 20
Json = dict[str, object]


def run(first: int, last: int) -> Json:
    """Import the files of these numbers in a process of its own."""
    paths = [str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    command = [sys.executable, "-W", "ignore", str(ROOT / "tests" / "importing" / "hostile.py"), str(first), str(last)]
    environment = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    done = subprocess.run(command, capture_output=True, text=True, env=environment, check=True)
    found: Json = json.loads(done.stdout.splitlines()[-1])
    return {"first": first, "last": last, **found}


def versions() -> dict[str, str]:
    """Of what reads the files."""
    import pyarrow

    return {"python": platform.python_version(), "pyarrow": pyarrow.__version__}


def main() -> None:
    """Import the files, part by part, and write what came of each part."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--first", type=int, default=0)
    parser.add_argument("--last", type=int, default=FILES)
    parser.add_argument("--output", type=Path, help="the counts as JSON")
    options = parser.parse_args()
    before = json.loads(options.output.read_text())["parts"] if options.output and options.output.is_file() else []
    parts = {part["first"]: part for part in before}
    for first in range(options.first, options.last, PART):
        if first not in parts:
            parts[first] = run(first, min(first + PART, options.last))
            print(json.dumps({k: parts[first][k] for k in ("first", "counts", "odd", "process_peak_mib")}), flush=True)
        if options.output:
            report = {"versions": versions(), "parts": [parts[each] for each in sorted(parts)]}
            options.output.write_text(json.dumps(report, indent=2) + "\n")


if __name__ == "__main__":
    main()
