"""The command ``recbole-llm``: RecBole's workflows from a shell, for our model and stock ones."""

import argparse
import json
import os
import shlex
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from importlib import import_module
from pathlib import Path
from typing import Any

import recbole_llm

PROGRAM = "recbole-llm"
TRACEBACK_VARIABLE = "RECBOLE_LLM_TRACEBACK"
_EXTRAS = {
    "pyarrow": "import",
    "hyperopt": "tune",
    "matplotlib": "bench",
}  # optional modules and the extra that brings them


def _split_overrides(rest: Sequence[str], command: str) -> list[str]:
    """The arguments that argparse does not know: all must be ``--key=value``, which RecBole reads from ``sys.argv``."""
    given: dict[str, str] = {}
    for argument in rest:
        if not argument.startswith("--") or "=" not in argument:
            raise ValueError(
                f"{argument!r} is not an option of '{PROGRAM} {command}' and not a configuration value; "
                f"write values as --key=value, for example --epochs=5. '{PROGRAM} {command} --help' lists the options."
            )
        key, _, value = argument.partition("=")
        if given.setdefault(key, value) != value:
            raise ValueError(f"{key} is given twice, as {given[key]!r} and {value!r}; give it once.")
    return list(rest)


def _config_files(value: str | None) -> list[str]:
    """The files of the option: one whose name may hold blanks, or several, of which those with blanks are in quotes."""
    if value and os.path.isfile(value):
        return [value]
    try:
        files = shlex.split(value or "") if os.sep == "/" else (value or "").split()
    except ValueError as error:
        raise ValueError(f"config_files: {value!r} holds a quote that does not close.") from error
    for file in files:
        if not os.path.isfile(file):
            raise ValueError(
                f"config_files: {file!r} does not exist. Give existing YAML files, separated by spaces; of several, those with "
                "blanks in their names go in quotes, as in \"'my data/a.yaml' b.yaml\"."
            )
    return files


def _json_ready(value: Any) -> Any:
    if isinstance(value, Mapping):
        return {str(k): _json_ready(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [_json_ready(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    return str(value)


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


def _write_json(path: str, content: Mapping[str, Any]) -> None:
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    temporary = target.with_name(f"{target.name}.tmp-{os.getpid()}")
    temporary.write_text(json.dumps(_json_ready(content), indent=2) + "\n", encoding="utf-8")
    os.replace(temporary, target)


def _add_run(parser: argparse.ArgumentParser) -> None:
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


def _run(options: argparse.Namespace, files: Sequence[str], overrides: Sequence[str]) -> int:
    sys.argv = [PROGRAM, *overrides]  # where RecBole's Config reads --key=value
    from recbole.config import Config
    from recbole.quick_start import run, run_recbole

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
        result = run(
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
            print(
                " ".join(
                    [f"next: {PROGRAM} recommend {shlex.quote(str(checkpoint))} --users ID", *options_to_repeat(config)]
                )
            )
    if options.output:
        from recbole_llm.bridge.report import versions

        _write_json(
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
    from recbole_llm.bridge.trainer import LLMTwoTowerTrainer
    from recbole_llm.recommend import newest_checkpoint

    written = (
        LLMTwoTowerTrainer.last_saved,
        newest_checkpoint(folder),
    )  # the second is of processes of its own (--nproc)
    for file in written:
        if file is not None and time.time() - os.stat(file).st_mtime <= seconds + 1:
            return file
    return None


def _add_info(parser: argparse.ArgumentParser) -> None:
    parser.add_argument("--json", action="store_true", help="the same as JSON")
    parser.add_argument("--cache", action="store_true", help="only the stored vectors, encoder by encoder")
    parser.add_argument("--prune", type=float, metavar="DAYS", help="remove vectors that no run used for so many days")
    parser.add_argument("--feature_cache_dir", default=None, metavar="DIR", help="another cache than the user's")


def _info(options: argparse.Namespace) -> int:
    if options.cache or options.prune is not None:
        from recbole_llm.content.upkeep import prune, store_info

        if options.prune is not None:
            print("\n".join(prune(options.feature_cache_dir, unused_days=options.prune).lines()))
        stored = [encoder.line() for encoder in store_info(options.feature_cache_dir)]
        print("\n".join(stored) or "no stored vectors")
        return 0
    from recbole_llm.bridge.report import environment, render

    report = environment()
    print(json.dumps(_json_ready(report), indent=2) if options.json else render(report))
    return 0


@dataclass(frozen=True)
class Command:
    """One command; its module is imported only when it is asked for.

    Attributes:
        summary: one line for the list of commands.
        module: where ``add`` and ``run`` are.
        add: name of the function that adds its options to a parser.
        run: name of the function that runs it with the parsed options; gives the exit code.
        configures: whether it takes ``--config_files`` and ``--key=value``, and ``run`` takes both after the options.
    """

    summary: str
    module: str
    add: str
    run: str
    configures: bool = False


COMMANDS: dict[str, Command] = {
    "run": Command("train, evaluate and print the table", "recbole_llm.cli", "_add_run", "_run", True),
    "compare": Command(
        "several models on one split: spread over seeds, paired significance over users",
        "recbole_llm.bridge.compare",
        "add_arguments",
        "run_compare",
        True,
    ),
    "tune": Command(
        "search hyper-parameters on validation; resumable",
        "recbole_llm.bridge.tuning",
        "add_arguments",
        "run_tune",
        True,
    ),
    "import": Command(
        "CSV, TSV, JSON Lines or Parquet to a RecBole dataset, with a report of every row",
        "recbole_llm.importer",
        "add_arguments",
        "run_import",
    ),
    "encode": Command(
        "vectors of a dataset's texts, kept for every later run",
        "recbole_llm.bridge.encode",
        "add_arguments",
        "run_encode",
        True,
    ),
    "split": Command(
        "benchmark files in which a share of the items has no training interaction",
        "recbole_llm.splitting",
        "add_arguments",
        "run_split",
    ),
    "export": Command(
        "a trained model as a folder of safe files for serving",
        "recbole_llm.serving.export",
        "add_export_arguments",
        "run_export",
    ),
    "recommend": Command(
        "the best items for users, for a list of items or for a text, from a checkpoint or an export",
        "recbole_llm.serving.recommend_command",
        "add_recommend_arguments",
        "run_recommend",
    ),
    "similar": Command(
        "the items most like one, from a checkpoint or an export",
        "recbole_llm.serving.recommend_command",
        "add_similar_arguments",
        "run_similar",
    ),
    "serve": Command(
        "an export online: HTTP service with new items live from their text",
        "recbole_llm.serving.command",
        "add_serve_arguments",
        "run_serve",
    ),
    "info": Command(
        "versions, device, kernel backend, repairs applied to RecBole, caches", "recbole_llm.cli", "_add_info", "_info"
    ),
}


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser with the options of the chosen command alone: those of the others would load their modules."""
    parser = argparse.ArgumentParser(prog=PROGRAM, description=__doc__, allow_abbrev=False)
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {recbole_llm.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        # an abbreviated option would swallow a configuration value such as --data=...
        sub = commands.add_parser(name, help=command.summary, description=command.summary, allow_abbrev=False)
        if name == chosen:
            getattr(import_module(command.module), command.add)(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command; the exit code is 0, 2 on a user's mistake, which is printed in one line, or 130 after Ctrl-C.

    Args:
        argv: arguments without the program's name; ``None`` for those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        options, rest = _parser(chosen).parse_known_args(arguments)
        command = COMMANDS[options.command]
        run = getattr(import_module(command.module), command.run)
        if command.configures:
            overrides = _split_overrides(rest, options.command)
            return run(options, _config_files(options.config_files), overrides)
        if rest:
            raise ValueError(
                f"{rest[0]!r} is not an option of '{PROGRAM} {options.command}'; "
                f"'{PROGRAM} {options.command} --help' lists them."
            )
        return run(options)
    except KeyboardInterrupt:
        return 130
    except (ValueError, OSError) as error:
        if os.environ.get(TRACEBACK_VARIABLE):
            raise
        print(f"{PROGRAM}: error: {error}\n(set {TRACEBACK_VARIABLE}=1 for the traceback)", file=sys.stderr)
        return 2
    except ModuleNotFoundError as error:
        if error.name not in _EXTRAS:
            raise
        extra = _EXTRAS[error.name]
        print(f"{PROGRAM}: error: this needs {error.name}: pip install 'recbole-llm[{extra}]'", file=sys.stderr)
        return 2
