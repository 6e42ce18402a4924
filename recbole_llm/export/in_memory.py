"""Build the loaded form of an export in memory, without writing files."""

from pathlib import Path

import numpy as np

from recbole_llm.export.reader import Export, ItemRecord
from recbole_llm.export.writer import EXACT_INDEX, ExportContents, manifest_of


def export_in_memory(contents: ExportContents) -> Export:
    """Build what ``load_export(write_artifact(folder, contents))`` would give, without a folder.

    It has no files and no ``export_id``.

    Arrays that are float32 already are shared and not copied.

    Args:
        contents: without an index: every item is scored.
    """
    float32 = lambda array: np.ascontiguousarray(array, dtype=np.float32)  # noqa: E731
    N, D = contents.vector.shape
    items = np.ascontiguousarray(contents.history_items, dtype=np.int32)
    weight, listed, text_map = contents.history_weight, contents.listed, contents.text_map
    trained = np.asarray(contents.trained, dtype=bool)
    records = contents.records
    manifest = manifest_of(contents, files={}, index=EXACT_INDEX)
    return Export(
        folder=Path(),
        manifest=manifest,
        item_ids=list(contents.item_ids),
        user_ids=list(contents.user_ids),
        records=[ItemRecord(i, None, {}) for i in contents.item_ids] if records is None else list(records),
        vector=float32(contents.vector),
        source=float32(contents.source),
        bias=float32(contents.bias),
        trained=trained,
        listed=np.ones(N, bool) if listed is None else np.asarray(listed, dtype=bool),
        offset=np.zeros(D, np.float32) if contents.offset is None else float32(contents.offset),
        user_part=None if contents.user_part is None else float32(contents.user_part),
        history_offsets=np.ascontiguousarray(contents.history_offsets, dtype=np.int64),
        history_items=items,
        history_weight=np.ones(len(items), np.float32) if weight is None else float32(weight),
        text_map=text_map,
        profile_map=contents.profile_map,
        history_rank=None if contents.history_rank is None else float32(contents.history_rank),
        disliked_offsets=None if contents.disliked_offsets is None else np.asarray(contents.disliked_offsets, np.int64),
        disliked_items=None if contents.disliked_items is None else np.asarray(contents.disliked_items, np.int32),
        content={name: float32(table) for name, table in contents.content.items()},
        search=contents.search,
        direct=dict(contents.direct),
        search_index=None if contents.search_index is None else memoryview(contents.search_index),
        # they made the contents, so they may be loaded
        encoders=() if contents.encoder is None else (contents.encoder.name,),
        picture_map=contents.picture_map,
        thumbnails=contents.thumbnails,
        picture_encoders=() if contents.pictures is None else (contents.pictures.name,),
        sequence=contents.sequence,
    )
