"""What is asked for."""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np

from recbole_llm.retrieval.rules import NO_RULES, Rules
from recbole_llm.retrieval.search import check_by

FALLBACKS = ("none", "popular")
SUBJECTS = ("user", "items", "profile_vector", "text_vector", "picture_vector", "item")


@dataclass(frozen=True, eq=False)
class Request:
    """Who wants what; exactly one of :data:`SUBJECTS`.

    Attributes:
        user: id of a user of the training data.
        items: ids of items an anonymous user likes; where the model weighs histories by recency, oldest first.
        weights: of ``items``, non-negative; ``None`` for the model's own.
        profile_vector: ``[F]`` float32 of the export's encoder, of the profile of a user without history.
        text_vector: ``[F]`` float32 of the export's encoder.
        text: the words of ``text_vector``, which are looked for as they stand; ``None`` for a vector alone.
        picture_vector: ``[F]`` float32 of the export's encoder of pictures.
        item: id of a live item, or one that the model knows and does not rank: what is like it is asked for.
        by: for a text, a picture or an ``item``, one of :data:`recbole_llm.retrieval.search.BY`.
        k: how many; fewer come back where fewer are allowed.
        exclude: item ids without a place.
        exclude_seen: whether the history has no place either.
        filter: attribute conditions, all of which must hold.
        explain: reasons per item.
        only_new: whether only items have a place that nobody has had yet.
        fallback: ``popular`` answers for an unknown user, or where no item is known; ``none`` raises.
        rules: what else decides about the list; its conditions hold beside ``exclude`` and ``filter``.
    """

    user: str | None = None
    items: Sequence[str] | None = None
    weights: Sequence[float] | None = None
    profile_vector: np.ndarray | None = None
    text_vector: np.ndarray | None = None
    text: str | None = None
    picture_vector: np.ndarray | None = None
    item: str | None = None
    by: str = "both"
    k: int = 10
    exclude: Sequence[str] = ()
    exclude_seen: bool = True
    filter: Mapping[str, Any] = field(default_factory=dict)
    explain: int = 0
    only_new: bool = False
    fallback: str = "none"
    rules: Rules = NO_RULES

    def __post_init__(self) -> None:
        given = [name for name in SUBJECTS if getattr(self, name) is not None]
        if len(given) != 1:
            told = ", ".join(given) or "none"
            raise ValueError(f"Give exactly one of {', '.join(SUBJECTS[:-1])} and {SUBJECTS[-1]}; got {told}.")
        if self.text is not None and self.text_vector is None:
            raise ValueError(
                "text is given without text_vector; give the vector of the text by the export's encoder too."
            )
        check_by(self.by)
        if self.by != "both" and given[0] in ("user", "items", "profile_vector"):
            raise ValueError(f"by is {self.by!r}; only searches for a text or for what is like an item know it.")
        if self.k < 1:
            raise ValueError(f"k is {self.k}; expected at least 1.")
        if self.explain < 0:
            raise ValueError(f"explain is {self.explain}; expected at least 0 reasons.")
        if self.fallback not in FALLBACKS:
            raise ValueError(f"fallback is {self.fallback!r}; expected one of {', '.join(FALLBACKS)}.")
        if self.weights is not None:
            if self.items is None or len(self.weights) != len(self.items):
                raise ValueError("weights belong to items, one each.")
            if not all(np.isfinite(weight) and weight >= 0 for weight in self.weights):
                raise ValueError("weights must be finite and not negative.")
