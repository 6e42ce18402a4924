"""``recbole-llm run``: train, evaluate and print the table, our model or any of RecBole's."""

import argparse
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from recbole_llm.commands.output import PROGRAM, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``recbole-llm run``."""
    parser.add_argument("--model", "-m", default="LLMTwoTower", help="LLMTwoTower or any model of RecBole")
    parser.add_argument(
        "--dataset", "-d", default="ml-100k", help="ml-100k, or a folder of atomic files in --data_path"
    )
    parser.add_argument("--config_files", default=None, help='YAML files, separated by spaces: "a.yaml b.yaml"')
    parser.add_argument(
        "--resume",
        default=None,
        metavar="PATH",
        help="go on from a *-last.pth checkpoint of LLMTwoTower, with its dataset and settings; paths are given again",
    )
    parser.add_argument("--nproc", type=int, default=1, help="processes in this group")
    parser.add_argument("--ip", default="localhost", help="address of the master process")
    parser.add_argument("--port", default="5678", help="port of the master process")
    parser.add_argument("--world_size", type=int, default=-1, help="processes in all groups; -1: this group only")
    parser.add_argument("--group_offset", type=int, default=0, help="rank of this group's first process")
    parser.add_argument(
        "--output", default=None, metavar="FILE", help="write configuration, metrics, seconds, versions"
    )


def run_model(options: argparse.Namespace, files: Sequence[str], overrides: Sequence[str]) -> int:
    """Run ``recbole-llm run``; gives the exit code."""
    sys.argv = [PROGRAM, *overrides]  # where RecBole's Config reads --key=value
    from recbole.config import Config
    from recbole.quick_start import run as run_group
    from recbole.quick_start import run_recbole

    from recbole_llm.bridge.distributed import settings_of_torchrun
    from recbole_llm.bridge.files import require_dataset

    settings: dict[str, Any] = {}
    place = settings_of_torchrun()
    if place and (options.nproc, options.world_size) != (1, -1):
        raise ValueError("--nproc and --world_size: torchrun has started the processes; leave them out.")
    if options.resume:
        from recbole_llm.bridge.checkpoint import settings_for_resume

        if files:
            raise ValueError(
                "--config_files: a resumed run has its checkpoint's settings; change one, or give a path again, as --key=value."
            )
        own = {argument[2:].partition("=")[0] for argument in overrides}
        options.model, options.dataset, settings = settings_for_resume(options.resume, own)
    config = Config(options.model, options.dataset, list(files), dict(settings))
    require_dataset(config)
    started = time.perf_counter()
    if place:
        result = run_recbole(options.model, options.dataset, list(files), settings | place)
    else:
        result = run_group(
            options.model,
            options.dataset,
            config_file_list=list(files),
            config_dict=settings,
            nproc=options.nproc,
            world_size=options.world_size,
            ip=options.ip,
            port=options.port,
            group_offset=options.group_offset,
        )
    seconds = time.perf_counter() - started
    if result is None or place.get("local_rank", 0) + place.get("offset", 0):  # rank 0 reports
        return 0
    print(f"\n{options.model} on {options.dataset}, {seconds:.1f} s\n{_table(result)}")
    if options.model == "LLMTwoTower":
        from recbole_llm.bridge.checkpoint_settings import options_to_repeat

        checkpoint = _checkpoint_of_run(config["checkpoint_dir"], seconds)
        if checkpoint is not None:
            command = f"{PROGRAM} recommend {shlex.quote(str(checkpoint))} --users ID"
            print(" ".join([f"next: {command}", *options_to_repeat(config)]))
    if options.output:
        from recbole_llm.bridge.environment import versions

        write_json(
            options.output,
            {
                "model": options.model,
                "dataset": options.dataset,
                "seconds": seconds,
                **result,
                "config": config.final_config_dict,
                "versions": versions(),
            },
        )
        print(f"written: {options.output}")
    return 0


def _checkpoint_of_run(folder: str, seconds: float) -> str | Path | None:
    """What the run of LLMTwoTower that has just ended wrote; ``None`` where it saved nothing.

    Args:
        folder: its ``checkpoint_dir``, in which other runs may write too.
        seconds: how long it took.
    """
    from recbole_llm.bridge.training.trainer import LLMTwoTowerTrainer
    from recbole_llm.checkpoints import newest_checkpoint

    # the second is of processes of its own (--nproc)
    for file in (LLMTwoTowerTrainer.last_saved, newest_checkpoint(folder)):
        if file is not None and time.time() - os.stat(file).st_mtime <= seconds + 1:
            return file
    return None


def _table(result: Mapping[str, Any]) -> str:
    """Validation and test metrics side by side, for the end of a run."""
    valid, test = result.get("best_valid_result") or {}, result.get("test_result") or {}
    names = list(dict.fromkeys([*test, *valid]))
    if not names:
        return ""
    show = lambda value: f"{value:.4f}" if isinstance(value, (int, float)) else "-"  # noqa: E731
    width = max(map(len, names))
    lines = [f"{'':{width}}  {'valid':>8}  {'test':>8}"]
    lines += [f"{n:{width}}  {show(valid.get(n)):>8}  {show(test.get(n)):>8}" for n in names]
    return "\n".join(lines)
