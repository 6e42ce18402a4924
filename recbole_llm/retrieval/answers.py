"""What an answer is."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from recbole_llm.retrieval.rules import Applied


@dataclass(frozen=True)
class Reason:
    """What one item of the history adds to a score.

    Attributes:
        id: of that item.
        title: its title.
        contribution: what it adds.
        alike: where several modalities describe the items, the cosine with the recommended item in each that both have.
    """

    id: str
    title: str
    contribution: float
    alike: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Parts:
    """What a search's score is made of; the three add up to it.

    Attributes:
        likeness: of the meaning.
        words: that occur as they stand.
        taste: what buyers of the likest items bought.
    """

    likeness: float
    words: float
    taste: float


@dataclass(frozen=True)
class Recommended:
    """One item of an answer.

    Attributes:
        id: external id.
        title: its title.
        score: <q, w_i> + b_i and boosts, by which items are ranked; for source ``popular`` the number of training interactions;
            for a search (``text``, ``similar``) that of :mod:`recbole_llm.retrieval.search` and boosts.
        probability: P(i|u), by the export's map and without boosts, which change what is shown and not what a user does;
            ``None`` for sources that are no score of a user (``popular``, searches).
        cold: whether it is known by its text alone.
        reasons: the largest positive contributions of the history, best first; for a search, of the likest items, whose buyers
            bought this one; ``None`` where none were asked for.
        rest: the contributions that are not among the reasons, and the user's own part; for a search, likeness and words too.
        bias: b_i. Reasons, order, rest, bias and the contributions of rules add up to the score.
        rules: what lifted, moved or admitted the item beside its score.
        order: what the order of the history adds, which belongs to no item of it alone; ``None`` where no block reads the order or
            no reasons were asked for.
        parts: of a search's score without boosts; ``None`` where no reasons were asked for, and for other sources.
        image: whether there is a small picture of it.
    """

    id: str
    title: str
    score: float
    cold: bool
    probability: float | None = None
    reasons: tuple[Reason, ...] | None = None
    rest: float | None = None
    bias: float | None = None
    rules: tuple[Applied, ...] = ()
    parts: Parts | None = None
    order: float | None = None
    image: bool = False


@dataclass(frozen=True)
class Recommendation:
    """An answer.

    Attributes:
        items: best first.
        source: ``history``, ``items``, ``profile``, ``text``, ``picture``, ``similar``, or ``popular`` where the fallback answered.
        unknown: ids of the request that no item has.
        note: why there are fewer items than asked for, or what a rule could not do; empty for nothing.
    """

    items: tuple[Recommended, ...]
    source: str
    unknown: tuple[str, ...] = ()
    note: str = ""
