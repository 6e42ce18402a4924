"""``recbole-llm fit``: a trained model once more, on more rows, with what its validation chose."""

import argparse
from collections.abc import Sequence

from recbole_llm.bridge.checkpoint_settings import MODEL
from recbole_llm.checkpoints import newest_checkpoint
from recbole_llm.commands.model_argument import add_checkpoint_argument
from recbole_llm.commands.run import add_process_arguments, fit_once_more


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``recbole-llm fit``."""
    add_checkpoint_argument(parser)
    parser.add_argument(
        "--rows",
        choices=("all", "valid"),
        default="all",
        help="all (default), or valid: training and validation, so that test still measures the model",
    )
    parser.add_argument("--config-files", default=None, help=argparse.SUPPRESS)  # its settings are the checkpoint's
    parser.add_argument("--verbose", action="store_true", help="show on the terminal what the log file gets")
    add_process_arguments(parser)


def run_fit(options: argparse.Namespace, files: Sequence[str], overrides: Sequence[str]) -> int:
    """Run ``recbole-llm fit``; gives the exit code.

    Raises:
        ValueError: if the checkpoint does not exist, holds no choices, or a path must be given again.
    """
    if files:
        raise ValueError(
            "--config-files: the fit has its checkpoint's settings; change one, or give a path again, as --key=value."
        )
    checkpoint = newest_checkpoint(options.checkpoint) or options.checkpoint
    from recbole_llm.bridge.checkpoint import settings_for_refit
    from recbole_llm.bridge.distributed import settings_of_torchrun
    from recbole_llm.bridge.training.choices import read_choices

    read_choices(str(checkpoint))  # a mistake is one line, before anything is read
    own = {argument[2:].partition("=")[0] for argument in overrides}
    options.model = MODEL
    options.dataset, settings = settings_for_refit(checkpoint, own)
    fit_once_more(options, (), overrides, settings_of_torchrun(), checkpoint, options.rows, settings=settings)
    return 0
