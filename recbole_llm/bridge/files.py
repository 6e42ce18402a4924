"""Check that a dataset's files exist before RecBole offers a download."""

from pathlib import Path
from typing import Any

from recbole_llm.bridge.run_settings import require_three_parts


def missing_files(config: Any) -> list[str]:
    """List the interaction files that ``config`` names and its dataset's folder lacks."""
    name, parts = config["dataset"], config["benchmark_filename"]
    wanted = [f"{name}.{part}.inter" for part in parts] if parts else [f"{name}.inter"]
    return [file for file in wanted if not (Path(config["data_path"]) / file).is_file()]


def require_dataset(config: Any) -> None:
    """Raise ``ValueError`` if files are missing: a command must neither prompt nor reach for a server unasked."""
    require_three_parts(config["benchmark_filename"])
    missing = missing_files(config)
    if missing:
        raise ValueError(
            f"dataset: no {' and no '.join(missing)} in {Path(config['data_path'])}. "
            f"Put RecBole atomic files there, or name the folder that holds {config['dataset']}/ with --data-path=FOLDER. "
            "ml-100k ships with RecBole and needs no file."
        )
