"""Which items of an answer have a small picture that can be asked for."""

from collections.abc import Sequence
from dataclasses import replace

from recbole_llm.retrieval.answers import Recommendation, Recommended
from recbole_llm.retrieval.item_catalog import Catalog


def with_thumbnails(
    catalog: Catalog, answers: Sequence[Recommendation | Exception]
) -> list[Recommendation | Exception]:
    """Mark the items of answers that have a small picture; answers of a catalogue without any stay as they are."""
    if not catalog.has_thumbnails:
        return list(answers)

    def marked(item: Recommended) -> Recommended:
        row = catalog.row_of.get(item.id)
        return replace(item, image=True) if row is not None and catalog.has_thumbnail(row) else item

    return [
        answer if isinstance(answer, Exception) else replace(answer, items=tuple(map(marked, answer.items)))
        for answer in answers
    ]
