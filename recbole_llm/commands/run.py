"""``recbole-llm run``: train, evaluate and print the table, our model or any of RecBole's."""

import argparse
import os
import sys
import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any, NamedTuple

from recbole_llm.commands.output import PROGRAM, write_json


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Arguments of ``recbole-llm run``."""
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
    parser.add_argument(
        "--final",
        nargs="?",
        const="all",
        choices=("all", "valid"),
        default=None,
        help="afterwards fit once more with what validation chose, on all rows, or with --final=valid on training and "
        "validation, so that test still measures it",
    )
    add_process_arguments(parser)
    parser.add_argument(
        "--output", default=None, metavar="FILE", help="write configuration, metrics, seconds, versions"
    )


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """How many processes run, and where."""
    parser.add_argument("--nproc", type=int, default=1, help="processes in this group")
    parser.add_argument("--ip", default="localhost", help="address of the master process")
    parser.add_argument("--port", default="5678", help="port of the master process")
    parser.add_argument("--world_size", type=int, default=-1, help="processes in all groups; -1: this group only")
    parser.add_argument("--group_offset", type=int, default=0, help="rank of this group's first process")


def run_model(options: argparse.Namespace, files: Sequence[str], overrides: Sequence[str]) -> int:
    """Run ``recbole-llm run``; gives the exit code."""
    sys.argv = [PROGRAM, *overrides]  # where RecBole's Config reads --key=value
    from recbole.config import Config

    from recbole_llm.bridge.files import require_dataset

    settings: dict[str, Any] = {}
    if options.final and options.model != "LLMTwoTower":
        raise ValueError(f"--final belongs to LLMTwoTower; {options.model} has no choices to repeat.")
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
    done = run_in_processes(options, files, settings)
    checkpoint = _checkpoint_of_run(config["checkpoint_dir"], done.seconds)
    if done.reports:
        print(f"\n{options.model} on {options.dataset}, {done.seconds:.1f} s\n{_table(done.result)}")
        _tell_what_is_next(options.model, None if options.final else checkpoint, config)
        if options.output:
            _write_output(options, done, config)
    if options.final:
        if checkpoint is None:
            raise ValueError("--final: the run has saved nothing to repeat. Leave saved files on.")
        settings.pop("resume_from", None)
        fit_once_more(options, files, settings, checkpoint, _rows_of(options.final, done), config)
    return 0


class Done(NamedTuple):
    """A run that has ended: its result, seconds of wall time, and whether this process reports it."""

    result: dict[str, Any]
    seconds: float
    reports: bool


def run_in_processes(options: argparse.Namespace, files: Sequence[str], settings: Mapping[str, Any]) -> Done:
    """Run RecBole's training and test in this process, those of torchrun, or new ones.

    Args:
        options: model, dataset and processes.
        files: YAML files.
        settings: values over the files.
    """
    from recbole.quick_start import run as run_group
    from recbole.quick_start import run_recbole

    from recbole_llm.bridge.distributed import settings_of_torchrun

    place = settings_of_torchrun()
    if place and (options.nproc, options.world_size) != (1, -1):
        raise ValueError("--nproc and --world_size: torchrun has started the processes; leave them out.")
    started = time.perf_counter()
    if place:
        result = run_recbole(options.model, options.dataset, list(files), {**settings, **place})
    else:
        result = run_group(
            options.model,
            options.dataset,
            config_file_list=list(files),
            config_dict=dict(settings),
            nproc=options.nproc,
            world_size=options.world_size,
            ip=options.ip,
            port=options.port,
            group_offset=options.group_offset,
        )
    first = not place.get("local_rank", 0) + place.get("offset", 0)  # rank 0 reports
    return Done(result or {}, time.perf_counter() - started, first and result is not None)


def fit_once_more(
    options: argparse.Namespace,
    files: Sequence[str],
    settings: Mapping[str, Any],
    checkpoint: str | Path,
    rows: str,
    config: Any,
) -> None:
    """Fit on more rows with the choices of a checkpoint, and say what came of it.

    Args:
        options: dataset and processes.
        files: YAML files.
        settings: values over the files.
        checkpoint: whose choices are repeated.
        rows: ``valid`` or ``all``.
        config: of the run, for the folder of checkpoints.
    """
    done = run_in_processes(options, files, {**settings, "refit_from": str(checkpoint), "refit_rows": rows})
    if not done.reports:
        return
    of = "training and validation" if rows == "valid" else "every row"
    table = _table({"test_result": done.result.get("test_result")})
    told = (
        table or "no figures: nothing is held out. Those above are of the model that was fitted on the training split."
    )
    print(f"\nfitted once more on {of} with what validation chose, {done.seconds:.1f} s\n{told}")
    _tell_what_is_next(options.model, _checkpoint_of_run(config["checkpoint_dir"], done.seconds), config)


def _rows_of(final: str, done: Done) -> str:
    """The rows of the last fit; without a test part, all of them."""
    result = done.result
    if done.reports and not result.get("best_valid_result"):
        print("--final: the split has no validation part; the documented constants are what was chosen.")
    if final == "valid" and done.reports and not result.get("test_result"):
        print("--final=valid: the split has no test part, so that training and validation are every row.")
    return final


def _tell_what_is_next(model: str, checkpoint: str | Path | None, config: Any) -> None:
    if model == "LLMTwoTower" and checkpoint is not None:
        from recbole_llm.bridge.checkpoint_settings import options_to_repeat

        print(" ".join([f"next: {PROGRAM} recommend {checkpoint} --users ID", *options_to_repeat(config)]))


def _write_output(options: argparse.Namespace, done: Done, config: Any) -> None:
    from recbole_llm.bridge.environment import versions

    content = {"model": options.model, "dataset": options.dataset, "seconds": done.seconds, **done.result}
    write_json(options.output, {**content, "config": config.final_config_dict, "versions": versions()})
    print(f"written: {options.output}")


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
