"""Vectors of a dataset's pictures, sounds and columns, aligned to its items; texts are ``dataset.py``'s own."""

from collections.abc import Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

from torch import Tensor

from recbole_llm.bridge.option_values import ModalitySource
from recbole_llm.content.encoders.images import load_image_encoder
from recbole_llm.content.encoders.joint import TextTower
from recbole_llm.content.encoders.sounds import load_sound_encoder
from recbole_llm.content.features import FeatureStore, FeatureTable, encode_texts
from recbole_llm.content.images.files import PICTURES
from recbole_llm.content.item_columns import PREFIX, column_vectors
from recbole_llm.content.media.encode import encode_files
from recbole_llm.content.media.files import ItemFiles, find_files
from recbole_llm.content.media.kinds import FileKind
from recbole_llm.content.sounds.files import SOUNDS
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


def _cells(dataset: Any, source: ModalitySource, kind: FileKind) -> dict[str, str] | None:
    """Id to the cell that names the item's files; ``None`` where there is no such column.

    Raises:
        ValueError: if the column was named and is not there.
    """
    table, column = item_table(dataset), source.column or kind.column
    if table is None:
        return None
    if column in table.types:
        return {token: table.columns[column][row] for token, row in table.row_of.items()}
    if source.column is not None:
        raise ValueError(
            f"item_modalities.{kind.modality}.column names {column!r}, and {table.path.name} has the columns "
            f"{table.describe_columns()}."
        )
    return None


KINDS = {"image": PICTURES, "audio": SOUNDS}


def load_media_encoder(modality: str, source: ModalitySource, device: Any) -> Any:
    """Load the encoder of a modality's files; raises ``ValueError`` where it is not to be had."""
    if modality == "audio":
        return load_sound_encoder(source.encoder, seconds=source.seconds, device=device)
    return load_image_encoder(source.encoder, device=device)


def files_of_items(dataset: Any, modality: str, source: ModalitySource | None, tokens: list[str | None]) -> ItemFiles:
    """Find the items' pictures or sounds, whether a model reads them or not.

    Args:
        dataset: RecBole's.
        modality: ``image`` or ``audio``.
        source: names the column; ``None`` where the modality is not configured.
        tokens: external ids in the order wanted; ``None`` is padding.

    Raises:
        ValueError: if the column that was named is not there.
    """
    kind, source = KINDS[modality], source or ModalitySource("")
    return find_files(
        kind, Path(dataset.dataset_path), tokens, _cells(dataset, source, kind), source.column or kind.column
    )


def media_table(
    dataset: Any, modality: str, source: ModalitySource, tokens: list[str | None], cache: str | None
) -> FeatureTable:
    """Encode the items' pictures or sounds; items without one are absent.

    Args:
        dataset: RecBole's.
        modality: ``image`` or ``audio``.
        source: encoder and column.
        tokens: external ids in internal order; ``None`` for padding.
        cache: folder of the feature store.

    Raises:
        ValueError: if not one item has a file that can be read, the column is not there, or the encoder is not to be had.
    """
    folder, kind = Path(dataset.dataset_path), KINDS[modality]
    found = files_of_items(dataset, modality, source, tokens)
    say(found.report.lines())
    encoder = load_media_encoder(modality, source, dataset.config["device"])
    vectors, counts = encode_files(
        kind, found.paths, encoder, FeatureStore(cache), show_progress=dataset.config["show_progress"]
    )
    say(counts.lines())
    if not counts.with_vector:
        raise ValueError(
            f"item_modalities names {kind.many}, and not one of {found.report.n} items has a {kind.one} that can be read: put "
            f"files into {folder / kind.folder} as ITEM_ID{kind.suffixes[0]}, name them in a column of "
            f"{dataset.dataset_name}.item, or leave {modality} out of item_modalities."
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


# ------------------------------------------------------------------ questions


def question_encoder(dataset: Any, options: Any, asked: str, compared: str) -> Any:
    """Load the encoder of questions of one modality that are compared with the items' other one.

    Args:
        dataset: RecBole's, of ours.
        options: of its configuration.
        asked: ``text``, ``image`` or ``audio``.
        compared: likewise.

    Raises:
        ValueError: if no encoder holds both in one space, or it is not to be had.
    """
    device, sources = dataset.config["device"], options.item_modalities or {}
    if asked == compared and asked != "text":
        if asked not in sources:
            raise ValueError(
                f"item_modalities names no encoder of {asked}, so that no {KINDS[asked].one} can be asked for."
            )
        return load_media_encoder(asked, sources[asked], device)
    if compared == "text":
        own = dataset.text_encoder()
        if asked == "text":
            return own
        if not isinstance(own, TextTower):
            raise ValueError(
                f"The texts' encoder {options.encoder!r} has no tower of {KINDS[asked].many}: a {KINDS[asked].one} finds items by "
                "their texts where encoder names a model of both, such as CLIP or SigLIP."
            )
        return load_media_encoder(asked, ModalitySource(own.files.name), device)
    if asked != "text":
        raise ValueError(f"No encoder has {asked} and {compared} in one space: ask by a text.")
    found = load_media_encoder(compared, sources[compared], device) if compared in sources else None
    if not getattr(found, "joint", False):
        named = repr(sources[compared].encoder) if compared in sources else "made elsewhere"
        raise ValueError(
            f"The encoder of the items' {KINDS[compared].many} ({named}) has no text tower: texts find {KINDS[compared].many} with "
            "CLIP, SigLIP or CLAP."
        )
    return TextTower(found.files, device=device)  # type: ignore[union-attr]


def centre_of_questions(dataset: Any, options: Any, asked: str, encoder: Any, most: int) -> Tensor | None:
    """Average what the items hold of the questions' modality, ``[F]`` float64; ``None`` where they hold nothing of it.

    Args:
        dataset: RecBole's, of ours.
        options: of its configuration.
        asked: modality of the questions.
        encoder: of :func:`question_encoder`.
        most: texts that are read, evenly taken.
    """
    store = FeatureStore(options.feature_cache_dir)
    if asked == "text":
        if item_table(dataset) is None:
            return None
        texts = [text for text in dataset.item_texts() if text]
        step = max(len(texts) // most, 1)
        table = encode_texts(texts[::step][:most], encoder, store, batch_size=options.encoder_batch_size)
    elif asked in (options.item_modalities or {}):
        table = dataset.media_vectors(asked)
        if table.fingerprint != encoder.fingerprint:
            return None
    else:
        return None
    return table.vectors[table.present].double().mean(0)
