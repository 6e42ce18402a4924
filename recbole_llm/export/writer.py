"""Write an export: complete or absent, never half."""

import hashlib
import json
import platform
import shutil
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from datetime import datetime, timezone
from pathlib import Path
from typing import Any

import numpy as np
from safetensors.numpy import save_file

import recbole_llm
from recbole_llm.atomic import atomic_folder, is_temporary
from recbole_llm.export.direct import DirectRows, to_tensors
from recbole_llm.export.manifest import (
    CARD,
    CODED_SCHEMA,
    CONTENT,
    CONTENT_SCHEMA,
    DIRECT,
    DIRECT_SCHEMA,
    DISLIKED_SCHEMA,
    ENCODER_FOLDER,
    EXACT,
    FIRST_SCHEMA,
    HISTORY,
    INDEX,
    ITEM_IDS,
    ITEMS,
    MANIFEST,
    NEVER_SHOWN,
    PICTURE_MAP,
    PICTURE_SCHEMA,
    PROFILE_MAP,
    PROFILE_SCHEMA,
    SEARCH,
    SEARCH_INDEX,
    SEARCH_SCHEMA,
    SEQUENCE_SCHEMA,
    SOUND_SCHEMA,
    TEXT_MAP,
    THUMBNAIL_SCHEMA,
    THUMBNAILS,
    USER_IDS,
    VECTORS,
    Block,
    EncoderSpec,
    FileSum,
    ItemText,
    Manifest,
)
from recbole_llm.export.pooling import Pooling
from recbole_llm.export.profile_map import ProfileMap
from recbole_llm.export.quantise import encoded
from recbole_llm.export.reader import ItemRecord, load_export
from recbole_llm.export.search_tables import SearchTables
from recbole_llm.export.sequence import SEQUENCE_FILE, SequenceWeights
from recbole_llm.export.text_map import TextMap
from recbole_llm.export.thumbnails import Thumbnails
from recbole_llm.scoring.probability import ProbabilityMap

EXACT_INDEX = {"kind": "exact"}  # every item is scored
QUERIES = 4096  # of users, by which codes of items are chosen


@dataclass(frozen=True, eq=False)
class ExportContents:
    """What goes into an export; N items, U users, D columns of all blocks. Rows are in catalogue order, no padding row.

    Attributes:
        item_ids: N external ids, unique.
        user_ids: U external ids, unique.
        records: N records; ``None`` for titles that are the ids.
        vector: ``[N, D]`` float32 targets.
        source: ``[N, D]`` float32 sources.
        bias: ``[N]`` float32.
        trained: ``[N]`` bool.
        listed: ``[N]`` bool, items that may be recommended; ``None`` for all.
        blocks: the columns.
        history_offsets: ``[U + 1]`` int64.
        history_items: ``[nnz]`` rows, ascending and unique within a user.
        history_weight: ``[nnz]`` float32 t_j; ``None`` for ones.
        history_rank: ``[nnz]``, 0 for a user's newest item; needed where a block has a decay or reads the order, else ``None``.
        disliked_offsets: ``[U + 1]`` int64, of items that users have seen and not liked; ``None`` for none.
        disliked_items: rows of these, ascending and unique within a user.
        content: by modality ``[N, f]``, unit vectors of the items' content; zero rows for items without.
        search: what searches need beside the content, or ``None``.
        search_index: bytes of the index of ``search`` and the texts, or ``None``.
        offset: ``[D]`` float32; ``None`` for zeros.
        user_part: ``[U, D]`` float32, or ``None``.
        text_map: or ``None``.
        picture_map: likewise; needs ``pictures`` and their vectors in ``content``.
        thumbnails: small pictures of the items, or ``None``.
        encoder: or ``None``.
        pictures: encoder of the items' pictures, or ``None``.
        sounds: encoder of the items' sounds, or ``None``.
        encoder_files: name under ``encoder/`` to file, copied; needs ``encoder``.
        item_text: or ``None``.
        profile_map: what a user's own text adds to the query, or ``None``.
        profile_text: how a user's columns make it; with ``profile_map``.
        attributes: attribute name to kind.
        history_decay: or ``None``.
        similar_by: ``vector`` or ``source``.
        probability: the map from scores to probabilities; ``None`` for the plain sigmoid.
        overlay_seq: last change of the service's log that the training data held already.
        index: description for the manifest, and the file's bytes; ``None`` for exact scoring.
        onnx: whether the arithmetic goes along as ONNX graphs (needs onnx).
        fitted_interactions: of the histories' interactions or others, how many the model was fitted on; ``None``: not told.
        never_shown: arguments of :func:`recbole_llm.scoring.never_shown.never_shown`.
        metrics: for the model card and the manifest.
        producer: further versions for the manifest, and the name of the dataset.
        card: the model card, Markdown.
        dtype: of the vectors of items and users: ``float32``, or ``int8`` (:mod:`recbole_llm.export.quantise`).
        direct: direct rows by the place of their block in ``blocks``; in float32 whatever ``dtype`` says.
        rescore: with ``int8``, whether the float32 vectors go along, by which the best are scored again.
        sequence: of the block that reads the order of a history, or ``None``.
    """

    item_ids: Sequence[str]
    user_ids: Sequence[str]
    vector: np.ndarray
    source: np.ndarray
    bias: np.ndarray
    trained: np.ndarray
    blocks: tuple[Block, ...]
    history_offsets: np.ndarray
    history_items: np.ndarray
    history_weight: np.ndarray | None = None
    history_rank: np.ndarray | None = None
    disliked_offsets: np.ndarray | None = None
    disliked_items: np.ndarray | None = None
    content: Mapping[str, np.ndarray] = field(default_factory=dict)
    search: SearchTables | None = None
    search_index: bytes | None = None
    records: Sequence[ItemRecord] | None = None
    listed: np.ndarray | None = None
    offset: np.ndarray | None = None
    user_part: np.ndarray | None = None
    text_map: TextMap | None = None
    picture_map: TextMap | None = None
    thumbnails: Thumbnails | None = None
    encoder: EncoderSpec | None = None
    pictures: EncoderSpec | None = None
    sounds: EncoderSpec | None = None
    encoder_files: Mapping[str, Path] = field(default_factory=dict)
    item_text: ItemText | None = None
    profile_map: ProfileMap | None = None
    profile_text: ItemText | None = None
    attributes: Mapping[str, str] = field(default_factory=dict)
    history_decay: float | None = None
    similar_by: str = "vector"
    probability: ProbabilityMap | None = None
    overlay_seq: int = 0
    index: tuple[Mapping[str, Any], bytes] | None = None
    onnx: bool = False
    fitted_interactions: int | None = None
    never_shown: tuple[int, int, int] = (0, 0, 0)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    producer: Mapping[str, str] = field(default_factory=dict)
    card: str | None = None
    dtype: str = "float32"
    rescore: bool = False
    sequence: SequenceWeights | None = None
    direct: Mapping[int, DirectRows] = field(default_factory=dict)


def write_artifact(folder: str | Path, contents: ExportContents) -> Manifest:
    """Write an export into a folder that does not exist yet.

    Everything is written beside it under another name, synchronised to the disk, read back with every check of the
    reader, and renamed: a folder of that name is always whole.

    Args:
        folder: the export; its parent is made if it is missing.
        contents: what it holds.

    Returns:
        The manifest.

    Raises:
        ValueError: if the folder exists, or the contents do not pass the reader's checks.
    """
    folder = Path(folder)
    if folder.exists():
        raise ValueError(
            f"output {str(folder)!r} exists, and an export is immutable: name another folder, or remove it."
        )
    folder.parent.mkdir(parents=True, exist_ok=True)
    with atomic_folder(folder) as temporary:
        _write_files(temporary, contents)
        manifest = _manifest(temporary, contents)
        _write_text(temporary / MANIFEST, json.dumps(manifest.to_json(), indent=1, ensure_ascii=False) + "\n")
        _set_modes(temporary)
        export = load_export(temporary, mapped=True)  # nobody else writes here
        if contents.onnx:
            from recbole_llm.export.onnx_graphs import check_graphs

            check_graphs(export)
    return manifest


def _float32(array: np.ndarray) -> np.ndarray:
    return np.ascontiguousarray(array, dtype=np.float32)


def _write_vectors(folder: Path, contents: ExportContents) -> None:
    """Write the vectors of items and users, in float32 or in eight bits."""
    D, listed = contents.vector.shape[1], contents.listed
    vectors: dict[str, np.ndarray] = {
        "item.bias": _float32(contents.bias),
        "item.trained": np.ascontiguousarray(contents.trained, dtype=np.uint8),
        "item.listed": np.asarray(np.ones(len(contents.bias)) if listed is None else listed, dtype=np.uint8, order="C"),
        "user.offset": np.zeros(D, np.float32) if contents.offset is None else _float32(contents.offset),
    }
    tables = {"item.vector": contents.vector, "item.source": contents.source, "user.part": contents.user_part}
    scales = np.repeat([block.scale for block in contents.blocks], [block.dim for block in contents.blocks])
    for name, table in tables.items():
        if table is None:
            continue
        if contents.dtype == "float32":
            vectors[name] = _float32(table)
            continue
        # items are multiplied by queries; what queries are made of, by items
        beside = _queries(contents) if name == "item.vector" else _float32(contents.vector * scales)
        vectors |= _coded(name, _float32(table), contents, beside)
    save_file(vectors, folder / VECTORS)
    if contents.rescore:
        save_file({name: _float32(table) for name, table in tables.items() if table is not None}, folder / EXACT)


def _write_history(folder: Path, contents: ExportContents) -> None:
    items = np.ascontiguousarray(contents.history_items, dtype=np.int32)
    weight = contents.history_weight
    optional = {} if contents.history_rank is None else {"rank": _float32(contents.history_rank)}
    if contents.disliked_items is not None:
        optional["disliked_offsets"] = np.ascontiguousarray(contents.disliked_offsets, dtype=np.int64)
        optional["disliked_items"] = np.ascontiguousarray(contents.disliked_items, dtype=np.int32)
    save_file(
        {
            **optional,
            "offsets": np.ascontiguousarray(contents.history_offsets, dtype=np.int64),
            "items": items,
            "weight": np.ones(len(items), np.float32) if weight is None else _float32(weight),
        },
        folder / HISTORY,
    )


def _write_optional_tables(folder: Path, contents: ExportContents) -> None:
    if contents.text_map is not None:
        save_file(_text_map_tensors(contents.text_map), folder / TEXT_MAP)
    if contents.picture_map is not None:
        save_file(_text_map_tensors(contents.picture_map), folder / PICTURE_MAP)
    if contents.thumbnails is not None:
        save_file(contents.thumbnails.to_tensors(), folder / THUMBNAILS)
    if contents.profile_map is not None:
        save_file(contents.profile_map.to_tensors(), folder / PROFILE_MAP)
    if contents.content:
        save_file({name: _float32(table) for name, table in contents.content.items()}, folder / CONTENT)
    if contents.direct:
        save_file(to_tensors(contents.direct), folder / DIRECT)
    if contents.search is not None:
        save_file(contents.search.to_tensors(), folder / SEARCH)
    if contents.sequence is not None:
        save_file({name: _float32(array) for name, array in contents.sequence.arrays.items()}, folder / SEQUENCE_FILE)


def _write_files(folder: Path, contents: ExportContents) -> None:
    _write_vectors(folder, contents)
    _write_history(folder, contents)
    _write_optional_tables(folder, contents)
    _write_lines(folder / ITEM_IDS, contents.item_ids)
    _write_lines(folder / USER_IDS, contents.user_ids)
    records = contents.records
    if records is None:
        records = [ItemRecord(item_id, None, {}) for item_id in contents.item_ids]
    _write_lines(
        folder / ITEMS,
        (
            {"title": r.title, **({} if r.text is None else {"text": r.text}), "attributes": dict(r.attributes)}
            for r in records
        ),
    )
    if contents.index is not None:
        (folder / INDEX).write_bytes(contents.index[1])
    if contents.search_index is not None:
        (folder / SEARCH_INDEX).write_bytes(contents.search_index)
    if contents.onnx:
        from recbole_llm.export.onnx_graphs import write_graphs

        write_graphs(folder, contents.blocks, _text_map_kind(contents.text_map))
    if contents.card is not None:
        _write_text(folder / CARD, contents.card)
    for name, path in contents.encoder_files.items():
        target = folder / ENCODER_FOLDER / name
        target.parent.mkdir(parents=True, exist_ok=True)
        shutil.copyfile(path, target)


def _queries(contents: ExportContents) -> np.ndarray:
    """The queries of up to ``QUERIES`` users with a history, ``[n, D]`` float32."""
    starts, items = contents.history_offsets, contents.history_items
    offset = np.zeros(contents.vector.shape[1]) if contents.offset is None else contents.offset
    pooling = Pooling(contents.blocks, _float32(offset), contents.sequence)
    users = np.flatnonzero(np.diff(starts))
    found = []
    for user in users[:: -(-len(users) // QUERIES) or 1].tolist():
        own = slice(int(starts[user]), int(starts[user + 1]))
        times = np.ones(own.stop - own.start) if contents.history_weight is None else contents.history_weight[own]
        part = None if contents.user_part is None else contents.user_part[user]
        ranks = None if contents.history_rank is None else contents.history_rank[own]
        found.append(pooling.query(_float32(contents.source[items[own]]), _float32(times), part, ranks).vector)
    return np.array(found, np.float32).reshape(-1, contents.vector.shape[1])


def _coded(name: str, table: np.ndarray, contents: ExportContents, beside: np.ndarray) -> dict[str, np.ndarray]:
    coded = encoded(table, [block.dim for block in contents.blocks], beside)
    return {f"{name}.codes": coded.codes, f"{name}.scale": coded.scale, "rotation.signs": coded.signs}


def _text_map_tensors(text_map: TextMap) -> dict[str, np.ndarray]:
    arrays = {
        "center": text_map.center,
        "vector": text_map.vector,
        "source": text_map.source,
        "bias": text_map.bias,
        "vector_offset": text_map.vector_offset,
        "source_offset": text_map.source_offset,
        "bias_offset": np.array(text_map.bias_offset, np.float32),
        "transform": text_map.transform,
        "support": text_map.support,
        "gamma": None if text_map.gamma is None else np.array(text_map.gamma, np.float32),
    }
    return {name: np.asarray(array, order="C") for name, array in arrays.items() if array is not None}


def manifest_of(contents: ExportContents, files: Mapping[str, FileSum], index: Mapping[str, Any]) -> Manifest:
    """Write the manifest of ``contents``, still without an ``export_id``.

    Args:
        contents: of the export.
        files: size and checksum by name, of what was written.
        index: kind and parameters of the index.
    """
    return Manifest(
        schema=max(_min_reader(contents), CODED_SCHEMA),
        min_reader=_min_reader(contents),
        export_id="",
        created_at=datetime.now(timezone.utc).isoformat(timespec="seconds"),
        producer={"recbole_llm": recbole_llm.__version__, "python": platform.python_version(), **contents.producer},
        blocks=contents.blocks,
        history_decay=contents.history_decay,
        similar_by=contents.similar_by,
        probability=contents.probability,
        counts={
            "items": len(contents.item_ids),
            "users": len(contents.user_ids),
            "interactions": len(contents.history_items),
            "trained_items": int(np.asarray(contents.trained).sum()),
            **({} if contents.fitted_interactions is None else {"fitted_interactions": contents.fitted_interactions}),
            **{name: count for name, count in zip(NEVER_SHOWN, contents.never_shown, strict=True) if count},
        },
        encoder=contents.encoder,
        pictures=contents.pictures,
        sounds=contents.sounds,
        item_text=contents.item_text,
        profile_text=contents.profile_text,
        attributes=dict(contents.attributes),
        text_map=_text_map_kind(contents.text_map),
        picture_map=_text_map_kind(contents.picture_map),
        overlay_seq=contents.overlay_seq,
        index=dict(index),
        metrics=dict(contents.metrics),
        files=dict(files),
    )


def _min_reader(contents: ExportContents) -> int:
    """The smallest schema that knows every file and tensor: readers refuse others."""
    if contents.sequence is not None:
        return SEQUENCE_SCHEMA
    if contents.profile_map is not None:
        return PROFILE_SCHEMA
    if contents.direct:
        return DIRECT_SCHEMA
    if contents.picture_map is not None or contents.thumbnails is not None:
        return THUMBNAIL_SCHEMA
    if contents.sounds is not None:
        return SOUND_SCHEMA
    if contents.pictures is not None:
        return PICTURE_SCHEMA
    if contents.dtype != "float32":
        return CODED_SCHEMA
    if contents.search is not None:
        return SEARCH_SCHEMA
    weighs = contents.history_weight is not None and contents.history_rank is not None  # both count since that schema
    if contents.disliked_items is not None or weighs:
        return DISLIKED_SCHEMA
    return CONTENT_SCHEMA if contents.content else FIRST_SCHEMA


def _manifest(folder: Path, contents: ExportContents) -> Manifest:
    files = {
        path.relative_to(folder).as_posix(): FileSum(path.stat().st_size, _sha256(path))
        for path in sorted(folder.rglob("*"))
        if path.is_file()
    }
    draft = manifest_of(contents, files, EXACT_INDEX if contents.index is None else contents.index[0])
    return replace(draft, export_id=draft.identity())


def _text_map_kind(text_map: TextMap | None) -> dict[str, Any] | None:
    return None if text_map is None else {"kind": text_map.kind, "normalize": text_map.normalize}


def _sha256(path: Path) -> str:
    with path.open("rb") as file:
        digest = hashlib.sha256()
        while chunk := file.read(1 << 20):
            digest.update(chunk)
    return digest.hexdigest()


def _write_lines(path: Path, values: Iterable[Any]) -> None:
    with path.open("w", encoding="utf-8", newline="\n") as file:
        file.writelines(json.dumps(value, ensure_ascii=False, allow_nan=False) + "\n" for value in values)


def _write_text(path: Path, text: str) -> None:
    path.write_text(text, encoding="utf-8", newline="\n")


def _set_modes(folder: Path) -> None:
    """Set every file's mode to that of an ordinarily opened one: safetensors makes its files readable for the owner alone."""
    mode = (folder / MANIFEST).stat().st_mode & 0o777
    for path in folder.rglob("*"):
        if path.is_file():
            path.chmod(mode)


def exports_in(folder: Path) -> list[Path]:
    """List the complete exports directly in ``folder``, oldest first by the time of their manifest."""
    found = [path for path in folder.iterdir() if not is_temporary(path) and (path / MANIFEST).is_file()]
    return sorted(found, key=lambda path: ((path / MANIFEST).stat().st_mtime_ns, path.name))
