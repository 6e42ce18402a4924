"""Items whose content and behaviour disagree, as a part of a report: where texts or pictures may be mixed up."""

from collections.abc import Sequence
from dataclasses import dataclass

from recbole_llm.export.item_records import item_records
from recbole_llm.fitting.disagreement import LEAST_USERS, agreements
from recbole_llm.reporting.document import table, text
from recbole_llm.reporting.quality import Trained

LISTED = 10


@dataclass(frozen=True)
class ContentCheck:
    """What one modality looks like beside behaviour.

    Attributes:
        modality: ``text``, ``image``...
        items: that could be told.
        suspects: of these, how many agree no better than an item with another's content.
        median: agreement of the item in the middle.
        threshold: below it an item is a suspect.
        first: id, title and agreement of the least agreeing suspects.
    """

    modality: str
    items: int
    suspects: int
    median: float
    threshold: float
    first: tuple[tuple[str, str, float], ...]


def check_content(trained: Trained) -> list[ContentCheck]:
    """Measure every modality of a model's items; nothing where none has enough items, or there are too many.

    Args:
        trained: the model and its data.
    """
    model, dataset = trained.model, trained.training
    data = model.training_data()
    found = []
    tokens = [str(token) for token in dataset.field2id_token[dataset.iid_field][1:]]
    titles: list[str] | None = None
    for modality, agreement in agreements(data.history, data.content, data.n_items).items():
        known = ~agreement.values.isnan()
        if not bool(known.any()):
            continue
        if titles is None:
            records = item_records(model.options, dataset, tokens, None, False).records
            titles = [record.title for record in records]
        items = agreement.suspects(data.n_items)
        first = tuple((tokens[item - 1], titles[item - 1], float(agreement.values[item])) for item in items[:LISTED])
        median = float(agreement.values.nanmedian())
        found.append(ContentCheck(modality, int(known.sum()), len(items), median, agreement.threshold, first))
    return found


def section(checks: Sequence[ContentCheck]) -> list[str]:
    """The part of the report, as lines of HTML; nothing without a check."""
    if not checks:
        return []
    lines = [
        "<h2>Content and behaviour</h2>",
        "<p>Agreement of an item: of all items, the share that is less like it in content than those which the same users have, on "
        f"average. {text(0.5)} is chance. Items with fewer than {LEAST_USERS} users cannot be told. A low one may be unusual, or "
        "have another item's content.</p>",
    ]
    for check in checks:
        lines.append(
            f"<p><b>{text(check.modality)}</b>: {check.suspects:,} of {check.items:,} items agree no better than items with "
            f"another's content (below {check.threshold:.2f}; the item in the middle has {check.median:.2f}).</p>"
        )
        rows = [[title if title == item else f"{title} ({item})", f"{value:.2f}"] for item, title, value in check.first]
        if rows:
            lines += table(f"Least agreeing items by {check.modality}", ["item", "agreement"], rows)
    return lines
