"""Record the golden runs anew: ``python tests/golden/record.py [NAME ...]``, with the project importable.

To be run where a change of the numbers is meant, and the diff of ``expected/`` read before it is committed. With ``--against``
nothing is written: what differs from the record by more than a hundredth of the tolerances is printed, which tells how far
another processor, thread count or library version is from them.
"""

import argparse
import os
import sys
import tempfile
import time
from contextlib import redirect_stdout
from pathlib import Path

os.environ.setdefault("OMP_NUM_THREADS", "1")
os.environ.setdefault("HF_HUB_OFFLINE", "1")
HERE = Path(__file__).resolve().parent
sys.path[:0] = [str(HERE), str(HERE.parents[1]), str(HERE.parents[1] / "kernels")]

import golden_runs  # noqa: E402


def main():
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("names", nargs="*", default=list(golden_runs.RUNS), help="of runs; without any: all")
    parser.add_argument("--against", action="store_true", help="compare with the record and write nothing")
    options = parser.parse_args()
    if options.against:
        golden_runs.METRIC, golden_runs.RELATIVE = golden_runs.METRIC / 100, golden_runs.RELATIVE / 100
    for name in options.names:
        if name not in golden_runs.RUNS:
            sys.exit(f"names: no run {name!r}; there are {', '.join(golden_runs.RUNS)}")
        started, here = time.perf_counter(), os.getcwd()
        with tempfile.TemporaryDirectory() as folder:
            os.chdir(folder)
            try:
                with open(os.devnull, "w") as nowhere, redirect_stdout(nowhere):
                    golden_runs.perform(name)
                found = golden_runs.summary(name)
            finally:
                os.chdir(here)
        if options.against:
            expected = golden_runs.read_expected(name)
            answers = expected.pop("answers")
            told = golden_runs.differences(found, expected)
            for what, answer in answers.items():
                told += golden_runs.of_answers(found["answers"][what], answer, what, golden_runs.RELATIVE)
            print(
                f"{name}: {len(told)} numbers differ by more than a hundredth of the tolerances", *told[:20], sep="\n  "
            )
        else:
            golden_runs.write_expected(name, found)
            print(f"{name}: {found['metrics']}, {time.perf_counter() - started:.1f} s")


if __name__ == "__main__":
    main()
