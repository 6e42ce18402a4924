"""Small copies of a dataset's pictures, for an export and for a report."""

from collections.abc import Collection
from logging import getLogger
from typing import Any

from recbole_llm.content.images.reading import require_pillow
from recbole_llm.export.thumbnails import MAX_BYTES, SIDE, Thumbnails

log = getLogger(__name__)


def small_pictures(dataset: Any) -> Thumbnails:
    """Make small copies of all items' pictures, in catalogue order.

    Raises:
        ValueError: if not one item has a picture that can be read, or Pillow is missing.
    """
    from recbole_llm.content.images.thumbnails import thumbnails_of

    require_pillow()
    found, counts = thumbnails_of(dataset.picture_files().paths[1:], SIDE, MAX_BYTES)
    for line in counts.lines():
        log.info("%s", line)
    if not counts.made:
        raise ValueError(
            f"images is 'thumbs', and not one of {counts.items} items has a picture that can be read. Put files into the dataset's "
            "folder images/ as ITEM_ID.jpg, or leave images out."
        )
    return Thumbnails.join(found)


def pictures_of(dataset: Any, items: Collection[int], side: int, max_bytes: int) -> dict[int, bytes]:
    """Make small copies of some items' pictures, where the dataset has any; JPEG by internal id.

    Args:
        dataset: RecBole's; one of a class that knows of no pictures has none.
        items: internal ids.
        side: pixels of the longer side at most.
        max_bytes: of one.
    """
    if not hasattr(dataset, "picture_files"):
        return {}
    paths = dataset.picture_files().paths
    wanted = sorted(item for item in set(items) if paths[item])
    if not wanted:
        return {}
    try:
        require_pillow()
    except ValueError as error:
        log.warning("Without pictures of the items: %s", error)
        return {}
    from recbole_llm.content.images.thumbnails import thumbnails_of

    found, _ = thumbnails_of([paths[item] for item in wanted], side, max_bytes)
    return {item: small for item, small in zip(wanted, found, strict=True) if small is not None}
