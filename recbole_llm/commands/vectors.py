"""``recbole-llm vectors``: the vectors of items or users with their ids."""

import argparse
import sys

from recbole_llm.bridge.checkpoint_settings import add_path_arguments, given_paths
from recbole_llm.checkpoints import newest_checkpoint
from recbole_llm.commands.model_argument import add_model_argument
from recbole_llm.loaded import FORMATS, SIDES, load, write_vectors
from recbole_llm.recommend import check_output


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``recbole-llm vectors``."""
    add_model_argument(parser)
    parser.add_argument(
        "--output",
        required=True,
        metavar="FILE",
        help=".npz (arrays ids and vectors), .parquet (columns id and vector) or .csv (a column for each dimension)",
    )
    parser.add_argument("--of", choices=("items", "users"), default="items", help="whose vectors (default: items)")
    parser.add_argument(
        "--side",
        choices=SIDES,
        default="target",
        help="of items: target, which a score multiplies by a user's vector, or source, which a history is made of",
    )
    parser.add_argument(
        "--bias",
        action="store_true",
        help="append the items' bias, and 1 for users: the product of a user's and an item's vector is then the score",
    )
    add_path_arguments(parser)


def run_vectors(options: argparse.Namespace) -> int:
    """Run ``recbole-llm vectors``; gives the exit code.

    Raises:
        ValueError: on another ending of the output, or options that do not go together.
    """
    check_output(options.output, FORMATS)
    if options.of == "users" and options.side != "target":
        raise ValueError("--side belongs to items; leave it out for --of users.")
    newest = newest_checkpoint(options.model)
    if newest is not None:
        print(f"model: {newest}", file=sys.stderr)
    model = load(newest or options.model, texts=False, **given_paths(options))
    if options.of == "items":
        found = model.item_vectors(side=options.side, bias=options.bias)
    else:
        found = model.user_vectors(bias=options.bias)
    write_vectors(found, options.output)
    print(f"{len(found.ids)} {options.of}, {found.vectors.shape[1]} dimensions, written to {options.output}")
    return 0
