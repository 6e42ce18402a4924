"""Item vectors that RecBole's own ``preload_weight`` names."""

from dataclasses import dataclass
from pathlib import Path
from typing import Any


@dataclass(frozen=True)
class PreloadedVectors:
    """Item vectors that RecBole's own ``preload_weight`` names: the atomic file and its two columns."""

    file: str
    id_field: str
    vector_field: str


def preloaded_vectors(config: Any) -> PreloadedVectors | None:
    """Return the item vectors that ``preload_weight`` names, if any."""
    preload = config["preload_weight"]
    if not preload:
        return None
    item_ids = {config["ITEM_ID_FIELD"], *(config["alias_of_item_id"] or ())}
    for id_field, vector_field in preload.items():
        for suffix, columns in (config["load_col"] or {}).items() if id_field in item_ids else ():
            if vector_field in (columns or ()):
                file = Path(config["data_path"]) / f"{config['dataset']}.{suffix}"
                return PreloadedVectors(str(file), id_field, vector_field)
    return None
