"""``recbole-llm leaderboard``: the canonical leave-one-out table of a data set, measured and cited."""

import argparse
import json
import sys
from collections.abc import Sequence
from pathlib import Path

from recbole_llm.bridge.experiments.leave_one_out import PROTOCOL, Loaded, load
from recbole_llm.bridge.experiments.table_rows import ROWS, WITH_BUDGET, Measured, RowRequest, measure_isolated
from recbole_llm.commands.output import PROGRAM
from recbole_llm.commands.pages import can_draw, say_if_not_drawn, settings_given, today
from recbole_llm.reporting.leaderboard import Asked, as_json, as_latex, as_markdown, asked_rows, measure_rows
from recbole_llm.reporting.published import CANONICAL


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``recbole-llm leaderboard``."""
    known = ", ".join(f"{name} ({each.dataset})" for name, each in CANONICAL.items())
    parser.add_argument(
        "dataset", help=f"{known}, or any folder of atomic files with a time column; give --data-path=DIR"
    )
    parser.add_argument(
        "--rows",
        default=None,
        help=f"rows to measure, separated by commas; {', '.join(WITH_BUDGET)} too, with --budget. Default: those of "
        f"{', '.join(ROWS)} that the data set can have",
    )
    parser.add_argument("--seeds", type=int, default=1, help="trainings of the rows that are trained")
    parser.add_argument(
        "--budget", type=float, default=None, metavar="MINUTES", help=f"processor minutes of {', '.join(WITH_BUDGET)}"
    )
    parser.add_argument(
        "--unmasked",
        action="store_true",
        help="measure every row a second time, with choices made where items of the history are ranked too",
    )
    parser.add_argument("--config-files", default=None, help='YAML files, separated by spaces: "a.yaml b.yaml"')
    parser.add_argument(
        "--output",
        default="leaderboard",
        metavar="DIR",
        help="for table.html, table.md, table.tex, table.json and rows; a later run goes on",
    )


def run_leaderboard(options: argparse.Namespace, config_files: Sequence[str], overrides: Sequence[str]) -> int:
    """Run the command."""
    names = _names(options)
    own = {f"--{key}" for key in (*PROTOCOL, "repeatable")}
    taken = [value for value in overrides if value.partition("=")[0] in own]
    if taken:
        raise ValueError(
            f"{taken[0].partition('=')[0]} is the protocol's own; leave it out. 'recbole-llm run' takes any split and metric."
        )
    dataset = CANONICAL[options.dataset].dataset if options.dataset in CANONICAL else options.dataset
    sys.argv = [PROGRAM, *overrides, *_quiet(overrides)]  # RecBole reads its configuration here

    arguments = tuple(sys.argv[1:])

    def read(unmasked: bool) -> Loaded:
        return load(dataset, config_files, unmasked=unmasked)

    def measure(loaded: Loaded, row: Asked) -> Measured:
        return measure_isolated(
            RowRequest(dataset, row.name, row.seed, row.unmasked, row.minutes, tuple(config_files), arguments)
        )

    say_if_not_drawn("table.html")
    folder = Path(options.output)
    # a row is valid for the settings of files too
    settings = [
        f"--{key}={json.dumps(value, sort_keys=True)}" for key, value in settings_given(config_files, ()).items()
    ]
    left_out: dict[str, str] = {}
    rows = measure_rows(
        asked_rows(names, options.seeds, options.unmasked, options.budget),
        folder / "rows",
        read,
        options.dataset,
        measure,
        [*settings, *overrides],
        lambda text: print(text, flush=True),
        left_out if options.rows is None else None,
    )
    table = as_json(options.dataset, dataset, rows, left_out)
    (folder / "table.json").write_text(json.dumps(table, indent=1) + "\n", encoding="utf-8")
    text = as_markdown(options.dataset, table)
    (folder / "table.md").write_text(text, encoding="utf-8")
    (folder / "table.tex").write_text(as_latex(options.dataset, table), encoding="utf-8")
    if can_draw():
        from recbole_llm.reporting.document import write
        from recbole_llm.reporting.leaderboard_page import leaderboard_page

        given = settings_given(config_files, overrides)
        write(leaderboard_page(options.dataset, table, given, today()), folder / "table.html")
    print(f"\n{text}\nwritten: {folder}")
    return 0


def _names(options: argparse.Namespace) -> list[str]:
    """Read the rows asked for.

    Raises:
        ValueError: if one is unknown, none is given, or the budget and the rows do not belong together.
    """
    names = [
        name.strip() for name in (",".join(ROWS) if options.rows is None else options.rows).split(",") if name.strip()
    ]
    known = (*ROWS, *WITH_BUDGET)
    unknown = [name for name in names if name not in known]
    if unknown or not names:
        raise ValueError(f"rows: {', '.join(unknown) or 'none'} given; expected some of {', '.join(known)}.")
    if options.seeds < 1:
        raise ValueError(f"seeds must be at least 1, got {options.seeds}.")
    trained = [name for name in names if name in WITH_BUDGET]
    if trained and not (options.budget or 0) > 0:
        raise ValueError(
            f"budget is {options.budget}, and {trained[0]} is trained within one; give --budget MINUTES above 0."
        )
    if options.budget is not None and not trained:
        raise ValueError(
            f"budget is of {', '.join(WITH_BUDGET)}, which --rows does not name; name it, or leave --budget out."
        )
    return names


def _quiet(overrides: Sequence[str]) -> list[str]:
    given = {value.partition("=")[0] for value in overrides}
    return [value for value in ("--show_progress=False", "--state=WARNING") if value.partition("=")[0] not in given]
