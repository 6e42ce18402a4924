"""The training data as the closed form sees it: without cold-start items, or the popular items alone."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from recbole_llm.fitting.ease import Content, content_centre, content_directions
from recbole_llm.fitting.validation import Validation, user_metric
from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.score import LinearBlock, Scorer

ContentTables = Mapping[str, tuple[Tensor, Tensor]]
"""By modality, vectors ``[n_items, f]`` and which items have one, ``[n_items]`` bool."""


@dataclass(frozen=True)
class WarmItems:
    """The training data of some of the items, at most those that have an interaction; n items are left.

    Attributes:
        items: ``[n]`` int64, their ids.
        warm: ``[n_items]`` bool, the same as flags.
        train: the training interactions, in ids of 0 .. n - 1; their weights are the entries of X of ``ease.py``.
        content: by modality, directions ``[n, f]``.
    """

    items: Tensor
    warm: Tensor
    train: Rows
    content: Content

    def expand(self, rows: Tensor) -> Tensor:
        """Put rows back into the catalogue, ``[n, d]`` -> ``[n_items, d]``, zero for the other items."""
        full = torch.zeros(len(self.warm), rows.shape[1], device=rows.device)
        full[self.items] = rows
        return full

    def expand_rows(self, rows: Rows) -> Rows:
        """Put rows of n items, about these items, back into the catalogue: n_items rows of catalogue ids, empty for others."""
        sizes = torch.zeros(len(self.warm), dtype=torch.int64, device=rows.ids.device)
        sizes[self.items] = rows.sizes
        return Rows(torch.nn.functional.pad(sizes.cumsum(0), (1, 0)), self.items[rows.ids], rows.weights)

    def compact(self, rows: Rows) -> Rows:
        """Translate rows of catalogue ids into ids of 0 .. n - 1, without the items left out."""
        kept = rows.keep(self.warm[rows.ids])
        return Rows(kept.offsets, (self.warm.cumsum(0) - 1)[kept.ids], kept.weights)

    def value(self, subset: Validation, source: Tensor, target: Tensor | None) -> float:
        """Compute the validation value of vectors of the n items; targets among the others count as missed."""
        return self.value_of(subset, LinearBlock("closed_form", source, target).scorer)

    def value_of(self, subset: Validation, scorer_of: Callable[[Rows], Scorer]) -> float:
        """Compute the same of whatever scores the n items for histories."""
        scorer = scorer_of(self.compact(subset.history))
        targets, seen = self.compact(subset.targets), self.compact(subset.seen)
        total = user_metric(scorer, targets, seen, len(self.items), subset.metric).sum()
        return float(total) / int((subset.targets.sizes > 0).sum())

    def popular(self, count: int) -> tuple["WarmItems", Tensor]:
        """Find the ``count`` items with most interactions, and their places among this one's items, ``[count]`` int64."""
        popularity = torch.bincount(self.train.ids, minlength=len(self.items))
        places = popularity.argsort(descending=True, stable=True)[:count].sort().values
        warm = torch.zeros_like(self.warm)
        warm[self.items[places]] = True
        chosen = warm[self.items]
        kept = self.train.keep(chosen[self.train.ids])
        train = Rows(kept.offsets, (chosen.cumsum(0) - 1)[kept.ids], kept.weights)
        content = {modality: directions[places] for modality, directions in self.content.items()}
        return WarmItems(self.items[places], warm, train, content), places


def warm_items(train: Rows, content: ContentTables, n_items: int) -> WarmItems:
    """Select all items that have a training interaction.

    Args:
        train: training interactions, one row per user. Their confidence is read, and not their weights.
        content: of the items.
        n_items: size of the whole catalogue.
    """
    warm = torch.bincount(train.ids, minlength=n_items) > 0
    items = torch.nonzero(warm).squeeze(1)
    position = warm.cumsum(0) - 1
    directions = {
        modality: content_directions(vectors, present, content_centre(vectors, present))[items]
        for modality, (vectors, present) in content.items()
    }
    entries = None if train.confidence is None else train.confidence.sqrt()
    return WarmItems(items, warm, Rows(train.offsets, position[train.ids], entries), directions)
