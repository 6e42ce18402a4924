"""Time and memory of importing interactions: ``recbole-llm import`` beside pandas, polars and DuckDB doing the same work.

    python benchmarks/import_speed.py --rows 1e7 --output import_speed.json

The work is: read CSV with ids as strings, keep the last row of each user and item by time, order by time, write a
tab-separated file. Reading alone is timed too, by each library's own reader. Every measurement is a process of its own; memory
is its largest resident set (VmHWM), mapped files included. Libraries that are not installed are named and left out.

    python benchmarks/import_speed.py --rows 1e6 --against OLD --rounds 15 --output import_paired.json

compares ours with the code of another checkout: processor time, in turn, each in a process of its own; the median of the
rounds' ratios.
"""

import argparse
import importlib.util
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Collection, Sequence
from pathlib import Path

ROOT = Path(__file__).resolve().parents[1]
COLUMNS = ("reviewerID", "asin", "overall", "unixReviewTime")


def make(path: Path, rows: int, kind: str) -> None:
    """Write interactions of heavy-tailed users and items, about 2% of them repeated pairs."""
    import numpy as np

    rng = np.random.default_rng(0)
    with path.open("w", encoding="utf-8") as file:
        if kind != "jsonl":
            file.write(",".join(COLUMNS) + "\n")
        for start in range(0, rows, 500_000):
            n = min(500_000, rows - start)
            user = (rng.pareto(1.1, n) * 20_000).astype(np.int64) % 1_000_000 * 2_654_435_761 % 10**11
            item = (rng.pareto(1.1, n) * 2_000).astype(np.int64) % 200_000 * 40_503 % 10**9
            columns = (
                user.tolist(),
                item.tolist(),
                rng.integers(1, 6, n).tolist(),
                rng.integers(1_400_000_000, 1_700_000_000, n).tolist(),
            )
            line = {
                "csv": "A{:011d},B{:09d},{}.0,{}\n",
                "quoted": '"A{:011d}","B{:09d}","{}.0","{}"\n',
                "jsonl": '{{"reviewerID": "A{:011d}", "asin": "B{:09d}", "overall": {}.0, "unixReviewTime": {}}}\n',
            }[kind].format
            file.write("".join(map(line, *columns)))


def to_parquet(source: Path, target: Path) -> None:
    """The same rows as Parquet."""
    import pyarrow.csv
    import pyarrow.parquet as pq

    reader = pyarrow.csv.open_csv(source)
    with pq.ParquetWriter(target, reader.schema) as writer:
        for batch in reader:
            writer.write_batch(batch, row_group_size=1 << 20)


def read_pyarrow(source: Path, target: Path) -> int:
    import pyarrow as pa
    import pyarrow.csv

    kinds = pyarrow.csv.ConvertOptions(column_types=dict.fromkeys(COLUMNS, pa.string()))
    return sum(batch.num_rows for batch in pyarrow.csv.open_csv(source, convert_options=kinds))


def read_csv_module(source: Path, target: Path) -> int:
    import csv

    with source.open(encoding="utf-8", newline="") as file:
        return sum(1 for _ in csv.reader(file, strict=True)) - 1


def read_pandas(source: Path, target: Path) -> int:
    import pandas as pd

    return sum(map(len, pd.read_csv(source, dtype=str, keep_default_na=False, chunksize=200_000)))


def read_polars(source: Path, target: Path) -> int:
    import polars as pl

    return sum(batch.height for batch in pl.scan_csv(source, infer_schema=False).collect_batches(chunk_size=200_000))


DUCKDB_SOURCE = (
    "read_csv('{}', auto_detect=false, all_varchar=true, header=true, delim=',', quote='\"', escape='\"', strict_mode=true, "
    "columns={{'u': 'varchar', 'i': 'varchar', 'r': 'varchar', 't': 'varchar'}})"
)


def read_duckdb(source: Path, target: Path) -> int:
    import duckdb

    connection = duckdb.connect()
    # the strings must be made, not only counted
    query = f"select count(*), max(u), max(i), max(r), max(t) from {DUCKDB_SOURCE.format(source)}"
    return connection.execute(query).fetchone()[0]


def work_ours(source: Path, target: Path) -> int:
    code = Path(os.environ.get("IMPORTED_FROM", ROOT))
    sys.path[:0] = [str(code), str(code / "kernels")]
    from recbole_llm.importer import import_dataset

    return import_dataset(source, "big", data_path=target.parent / "imported").interactions.rows_kept


def work_pandas(source: Path, target: Path) -> int:
    import pandas as pd

    frame = pd.read_csv(source, dtype={"reviewerID": str, "asin": str}, keep_default_na=False)
    frame = frame.sort_values("unixReviewTime", kind="stable").drop_duplicates(["reviewerID", "asin"], keep="last")
    frame.to_csv(target, sep="\t", index=False)
    return len(frame)


def work_polars(source: Path, target: Path) -> int:
    import polars as pl

    rows = (
        pl.scan_csv(source, infer_schema=False)
        .with_row_index("n")
        .with_columns(pl.col("unixReviewTime").cast(pl.Float64))
    )
    rows = rows.sort("unixReviewTime", "n").unique(["reviewerID", "asin"], keep="last", maintain_order=True).drop("n")
    rows.sink_csv(target, separator="\t", quote_style="never")
    return _lines(target) - 1


def work_duckdb(source: Path, target: Path) -> int:
    import duckdb

    connection = duckdb.connect(target.with_suffix(".db"))
    connection.execute(f"set memory_limit='1GB'; set temp_directory='{target.parent / 'spilled'}'")
    connection.execute(
        f"create table a as select row_number() over () n, u, i, r::double r, t::double t from {DUCKDB_SOURCE.format(source)}"
    )
    connection.execute("create table k as select max_by(n, (t, n)) n from a group by u, i")
    connection.execute(
        f"copy (select u, i, r, t from a semi join k using (n) order by t, n) to '{target}' (format csv, delimiter '\t', quote '')"
    )
    return _lines(target) - 1


def _lines(path: Path) -> int:
    with path.open("rb") as file:
        return sum(block.count(b"\n") for block in iter(lambda: file.read(1 << 22), b""))


# name: function, file, library
MEASUREMENTS = {
    "read csv, pyarrow": (read_pyarrow, "csv", "pyarrow"),
    "read csv, polars": (read_polars, "csv", "polars"),
    "read csv, DuckDB": (read_duckdb, "csv", "duckdb"),
    "read csv, csv module": (read_csv_module, "csv", "csv"),
    "read csv, pandas": (read_pandas, "csv", "pandas"),
    "import csv, ours": (work_ours, "csv", "pyarrow"),
    "import csv, pandas": (work_pandas, "csv", "pandas"),
    "import csv, polars": (work_polars, "csv", "polars"),
    "import csv, DuckDB": (work_duckdb, "csv", "duckdb"),
    "import quoted csv, ours": (work_ours, "quoted.csv", "pyarrow"),
    "import quoted csv, pandas": (work_pandas, "quoted.csv", "pandas"),
    "import parquet, ours": (work_ours, "parquet", "pyarrow"),
    "import json lines, ours": (work_ours, "jsonl", "pyarrow"),
}


def measure(name: str, folder: Path) -> None:
    """One measurement, in this process; prints it as JSON."""
    function, kind, library = MEASUREMENTS[name]
    started, cpu = time.perf_counter(), time.process_time()
    rows = function(folder / f"big.{kind}", folder / "out.tsv")
    seconds, cpu = time.perf_counter() - started, time.process_time() - cpu
    status = Path("/proc/self/status").read_text()
    peak = int(status.split("VmHWM:")[1].split()[0]) / 1024
    from importlib import metadata

    version = metadata.version(library) if library != "csv" else sys.version.split()[0]
    print(
        json.dumps(
            {
                "name": name,
                "rows_out": rows,
                "seconds": seconds,
                "cpu_s": cpu,
                "peak_mib": peak,
                "library": f"{library} {version}",
            }
        )
    )


def run(name: str, folder: Path, source: Path = ROOT) -> dict[str, object]:
    """One measurement in a fresh process and an empty output folder, of the code in ``source``."""
    with tempfile.TemporaryDirectory(dir=folder) as scratch:
        for path in folder.glob("big.*"):
            os.link(path, Path(scratch) / path.name)
        command = [sys.executable, __file__, "--measure", name, "--folder", scratch]
        environment = {**os.environ, "IMPORTED_FROM": str(source)}
        done = subprocess.run(command, capture_output=True, text=True, env=environment)
    if done.returncode:
        return {"name": name, "error": done.stderr.strip().split("\n")[-1]}
    return json.loads(done.stdout.strip().split("\n")[-1])


def paired(names: Sequence[str], folder: Path, against: Path, rounds: int) -> dict[str, dict]:
    """Processor time of ours and of another checkout, in turn."""
    found: dict[str, dict] = {}
    for name in names:
        runs: dict[str, list[dict]] = {"ours": [], "against": []}
        for number in range(rounds):
            for side in sorted(runs, reverse=bool(number % 2)):
                runs[side].append(run(name, folder, ROOT if side == "ours" else against))
                if "error" in runs[side][-1]:
                    raise SystemExit(f"{name}, {side}: {runs[side][-1]['error']}")
        ratios = [ours["cpu_s"] / old["cpu_s"] for ours, old in zip(runs["ours"], runs["against"], strict=True)]
        sides = {
            side: {key: round(statistics.median(one[key] for one in those), 3) for key in ("cpu_s", "peak_mib")}
            for side, those in runs.items()
        }
        quartiles = statistics.quantiles(ratios, n=4)
        found[name] = {
            **sides,
            "rows_out": runs["ours"][0]["rows_out"],
            "cpu_ratio": round(statistics.median(ratios), 3),
            "cpu_ratio_quartiles": [round(quartiles[0], 3), round(quartiles[2], 3)],
        }
        print(name, json.dumps(found[name]), flush=True)
    return found


def compared(folder: Path, rows: int, names: Sequence[str], options: argparse.Namespace) -> None:
    """Compare with another checkout; a report that is there keeps what it holds of other names."""
    from timing import machine

    command = ["git", "-C", str(options.against), "rev-parse", "HEAD"]
    commit = subprocess.run(command, capture_output=True, text=True, check=True).stdout.strip()
    about = {**machine("cpu"), "against_commit": commit, "rows": rows, "rounds": options.rounds}
    report = json.loads(options.output.read_text()) if options.output and options.output.exists() else {}
    for name, found in paired(names, folder, options.against, options.rounds).items():
        report[name] = about | found
    if options.output:
        options.output.write_text(json.dumps(report, indent=1) + "\n")


def make_files(folder: Path, rows: int, kinds: Collection[str]) -> None:
    """Make ``big.KIND``, each in a process of its own: numpy and the strings must not count as this one's memory."""
    for kind in ("csv", "quoted", "jsonl"):
        if {kind, f"{kind}.csv"} & set(kinds) or (kind == "csv" and "parquet" in kinds):
            target = folder / ("big.quoted.csv" if kind == "quoted" else f"big.{kind}")
            code = (
                f"import import_speed as s; from pathlib import Path; s.make(Path({str(target)!r}), {rows}, {kind!r})"
            )
            subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)
    if "parquet" in kinds:
        call = f"s.to_parquet(Path({str(folder / 'big.csv')!r}), Path({str(folder / 'big.parquet')!r}))"
        code = f"import import_speed as s; from pathlib import Path; {call}"
        subprocess.run([sys.executable, "-c", code], check=True, cwd=Path(__file__).parent)


def main() -> None:
    """Make the files, measure everything ``--repeats`` times in turn, print the fastest of each."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--rows", type=float, default=1e6)
    parser.add_argument("--repeats", type=int, default=1)
    parser.add_argument("--only", default="", help="measurements whose name contains this")
    parser.add_argument("--folder", type=Path, help="where the files are made (default: a temporary folder)")
    parser.add_argument("--output", type=Path, help="the measurements as JSON")
    parser.add_argument("--against", type=Path, metavar="DIR", help="a checkout to compare ours with, in turn")
    parser.add_argument("--rounds", type=int, default=15, help="of that comparison")
    parser.add_argument("--measure", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.measure:
        return measure(options.measure, options.folder)
    with tempfile.TemporaryDirectory(dir=options.folder) as scratch:
        folder, rows = Path(scratch), int(options.rows)
        chosen = {name: m for name, m in MEASUREMENTS.items() if options.only in name}
        make_files(folder, rows, {kind for _, kind, _ in chosen.values()})
        if options.against:
            return compared(folder, rows, [name for name in chosen if name.endswith("ours")], options)
        best: dict[str, dict] = {}
        for _ in range(options.repeats):
            for name, (_, _, library) in chosen.items():
                if importlib.util.find_spec(library) is None:
                    best[name] = {"name": name, "error": f"{library} is not installed"}
                    continue
                found = run(name, folder)
                if "error" in found or found["seconds"] < best.get(name, {}).get("seconds", float("inf")):
                    best[name] = found
    print(f"{rows:,} rows, {os.cpu_count()} CPU cores, fastest of {options.repeats}")
    for name, found in best.items():
        if "error" in found:
            print(f"{name:28} {found['error']}")
        else:
            speed = rows / found["seconds"] / 1e6
            print(
                f"{name:28} {found['seconds']:7.1f} s {speed:6.2f} M rows/s {found['peak_mib']:6.0f} MiB  "
                f"{found['rows_out']:,} rows out  {found['library']}"
            )
    if options.output:
        options.output.write_text(
            json.dumps({"rows": rows, "cpus": os.cpu_count(), "measurements": list(best.values())}, indent=2) + "\n"
        )


if __name__ == "__main__":
    main()
