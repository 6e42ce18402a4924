"""``recbole-llm import``: tables of interactions, items and users to a RecBole dataset."""

import argparse

from recbole_llm.importer import import_dataset
from recbole_llm.importing.settings_file import run_command
from recbole_llm.text_files import separated


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``recbole-llm import``."""
    add = parser.add_argument
    add("interactions", help="CSV, TSV, JSON Lines (also .gz) or Parquet, a row per interaction")
    add("--items", metavar="FILE", help="a row per item, with its texts")
    add("--users", metavar="FILE", help="a row per user")
    add(
        "--images",
        metavar="FOLDER",
        help="pictures of the items, named ITEM_ID.jpg or by --image-column; they are copied",
    )
    add("--image-encoder", metavar="NAME", help="what makes vectors of them, for the YAML: a vision model or onnx:FILE")
    add(
        "--audio", metavar="FOLDER", help="sounds of the items, named ITEM_ID.wav or by --audio-column; they are copied"
    )
    add("--audio-encoder", metavar="NAME", help="what makes vectors of them, for the YAML: an audio model or onnx:FILE")
    add("--dataset", "-d", required=True, help="RecBole's name for the result")
    add(
        "--data-path", default="dataset", metavar="FOLDER", help="gets a folder named as the dataset (default: dataset)"
    )
    columns = parser.add_argument_group(
        "columns", "found by name and content where not given; an empty name says that there is none"
    )
    for role in ("user", "item", "rating", "label", "time"):
        columns.add_argument(f"--{role}-column", metavar="NAME")
    columns.add_argument("--weight-column", metavar="NAME", help="how much an interaction counts; ratings may be it")
    columns.add_argument("--event-column", metavar="NAME", help="kinds of events, for --event-weights")
    columns.add_argument("--items-id-column", metavar="NAME", help="in the items' file")
    columns.add_argument(
        "--image-column", metavar="NAME", help="in the items' file: paths inside --images, several with | between them"
    )
    columns.add_argument("--audio-column", metavar="NAME", help="likewise, inside --audio")
    columns.add_argument("--users-id-column", metavar="NAME", help="in the users' file")
    columns.add_argument(
        "--text-columns",
        nargs="+",
        action="extend",
        metavar="NAME",
        help="that make an item's text; commas separate too, but for a name in double quotes",
    )
    columns.add_argument(
        "--user-text-columns", nargs="+", action="extend", metavar="NAME", help="that make a user's text"
    )
    rows = parser.add_argument_group("rows")
    rows.add_argument("--threshold", type=float, help="ratings below it are no interactions")
    rows.add_argument("--keep-negatives", action="store_true", help="write them, and label 0, as rows of label 0")
    rows.add_argument(
        "--duplicates",
        choices=("last", "first", "keep", "sum"),
        default="last",
        help="rows of the same user and item; sum: the last one with the sum of their weights",
    )
    rows.add_argument(
        "--event-weights", metavar="KIND=WEIGHT,...", help="how much each kind of event counts: view=1,cart=3,buy=5"
    )
    rows.add_argument("--half-life", type=float, metavar="DAYS", help="after which an interaction counts half")
    rows.add_argument(
        "--order", choices=("auto", "file", "time"), default="auto", help="auto: of time where float32 loses it"
    )
    rows.add_argument("--time-unit", choices=("s", "ms", "us", "ns", "iso"), help="found if not given")
    rows.add_argument(
        "--time-format",
        metavar="FORMAT",
        help="form of the times, such as '%%d/%%m/%%Y %%H:%%M'; found where rows tell",
    )
    rows.add_argument("--decimal", choices=(".", ","), help="sign before decimals; found if not given")
    rows.add_argument("--bad-rows", choices=("error", "drop"), default="error", help="rows that cannot be read")
    rows.add_argument("--keep-html", action="store_true", help="leave HTML in texts")
    files = parser.add_argument_group("files")
    files.add_argument("--separator", help=r"between cells; '\t' for a tab; found from the header if not given")
    files.add_argument(
        "--quoting", choices=("auto", "csv", "none"), default="auto", help="none: quotes are plain characters"
    )
    files.add_argument("--encoding", default="utf-8", help="of text files")
    files.add_argument("--overwrite", action="store_true", help="replace the dataset's folder")
    files.add_argument("--quiet", action="store_true", help="no progress bar")


def run_import(options: argparse.Namespace) -> int:
    """Run ``recbole-llm import`` with the parsed options of :func:`add_arguments` and print the report.

    Raises:
        ValueError: as :func:`import_dataset`.
    """
    values = vars(options)
    named = {name: values[name] for name in import_dataset.__kwdefaults__ or {} if name in values}
    for name in ("text_columns", "user_text_columns"):
        if named[name] is not None:
            named[name] = [part.strip() for part in separated(named[name]) if part.strip()]
    if named["event_weights"] is not None:
        named["event_weights"] = _event_weights(named["event_weights"])
    if named["separator"] == r"\t":
        named["separator"] = "\t"
    report = import_dataset(options.interactions, options.dataset, progress=not options.quiet, **named)
    print("\n".join(report.lines()))
    print(f"next: {run_command(report)}")
    return 0


def _event_weights(text: str) -> dict[str, float]:
    """Read ``view=1,buy=5``.

    Raises:
        ValueError: where a part is none such.
    """
    found: dict[str, float] = {}
    for part in separated([text]):
        kind, sign, weight = part.rpartition("=")
        try:
            value = float(weight)
        except ValueError:
            sign = ""
        if not sign or not kind.strip() or kind.strip() in found:
            raise ValueError(
                f"--event-weights: {part!r} is no kind with its weight, each kind once, as in view=1,buy=5."
            )
        found[kind.strip()] = value
    return found
