"""``recbole-llm quickstart``: from two tables to a report in one command."""

import argparse
import re
import shlex
import time
from collections.abc import Sequence
from pathlib import Path

from recbole_llm.commands.output import PROGRAM

# the latest tenth of everybody's interactions is the test, the tenth before it validation
BY_TIME = '{"split": {"RS": [0.8, 0.1, 0.1]}, "order": "TO", "group_by": "user", "mode": "full"}'


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``recbole-llm quickstart``."""
    parser.add_argument("interactions", help="CSV, TSV, JSON Lines (also .gz) or Parquet, a row per purchase or rating")
    parser.add_argument(
        "items", nargs="?", help="the same, a row per item with its texts; without it, ids alone are learned from"
    )
    parser.add_argument("--dataset", "-d", help="name of the result; the first file's name is the default")
    parser.add_argument("--data-path", default="dataset", metavar="FOLDER", help="gets a folder named as the dataset")
    parser.add_argument("--output", default="report.html", metavar="FILE", help="the report")
    customers = parser.add_mutually_exclusive_group()
    customers.add_argument("--customers", type=int, default=10, metavar="N", help="sample customers in the report")
    customers.add_argument("--no-customers", action="store_true", help="no customers in the report")
    parser.add_argument(
        "--config-files", default=None, help='YAML files over that of the import, separated by spaces: "a.yaml b.yaml"'
    )
    parser.add_argument("--verbose", action="store_true", help="show on the terminal what the log file gets")


def run_quickstart(options: argparse.Namespace, files: Sequence[str], overrides: Sequence[str]) -> int:
    """Run ``recbole-llm quickstart``; gives the exit code.

    Raises:
        ValueError: if a file cannot be read, or a package is missing.
    """
    from recbole_llm.commands import run
    from recbole_llm.commands.pages import settings_given
    from recbole_llm.commands.report import write_report
    from recbole_llm.importer import RESERVED_NAMES, import_dataset
    from recbole_llm.reporting.drawing import require_matplotlib

    if options.customers < 0:
        raise ValueError(f"--customers is {options.customers}; expected at least 0.")
    require_matplotlib()  # said before anything long is done
    started = time.perf_counter()
    dataset = options.dataset or _name_of(options.interactions)
    if dataset in RESERVED_NAMES:
        dataset = f"my-{dataset}"
    again = (Path(options.data_path) / dataset / "import_report.json").is_file()
    _say("1 of 3: import" + (f"; {dataset} is there from an earlier import and is made anew" if again else ""))
    report = import_dataset(
        options.interactions,
        dataset,
        items=options.items,
        data_path=options.data_path,
        overwrite=again,
        progress=True,
    )
    print("\n".join(report.lines()))
    timed = "timestamp:float" in report.interactions.columns.values() and "eval_args" not in settings_given(
        files, overrides
    )
    _say("2 of 3: train and measure")
    if timed:
        print(
            "Held out are the latest tenth of everybody's rows for the test, and the tenth before it for all choices."
        )
    parser = argparse.ArgumentParser()
    run.add_arguments(parser)
    command = parser.parse_args(["--dataset", dataset, *(["--verbose"] if options.verbose else [])])
    values = [*overrides, *([f"--eval_args={BY_TIME}"] if timed else [])]
    checkpoint = run.run_and_tell(command, [str(report.config_file), *files], values)
    if checkpoint is None:
        raise ValueError("the run saved no checkpoint, so there is nothing to report.")
    _say("3 of 3: report")
    paths = {"data_path": options.data_path, **_paths(overrides)}
    size = write_report(checkpoint, options.output, 0 if options.no_customers else options.customers, paths)
    print(f"written: {options.output} ({size / 1e3:,.0f} kB); open it in a browser")
    print(f"{time.perf_counter() - started:.0f} s in all. What was done, step by step:")
    for line in _by_hand(options, dataset, [str(report.config_file), *files], values, checkpoint):
        print(f"  {line}")
    return 0


def _name_of(file: str) -> str:
    stem = re.sub(r"(\.\w{1,8}){1,2}$", "", Path(file).name)
    return re.sub(r"[^\w.-]", "-", stem).strip("-.") or "data"


def _paths(overrides: Sequence[str]) -> dict[str, str]:
    """Paths among the configuration values that a checkpoint is given again."""
    from recbole_llm.bridge.checkpoint_settings import PATHS

    pairs = (argument[2:].partition("=") for argument in overrides)
    return {key: value for key, _, value in pairs if key in PATHS and value}


def _by_hand(
    options: argparse.Namespace, dataset: str, files: Sequence[str], values: Sequence[str], checkpoint: str | Path
) -> list[str]:
    quote = shlex.quote
    named = (
        files[0] if len(files) == 1 else " ".join(map(quote, files))
    )  # as :func:`recbole_llm.cli._config_files` reads them
    items = f" --items {quote(options.items)}" if options.items else ""
    folder = "" if options.data_path == "dataset" else f" --data-path {quote(options.data_path)}"
    repeated = [f"--{key.replace('_', '-')}={quote(value)}" for key, value in _paths(values).items()]
    return [
        f"{PROGRAM} import {quote(options.interactions)}{items} --dataset {quote(dataset)}{folder} --overwrite",
        " ".join([f"{PROGRAM} run --dataset {quote(dataset)} --config-files {quote(named)}", *map(quote, values)]),
        " ".join([f"{PROGRAM} report {quote(str(checkpoint))}{folder} --output {quote(options.output)}", *repeated]),
    ]


def _say(text: str) -> None:
    print(f"\n== {text}", flush=True)
