"""Vectors of an item from what it has of each modality, as the model places items that nobody has touched."""

import numpy as np

from recbole_llm.export.reader import Export
from recbole_llm.export.text_map import placed
from recbole_llm.retrieval.item_catalog import Catalog, MappedItem


def map_item(
    export: Export,
    catalog: Catalog,
    item_id: str,
    text: np.ndarray | None,
    picture: np.ndarray | None,
    without_picture: bool = False,
) -> MappedItem | None:
    """Map an item's content to its vectors; ``None`` where nothing that is given can be mapped.

    Args:
        export: the model.
        catalog: its items.
        item_id: external id, known or new. What an item of the export is not given here, it has of the export.
        text: ``[F]`` float32 of the encoder of texts, or ``None``.
        picture: likewise of pictures.
        without_picture: leave out the picture that the item has of the export.

    Raises:
        ValueError: if a vector is of another encoder.
    """
    row = catalog.row_of.get(item_id)
    base = None if row is None else catalog.base_of(row)
    given_text = text is not None and export.text_map is not None
    if not given_text and (picture is None or export.picture_map is None) and not without_picture:
        return None
    parts = []
    for modality, content_map, given in (("text", export.text_map, text), ("image", export.picture_map, picture)):
        if content_map is None:
            continue
        if given is not None:
            parts.append((content_map, content_map.directions(given[None])))
            continue
        if modality == "image" and without_picture:
            continue
        known = export.content.get(modality)
        if base is not None and known is not None and known.shape[1] == content_map.width and known[base].any():
            parts.append((content_map, known[base][None]))
    if not parts:  # the picture was all that was known of it
        return None
    vector, source, bias = placed(parts)
    return MappedItem(vector[0], source[0], float(bias[0]), text)
