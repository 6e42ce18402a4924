"""``recbole-llm run``: train, evaluate and say what the model is worth, ours or any of RecBole's."""

import argparse
import itertools
import logging
import os
import shlex
import sys
import time
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from recbole_llm.commands.output import PROGRAM, write_json

OURS = "LLMTwoTower"
DATASET = "ml-100k"


def add_arguments(parser: argparse.ArgumentParser) -> None:
    """Add the arguments of ``recbole-llm run``."""
    parser.add_argument("--model", "-m", default=OURS, help="LLMTwoTower or any model of RecBole")
    parser.add_argument("--dataset", "-d", default=DATASET, help="ml-100k, or a folder of atomic files in --data-path")
    parser.add_argument("--config-files", default=None, help='YAML files, separated by spaces: "a.yaml b.yaml"')
    parser.add_argument("--verbose", action="store_true", help="show on the terminal what the log file gets")
    parser.add_argument(
        "--no-baselines",
        action="store_true",
        help="do not measure bestsellers and ItemKNN beside the model; without them there are metrics and no words",
    )
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
    parser.add_argument(
        "--output", default=None, metavar="FILE", help="write configuration, metrics, figures, seconds, versions"
    )
    add_process_arguments(parser)


def add_process_arguments(parser: argparse.ArgumentParser) -> None:
    """Add how many processes run, and where."""
    parser.add_argument("--nproc", type=int, default=1, help="processes in this group")
    parser.add_argument("--ip", default="localhost", help="address of the master process")
    parser.add_argument("--port", default="5678", help="port of the master process")
    parser.add_argument("--world-size", type=int, default=-1, help="processes in all groups; -1: this group only")
    parser.add_argument("--group-offset", type=int, default=0, help="rank of this group's first process")


@dataclass(frozen=True, eq=False)
class Finished:
    """A run that has ended.

    Attributes:
        result: RecBole's.
        watch: what was watched; ``None`` where it ran in processes of its own.
        log_file: where everything was logged.
        history: curves and times.
    """

    result: dict[str, Any]
    watch: Any
    log_file: Path | None
    history: dict[str, Any]


def run_model(options: argparse.Namespace, files: Sequence[str], overrides: Sequence[str]) -> int:
    """Run ``recbole-llm run``; gives the exit code."""
    run_and_tell(options, files, overrides)
    return 0


def run_and_tell(options: argparse.Namespace, files: Sequence[str], overrides: Sequence[str]) -> str | Path | None:
    """Train, measure and print the answer.

    Args:
        options: of :func:`add_arguments`.
        files: YAML files.
        overrides: ``--key=value``.

    Returns:
        The checkpoint, ``None`` where this process has written none.
    """
    from recbole_llm.bridge.distributed import settings_of_torchrun

    place = settings_of_torchrun()
    if place and (options.nproc, options.world_size) != (1, -1):
        raise ValueError("--nproc and --world-size: torchrun has started the processes; leave them out.")
    final = getattr(options, "final", None)
    if final and options.model != OURS:
        raise ValueError(f"--final belongs to {OURS}; {options.model} has no choices to repeat.")
    resumed = options.resume is not None
    finished, config, seconds = train(options, files, overrides, place)
    if final:
        chosen_by = _checkpoint_of_run(config["checkpoint_dir"], seconds)
        checkpoint = None if finished is None else _tell(options, finished, config, seconds)
        settings = None
        if resumed and chosen_by is not None:  # they are in no file and on no command line
            from recbole_llm.bridge.checkpoint import settings_for_refit

            _, settings = settings_for_refit(chosen_by, _keys(overrides))
        return fit_once_more(options, files, overrides, place, chosen_by, final, finished, settings) or checkpoint
    if finished is None:  # rank 0 reports
        return None
    return _tell(options, finished, config, seconds)


def fit_once_more(
    options: argparse.Namespace,
    files: Sequence[str],
    overrides: Sequence[str],
    place: Mapping[str, Any],
    checkpoint: str | Path | None,
    rows: str,
    before: Finished | None = None,
    settings: Mapping[str, Any] | None = None,
) -> str | Path | None:
    """Fit on more rows with the choices of a checkpoint, and say what came of it.

    Args:
        options: dataset and processes.
        files: YAML files.
        overrides: ``--key=value``.
        place: as of :func:`train`.
        checkpoint: whose choices are repeated.
        rows: ``valid`` or ``all``.
        before: the run that chose, where it has just ended.
        settings: of a checkpoint, where there are no files.

    Returns:
        The new checkpoint, ``None`` where this process has written none.

    Raises:
        ValueError: if there is no checkpoint.
    """
    if checkpoint is None:
        raise ValueError("--final: the run has saved nothing, and nothing can be repeated.")
    if before is not None and not before.result.get("best_valid_result"):
        print("--final: the split has no validation part; the documented constants are what was chosen.")
    if before is not None and rows == "valid" and not before.result.get("test_result"):
        print("--final=valid: the split has no test part, so that training and validation are every row.")
    options.resume = None
    again = {"refit_from": str(checkpoint), "refit_rows": rows}
    finished, config, seconds = train(options, files, overrides, place, {**(settings or {}), **again})
    if finished is None:
        return None
    of = "training and validation" if rows == "valid" else "every row"
    table = _table({"test_result": finished.result.get("test_result")})
    told = table or "no figures: nothing is held out; earlier ones are of the model fitted on the training split."
    print(f"\nfitted once more on {of} with what validation chose, {seconds:.1f} s\n{told}")
    new = _checkpoint_of_run(config["checkpoint_dir"], seconds)
    for line in _next(new, config, finished.watch)[1:]:
        print(f"next: {line}")
    return new


def _tell(options: argparse.Namespace, finished: Finished, config: Any, seconds: float) -> str | Path | None:
    """Measure a run that has ended and print the answer; gives its checkpoint."""
    checkpoint = None
    if options.model == OURS:
        checkpoint = _checkpoint_of_run(config["checkpoint_dir"], seconds)
    record = None
    if not options.no_baselines:
        record = _record(options, finished, config, checkpoint)
    _print(options, finished, config, seconds, checkpoint, record)
    if options.output:
        from recbole_llm.bridge.environment import versions

        write_json(
            options.output,
            {
                "model": options.model,
                "dataset": options.dataset,
                "seconds": seconds,
                **finished.result,
                **({} if record is None else {"report": record}),
                "config": config.final_config_dict,
                "versions": versions(),
            },
        )
        print(f"written: {options.output}")
    return checkpoint


# ---------------------------------------------------------------- training


def train(
    options: argparse.Namespace,
    files: Sequence[str],
    overrides: Sequence[str],
    place: Mapping[str, Any],
    given: Mapping[str, Any] | None = None,
) -> tuple[Finished | None, Any, float]:
    """Train as the options say.

    Args:
        options: of :func:`add_arguments`; model and dataset of a resumed run are written into them.
        files: YAML files.
        overrides: ``--key=value``.
        place: this process's place among those of torchrun; empty for a run of its own.
        given: values over the files.

    Returns:
        The run, ``None`` in a process that is not rank 0; the configuration; the seconds it took.
    """
    sys.argv = [PROGRAM, *overrides]  # where RecBole's Config reads --key=value
    from recbole.config import Config

    from recbole_llm.bridge.files import require_dataset
    from recbole_llm.bridge.finetune_option import read_finetune

    settings: dict[str, Any] = dict(given or {})
    if options.resume:
        from recbole_llm.bridge.checkpoint import settings_for_resume

        if files:
            raise ValueError(
                "--config-files: a resumed run has its checkpoint's settings; change one, or give a path again, as --key=value."
            )
        model, dataset, settings = settings_for_resume(options.resume, _keys(overrides))
        for name, asked, default, trained in (
            ("model", options.model, OURS, model),
            ("dataset", options.dataset, DATASET, dataset),
        ):
            if asked is not default and asked != trained:  # the default itself stands for nothing given
                raise ValueError(f"--{name} is {asked!r}, and {options.resume!r} is of {trained!r}: leave it out.")
        options.model, options.dataset = model, dataset
    config = Config(options.model, options.dataset, list(files), dict(settings))
    require_dataset(config)
    if getattr(options, "final", None) and read_finetune("finetune", config["finetune"]) is not None:
        raise ValueError(
            "--final: a fit that repeats choices tunes no encoder. Next step: leave --final out, or finetune empty."
        )
    started = time.perf_counter()
    if place or (options.nproc == 1 and options.world_size <= 0):
        speaks = place.get("local_rank", 0) + place.get("offset", 0) == 0
        here = _run_here(options, files, {**settings, **place}, speaks)
        finished = here if speaks else None
    else:
        finished = _run_group(options, files, settings)
    return finished, config, time.perf_counter() - started


def _keys(overrides: Sequence[str]) -> set[str]:
    """The keys that ``--key=value`` arguments give."""
    return {argument[2:].partition("=")[0] for argument in overrides}


def _run_here(options: argparse.Namespace, files: Sequence[str], settings: Mapping[str, Any], speaks: bool) -> Finished:
    from recbole_llm.bridge.watched_run import run_watched
    from recbole_llm.commands.console import Console

    def console(config: Any) -> logging.Handler | None:
        quiet = speaks and not options.verbose
        return Console(config["epochs"] or 1) if quiet else None

    result, watch = run_watched(options.model, options.dataset, files, settings, console)
    alone = "world_size" not in settings  # what several processes have trained is read from the checkpoint, whole
    return Finished(result, watch if alone else None, watch.log_file, watch.history)


def _run_group(options: argparse.Namespace, files: Sequence[str], settings: Mapping[str, Any]) -> Finished | None:
    """Start the processes of this group; rank 0 shows the run."""
    import torch.multiprocessing as mp

    queue = mp.get_context("spawn").SimpleQueue()
    group = {
        "world_size": options.nproc if options.world_size == -1 else options.world_size,
        "ip": options.ip,
        "port": options.port,
        "nproc": options.nproc,
        "offset": options.group_offset,
    }
    mp.spawn(
        _process_of_group,
        args=(options, list(files), {**settings, **group}, queue),
        nprocs=options.nproc,
        join=True,
    )
    if options.group_offset or queue.empty():
        return None
    result, log_file, history = queue.get()
    return Finished(result, None, log_file, history)


def _process_of_group(
    rank: int, options: argparse.Namespace, files: Sequence[str], settings: Mapping[str, Any], queue: Any
) -> None:
    speaks = rank + options.group_offset == 0
    finished = _run_here(options, files, {**settings, "local_rank": rank}, speaks)
    if speaks:
        queue.put((finished.result, finished.log_file, finished.history))


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


# ---------------------------------------------------------------- the answer


def _record(
    options: argparse.Namespace, finished: Finished, config: Any, checkpoint: str | Path | None
) -> dict[str, Any] | None:
    """Measure the model beside the baselines and keep the figures in the checkpoint; ``None`` where that cannot be done."""
    from recbole_llm.reporting.quality import measure, reason_without
    from recbole_llm.reporting.trained import keep, of_checkpoint, of_watch

    result = finished.result
    metrics = {"valid": result.get("best_valid_result") or {}, "test": result.get("test_result") or {}}
    if finished.watch is not None:
        trained = of_watch(finished.watch, metrics)
    elif checkpoint is not None:
        trained = of_checkpoint(checkpoint, config, finished.history, metrics)
    else:
        _note("no words: the model of several processes is measured from a checkpoint, and there is none.")
        return None
    if (why := reason_without(trained.test)) is not None:
        _note(f"no words: {why}.")
        return None
    try:
        record = measure(trained)
    except NotImplementedError:
        _note(f"no words: {options.model} has no full ranking.")
        return None
    if checkpoint is not None:
        try:
            keep(checkpoint, record, config)
        except OSError as error:
            _note(f"the figures are not in the checkpoint: {error}")
    return record


def _print(
    options: argparse.Namespace,
    finished: Finished,
    config: Any,
    seconds: float,
    checkpoint: str | Path | None,
    record: Mapping[str, Any] | None,
) -> None:
    from recbole_llm.commands.console import plain

    print(f"\n{options.model} on {options.dataset}, {seconds:.1f} s")
    if record is not None:
        from recbole_llm.reporting.words import answer

        print(f"\n{plain(chr(10).join(answer(record)))}")
    print(f"\n{_table(finished.result)}")
    if finished.log_file is not None:
        print(f"\nlog: {os.path.relpath(finished.log_file)}")
    for line in _next(checkpoint, config, finished.watch):
        print(f"next: {line}")


def _next(checkpoint: str | Path | None, config: Any, watch: Any) -> list[str]:
    """Commands that go on from here, as they are typed."""
    if checkpoint is None:
        return []
    from recbole_llm.bridge.checkpoint_settings import options_to_repeat

    file, repeated = shlex.quote(str(checkpoint)), options_to_repeat(config)
    whom = "--output recommendations.csv"  # everybody
    if watch is not None:
        training = watch.splits[0]._dataset
        user = str(training.id2token(training.uid_field, int(training.inter_feat[training.uid_field][0])))
        whom = f"--users {shlex.quote(user)}"
    return [
        " ".join([f"{PROGRAM} report {file} --output report.html", *repeated]),
        " ".join([f"{PROGRAM} recommend {file} {whom}", *repeated]),
        _serving(file, config, repeated),
    ]


def _serving(file: str, config: Any, repeated: Sequence[str]) -> str:
    """The command that exports a checkpoint and serves the export, with the encoder that texts need."""
    from recbole_llm.bridge.options import Options
    from recbole_llm.content.encoder_settings import is_function

    encoder = Options.from_config(config).text_encoder
    named = encoder is not None and is_function(encoder)  # an export holds no code
    bundle = ["--bundle-encoder"] if encoder is not None and not named else []
    folder = next(name for name in _names("export") if not os.path.lexists(name))  # an export is never overwritten
    export = [PROGRAM, "export", file, "--output", folder, *bundle, *repeated]
    serve = [PROGRAM, "serve", folder, *(["--encoder", shlex.quote(str(encoder))] if named else [])]
    return f"{' '.join(export)} && {' '.join(serve)}"


def _names(first: str) -> Iterator[str]:
    """A name, and with numbers from 2 on."""
    yield first
    yield from (f"{first}-{number}" for number in itertools.count(2))


def _note(text: str) -> None:
    print(text, file=sys.stderr)


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
