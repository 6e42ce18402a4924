"""The pages that come from tables of the code and from examples/. ``hooks.py`` puts them into the site."""

import argparse
import json
import os
import re
from collections.abc import Callable
from functools import partial
from pathlib import Path

EXAMPLES = Path(__file__).resolve().parents[2] / "examples"
WIDTH = 110


def keys() -> str:
    """Every configuration key, from the table in bridge/options.py."""
    from recbole_llm.bridge.option_reference import markdown_table
    from recbole_llm.bridge.options import RECBOLE_KEYS

    rows = [f"| `{name}` | `{value}` | {meaning} |" for name, (value, meaning) in RECBOLE_KEYS.items()]
    return "\n".join(
        [
            "# Configuration keys",
            "",
            "Give a key in a YAML file, in `config_dict`, or as `--key=value`. The last one wins. The defaults are those of",
            "[LLMTwoTower.yaml](../recbole_llm/properties/LLMTwoTower.yaml). A key that looks like a misspelt one is an error.",
            "",
            markdown_table(),
            "## Keys of RecBole with other defaults",
            "",
            "| key | default | meaning |",
            "|---|---|---|",
            *rows,
            "",
            "Every other key of RecBole means what it means there.",
            "",
        ]
    )


def command_line() -> str:
    """The help of every command."""
    from recbole_llm import cli

    os.environ["COLUMNS"] = str(WIDTH)
    parts = [
        "# Command line",
        "",
        "`recbole-llm COMMAND --help` prints the same. `python -m recbole_llm` is the command too, and",
        "`python -m recbole_llm script.py --model=BPR` runs a script of yours with RecBole repaired.",
        "",
    ]
    for name, command in cli.COMMANDS.items():
        parser = argparse.ArgumentParser(prog=f"recbole-llm {name}", allow_abbrev=False)
        getattr(__import__(command.module, fromlist=[command.add]), command.add)(parser)
        rows = [row for action in parser._actions if (row := _row(action)) is not None]
        more = ["", "Any configuration key may follow as `--key=value`."] if command.configures else []
        text = command.summary[0].upper() + command.summary[1:]
        examples = ["```bash", *(f"recbole-llm {example}" for example in command.examples), "```", ""]
        parts += [f"## {name}", "", f"{text}.", "", *examples, "| option | meaning |", "|---|---|", *rows, *more, ""]
    return "\n".join(parts)


def _row(action: argparse.Action) -> str | None:
    if action.help == argparse.SUPPRESS or isinstance(action, argparse._HelpAction):
        return None
    names = ", ".join(f"`{name}`" for name in action.option_strings) or f"`{action.metavar or action.dest}`"
    value = action.metavar or ("{" + ",".join(map(str, action.choices)) + "}" if action.choices else "")
    if action.option_strings and action.nargs != 0 and not value:
        value = action.dest.upper()
    shown = f" `{value}`" if value and action.option_strings and action.nargs != 0 else ""
    text = re.sub(r"\s+", " ", action.help or "").replace("%%", "%").replace("%(default)s", str(action.default))
    return f"| {names}{shown} | {text.replace('|', chr(92) + '|').replace('<', '&lt;')} |".replace(
        "|URL`", "&#124;URL`"
    )


def notebook(path: Path) -> str:
    """A notebook with the outputs that are stored in it."""
    parts = []
    for cell in json.loads(path.read_text(encoding="utf-8"))["cells"]:
        source = "".join(cell["source"])
        parts.append(source if cell["cell_type"] == "markdown" else f"```python\n{source}\n```")
        said = "".join(line for output in cell.get("outputs", ()) for line in output.get("text", ()))
        if said:
            parts.append(f"```text\n{said.rstrip()}\n```")
    return "\n\n".join(parts) + "\n"


def script(path: Path) -> str:
    """A script of examples/ as it stands."""
    return f"# {path.name}\n\n```python\n{path.read_text(encoding='utf-8').rstrip()}\n```\n"


PAGES: dict[str, Callable[[], str]] = {"keys.md": keys, "command-line.md": command_line}
# file of the repository -> its page
OF_EXAMPLES = {f"examples/{path.name}": f"examples/{path.stem}.md" for path in sorted(EXAMPLES.glob("*.*"))}
PAGES |= {
    page: partial(notebook if name.endswith(".ipynb") else script, EXAMPLES.parent / name)
    for name, page in OF_EXAMPLES.items()
}
