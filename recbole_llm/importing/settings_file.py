"""The YAML beside an imported dataset, and the command that runs it."""

import shlex
from collections.abc import Callable, Sequence
from pathlib import Path
from typing import Any

from recbole_llm.content.encoder_settings import is_function
from recbole_llm.importing.report import ImportReport

EXAMPLE_ENCODERS = {"image": "google/siglip2-base-patch16-224", "audio": "laion/clap-htsat-unfused"}


def run_command(report: ImportReport) -> str:
    """Write the command to run next, quoted for a shell if a path holds blanks."""
    return shlex.join(["recbole-llm", "run", "--dataset", report.dataset, "--config-files", str(report.config_file)])


def _media(report: ImportReport, show: Callable[[Any], str]) -> list[str]:
    """The line that names the encoders of pictures and sounds; one that runs code is given on the command line."""
    found: dict[str, dict[str, str]] = {}
    waiting: dict[str, dict[str, str]] = {}
    for modality, media in (("image", report.pictures), ("audio", report.sounds)):
        if media is None:
            continue
        column = {} if media.column is None else {"column": media.column}
        source = {"encoder": media.encoder or EXAMPLE_ENCODERS[modality]} | column
        waits = media.encoder is None or is_function(media.encoder)
        (waiting if waits else found)[modality] = source
    lines = [f"item_modalities: {show(found)}"] if found else []
    return lines + ([f"# item_modalities: {show(found | waiting)}"] if waiting else [])


def settings(report: ImportReport, data_path: str | Path, fields: Sequence[str]) -> str:
    """Write the YAML to run RecBole with, in the form of recbole_llm/properties/LLMTwoTower.yaml."""
    import yaml

    def show(value: Any) -> str:
        text = yaml.safe_dump(value, default_flow_style=True, width=10**6, allow_unicode=True)
        return text.removesuffix("...\n").strip()

    lines = [
        "# Written by recbole-llm import.",
        # one line, whatever characters the path holds
        "# " + " ".join(run_command(report).splitlines()),
        f"data_path: {show(str(data_path))}",
        'field_separator: "\\t"',
        'seq_separator: " "',
        "USER_ID_FIELD: user_id",
        "ITEM_ID_FIELD: item_id",
        "load_col:",
        f"  inter: {show(list(fields))}",
    ]
    if report.items is not None and report.items.unseen:
        out = "" if report.items.text_fields else "# "  # without texts nothing places them
        lines.append(
            f"  {out}item: [item_id]                # also the {report.items.unseen} items without an interaction"
        )
    if "rating" in fields:
        lines.append("RATING_FIELD: rating")
    if "timestamp" in fields:
        lines.append("TIME_FIELD: timestamp")
    if "label" in fields:
        lines.append("LABEL_FIELD: label")
    if "weight" in fields:
        lines.append("weight_field: weight            # how much each interaction counts")
    if report.items is not None and report.items.text_fields:
        lines.append(f"item_text_fields: {show(report.items.text_fields)}")
    else:
        lines.append("encoder: ~                      # no item texts")
    lines += _media(report, show)
    if report.users is not None and report.users.text_fields:
        lines.append(f"user_text_fields: {show(report.users.text_fields)}")
        lines.append("# user_tower: history+text         # users' texts take part in the model")
    return "\n".join(lines) + "\n"
