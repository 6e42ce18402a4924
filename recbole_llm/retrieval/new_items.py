"""Some places for items that nobody has had yet."""

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from typing import Any

from recbole_llm.retrieval.answers import Recommended
from recbole_llm.retrieval.recommender import Recommendation, Recommender, Request


def with_new(recommender: Recommender, requests: Sequence[Request], answers: list[Any], least: int) -> list[Any]:
    """Return answers with new items in the last places where the best hold fewer than ``least``.

    The other items stay in their order, and their last ones make room. Conditions, boosts and caps hold for the new items too.

    Args:
        recommender: that answered.
        requests: of users.
        answers: to them, errors included.
        least: new items that each answer holds, where there are so many and the caps leave them a place.

    Raises:
        ValueError: if ``least`` is negative, or more than a request asks for.
    """
    if least and not all(0 < least <= request.k for request in requests):
        raise ValueError(f"include_new is {least}; expected a number from 0 to k, the items of an answer.")
    lacking = {
        at: least - sum(item.cold for item in answer.items)
        for at, answer in enumerate(answers)
        if isinstance(answer, Recommendation) and sum(item.cold for item in answer.items) < least
    }
    if not lacking:
        return answers
    kept = {at: _with_room(answers[at].items, requests[at].k - n) for at, n in lacking.items()}
    found = recommender.recommend_many(
        [
            _for_new(requests[at], kept[at], n + _blocked(recommender, requests[at], kept[at]))
            for at, n in lacking.items()
        ]
    )
    for (at, n), new in zip(lacking.items(), found, strict=True):
        if isinstance(new, Exception):
            raise new
        answers[at] = _joined(recommender, requests[at], answers[at], kept[at], new.items, n)
    return answers


def _with_room(items: Sequence[Recommended], most: int) -> list[Recommended]:
    """The items without the last known ones, so that at most so many are left."""
    known = [item for item in items if not item.cold]
    away = {item.id for item in known[len(known) - max(len(items) - most, 0) :]}
    return [item for item in items if item.id not in away]


def _for_new(request: Request, kept: Sequence[Recommended], k: int) -> Request:
    """The question for the best new items beside those that are there; only what decides about single items applies, and caps."""
    rules = replace(request.rules, diversity=None, explore=None) if request.rules.rerank else request.rules
    there = [item.id for item in kept if item.cold]
    return replace(request, k=k, only_new=True, exclude=[*request.exclude, *there], rules=rules)


def _blocked(recommender: Recommender, request: Request, kept: Sequence[Recommended]) -> int:
    """How many new items the caps may leave out because of what is kept."""
    return sum(_counts(recommender, request.rules.caps, kept).values())


def _counts(
    recommender: Recommender, caps: Mapping[str, int], items: Sequence[Recommended]
) -> Counter[tuple[str, Any]]:
    """How many items have each value of a capped attribute."""
    catalog = recommender.catalog
    return Counter(
        (name, value) for item in items for name in caps for value in catalog.values(catalog.row_of[item.id], name)
    )


def _joined(
    recommender: Recommender,
    request: Request,
    answer: Recommendation,
    kept: list[Recommended],
    new: Sequence[Recommended],
    wanted: int,
) -> Recommendation:
    """The answer with the first ``wanted`` new items that the caps leave beside what is kept."""
    caps = request.rules.caps
    counts = _counts(recommender, caps, kept)

    def takes(item: Recommended) -> bool:
        own = _counts(recommender, caps, [item])
        fits = all(counts[key] + number <= caps[key[0]] for key, number in own.items())
        if fits:
            counts.update(own)
        return fits

    taken: list[Recommended] = []
    for item in new:
        if len(taken) < wanted and takes(item):
            taken.append(item)
    if not taken:
        return answer
    stay = {item.id for item in kept}
    for item in answer.items:  # those that made room for new ones that are not there after all
        if item.id not in stay and len(stay) + len(taken) < request.k and takes(item):
            stay.add(item.id)
    note = answer.note
    if len(taken) < min(wanted, len(new)):
        lacking = wanted - len(taken)
        note = f"{note} {lacking} of the new items wanted are not there: the caps leave none of them a place.".strip()
    items = (*(item for item in answer.items if item.id in stay), *map(_without_places, taken))
    return replace(answer, items=items, note=note)


def _without_places(item: Recommended) -> Recommended:
    """The item without its places by score, which are among new items alone."""
    return replace(item, rules=tuple(rule._replace(place=None) for rule in item.rules)) if item.rules else item
