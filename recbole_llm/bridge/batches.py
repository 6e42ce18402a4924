"""Training batches: users for the catalogue losses, interactions with sampled negatives for the others."""

from collections.abc import Iterator
from logging import getLogger
from math import ceil
from typing import Any

import torch
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.bridge.options import CATALOG_LOSSES

MAX_REDRAWS = 1000  # a user of 99% of the catalogue needs 100 draws on average, 1000 fail with probability 4e-5


def train_dataloader_class(config: Any) -> type[AbstractDataLoader]:
    """The loader of training rows for ``loss_type``: users, or interactions with sampled negatives."""
    return UserRowsDataLoader if config["loss_type"] in CATALOG_LOSSES else InteractionRowsDataLoader


class NegativeSampler:
    """Exact negatives by rejection: an item of the catalogue that the user has no training interaction with.

    The catalogue is the items with a training interaction; RecBole's sampler also draws items that occur in the
    validation or test split only, and so trains the model to dislike what it will be tested on.

    Args:
        user_id: training pairs, ``[P]`` int64.
        item_id: training pairs, ``[P]`` int64.
        distribution: ``uniform`` over the catalogue, or ``popularity``: proportional to count^alpha.
        alpha: exponent of ``popularity``.

    Raises:
        ValueError: if a user has interacted with the whole catalogue, or the distribution is unknown.
    """

    def __init__(self, user_id: Tensor, item_id: Tensor, distribution: str, alpha: float) -> None:
        self.candidates, count = torch.unique(item_id, return_counts=True)
        self._span = int(item_id.max()) + 1 if len(item_id) else 1
        self._pairs = torch.unique(user_id * self._span + item_id)
        full = int((torch.bincount(self._pairs // self._span) >= len(self.candidates)).sum())
        if full:
            raise ValueError(
                f"{full} users have interacted with every item of the training set, so no negative exists for them: "
                "filter them with user_inter_num_interval, or use loss_type: catalog_bce."
            )
        if distribution == "uniform":
            self._cumulative = None
        elif distribution == "popularity":
            self._cumulative = count.double().pow(alpha).cumsum(0)
        else:
            raise ValueError(
                f"train_neg_sample_args.distribution must be uniform or popularity, got {distribution!r}; "
                "sampled_bce and pair_bce need negatives, catalog_bce and catalog_ce do not."
            )

    def draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        """``[n]`` int64 items of the catalogue, independent of any user."""
        if self._cumulative is None:
            return self.candidates[torch.randint(len(self.candidates), (n,), generator=generator)]
        point = torch.rand(n, generator=generator, dtype=torch.float64) * self._cumulative[-1]
        return self.candidates[
            torch.searchsorted(self._cumulative, point, right=True).clamp(max=len(self.candidates) - 1)
        ]

    def sample(self, user_id: Tensor, k: int, generator: torch.Generator | None = None) -> Tensor:
        """``[B, k]`` int64: for each user of ``user_id`` (``[B]``), k independent negatives (repeats possible)."""
        base = user_id.repeat_interleave(k) * self._span
        items = self.draw(len(base), generator)
        open_ = torch.arange(len(base))
        for _ in range(MAX_REDRAWS):
            open_ = open_[self._is_positive(base[open_] + items[open_])]
            if not len(open_):
                return items.view(len(user_id), k)
            items[open_] = self.draw(len(open_), generator)
        raise ValueError(
            f"No negative found in {MAX_REDRAWS} draws for {len(torch.unique(base[open_]))} users who have interacted "
            "with nearly the whole catalogue: filter them with user_inter_num_interval, or use loss_type: catalog_bce."
        )

    def _is_positive(self, key: Tensor) -> Tensor:
        at = torch.searchsorted(self._pairs, key).clamp(max=len(self._pairs) - 1)
        return self._pairs[at] == key


class _RowsDataLoader(AbstractDataLoader):
    """Batches cut from a permutation of rows; no item column is ever copied into them."""

    step: int

    def __init__(self, config: Any, dataset: Any, sampler: Any, shuffle: bool = False) -> None:
        self.logger = getLogger()
        self.uid_field, self.iid_field = dataset.uid_field, dataset.iid_field
        super().__init__(config, dataset, sampler, shuffle=shuffle)

    def update_config(self, config: Any) -> None:
        """Take over another configuration, for loaders read from a file."""
        super().update_config(config)
        if not config["single_spec"]:
            self.step = max(1, self.step // config["world_size"])

    def __len__(self) -> int:
        return ceil(len(self.sampler) / self.step)

    def __iter__(self) -> Iterator[Interaction]:
        order = torch.as_tensor(list(self.sampler), dtype=torch.int64)
        for start in range(0, len(order), self.step):
            yield self.collate_fn(order[start : start + self.step])

    def collate_fn(self, index: Any) -> Interaction:
        """The batch of the given rows."""
        raise NotImplementedError


class UserRowsDataLoader(_RowsDataLoader):
    """Every user with a training interaction once per epoch; ``train_batch_size`` counts users."""

    def __init__(self, config: Any, dataset: Any, sampler: Any, shuffle: bool = False) -> None:
        self.users = torch.unique(dataset.inter_feat[dataset.uid_field])
        self.sample_size = len(self.users)
        super().__init__(config, dataset, sampler, shuffle=shuffle)

    def _init_batch_size_and_step(self) -> None:
        self.step = self.config["train_batch_size"]
        self.set_batch_size(self.step)

    def collate_fn(self, index: Any) -> Interaction:
        """Users, ``[B]`` int64."""
        return Interaction({self.uid_field: self.users[torch.as_tensor(index)]})


class InteractionRowsDataLoader(_RowsDataLoader):
    """Interactions with k negatives each, as (user, item, negatives [B, k]) or as labelled pairs.

    As in RecBole, ``train_batch_size`` counts the rows of the flattened batch: k per interaction for ``sampled_bce``,
    1 + k for ``pair_bce``.
    """

    def __init__(self, config: Any, dataset: Any, sampler: Any, shuffle: bool = False) -> None:
        self.user_id = dataset.inter_feat[dataset.uid_field].long()
        self.item_id = dataset.inter_feat[dataset.iid_field].long()
        self.sample_size = len(self.user_id)
        self.neg_item_field = config["NEG_PREFIX"] + dataset.iid_field
        self.label_field = config["LABEL_FIELD"]
        super().__init__(config, dataset, sampler, shuffle=shuffle)
        args = config["train_neg_sample_args"]
        if args.get("dynamic"):
            raise ValueError(
                "train_neg_sample_args.dynamic is not available for LLMTwoTower: set it to false, or use "
                "loss_type: catalog_bce, which sees every negative."
            )
        self.negatives = NegativeSampler(self.user_id, self.item_id, args["distribution"], _number(args["alpha"]))

    @property
    def _per_row(self) -> int:
        k = self.config["train_neg_sample_args"]["sample_num"]
        if not isinstance(k, int) or k < 1:
            raise ValueError(
                f"train_neg_sample_args.sample_num must be at least 1 for loss_type {self.config['loss_type']}, got {k!r}; "
                "catalog_bce and catalog_ce need no negatives."
            )
        return k

    def _init_batch_size_and_step(self) -> None:
        rows = self._per_row + (self.config["loss_type"] == "pair_bce")
        self.step = max(self.config["train_batch_size"] // rows, 1)
        self.set_batch_size(self.step * rows)

    def collate_fn(self, index: Any) -> Interaction:
        """Fields user ``[B]``, item ``[B]``, negatives ``[B, k]``; or user, item, label ``[B (1 + k)]`` for ``pair_bce``."""
        index = torch.as_tensor(index)
        user, item = self.user_id[index], self.item_id[index]
        negative = self.negatives.sample(user, self._per_row, self.generator)
        if self.config["loss_type"] == "pair_bce":
            label = torch.zeros(len(user), 1 + self._per_row)
            label[:, 0] = 1
            pairs = torch.cat([item[:, None], negative], 1)
            return Interaction(
                {
                    self.uid_field: user.repeat_interleave(pairs.shape[1]),
                    self.iid_field: pairs.flatten(),
                    self.label_field: label.flatten(),
                }
            )
        return Interaction({self.uid_field: user, self.iid_field: item, self.neg_item_field: negative})


def _number(alpha: Any) -> float:
    return float(alpha) if isinstance(alpha, (int, float)) else 1.0
