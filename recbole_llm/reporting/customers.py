"""Sample customers of a report under pseudonyms: what they had, what they are shown, and why.

A pseudonym is a number in the report's own order and tells nothing of the id. A history may still tell who somebody is, so the
report says that it holds personal data, and ``--no-customers`` leaves this part out.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch

from recbole_llm.bridge.evaluation.rows import ranked_rows
from recbole_llm.export.item_pictures import pictures_of
from recbole_llm.export.item_records import item_records
from recbole_llm.reporting.quality import Trained, at_test
from recbole_llm.reporting.ranking import rank_rows, some_rows

MOST_HISTORY = 30  # items of a history that are listed, the newest where time is known
N_REASONS = 2
SIDE, PICTURE_BYTES = 96, 8 << 10  # of a small picture
ALL_PICTURES = 900_000  # bytes; a third more as text in the page, which stays below 2 MB


@dataclass(frozen=True)
class Shown:
    """One item of a customer's answer.

    Attributes:
        title: of the item.
        chance: P(i|u).
        hit: whether it was a held-out interaction.
        reasons: titles of the items of the history that add most to its score, the largest first.
        picture: a small picture of the item, a JPEG; ``None`` where there is none, or no more of them fit into the report.
    """

    title: str
    chance: float
    hit: bool
    reasons: tuple[str, ...]
    picture: bytes | None = None


@dataclass(frozen=True)
class Customer:
    """One customer.

    Attributes:
        history: titles of what was known.
        left: items of the history that are not listed.
        held_out: how many interactions were held out.
        shown: the answer, best first.
    """

    history: tuple[str, ...]
    left: int
    held_out: int
    shown: tuple[Shown, ...]


def sample_customers(trained: Trained, number: int) -> list[Customer]:
    """Customers with held-out interactions, from those with the shortest history to those with the longest.

    Args:
        trained: an ``LLMTwoTower`` and its data.
        number: how many; fewer where there are fewer.
    """
    every = ranked_rows(trained.test)
    model, dataset = trained.model, trained.training
    if every.seen is None or number < 1:
        return []
    order = torch.argsort(every.seen.sizes, stable=True)
    picks = order[torch.linspace(0, len(order) - 1, min(number, len(order))).round().long()]
    rows = some_rows(every, picks)
    tokens = [str(token) for token in dataset.field2id_token[dataset.iid_field][1:]]
    titles = ["", *(record.title for record in item_records(model.options, dataset, tokens, None, False).records)]
    with at_test(model):
        device = model.item_bias.device
        ranking = rank_rows(model, rows, dataset.item_num, device)
        found: list[Customer] = []
        shown_ids: list[list[int]] = []
        for place, user in enumerate(rows.users.to(device)):
            one = user.reshape(1)
            history = model.ranking_history.select(one)
            shown = ranking.shown[place]
            items = ranking.items[place][shown]
            score, part = model.score, model.score.user_parts(one)
            chance = model.probabilities(one)[0, items.to(device)].cpu()
            added = sum(score.parts(history, items.to(device), part).of_history.values())
            assert isinstance(added, torch.Tensor) or not len(history.ids)
            entries = history.ids.cpu()
            why = _reasons(added, entries) if isinstance(added, torch.Tensor) else [()] * len(items)
            listed = _newest(history, entries)
            answer = [
                Shown(titles[item], float(p), bool(hit), tuple(titles[e] for e in reasons))
                for item, p, hit, reasons in zip(items.tolist(), chance, ranking.hit[place][shown], why, strict=True)
            ]
            shown_ids.append(items.tolist())
            found.append(
                Customer(
                    tuple(titles[item] for item in listed),
                    len(entries) - len(listed),
                    int(rows.positives.sizes[place]),
                    tuple(answer),
                )
            )
    return _with_pictures(found, shown_ids, dataset)


def _with_pictures(customers: list[Customer], items: Sequence[Sequence[int]], dataset: Any) -> list[Customer]:
    """Put small pictures beside the items, the first customers' first, as many as fit."""
    small = pictures_of(dataset, [item for each in items for item in each], SIDE, PICTURE_BYTES)
    if not small:
        return customers
    left, found = ALL_PICTURES, []
    for customer, ids in zip(customers, items, strict=True):
        answer = []
        for one, item in zip(customer.shown, ids, strict=True):
            picture = small.get(item)
            if picture is not None and len(picture) <= left:
                left -= len(picture)
                one = replace(one, picture=picture)
            answer.append(one)
        found.append(replace(customer, shown=tuple(answer)))
    return found


def _reasons(added: torch.Tensor, entries: torch.Tensor) -> list[tuple[int, ...]]:
    """For each item the entries of the history that add most to it, where they add anything."""
    value, at = added.cpu().topk(min(N_REASONS, added.shape[1]), dim=1)
    return [
        tuple(int(entries[e]) for v, e in zip(vs.tolist(), es.tolist(), strict=True) if v > 0)
        for vs, es in zip(value, at, strict=True)
    ]


def _newest(history: object, entries: torch.Tensor) -> list[int]:
    ranks = getattr(history, "ranks", None)
    if ranks is not None:
        entries = entries[torch.argsort(ranks.cpu(), stable=True)]
    return entries[:MOST_HISTORY].tolist()
