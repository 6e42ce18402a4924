"""Which items no answer holds, and why, in sentences: the same for a run, an export and a recommendation."""


def never_shown(left_out: int, unplaced: int, unread: int) -> list[str]:
    """Sentences, one a reason.

    Args:
        left_out: items without a training interaction that have content and no place among the others.
        unplaced: items without a training interaction that nothing places.
        unread: items of the .item file that were not read.
    """
    reasons = (
        (left_out, "without a training interaction are left out: validation says that they gain nothing"),
        (unplaced, "without a training interaction are ranked last: they have no content, or cold_map is none"),
        (unread, "of the .item file are in no interaction and were not read: add item: [item_id] to load_col"),
    )
    return [f"never shown: {count:,} items {why}" for count, why in reasons if count]
