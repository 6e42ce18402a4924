"""LLMTwoTower whose items are spread over the processes of ``torch.distributed``, for catalogues larger than one device.

Rank r holds the rows [N r / R, N (r + 1) / R) of everything that has a row per item and a vector or a bias in it: ID tables,
biases, frozen features. Everything else is the same on every rank: adapters, the user tower, histories, and the users of a
batch. The formulas are the model's own, with three sums over ranks:

    x_u     sum of each rank's part of the pooled history
    loss    of the rank's items (:mod:`recbole_llm_kernels.sharded`)
    dL/dA   of an adapter A, which every rank applies to its own items

Shapes: N items, n of them here, B users, D ``embedding_size``.
"""

from collections.abc import Callable
from dataclasses import replace
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from recbole_llm.bridge import distributed
from recbole_llm.model import LLMTwoTower
from recbole_llm.selection import Selection
from recbole_llm.towers import ID_INIT_STD, FrozenTensor, ItemTower, Rows
from recbole_llm_kernels import sharded
from recbole_llm_kernels.functional import TopK

CHUNK_ROWS = 2**16  # drawn at once; a multiple of 16, see normal_rows


def normal_rows(n_rows: int, dim: int, own: slice, std: float) -> Tensor:
    """The rows ``own`` of what ``torch.empty(n_rows, dim).normal_(std=std)`` would be on a CPU, without the others' memory.

    The random stream moves on as if the whole had been drawn. PyTorch draws normal numbers in groups of 16, and at least
    so many at a time (ATen's ``DistributionTemplates.h``, ``normal_fill``), so that chunks of 16 rows continue each other.
    """
    kept = torch.empty(own.stop - own.start, dim)
    start = 0
    while start < n_rows:
        stop = start + CHUNK_ROWS
        if n_rows - stop < 16:  # no last chunk of fewer than 16 numbers
            stop = n_rows
        drawn = torch.empty(stop - start, dim).normal_(std=std)
        first, last = max(start, own.start), min(stop, own.stop)
        if first < last:
            kept[first - own.start : last - own.start] = drawn[first - start : last - start]
        start = stop
    return kept


class _ShardedItemTower(ItemTower):
    """The tower of the rows ``own`` out of ``total``; ID vectors start as those rows of the whole table would."""

    def __init__(self, own: slice, total: int, *args: Any) -> None:
        self._own, self._total = own, total
        super().__init__(own.stop - own.start, *args)

    def _make_ids(self, n_items: int, dim: int) -> nn.Embedding:
        normal_rows(self._total, dim, slice(0, 0), 1.0)  # what nn.Embedding draws first
        rows = normal_rows(self._total, dim, self._own, ID_INIT_STD)
        if self._own.start == 0:
            rows[0] = 0
        return nn.Embedding(n_items, dim, _weight=rows)


class ShardedTwoTower(LLMTwoTower):
    """What ``LLMTwoTower(config, dataset)`` gives with ``shard_items`` in a group of several processes.

    Its methods are collectives: every rank calls them, in the same order and with the same users.

    Attributes:
        own: the items whose rows are here.

    Raises:
        ValueError: if there are fewer items than processes.
    """

    shards_items = True

    def __init__(self, config: Any, dataset: Any) -> None:
        total = int(dataset.num(config["ITEM_ID_FIELD"]))
        if total < distributed.world_size():
            raise ValueError(
                f"shard_items: {total} items (padding included) cannot be spread over {distributed.world_size()} processes. "
                "Start fewer processes, or set shard_items to false."
            )
        self.own = distributed.own_part(total)
        _agree_on_random_numbers(config["device"])
        super().__init__(config, dataset)
        dataset.__dict__.pop("_item_features", None)  # the whole table of which the model has taken its rows
        self._padding_rows = int(self.own.start == 0)
        for tower in {self.target_tower, self.source_tower}:
            for parameter in tower.adapters.parameters():
                parameter.register_hook(distributed.sum_over_ranks)

    def _own_rows(self, of_items: Tensor) -> Tensor:
        return of_items[self.own].clone()

    def _make_item_tower(self, features: dict[str, tuple[FrozenTensor, FrozenTensor]]) -> ItemTower:
        options = self.options
        return _ShardedItemTower(
            self.own, self.n_items, options.embedding_size, features, options.adapter_hidden_size, options.use_item_id
        )

    @cached_property
    def sharded_names(self) -> frozenset[str]:
        """Names in ``state_dict`` of the parameters that have a row per item."""
        tables = [self.item_bias, *(tower.id.weight for tower in (self.target_tower, self.source_tower) if tower.id)]
        named = self.named_parameters(remove_duplicate=False)
        return frozenset(name for name, parameter in named if any(parameter is table for table in tables))

    # ------------------------------------------------------------------ the sums

    def _pool(self, vectors: Tensor, history: Rows, weights: Tensor) -> Tensor:
        here = (history.ids >= self.own.start) & (history.ids < self.own.stop)
        mine = replace(history, weights=weights).keep(here)
        assert mine.weights is not None
        part = super()._pool(vectors, replace(mine, ids=mine.ids - self.own.start), mine.weights)
        return sharded.sum_over_ranks(part)

    def _loss_over_catalogue(self, query: Tensor, targets: Rows) -> Tensor:
        arguments = (query, self._candidates(), targets.offsets, targets.ids)
        bias = self._training_bias()
        if self.options.loss_type == "catalog_ce":
            return sharded.catalog_ce(*arguments, item_bias=bias, reduction="sum")
        return sharded.catalog_bce(
            *arguments,
            item_bias=bias,
            neg_weight=self.options.neg_weight,
            reduction="sum",
            backend=self.options.kernel_backend,
        )

    def _lowest_bias(self, trained: Tensor) -> Tensor:
        lowest = self.item_bias.masked_fill(~trained, torch.inf).min()
        dist.all_reduce(lowest, dist.ReduceOp.MIN)
        return torch.where(lowest.isinf(), 0.0, lowest)

    # ------------------------------------------------------------------ ranking

    @torch.no_grad()
    def score_topk(self, query: Tensor, item: Tensor, k: int, **options: Any) -> TopK:
        """:func:`recbole_llm_kernels.sharded.score_topk` of ``item_vectors``, which are this rank's."""
        return sharded.score_topk(query, item, k, **options)

    def _learned_logits(self, users: Tensor) -> Tensor:
        """Scores of all items, ``[B, N]``, on every rank."""
        own = super()._learned_logits(users)
        logits = own.new_zeros(len(users), self.n_items)
        logits[:, self.own] = own
        dist.all_reduce(logits)
        return logits

    def predict(self, interaction: Any) -> Tensor:
        """Not available: pairs are scored by the model that one process reads from the checkpoint.

        Raises:
            ValueError: always.
        """
        raise ValueError(
            "With shard_items, items are ranked and not scored pair by pair. Read the checkpoint in one process, with "
            "load_data_and_model, and call its predict."
        )

    def place_cold_items(self, selection: Selection | None, log: Callable[[str], None]) -> None:
        """Say that cold items keep the map of their content and the lowest bias of a trained item."""
        cold = int(self.cold.sum())
        if cold:
            log(f"{cold} items have no training interaction; with shard_items cold_map does not place them")

    def cold_remark(self) -> str:
        """What the model does about items without a training interaction, in a sentence."""
        return (
            "cold items are ranked by the map of their content with the lowest bias: shard_items leaves cold_map out."
        )


def _agree_on_random_numbers(device: torch.device) -> None:
    """Every rank goes on with rank 0's random streams: initial values and dropped histories are those of one process."""
    torch.set_rng_state(distributed.agreed(torch.get_rng_state()))
    if device.type == "cuda":
        torch.cuda.set_rng_state(distributed.agreed(torch.cuda.get_rng_state(device)), device)
