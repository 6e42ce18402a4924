"""The canonical leave-one-out table as a committed result: what ``recbole-llm leaderboard`` measured, with machine and commit.

    python benchmarks/table.py beauty --data_path FOLDER --seeds 3
    python benchmarks/table.py beauty --data_path FOLDER --rows LLMTwoTower,EASE --work FOLDER

Rows that a stopped run left in ``--work`` are taken over where the interactions, the settings and the version are the same. Further
arguments, such as ``--blocks=...``, go to the command as they are.
"""

import argparse
import json
import sys
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
sys.path[:0] = [str(ROOT), str(ROOT / "kernels"), str(ROOT / "benchmarks")]

from timing import machine

from recbole_llm import cli

RESULTS = ROOT / "benchmarks" / "results"


def main() -> int:
    """Measure the rows and write the result file."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("name", help="beauty, sports, toys or a data set")
    parser.add_argument("--data_path", required=True, help="folder that holds the data set's folder")
    parser.add_argument("--rows", default=None, help="rows to measure; all by default")
    parser.add_argument("--seeds", type=int, default=1)
    parser.add_argument("--unmasked", action="store_true")
    parser.add_argument("--work", default="table", help="rows measured, so that a stopped run goes on")
    parser.add_argument("--commit", default=None, help="at which the rows in --work were measured, if not this one")
    parser.add_argument("--output", default=None, help="JSON; default benchmarks/results/table-<name>.json")
    options, others = parser.parse_known_args()
    work = Path(options.work) / options.name
    command = ["leaderboard", options.name, f"--data_path={options.data_path}", "--seeds", str(options.seeds)]
    command += ["--rows", options.rows] if options.rows else []
    command += ["--unmasked"] if options.unmasked else []
    code = cli.main([*command, "--output", str(work), *others])
    if code:
        return code
    table = json.loads((work / "table.json").read_text())
    where = machine("cpu")
    if options.commit:
        where["commit"] = options.commit
    shown = " ".join([*command[:2], "--data_path=FOLDER", *command[3:], *others])
    result = {"benchmark": "table", "command": f"recbole-llm {shown}"} | table | {"machine": where}
    path = Path(options.output or RESULTS / f"table-{options.name}.json")
    path.write_text(json.dumps(result, indent=1) + "\n")
    return 0


if __name__ == "__main__":
    raise SystemExit(main())
