"""Vectors of a dataset's pictures, sounds and columns, aligned to its items; texts are ``dataset.py``'s own."""

from collections.abc import Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole_llm.bridge.option_values import ModalitySource
from recbole_llm.content.encoders.images import load_image_encoder
from recbole_llm.content.features import FeatureStore, FeatureTable
from recbole_llm.content.images.encode import encode_pictures
from recbole_llm.content.images.files import COLUMN, FOLDER, find_pictures
from recbole_llm.content.item_columns import PREFIX, column_vectors
from recbole_llm.content.text import read_atomic_table
from recbole_llm.content.text.atomic_files import AtomicTable


def in_words(modality: str) -> str:
    """Return what describes items, in the plural.

    Example:
        >>> in_words("image"), in_words("column_brand")
        ('pictures', 'column_brand')
    """
    if modality.startswith(PREFIX):
        return modality
    return {"image": "pictures", "audio": "sounds"}.get(modality, f"{modality}s")


def item_table(dataset: Any) -> AtomicTable | None:
    """Read the dataset's ``.item`` file; ``None`` where there is none."""
    path = Path(dataset.dataset_path) / f"{dataset.dataset_name}.item"
    if not path.is_file():
        return None
    config = dataset.config
    return read_atomic_table(
        path,
        dataset.iid_field,
        separator=config["field_separator"],
        encoding=config["encoding"] or "utf-8",
        seq_separator=config["seq_separator"],
    )


def say(lines: list[str]) -> None:
    """Write lines of what became of the items' content into the run's log."""
    for line in lines:
        getLogger().info(line, extra={"content": True})


def _cells(dataset: Any, source: ModalitySource, modality: str, usual: str) -> dict[str, str] | None:
    """Id to the cell that names the item's files; ``None`` where there is no such column.

    Raises:
        ValueError: if the column was named and is not there.
    """
    table, column = item_table(dataset), source.column or usual
    if table is None:
        return None
    if column in table.types:
        return {token: table.columns[column][row] for token, row in table.row_of.items()}
    if source.column is not None:
        raise ValueError(
            f"item_modalities.{modality}.column names {column!r}, and {table.path.name} has the columns {table.describe_columns()}."
        )
    return None


def picture_table(dataset: Any, source: ModalitySource, tokens: list[str | None], cache: str | None) -> FeatureTable:
    """Encode the items' pictures; items without one are absent.

    Args:
        dataset: RecBole's.
        source: encoder and column.
        tokens: external ids in internal order; ``None`` for padding.
        cache: folder of the feature store.

    Raises:
        ValueError: if not one item has a picture that can be read, the column is not there, or the encoder is not to be had.
    """
    folder = Path(dataset.dataset_path)
    found = find_pictures(folder, tokens, _cells(dataset, source, "image", COLUMN), source.column or COLUMN)
    say(found.report.lines())
    encoder = load_image_encoder(source.encoder, device=dataset.config["device"])
    vectors, counts = encode_pictures(
        found.paths, encoder, FeatureStore(cache), show_progress=dataset.config["show_progress"]
    )
    say(counts.lines())
    if not counts.with_vector:
        raise ValueError(
            f"item_modalities names pictures, and not one of {found.report.n} items has a picture that can be read: put files "
            f"into {folder / FOLDER} as ITEM_ID.jpg, name them in a column of {dataset.dataset_name}.item, or leave "
            "item_modalities empty."
        )
    return vectors


def column_tables(
    dataset: Any, wanted: Mapping[str, str] | str, tokens: list[str | None], modalities: Mapping[str, ModalitySource]
) -> dict[str, FeatureTable]:
    """Make vectors of the columns that ``item_columns`` names, by modality.

    Args:
        dataset: RecBole's.
        wanted: the key's value.
        tokens: external ids in internal order; ``None`` for padding.
        modalities: whose columns name files, which ``auto`` leaves out.

    Raises:
        ValueError: if there is no ``.item`` file, or a column is not there or says nothing.
    """
    table = item_table(dataset)
    if table is None:
        raise ValueError(
            f"item_columns is {wanted!r}, and there is no {dataset.dataset_name}.item in {dataset.dataset_path}. Add that file, or "
            "leave item_columns empty."
        )
    taken = {source.column or name for name, source in modalities.items()}
    found, left = column_vectors(table, tokens, wanted, taken)
    say([*(each.line for each in found), *left])
    return {each.table.modality: each.table for each in found}
