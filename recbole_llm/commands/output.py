"""What several commands print and write."""

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from recbole_llm.atomic import atomic_file

PROGRAM = "recbole-llm"


def json_ready(value: Any) -> Any:
    """Convert the value to what JSON holds; what it cannot hold becomes a string."""
    if isinstance(value, Mapping):
        return {str(k): json_ready(v) for k, v in value.items()}
    if isinstance(value, (list, tuple, set)):
        return [json_ready(v) for v in value]
    if value is None or isinstance(value, (bool, int, float, str)):
        return value
    if hasattr(value, "item") and getattr(value, "ndim", None) == 0:
        return value.item()
    return str(value)


def write_json(path: str, content: Mapping[str, Any]) -> None:
    """Write a JSON file, whole or not at all."""
    target = Path(path)
    target.parent.mkdir(parents=True, exist_ok=True)
    with atomic_file(target) as file:
        file.write((json.dumps(json_ready(content), indent=2) + "\n").encode())
