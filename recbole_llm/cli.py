"""The command ``recbole-llm``: RecBole's workflows from a shell, for our model and stock ones."""

import argparse
import os
import shlex
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
    "matplotlib": "report",
}  # optional modules and the extra that brings them


def _split_overrides(rest: Sequence[str], command: str) -> list[str]:
    """The arguments that argparse does not know: all must be ``--key=value``, which RecBole reads from ``sys.argv``."""
    given: dict[str, str] = {}
    taken = []
    for argument in rest:
        if not argument.startswith("--") or "=" not in argument:
            raise ValueError(
                f"{argument!r} is not an option of '{PROGRAM} {command}' and not a configuration value; "
                f"write values as --key=value, for example --epochs=5. '{PROGRAM} {command} --help' lists the options."
            )
        key, _, value = argument.partition("=")
        key = "--" + key[2:].replace("-", "_")  # RecBole's keys have underscores; --learning-rate is --learning_rate
        taken.append(f"{key}={value}")
        if given.setdefault(key, value) != value:
            raise ValueError(f"{key} is given twice, as {given[key]!r} and {value!r}; give it once.")
    return taken


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


@dataclass(frozen=True)
class Command:
    """One command; its module is imported only when it is asked for.

    Attributes:
        summary: one line for the list of commands.
        module: where ``add`` and ``run`` are.
        add: name of the function that adds its options to a parser.
        run: name of the function that runs it with the parsed options; gives the exit code.
        examples: command lines without the program's name, for the help.
        configures: whether it takes ``--config-files`` and ``--key=value``, and ``run`` takes both after the options.
    """

    summary: str
    module: str
    add: str
    run: str
    examples: tuple[str, ...]
    configures: bool = False


COMMANDS: dict[str, Command] = {
    "quickstart": Command(
        "from two tables to a report: import, train, compare with bestsellers and ItemKNN, in one command",
        "recbole_llm.commands.quickstart",
        "add_arguments",
        "run_quickstart",
        (
            "quickstart orders.csv products.csv",
            "quickstart orders.csv products.csv --dataset shop --output shop.html --no-customers",
        ),
        True,
    ),
    "run": Command(
        "train, evaluate and say in words what the model is worth",
        "recbole_llm.commands.run",
        "add_arguments",
        "run_model",
        (
            "run --dataset ml-100k",
            "run --dataset shop --config-files dataset/shop/shop.yaml --output result.json",
            "run --model BPR --dataset ml-100k --epochs=20 --learning-rate=0.01",
            "run --dataset shop --config-files dataset/shop/shop.yaml --final",
            "run --resume saved/LLMTwoTower-...-last.pth",
        ),
        True,
    ),
    "fit": Command(
        "a trained model once more, on all rows, with what its validation chose",
        "recbole_llm.commands.fit",
        "add_arguments",
        "run_fit",
        (
            "fit saved",
            "fit saved/LLMTwoTower-....pth --rows valid",
        ),
        True,
    ),
    "compare": Command(
        "several models on one split: spread over seeds, paired significance over users",
        "recbole_llm.commands.compare",
        "add_arguments",
        "run_compare",
        (
            "compare --models EASE,ItemKNN,LLMTwoTower --dataset ml-100k",
            "compare -m BPR,LLMTwoTower -d shop --config-files dataset/shop/shop.yaml --seeds 3 --output comparison",
        ),
        True,
    ),
    "leaderboard": Command(
        "the canonical leave-one-out table of Amazon Beauty, Sports or Toys, measured and cited",
        "recbole_llm.commands.leaderboard",
        "add_arguments",
        "run_leaderboard",
        (
            "leaderboard beauty --data-path=data",
            "leaderboard beauty --data-path=data --rows EASE,LLMTwoTower --seeds 3 --unmasked --output table",
        ),
        True,
    ),
    "tune": Command(
        "search hyper-parameters on validation; resumable",
        "recbole_llm.commands.tune",
        "add_arguments",
        "run_tune",
        (
            "tune --dataset ml-100k --params-file configs/ml-100k/LLMTwoTower.hyper",
            "tune -m BPR -d ml-100k --params-file configs/stock/BPR.hyper --algo random --max-evals 10",
        ),
        True,
    ),
    "import": Command(
        "CSV, TSV, JSON Lines or Parquet to a RecBole dataset, with a report of every row",
        "recbole_llm.commands.import_",
        "add_arguments",
        "run_import",
        (
            "import orders.csv --items products.csv --dataset shop",
            "import ratings.csv --dataset films --threshold 4 --time-column when --time-unit s",
        ),
    ),
    "encode": Command(
        "vectors of a dataset's texts, kept for every later run",
        "recbole_llm.commands.encode",
        "add_arguments",
        "run_encode",
        (
            "encode --dataset shop --config-files dataset/shop/shop.yaml",
            "encode --dataset ml-100k --encoder-batch-size=128",
        ),
        True,
    ),
    "split": Command(
        "benchmark files in which a share of the items has no training interaction",
        "recbole_llm.commands.split",
        "add_arguments",
        "run_split",
        ("split ml-100k --cold-items 0.2 --output ml-100k-cold",),
    ),
    "report": Command(
        "one HTML file about a trained model: quality beside baselines, in pictures, with sample customers",
        "recbole_llm.commands.report",
        "add_arguments",
        "run_report",
        (
            "report saved",
            "report saved --output shop.html --no-customers",
            "report saved/LLMTwoTower-....pth --data-path data --customers 20",
        ),
    ),
    "export": Command(
        "a trained model as a folder of safe files for serving",
        "recbole_llm.commands.export",
        "add_export_arguments",
        "run_export",
        (
            "export saved --output export",
            "export saved --output export --bundle-encoder --attributes price,brand",
        ),
    ),
    "recommend": Command(
        "the best items for users, items, a profile, a text, a picture or a sound, from a checkpoint or an export",
        "recbole_llm.commands.recommend",
        "add_recommend_arguments",
        "run_recommend",
        (
            "recommend saved --users 000505 000012",
            "recommend saved --k 20 --output recommendations.xlsx",
            'recommend export --text "cast iron frying pan"',
        ),
    ),
    "similar": Command(
        "the items most like one, from a checkpoint or an export",
        "recbole_llm.commands.recommend",
        "add_similar_arguments",
        "run_similar",
        (
            "similar saved --item 00042",
            "similar export --item 00042 --k 5",
            "similar export --item 00042 --filter brand=Acme --cap category=2",
        ),
    ),
    "vectors": Command(
        "the vectors of items or users with their ids, as a file",
        "recbole_llm.commands.vectors",
        "add_arguments",
        "run_vectors",
        ("vectors saved --output items.parquet", "vectors export --of users --bias --output users.npz"),
    ),
    "serve": Command(
        "an export online: HTTP service with new items live from their text",
        "recbole_llm.commands.serve",
        "add_serve_arguments",
        "run_serve",
        (
            "serve export",
            "serve export --port 8080 --workers 2 --map",
        ),
    ),
    "info": Command(
        "versions, device, kernel backend, repairs applied to RecBole, caches",
        "recbole_llm.commands.info",
        "add_arguments",
        "run_info",
        (
            "info",
            "info --cache",
            "info --prune 30",
        ),
    ),
}


class _Help(argparse.RawDescriptionHelpFormatter):
    """Adds each option's default, and leaves examples as they are typed."""

    def _get_help_string(self, action: argparse.Action) -> str:
        text = action.help or ""
        shown = action.option_strings and action.nargs != 0 and action.default not in (None, "", argparse.SUPPRESS)
        if not shown or action.default == [] or "default" in text or "$" in text:
            return text
        return f"{text} (default: %(default)s)".strip()


def _examples(command: Command) -> str:
    lines = ["examples:", *(f"  {PROGRAM} {example}" for example in command.examples)]
    if command.configures:
        keys = os.path.join(os.path.dirname(recbole_llm.__file__), "properties", "LLMTwoTower.yaml")
        lines += [
            "",
            "any configuration key may follow as --key=value; every key of ours with its default and meaning:",
            f"  {keys}",
        ]
    return "\n".join(lines)


def _accept_both_spellings(parser: argparse.ArgumentParser) -> None:
    """Show options with hyphens, and take them with underscores too."""
    for action in parser._actions:
        action.option_strings = [option.replace("_", "-") for option in action.option_strings]
        for option in action.option_strings:
            for spelling in (option, "--" + option[2:].replace("-", "_") if option.startswith("--") else option):
                parser._option_string_actions[spelling] = action


def _parser(chosen: str | None) -> argparse.ArgumentParser:
    """The parser with the options of the chosen command alone: those of the others would load their modules."""
    parser = argparse.ArgumentParser(
        prog=PROGRAM,
        description=__doc__,
        allow_abbrev=False,
        formatter_class=_Help,
        epilog=f"begin with:\n  {PROGRAM} {COMMANDS['run'].examples[0]}\n'{PROGRAM} COMMAND --help' shows options and examples.",
    )
    parser.add_argument("--version", action="version", version=f"{PROGRAM} {recbole_llm.__version__}")
    commands = parser.add_subparsers(dest="command", required=True, metavar="COMMAND")
    for name, command in COMMANDS.items():
        # an abbreviated option would swallow a configuration value such as --data=...
        sub = commands.add_parser(
            name,
            help=command.summary,
            description=command.summary,
            allow_abbrev=False,
            formatter_class=_Help,
            epilog=_examples(command),
        )
        if name == chosen:
            getattr(import_module(command.module), command.add)(sub)
            _accept_both_spellings(sub)
    return parser


def main(argv: Sequence[str] | None = None) -> int:
    """Run a command, or without one show the help.

    The exit code is 0, 2 on a user's mistake, which is printed in one line, or 130 after Ctrl-C.

    Args:
        argv: arguments without the program's name; ``None`` for those of the process.
    """
    arguments = list(sys.argv[1:] if argv is None else argv)
    chosen = next((argument for argument in arguments if not argument.startswith("-")), None)
    try:
        if not arguments:
            _parser(None).print_help()
            return 0
        options, rest = _parser(chosen).parse_known_args(arguments)
        command = COMMANDS[options.command]
        run = getattr(import_module(command.module), command.run)
        if command.configures:
            overrides = _split_overrides(rest, options.command)
            return run(options, _config_files(getattr(options, "config_files", None)), overrides)
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
        if error.name == "recbole_llm_kernels":
            print(
                f"{PROGRAM}: error: the files of recbole_llm_kernels are gone; uninstalling recbole-llm-kernels takes them "
                "away. Install recbole-llm again with pip's --force-reinstall --no-deps.",
                file=sys.stderr,
            )
            return 2
        if error.name not in _EXTRAS:
            raise
        extra = _EXTRAS[error.name]
        print(
            f"{PROGRAM}: error: this needs {error.name}: pip install -e '.[{extra}]' in the checkout", file=sys.stderr
        )
        return 2
