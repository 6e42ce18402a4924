"""The table of our configuration keys as the YAML file of defaults and as the documentation's key reference."""

from typing import Any

import yaml

from recbole_llm.bridge.options import KEYS, RECBOLE_KEYS


def yaml_text() -> str:
    """Write the contents of ``properties/LLMTwoTower.yaml``."""
    lines = [
        "# Defaults of LLMTwoTower, written from the table in bridge/options.py. A dataset's own YAML, config"
        " files, dictionaries",
        "# and the command line override them, in that order.",
    ]
    group = ""
    for name, key in KEYS.items():
        if key.group != group:
            group = key.group
            lines += ["", f"# {group}"]
        lines.append(_yaml_line(name, key.default, f"({key.kind}) {key.meaning}"))
    lines += ["", "# RecBole's keys"]
    lines += [_yaml_line(name, value, meaning) for name, (value, meaning) in RECBOLE_KEYS.items()]
    return "\n".join(lines) + "\n"


def _yaml_line(name: str, value: Any, comment: str) -> str:
    written = "~" if value is None else yaml.safe_dump(value, default_flow_style=True).removesuffix("\n...\n").strip()
    setting = f"{name}: {written}"
    return f"{setting:<31} # {comment}" if len(setting) < 31 else f"{setting}  # {comment}"


def markdown_table() -> str:
    """Write the key reference of the documentation, a table under each heading."""
    lines: list[str] = []
    group = ""
    for name, key in KEYS.items():
        if key.group != group:
            group = key.group
            lines += ["", f"## {group}", "", "| key | type | default | meaning |", "|---|---|---|---|"]
        default = "" if key.default is None else f"`{key.default}`"
        meaning = key.meaning.replace("|", "\\|")
        lines.append(f"| `{name}` | {key.kind.replace('|', ' or ')} | {default} | {meaning} |")
    return "\n".join(lines).strip() + "\n"
