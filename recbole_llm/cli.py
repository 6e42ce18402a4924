"""The command ``recbole-llm``: RecBole's workflows from a shell, for our model and stock ones."""

import argparse
import os
import sys
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import import_module

import recbole_llm
from recbole_llm.commands.output import PROGRAM

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
    files = (value or "").split()
    for file in files:
        if not os.path.isfile(file):
            raise ValueError(f"config_files: {file!r} does not exist. Give existing YAML files, separated by spaces.")
    return files


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
    "run": Command(
        "train, evaluate and print the table", "recbole_llm.commands.run", "add_arguments", "run_model", True
    ),
    "fit": Command(
        "a trained model once more, on all rows, with what its validation chose",
        "recbole_llm.commands.fit",
        "add_arguments",
        "run_fit",
        True,
    ),
    "compare": Command(
        "several models on one split: spread over seeds, paired significance over users",
        "recbole_llm.commands.compare",
        "add_arguments",
        "run_compare",
        True,
    ),
    "tune": Command(
        "search hyper-parameters on validation; resumable",
        "recbole_llm.commands.tune",
        "add_arguments",
        "run_tune",
        True,
    ),
    "import": Command(
        "CSV, TSV, JSON Lines or Parquet to a RecBole dataset, with a report of every row",
        "recbole_llm.commands.import_",
        "add_arguments",
        "run_import",
    ),
    "encode": Command(
        "vectors of a dataset's texts, kept for every later run",
        "recbole_llm.commands.encode",
        "add_arguments",
        "run_encode",
        True,
    ),
    "split": Command(
        "benchmark files in which a share of the items has no training interaction",
        "recbole_llm.commands.split",
        "add_arguments",
        "run_split",
    ),
    "export": Command(
        "a trained model as a folder of safe files for serving",
        "recbole_llm.commands.export",
        "add_export_arguments",
        "run_export",
    ),
    "recommend": Command(
        "the best items for users, for a list of items or for a text, from a checkpoint or an export",
        "recbole_llm.commands.recommend",
        "add_recommend_arguments",
        "run_recommend",
    ),
    "similar": Command(
        "the items most like one, from a checkpoint or an export",
        "recbole_llm.commands.recommend",
        "add_similar_arguments",
        "run_similar",
    ),
    "serve": Command(
        "an export online: HTTP service with new items live from their text",
        "recbole_llm.commands.serve",
        "add_serve_arguments",
        "run_serve",
    ),
    "info": Command(
        "versions, device, kernel backend, repairs applied to RecBole, caches",
        "recbole_llm.commands.info",
        "add_arguments",
        "run_info",
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
