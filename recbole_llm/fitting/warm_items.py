"""The training data as the closed form sees it: without the items that nobody has touched, or the popular items alone.

Knows neither RecBole nor the kernels.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

from recbole_llm.ease import text_centre, text_directions
from recbole_llm.selection import LinearScorer, Selection, user_metric
from recbole_llm.towers import Rows


@dataclass(frozen=True)
class Catalogue:
    """The training data of some of the items, at most those that have an interaction; n items are left.

    Attributes:
        items: ``[n]`` int64, their ids.
        warm: ``[n_items]`` bool, the same as flags.
        train: the training interactions, in ids of 0 .. n - 1.
        text: ``[n, f]``, rows of ``text_directions``.
    """

    items: Tensor
    warm: Tensor
    train: Rows
    text: Tensor

    def expand(self, rows: Tensor) -> Tensor:
        """``[n, d]`` -> ``[n_items, d]``, zero for the other items."""
        full = torch.zeros(len(self.warm), rows.shape[1], device=rows.device)
        full[self.items] = rows
        return full

    def compact(self, rows: Rows) -> Rows:
        """Rows of catalogue ids in ids of 0 .. n - 1, without the items left out."""
        kept = rows.keep(self.warm[rows.ids])
        return Rows(kept.offsets, (self.warm.cumsum(0) - 1)[kept.ids], kept.weights)

    def value(self, subset: Selection, source: Tensor, target: Tensor | None) -> float:
        """Validation value of vectors of the n items; targets among the others count as missed."""
        scorer = LinearScorer(self.compact(subset.history), source, target)
        targets, seen = self.compact(subset.targets), self.compact(subset.seen)
        total = user_metric(scorer, targets, seen, len(self.items), subset.metric).sum()
        return float(total) / int((subset.targets.sizes > 0).sum())

    def popular(self, count: int) -> tuple["Catalogue", Tensor]:
        """The ``count`` items that have most interactions, and their places among this one's items, ``[count]`` int64."""
        popularity = torch.bincount(self.train.ids, minlength=len(self.items))
        places = popularity.argsort(descending=True, stable=True)[:count].sort().values
        warm = torch.zeros_like(self.warm)
        warm[self.items[places]] = True
        chosen = warm[self.items]
        kept = self.train.keep(chosen[self.train.ids])
        train = Rows(kept.offsets, (chosen.cumsum(0) - 1)[kept.ids], kept.weights)
        return Catalogue(self.items[places], warm, train, self.text[places]), places


def catalogue_of(train: Rows, features: Tensor | None, present: Tensor | None, n_items: int) -> Catalogue:
    """All items that have a training interaction.

    Args:
        train: training interactions, one row per user. Their weights are not read.
        features: frozen text vectors, ``[n_items, f]``; ``None`` for none.
        present: ``[n_items]`` bool, items that have a text; ``None`` for all.
        n_items: size of the whole catalogue.
    """
    warm = torch.bincount(train.ids, minlength=n_items) > 0
    items = torch.nonzero(warm).squeeze(1)
    position = warm.cumsum(0) - 1
    if features is None:
        text = torch.zeros(n_items, 1, device=train.ids.device)
    else:
        present = torch.ones_like(warm) if present is None else present
        text = text_directions(features, present, text_centre(features, present))
    return Catalogue(items, warm, Rows(train.offsets, position[train.ids]), text[items])
