"""``recbole-llm split``: benchmark files in which a share of the items has no training interaction."""

import argparse
import shlex

from recbole_llm.commands.output import PROGRAM
from recbole_llm.importing.cold_split import split_dataset


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``recbole-llm split``."""
    parser.add_argument("dataset", help="ml-100k, or a folder of atomic files in --data-path")
    parser.add_argument("--cold-items", type=float, default=0.15, help="share of the items hidden from training")
    parser.add_argument("--seed", type=int, default=0, help="of the choice and of the split")
    parser.add_argument("--output", required=True, metavar="NAME", help="name of the new dataset")
    parser.add_argument("--data-path", default="dataset", help="holds DATASET/ and gets NAME/")


def run_split(options: argparse.Namespace) -> int:
    """Run the command: write the files and print the report and what to run next."""
    report = split_dataset(
        options.dataset,
        options.output,
        cold_items=options.cold_items,
        seed=options.seed,
        data_path=options.data_path,
    )
    yaml = report.folder / f"{options.output}.yaml"
    run = ["run", "--dataset", options.output, f"--data-path={options.data_path}", "--config-files", str(yaml)]
    print("\n".join([*report.lines(), f"next: {shlex.join([PROGRAM, *run])}"]))
    return 0
