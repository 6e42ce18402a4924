"""The first argument of commands that read a trained model."""

import argparse


def add_checkpoint_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``checkpoint``, a file or the folder of the newest one."""
    parser.add_argument(
        "checkpoint", help="what 'recbole-llm run' saved (saved/LLMTwoTower-....pth), or its folder for the newest one"
    )


def add_model_argument(parser: argparse.ArgumentParser) -> None:
    """Add ``model``, a checkpoint or an export."""
    parser.add_argument(
        "model",
        metavar="MODEL",
        help="a checkpoint that 'recbole-llm run' saved (saved/LLMTwoTower-....pth), its folder for the newest one, or the "
        "folder of an export",
    )
