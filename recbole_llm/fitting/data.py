"""The training data of a fit."""

from dataclasses import dataclass, field
from functools import cached_property

import torch
from torch import Tensor

from recbole_llm.fitting.warm_items import ContentTables
from recbole_llm.scoring.item_rows import AllRows
from recbole_llm.scoring.rows import Rows


@dataclass(frozen=True, eq=False)
class TrainingData:
    """What a model is fitted on.

    Attributes:
        history: training items of every user; with ranks where interactions are split by time.
        rows: which items are in this process.
        content: vectors of the items by modality.
        disliked: items that users have seen and not liked, as many rows as ``history``; ``None`` for none.
    """

    history: Rows
    rows: AllRows
    content: ContentTables = field(default_factory=dict)
    disliked: Rows | None = None

    @property
    def n_items(self) -> int:
        """Items N, padding row 0 included."""
        return self.rows.n_items

    @property
    def is_ordered(self) -> bool:
        """Whether recency counts."""
        return self.history.ranks is not None

    @cached_property
    def popularity(self) -> Tensor:
        """Training interactions of each item, ``[N]`` int64."""
        return torch.bincount(self.history.ids, minlength=self.n_items)

    @cached_property
    def trained(self) -> Tensor:
        """Items with a training interaction, ``[N]`` bool."""
        return self.popularity > 0


@dataclass(frozen=True, eq=False)
class Known:
    """What is known of the users when recommendations are made.

    Attributes:
        history: items of every user; with ranks, or weights, where the model weighs histories by recency.
        fitted: interactions that the model was fitted on.
        disliked: items that users have seen and not liked, as many rows, none of them in ``history``; ``None`` for none.
    """

    history: Rows
    fitted: int
    disliked: Rows | None = None
