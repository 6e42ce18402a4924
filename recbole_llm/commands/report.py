"""``recbole-llm report``: one HTML file about a trained model."""

import argparse
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_llm.bridge.checkpoint_settings import add_path_arguments, given_paths
from recbole_llm.checkpoints import newest_checkpoint
from recbole_llm.commands.model_argument import add_checkpoint_argument

DEFAULT_OUTPUT = "report.html"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``recbole-llm report``."""
    add_checkpoint_argument(parser)
    parser.add_argument("--output", default=DEFAULT_OUTPUT, metavar="FILE", help="the HTML file to write")
    customers = parser.add_mutually_exclusive_group()
    customers.add_argument("--customers", type=int, default=10, metavar="N", help="sample customers, under numbers")
    customers.add_argument(
        "--no-customers", action="store_true", help="no customers: the report holds figures and no history of anybody"
    )
    parser.add_argument("--measure", action="store_true", help="measure anew, though the checkpoint holds figures")
    add_path_arguments(parser)


def run_report(options: argparse.Namespace) -> int:
    """Run ``recbole-llm report``; gives the exit code.

    Raises:
        ValueError: if there is no checkpoint, its data are not to be had, or there is no full ranking to measure.
    """
    checkpoint = newest_checkpoint(options.checkpoint) or Path(options.checkpoint)
    if not checkpoint.is_file():
        raise ValueError(
            f"checkpoint {options.checkpoint!r} does not exist or holds none. Give a file that 'recbole-llm run' saved "
            "(saved/LLMTwoTower-....pth), or its folder."
        )
    if options.customers < 0:
        raise ValueError(f"--customers is {options.customers}; expected at least 0.")
    number = 0 if options.no_customers else options.customers
    size = write_report(checkpoint, options.output, number, given_paths(options), options.measure)
    print(f"written: {options.output} ({size / 1e3:,.0f} kB), of {checkpoint}")
    return 0


def write_report(
    checkpoint: str | Path, output: str | Path, customers: int, paths: Mapping[str, Any], anew: bool = False
) -> int:
    """Write the report of a checkpoint.

    Args:
        checkpoint: the file.
        output: the HTML file.
        customers: how many sample customers it shows.
        paths: of the data and the encoder, as for :func:`recbole_llm.checkpoints.load_run`.
        anew: measure though the checkpoint holds figures.

    Returns:
        Its size in bytes.

    Raises:
        ValueError: as :func:`run_report`.
    """
    from recbole_llm.bridge.checkpoint import MODEL_PARTS, read_checkpoint
    from recbole_llm.bridge.environment import versions
    from recbole_llm.checkpoints import load_run
    from recbole_llm.reporting.content_check import check_content, section
    from recbole_llm.reporting.customers import sample_customers
    from recbole_llm.reporting.document import shown_settings, write
    from recbole_llm.reporting.drawing import require_matplotlib
    from recbole_llm.reporting.page import page
    from recbole_llm.reporting.plots import pictures
    from recbole_llm.reporting.quality import measure
    from recbole_llm.reporting.record import checked, kept
    from recbole_llm.reporting.trained import of_loaded

    require_matplotlib()
    state = read_checkpoint(checkpoint, parts=MODEL_PARTS)
    record = None if anew else kept(state)
    people: list[Any] = []
    more: list[str] = []
    if record is None or customers:
        trained = of_loaded(load_run(checkpoint, **paths))
        record = record or checked(measure(trained))
        people = sample_customers(trained, customers) if customers else []
        more = section(check_content(trained))
    settings = state.get("settings")
    given = settings.get("given") if isinstance(settings, Mapping) else None
    shown = shown_settings(given) if isinstance(given, Mapping) else {}
    return write(page(record, pictures(record), people, shown, versions(), more), output)
