"""``recbole-llm encode``: the vectors of texts, pictures and sounds ahead of every run, by one process or by all of torchrun.

    torchrun --nproc_per_node 2 -m recbole_llm encode --dataset NAME

Processes share the work by their numbers and meet in the feature store alone: there is no process group to set up, none waits
for another, and a run that was stopped goes on with any number of processes.
"""

import argparse
import os
import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from recbole_llm.bridge.files import require_dataset
from recbole_llm.content.processes import number_of_processes


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the options of ``recbole-llm encode``."""
    parser.add_argument("--dataset", "-d", required=True, help="ml-100k, or a folder of atomic files in --data-path")
    parser.add_argument(
        "--modality",
        default=None,
        metavar="NAME",
        help="text, image or audio: encode this alone (default: all that are configured)",
    )
    parser.add_argument(
        "--benchmark",
        default=None,
        metavar="NAMES",
        help="encoders with commas between them: encode the items with each, and say what it costs and how well it ranks items "
        "whose interactions are hidden",
    )
    parser.add_argument("--config-files", default=None, help='YAML files, separated by spaces: "a.yaml b.yaml"')


def run_encode(options: argparse.Namespace, files: Sequence[str], overrides: Sequence[str]) -> int:
    """Run it; every process ends with all vectors in the store, and the first says what there is.

    Args:
        options: of :func:`add_arguments`.
        files: YAML files.
        overrides: ``--key=value``.

    Raises:
        ValueError: if there is no such dataset, or it has no texts to encode.
    """
    from recbole_llm.bridge.repairs.configuration import PROGRAM

    if options.benchmark is not None and options.modality not in (None, "text"):
        raise ValueError(
            f"--modality is {options.modality!r}, and --benchmark compares encoders of texts: leave one of them out."
        )
    rank, processes = number_of_processes()
    settings = {}
    if processes > 1:
        settings["gpu_id"] = os.environ.get("LOCAL_RANK", "0")  # a GPU for each, where there are some
    if rank:
        settings |= {"show_progress": "False", "state": "ERROR"}
    sys.argv = [PROGRAM, *overrides]  # where RecBole's Config reads --key=value
    from recbole.config import Config
    from recbole.utils import init_logger

    from recbole_llm.bridge.dataset import LLMTwoTowerDataset

    config = Config("LLMTwoTower", options.dataset, list(files), dict(settings))
    require_dataset(config)
    if not rank:
        init_logger(config)
    dataset = LLMTwoTowerDataset(config)
    if options.benchmark is not None:
        return _benchmark(dataset, options.benchmark)
    wanted = None if options.modality is None else (options.modality,)
    found = [("items", name, table) for name, table in dataset.item_vectors(wanted).items()]
    if wanted in (None, ("text",)):
        found += [("users", name, table) for name, table in dataset.user_features.items()]
    if not found and wanted is not None:
        raise ValueError(
            f"--modality is {options.modality!r}, and nothing of this kind is configured. Pictures are named by "
            "--item_modalities='{image: {encoder: NAME, column: image}}', sounds by '{audio: {encoder: NAME}}', texts by "
            "--encoder=NAME."
        )
    if not found:
        raise ValueError(
            f"encoder is empty, so there is nothing to encode. Name one with --encoder=..., and the columns of "
            f"{Path(config['data_path']) / options.dataset}.item with --item_text_fields=..."
        )
    if rank:
        return 0
    for what, name, table in found:
        count = int(table.present.sum())
        article = "an" if name[0] in "aeiou" else "a"
        print(f"{what}: {count} of {len(table) - 1} have {article} {name} vector of {table.dim} dimensions")
    return 0


def _benchmark(dataset: Any, given: str) -> int:
    """Print a table of encoders."""
    from recbole_llm.bridge.encoder_benchmark import DRAWS, METRIC, compare_encoders

    names = [name.strip() for name in given.split(",") if name.strip()]
    if not names:
        raise ValueError("--benchmark names no encoder: give names or folders with commas between them.")
    figures = compare_encoders(dataset, names)
    width = max(map(len, names))
    print(f"{'encoder':{width}}  {'dims':>5}  {'texts/s':>9}  {METRIC!s:>7}  against the first")
    print(*(each.line(width) for each in figures), sep="\n")
    print(
        f"texts/s: of a processor second. {METRIC}: a fifth of the items, without their interactions, ranked among themselves by "
        f"their texts alone; mean of {DRAWS} draws over users, ± standard error."
    )
    return 0
