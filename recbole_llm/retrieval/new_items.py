"""Some places for items that nobody has had yet."""

from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from recbole_llm.retrieval.recommender import Recommendation, Recommender, Request


def with_new(recommender: Recommender, requests: Sequence[Request], answers: list[Any], least: int) -> list[Any]:
    """Return answers with new items in the last places where the best hold fewer than ``least``.

    Args:
        recommender: that answered.
        requests: of users.
        answers: to them, errors included.
        least: new items that each answer holds, where there are so many.
    """
    lacking = [
        at
        for at, answer in enumerate(answers)
        if isinstance(answer, Recommendation) and sum(item.cold for item in answer.items) < least
    ]
    if not lacking:
        return answers
    found = recommender.recommend_many([replace(requests[at], k=least, only_new=True) for at in lacking])
    for at, new in zip(lacking, found, strict=True):
        if isinstance(new, Exception):
            raise new
        known = [item for item in answers[at].items if not item.cold]
        kept = known[: max(requests[at].k - len(new.items), 0)]
        both = sorted([*kept, *new.items], key=lambda item: -item.score)
        answers[at] = replace(answers[at], items=tuple(both))
    return answers
