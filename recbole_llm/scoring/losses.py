"""What LLMTwoTower's learned block is trained by: losses over the catalogue, over sampled negatives, over labelled pairs."""

from typing import TYPE_CHECKING, Any

import torch
from torch import Tensor, nn

from recbole_llm.bridge.batches import DrawnBatch
from recbole_llm.bridge.options import NEG_VALID_FIELD, Options
from recbole_llm.towers import FrozenTensor, ItemTower, Rows, UserTower
from recbole_llm_kernels import catalog_bce, catalog_ce, default_backend, pair_bce, sampled_bce
from recbole_llm_kernels.torch_ops.sampled import has_sampled_dots
from recbole_llm_kernels.torch_ops.scaled_bce import scaled_sampled_bce

NOT_IN_CATALOGUE = float("-inf")  # the kernels' mark for an item that no loss, gradient or ranking may see


class LearnedLoss:
    """The part of ``LLMTwoTower`` that gradient descent calls."""

    USER_ID: str
    ITEM_ID: str
    NEG_ITEM_ID: str
    LABEL: str
    options: Options
    n_items: int
    item_bias: Any
    log_scale: nn.Parameter
    source_tower: ItemTower
    target_tower: ItemTower
    user_tower: UserTower
    _trained: FrozenTensor

    if TYPE_CHECKING:  # what the model itself provides

        @property
        def history(self) -> Rows:
            """Training items of every user."""
            ...

        def _own_rows(self, of_items: Tensor) -> Tensor: ...
        def _candidates(self, ids: Tensor | None = None) -> Tensor: ...
        def _drop(self, history: Rows) -> Rows: ...
        def _queries_of_users(self, users: Tensor, history: Rows | None, source: Tensor) -> Tensor: ...
        def _queries_of_pairs(self, users: Tensor, items: Tensor) -> Tensor: ...
        def _pooled_of_pairs(self, users: Tensor, items: Tensor) -> Tensor | None: ...

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Training loss of a batch in nats, a float32 scalar.

        Under a catalogue loss the batch is users, each with all its training items as targets, and the loss is per target;
        under ``sampled_bce`` and ``pair_bce`` it is interactions, and the loss is the mean over them.
        """
        if self.options.trains_on_users:
            return self._catalog_loss(interaction[self.USER_ID])
        return self._interaction_loss(interaction)

    def _training_bias(self, ids: Tensor | None = None) -> Tensor:
        trained = self._own_rows(self._trained.value) if ids is None else self._trained.value[ids]
        bias = self.item_bias if ids is None else self.item_bias[ids]
        return torch.where(trained, bias, NOT_IN_CATALOGUE)

    def _catalog_loss(self, users: Tensor) -> Tensor:
        targets = self.history.select(users)
        query = self._queries_of_users(users, self._drop(targets), self.source_tower())
        return self._loss_over_catalogue(query, targets) / max(len(targets.ids), 1)

    def _loss_over_catalogue(self, query: Tensor, targets: Rows) -> Tensor:
        """Sum of the rows' losses."""
        bias, backend = self._training_bias(), self.options.kernel_backend
        arguments = (query, self._candidates(), targets.offsets, targets.ids)
        if self.options.loss_type == "catalog_ce":
            return catalog_ce(*arguments, item_bias=bias, reduction="sum", backend=backend)
        weight = self.options.neg_weight
        return catalog_bce(*arguments, item_bias=bias, neg_weight=weight, reduction="sum", backend=backend)

    def _interaction_loss(self, interaction: Any) -> Tensor:
        users, items = interaction[self.USER_ID], interaction[self.ITEM_ID]
        loss = self._loss_at_once(users, items, interaction)
        if loss is not None:
            return loss
        query = self._queries_of_pairs(users, items)
        row = torch.arange(len(users), device=users.device)
        if self.options.loss_type == "pair_bce":
            candidates, bias, item_row = self._candidates_of(items)
            return pair_bce(
                query,
                candidates,
                row,
                item_row,
                interaction[self.LABEL],
                item_bias=bias,
                backend=self.options.kernel_backend,
            )
        negatives, valid = interaction[self.NEG_ITEM_ID], None
        if NEG_VALID_FIELD in interaction.interaction:  # shared by the batch
            valid = interaction[NEG_VALID_FIELD]
            candidates, bias, rows = self._candidates_of(torch.cat([items, negatives]))
            positive, negative = rows[: len(items)], rows[len(items) :]
        else:
            candidates, bias, rows = self._candidates_of(torch.cat([items[:, None], negatives.view(len(items), -1)], 1))
            positive, negative = rows[:, 0], rows[:, 1:]
        return sampled_bce(
            query,
            candidates,
            row,
            positive.contiguous(),
            negative.contiguous(),
            neg_valid=valid,
            item_bias=bias,
            neg_weight=self.options.neg_weight,
            backend=self.options.kernel_backend,
        )

    def _loss_at_once(self, users: Tensor, items: Tensor, interaction: Any) -> Tensor | None:
        """``sampled_bce`` from user vectors on, on a CPU and where every entry of the batch counts; ``None`` elsewhere."""
        device = users.device
        if self.options.loss_type != "sampled_bce" or self.options.scoring != "dot" or device.type != "cpu":
            return None
        if NEG_VALID_FIELD in interaction.interaction or torch.is_autocast_enabled("cpu"):
            return None
        if "triton" in (self.options.kernel_backend, default_backend(device)) or not has_sampled_dots():
            return None
        ids = self._counting_entries(items, interaction)
        if ids is None:
            return None
        candidates, bias = self.target_tower, self.item_bias
        if candidates.adapters:
            used, ids = self._distinct(ids)
            vectors, bias = candidates(used), bias.index_select(0, used)
        else:
            vectors = candidates()
        if ids.shape[1] > len(vectors):  # more than sampled_dots takes
            return None
        tower, offset, of_row = self.user_tower, None, None
        if tower.is_a_table and tower.id is not None:
            user, offset, of_row = tower.id.weight, tower.offset, users
        else:
            pooled = self._pooled_of_pairs(users, items)
            if tower.is_a_history and pooled is not None:
                user, offset = pooled, tower.offset
            else:
                user = tower(users, pooled)
        weight = self.options.neg_weight
        return scaled_sampled_bce(user, offset, self.log_scale, vectors, bias, of_row, ids, weight)

    def _counting_entries(self, items: Tensor, interaction: Any) -> Tensor | None:
        """Positive and negatives of each row, ``[B, 1 + K]`` int64, contiguous, where each counts; ``None`` where one does not."""
        if isinstance(interaction, DrawnBatch) and (drawn := interaction.entries()) is not None:
            return drawn.contiguous()
        negatives = interaction[self.NEG_ITEM_ID].view(len(items), -1)
        ids = torch.cat([items[:, None], negatives], 1)
        trained = self._trained.value.index_select(0, ids.view(-1))
        return ids if bool(trained.all()) and not bool((negatives == items[:, None]).any()) else None

    def _candidates_of(self, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors ``[n, D]`` and biases ``[n]`` that hold those of ``items``, and the row of each, shaped as ``items``.

        A table of IDs is handed over as it is; where vectors are computed, only those of the items that occur are.
        """
        if not self.target_tower.adapters and self.options.scoring == "dot":
            return self._candidates(), self._training_bias(), items
        used, rows = self._distinct(items)
        return self._candidates(used), self._training_bias(used), rows

    def _sources_of(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Source vectors ``[n, D]`` that hold those of ``items`` (``[m]``), and the row of each, ``[m]``."""
        if not self.source_tower.adapters:
            return self.source_tower(), items
        used, rows = self._distinct(items)
        return self.source_tower(used), rows

    def _distinct(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """As ``torch.unique`` with its inverse; marks in a table of the catalogue take a fraction of a sort's time."""
        marks = torch.zeros(self.n_items, dtype=torch.int64, device=items.device)
        marks[items] = 1
        return marks.nonzero()[:, 0], (marks.cumsum(0) - 1)[items]
