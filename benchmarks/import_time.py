"""What the plugin adds to an import: of itself, and to RecBole's own.

    python benchmarks/import_time.py --output benchmarks/results/import_time.json
    python benchmarks/import_time.py --python OLD/bin/python --ray real     # libraries that RecBole imports on unrepaired

Each sample is a fresh interpreter that times one import statement; variants take turns, and differences are taken within
a round. ``import recbole.quick_start`` fails on today's libraries for want of a ray that can be imported, and for nothing
else, so all variants find a package of that name of one empty function before any other: stock imports it, we ignore it.
With ``--ray real`` they find the installed one.
"""

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
STATEMENTS = {
    "nothing": "pass",
    "recbole_llm": "import recbole_llm",
    "RecBole": "import recbole.quick_start",
    "RecBole repaired": "import recbole_llm, recbole.quick_start",
}
CLOCKS = ("wall", "cpu", "process")  # of the statement, twice; of the interpreter from its start to its end
PROGRAM = """
import json, sys, time
before, wall, cpu = set(sys.modules), time.perf_counter(), time.process_time()
{statement}
wall, cpu = time.perf_counter() - wall, time.process_time() - cpu
top = sorted({{name.partition(".")[0] for name in set(sys.modules) - before}} - set(sys.stdlib_module_names))
print(json.dumps([wall, cpu, top]))
"""


def sample(python: str, statement: str, path: str) -> tuple[dict[str, float], list[str]]:
    """Seconds of one statement in a fresh interpreter, by wall clock, of CPU and of the process; what it loaded."""
    env = {**os.environ, "PYTHONPATH": path, "OMP_NUM_THREADS": "1", "PYTHONWARNINGS": "ignore"}
    program = PROGRAM.format(statement=statement)
    start = time.perf_counter()
    done = subprocess.run([python, "-c", program], capture_output=True, text=True, env=env, check=True)
    process = time.perf_counter() - start
    wall, cpu, top = json.loads(done.stdout.splitlines()[-1])
    return {"wall": wall, "cpu": cpu, "process": process}, top


def measure(python: str, rounds: int, real_ray: bool) -> dict[str, object]:
    """All variants in turn, ``rounds`` times after one round to fill the file cache."""
    times: dict[str, list[dict[str, float]]] = {name: [] for name in STATEMENTS}
    loaded: dict[str, list[str]] = {}
    with tempfile.TemporaryDirectory() as folder:
        if not real_ray:
            Path(folder, "ray").mkdir()
            Path(folder, "ray", "__init__.py").touch()
            Path(folder, "ray", "tune.py").write_text("def report(**metrics): pass\n", encoding="utf-8")
        path = os.pathsep.join([folder, str(ROOT), str(ROOT / "kernels")])
        names = list(STATEMENTS)
        for number in range(rounds + 1):
            shift = number % len(names)
            for name in names[shift:] + names[:shift]:
                seconds, loaded[name] = sample(python, STATEMENTS[name], path)
                if number:
                    times[name].append(seconds)

    def added(clock: str) -> float:
        pairs = zip(times["RecBole repaired"], times["RecBole"], strict=True)
        return round(statistics.median(ours[clock] - stock[clock] for ours, stock in pairs), 4)

    def median(name: str, clock: str) -> float:
        return round(statistics.median(seconds[clock] for seconds in times[name]), 4)

    return {
        "rounds": rounds,
        "ray": "the installed one" if real_ray else "a stub of one function, for every variant",
        "seconds": {name: {clock: median(name, clock) for clock in CLOCKS} for name in STATEMENTS},
        "added_to_recbole": {clock: added(clock) for clock in CLOCKS},
        "loaded_by_recbole_llm": loaded["recbole_llm"],
    }


def main() -> None:
    """Read the command line, measure, print and write."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rounds", type=int, default=15)
    parser.add_argument("--python", default=sys.executable, help="interpreter to measure")
    parser.add_argument("--ray", choices=("stub", "real"), default="stub")
    parser.add_argument("--output", help="JSON file to write; a run with other libraries is added beside those there")
    options = parser.parse_args()
    from stock_models import versions
    from timing import machine

    here = machine("cpu")
    found = versions(options.python)
    result = measure(options.python, options.rounds, options.ray == "real") | {"versions": found}
    print(json.dumps(result, indent=1))
    if options.output:
        target = Path(options.output)
        runs = json.loads(target.read_text(encoding="utf-8"))["runs"] if target.is_file() else []
        runs = [run for run in runs if run["versions"] != found] + [result]
        content = {key: here[key] for key in ("cpu", "cores", "load_average", "commit")} | {"runs": runs}
        target.parent.mkdir(parents=True, exist_ok=True)
        target.write_text(json.dumps(content, indent=1) + "\n", encoding="utf-8")


if __name__ == "__main__":
    main()
