"""What ``compare`` and ``tune`` share to write their HTML files."""

import datetime
from collections.abc import Sequence
from importlib.util import find_spec
from typing import Any

from recbole_llm.text_files import read_text


def can_draw() -> bool:
    """Whether pictures can be drawn."""
    return find_spec("matplotlib") is not None


def say_if_not_drawn(files: str) -> None:
    """Say before anything long is done that files will not be written, where they cannot be."""
    if not can_draw():
        print(f"{files} will not be written, as they need matplotlib: pip install -e '.[report]' in the checkout.")


def settings_given(config_files: Sequence[str], overrides: Sequence[str]) -> dict[str, Any]:
    """Configuration values of YAML files and of ``--key=value``, the later over the earlier."""
    import yaml

    found: dict[str, Any] = {}
    for file in config_files:
        read = yaml.safe_load(read_text(file, "config_files"))
        found |= read if isinstance(read, dict) else {}
    for override in overrides:
        key, _, value = override.removeprefix("--").partition("=")
        found[key] = value
    return found


def today() -> str:
    """The date, as in ``2026-11-30``."""
    return datetime.datetime.now(datetime.timezone.utc).date().isoformat()
