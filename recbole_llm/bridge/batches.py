"""Training batches: users for the catalogue losses, interactions with sampled negatives for the others."""

import copy
from abc import ABC, abstractmethod
from collections.abc import Iterator
from logging import getLogger
from math import ceil
from typing import Any

import torch
from recbole.data.dataloader.abstract_dataloader import AbstractDataLoader
from recbole.data.interaction import Interaction
from torch import Tensor

from recbole_llm.bridge import distributed
from recbole_llm.bridge.option_checks import CATALOG_LOSSES
from recbole_llm.bridge.options import NEG_VALID_FIELD, Options
from recbole_llm.scoring.rows import Rows

MAX_REDRAWS = 1000  # a user of 99% of the catalogue needs 100 draws on average, 1000 fail with probability 4e-5
STRETCH = 2**18  # rows whose negatives are drawn at once
# interactions of a user that stand side by side in a batch
GROUP = 16
# a table of one byte a slot tells most negatives from positives in one look; a binary search settles the rest
SLOTS_PER_PAIR = 16
MOST_SLOTS_PER_PAIR = 64  # up to here every user and item has a slot of its own, and nothing is left to search
GOLDEN = 0x1E3779B97F4A7C15  # odd, near 2**63 / golden ratio


def train_dataloader_class(config: Any) -> type[AbstractDataLoader]:
    """Choose the loader of training rows for ``loss_type``: users, or interactions with sampled negatives."""
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
        keys = int(self._pairs[-1]) + self._span if len(self._pairs) else 1
        self._has_slot_for_each = keys <= MOST_SLOTS_PER_PAIR * len(self._pairs)
        self._bits = max(SLOTS_PER_PAIR * len(self._pairs), 2).bit_length()
        self._taken = torch.zeros(keys if self._has_slot_for_each else 2**self._bits, dtype=torch.bool)
        self._taken[self._slot(self._pairs)] = True
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

    def to(self, device: torch.device) -> "NegativeSampler":
        """Return the same sampler on another device; itself if it is there already."""
        if self.candidates.device == device:
            return self
        other = copy.copy(self)
        other.candidates, other._pairs = self.candidates.to(device), self._pairs.to(device)
        other._taken = self._taken.to(device)
        other._cumulative = None if self._cumulative is None else self._cumulative.to(device)
        return other

    def draw(self, n: int, generator: torch.Generator | None) -> Tensor:
        """Draw items of the catalogue independently of any user, ``[n]`` int64."""
        device = self.candidates.device
        if self._cumulative is None:
            at = torch.randint(len(self.candidates), (n,), generator=generator, device=device)
        else:
            point = torch.rand(n, generator=generator, dtype=torch.float64, device=device) * self._cumulative[-1]
            at = torch.searchsorted(self._cumulative, point, right=True).clamp(max=len(self.candidates) - 1)
        return self.candidates.index_select(0, at)  # a third of the time of candidates[at]

    def sample(self, user_id: Tensor, k: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw k independent negatives for each user (repeats possible), ``[B]`` int64 -> ``[B, k]`` int64."""
        base = user_id * self._span
        base = base if k == 1 else base.repeat_interleave(k)
        items = self.draw(len(base), generator)
        open_ = self._positives(base + items)
        for _ in range(MAX_REDRAWS):
            if not len(open_):
                return items.view(len(user_id), k)
            items[open_] = self.draw(len(open_), generator)
            open_ = open_[self._positives(base[open_] + items[open_])]
        raise ValueError(
            f"No negative found in {MAX_REDRAWS} draws for {len(torch.unique(base[open_]))} users who have interacted "
            "with nearly the whole catalogue: filter them with user_inter_num_interval, or use loss_type: catalog_bce."
        )

    def distinct(self, n: int, generator: torch.Generator | None = None) -> Tensor:
        """Draw ``n`` items of the catalogue and return the distinct ones, ascending; all items if they are fewer than ``n``."""
        if n >= len(self.candidates):
            return self.candidates
        return torch.unique(self.draw(n, generator))

    def positives_among(self, user_id: Tensor, items: Tensor) -> Tensor:
        """Test each of ``items`` (``[M]``) for being a training item of each user (``[B]``); ``[B, M]`` bool."""
        place = torch.full((self._span,), -1, dtype=torch.int32, device=items.device)
        place[items] = torch.arange(len(items), dtype=torch.int32, device=items.device)
        first = user_id * self._span
        begin, end = torch.searchsorted(self._pairs, first), torch.searchsorted(self._pairs, first + self._span)
        sizes = end - begin
        row = torch.repeat_interleave(torch.arange(len(user_id), device=items.device), sizes)
        entry = torch.arange(len(row), device=items.device) + (begin - sizes.cumsum(0) + sizes)[row]
        at = place[self._pairs[entry] - first[row]].long()
        found = torch.zeros(len(user_id), len(items), dtype=torch.bool, device=items.device)
        found[row[at >= 0], at[at >= 0]] = True
        return found

    def _positives(self, key: Tensor) -> Tensor:
        """Find the training pairs among ``key`` (``[n]``); returns ascending positions."""
        suspect = self._taken.index_select(0, self._slot(key)).nonzero()[:, 0]
        if self._has_slot_for_each:
            return suspect
        key = key[suspect]
        at = torch.searchsorted(self._pairs, key).clamp(max=len(self._pairs) - 1)
        return suspect[self._pairs[at] == key]

    def _slot(self, key: Tensor) -> Tensor:
        """Fibonacci hashing where keys share slots: neighbouring keys, and one item's keys, are spread over the table."""
        if self._has_slot_for_each:
            return key
        return ((key * GOLDEN) >> (63 - self._bits)) & (2**self._bits - 1)


class _RowsDataLoader(AbstractDataLoader, ABC):
    """Batches cut from a permutation of rows, made on the model's device; no item column is ever copied into them.

    Every process draws the whole batch from the same stream and takes its part of the rows, so that several processes train
    on the batches that one would.
    """

    step: int
    generator: torch.Generator | None

    def __init__(self, config: Any, dataset: Any, sampler: Any, shuffle: bool = False) -> None:
        self.logger = getLogger()
        self.uid_field, self.iid_field = dataset.uid_field, dataset.iid_field
        self._is_shuffled = shuffle
        super().__init__(config, dataset, sampler, shuffle=shuffle)
        self.step = self._rows_of_batch  # RecBole gives a process its share of it

    @property
    @abstractmethod
    def _rows_of_batch(self) -> int:
        """Return the number of rows of a batch over all processes."""

    def _init_batch_size_and_step(self) -> None:
        self.step = self._rows_of_batch
        self.set_batch_size(self.step)

    def __len__(self) -> int:
        return ceil(self.sample_size / self.step)

    def __iter__(self) -> Iterator[Interaction]:
        device = torch.device(self.config["device"] or "cpu")
        generator = self._generator_of_epoch(device)
        order = self._order(generator, device)
        stretch = max(STRETCH // self.step, 1) * self.step  # one draw of negatives, and its wait, for many batches
        # where items are spread over the processes, each sees every user
        is_whole = self.config["shard_items"] or not distributed.active()
        for start in range(0, len(order), stretch):
            columns = self._columns(order[start : start + stretch], generator)
            for batch in zip(*(column.split(self.step) for column in columns), strict=True):
                batch = self._whole_batch(*batch)
                if not is_whole:
                    part = distributed.own_part(len(batch[0]))
                    batch = tuple(column[part] for column in batch)
                yield self._interaction(*batch)

    def _order(self, generator: torch.Generator, device: torch.device) -> Tensor:
        """Draw the order of an epoch's rows, ``[sample_size]`` int32 or int64."""
        if not self._is_shuffled:
            return torch.arange(self.sample_size, device=device)
        # on a CPU the same permutation in half the time
        dtype = torch.int32 if device.type == "cpu" and self.sample_size < 2**31 else torch.int64
        return torch.randperm(self.sample_size, generator=generator, device=device, dtype=dtype)

    def _generator_of_epoch(self, device: torch.device) -> torch.Generator:
        """Make a random stream of its own for each epoch.

        The loader's generator, which a checkpoint holds, moves by one number.
        """
        if self.generator is None:  # RecBole takes it away from loaders that it has saved
            self.generator = torch.Generator().manual_seed(self.config["seed"])
        seed = int(torch.randint(2**62, (), generator=self.generator))
        return torch.Generator(device).manual_seed(seed)

    @abstractmethod
    def _columns(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        """Return the columns from which the batches of the given rows are cut."""

    def _whole_batch(self, *columns: Tensor) -> tuple[Tensor, ...]:
        """Return the columns of the batch of all processes, for what they draw together."""
        return columns

    @abstractmethod
    def _interaction(self, *columns: Tensor) -> Interaction:
        """Build the batch from its part of each column."""

    def collate_fn(self, index: Any) -> Interaction:
        """The batch of the given rows, as RecBole's loaders give it."""
        rows = torch.as_tensor(index)
        return self._interaction(*self._whole_batch(*self._columns(rows, self._generator_of_epoch(rows.device))))


class DrawnBatch(Interaction):
    """Interactions with negatives as our loader drew them: all of the training catalogue, no negative the item of its row.

    Args:
        columns: user ``[B]``, item ``[B]`` and negatives ``[B, k]``, in this order.
        entries: item and negatives of each row side by side, ``[B, 1 + k]``, of which those columns are views.
    """

    def __init__(self, columns: dict[str, Tensor], entries: Tensor) -> None:
        super().__init__(columns)
        self._entries, self._drawn = entries, list(columns.items())[1:]
        self._version = None if entries.is_inference() else entries._version

    def entries(self) -> Tensor | None:
        """Return item and negatives, ``[B, 1 + k]``; ``None`` once one of the two columns was exchanged or written to."""
        if self._version is None or self._entries._version != self._version:
            return None
        if any(self.interaction.get(name) is not column for name, column in self._drawn):
            return None
        return self._entries


class UserRowsDataLoader(_RowsDataLoader):
    """Every user with a training interaction once per epoch; ``train_batch_size`` counts users.

    A batch has the users, ``[B]`` int64.
    """

    def __init__(self, config: Any, dataset: Any, sampler: Any, shuffle: bool = False) -> None:
        self.users = torch.unique(dataset.inter_feat[dataset.uid_field])
        self.sample_size = len(self.users)
        super().__init__(config, dataset, sampler, shuffle=shuffle)

    @property
    def _rows_of_batch(self) -> int:
        return int(self.config["train_batch_size"])

    def _columns(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        self.users = self.users.to(rows.device)
        return (self.users[rows],)

    def _interaction(self, *columns: Tensor) -> Interaction:
        return Interaction({self.uid_field: columns[0]})


class InteractionRowsDataLoader(_RowsDataLoader):
    """Interactions with k negatives each, as (user, item, negatives [B, k]) or as labelled pairs.

    As in RecBole, ``train_batch_size`` counts the rows of the flattened batch: k per interaction for ``sampled_bce``,
    1 + k for ``pair_bce``. A batch has the fields user ``[B]``, item ``[B]``, negatives ``[B, k]``; for ``pair_bce`` user,
    item and label, ``[B (1 + k)]`` each.
    """

    def __init__(self, config: Any, dataset: Any, sampler: Any, shuffle: bool = False) -> None:
        user_id, item_id = dataset.inter_feat[dataset.uid_field].long(), dataset.inter_feat[dataset.iid_field].long()
        self._user_id, self._item_id = user_id.int(), item_id.int()  # gathered in a third of int64's time
        self.sample_size = len(user_id)
        self.neg_item_field = config["NEG_PREFIX"] + dataset.iid_field
        self.label_field = config["LABEL_FIELD"]
        super().__init__(config, dataset, sampler, shuffle=shuffle)
        args = config["train_neg_sample_args"]
        if args.get("dynamic"):
            raise ValueError(
                "train_neg_sample_args.dynamic is not available for LLMTwoTower: set it to false, or use "
                "loss_type: catalog_bce, which sees every negative."
            )
        self._shared = self._shared_of(args.get("shared") or 0)
        self.negatives = NegativeSampler(user_id, item_id, args["distribution"], _number(args["alpha"]))
        self._groups = self._groups_of(user_id) if "history" in Options.from_config(config).user_tower else None

    @staticmethod
    def _groups_of(user_id: Tensor) -> Rows:
        """Group interactions of the same user, at most ``GROUP`` together, so that rows of a batch share their history."""
        of_user = torch.argsort(user_id, stable=True)
        counts = torch.bincount(user_id)
        place = torch.arange(len(of_user)) - (counts.cumsum(0) - counts)[user_id[of_user]]
        begins = (place % GROUP == 0).nonzero()[:, 0]
        return Rows(torch.cat([begins, torch.tensor([len(of_user)])]), of_user)

    def _order(self, generator: torch.Generator, device: torch.device) -> Tensor:
        if self._groups is None or not self._is_shuffled:
            return super()._order(generator, device)
        self._groups = self._groups.to(device)
        groups = torch.randperm(len(self._groups.sizes), generator=generator, device=device)
        return self._groups.select(groups).ids

    def _shared_of(self, number: Any) -> int:
        """Return how many negatives the rows of a batch share; 0 if each has its own."""
        if isinstance(number, bool) or not isinstance(number, int) or number < 0:
            raise ValueError(f"train_neg_sample_args.shared must be a number of items, or 0 for none, got {number!r}.")
        if number and self.config["loss_type"] != "sampled_bce":
            raise ValueError(
                f"train_neg_sample_args.shared belongs to loss_type sampled_bce, and loss_type is {self.config['loss_type']}."
            )
        return number

    @property
    def _per_row(self) -> int:
        k = self.config["train_neg_sample_args"]["sample_num"]
        if not isinstance(k, int) or k < 1:
            raise ValueError(
                f"train_neg_sample_args.sample_num must be at least 1 for loss_type {self.config['loss_type']}, got {k!r}; "
                "catalog_bce and catalog_ce need no negatives."
            )
        return k

    @property
    def _rows_of_batch(self) -> int:
        rows = self._per_row + (self.config["loss_type"] == "pair_bce")
        return max(self.config["train_batch_size"] // rows, 1)

    def _columns(self, rows: Tensor, generator: torch.Generator) -> tuple[Tensor, ...]:
        self.negatives = self.negatives.to(rows.device)
        self._user_id, self._item_id = self._user_id.to(rows.device), self._item_id.to(rows.device)
        user, item = self._user_id.index_select(0, rows).long(), self._item_id.index_select(0, rows).long()
        if self._shared:
            self._generator = generator
            return user, item
        # side by side for the whole stretch: 1 ms for 128 batches, 8 ms batch by batch
        return user, torch.cat([item[:, None], self.negatives.sample(user, self._per_row, generator)], 1)

    def _whole_batch(self, *columns: Tensor) -> tuple[Tensor, ...]:
        if not self._shared:
            return columns
        self._negatives_of_batch = self.negatives.distinct(self._shared, self._generator)
        return columns

    def _with_shared_negatives(self, user: Tensor, item: Tensor) -> Interaction:
        negative = self._negatives_of_batch
        valid = ~self.negatives.positives_among(user, negative)
        columns = {self.uid_field: user, self.iid_field: item, self.neg_item_field: negative, NEG_VALID_FIELD: valid}
        return Interaction(columns)

    def _interaction(self, *columns: Tensor) -> Interaction:
        if self._shared:
            return self._with_shared_negatives(*columns)
        user, pairs = columns
        if self.config["loss_type"] != "pair_bce":
            item, negative = pairs[:, 0], pairs[:, 1:]
            return DrawnBatch({self.uid_field: user, self.iid_field: item, self.neg_item_field: negative}, pairs)
        label = torch.zeros(len(user), pairs.shape[1], device=user.device)
        label[:, 0] = 1
        return Interaction(
            {
                self.uid_field: user.repeat_interleave(pairs.shape[1]),
                self.iid_field: pairs.flatten(),
                self.label_field: label.flatten(),
            }
        )


def _number(alpha: Any) -> float:
    return float(alpha) if isinstance(alpha, (int, float)) else 1.0
