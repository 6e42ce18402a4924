"""What the towers are trained by: losses over the catalogue, over sampled negatives, over labelled pairs."""

from dataclasses import dataclass

import torch
from torch import Tensor

from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.score import NOT_IN_CATALOGUE
from recbole_llm.scoring.towers import TwoTowers, distinct, is_sparse
from recbole_llm_kernels import fuses_scaled_bce, pair_bce, sampled_bce, scaled_sampled_bce


@dataclass(frozen=True)
class LossOptions:
    """The options that a loss reads, named and meant as the configuration keys."""

    loss_type: str
    neg_weight: float
    scoring: str
    history_dropout: float
    kernel_backend: str


class TowerLoss:
    """The training loss of two towers.

    Args:
        towers: what is trained.
        options: which loss.
    """

    def __init__(self, towers: TwoTowers, options: LossOptions) -> None:
        self.towers, self.options = towers, options

    def of_users(self, users: Tensor, histories: Rows) -> Tensor:
        """Compute the loss over the whole catalogue, a mean over targets, in nats.

        Args:
            users: ``[B]`` int64. All training items of a user are targets.
            histories: training items of every user.
        """
        targets = histories.select(users)
        query = self.towers.queries(users, self._drop(targets))
        total = self.towers.rows.catalog_loss(
            self.options.loss_type,
            query,
            self.towers.candidates(),
            targets.offsets,
            targets.ids,
            bias=self._bias(),
            neg_weight=self.options.neg_weight,
            backend=self.options.kernel_backend,
            confidence=targets.confidence,
        )
        return total / max(len(targets.ids), 1)

    def _drop(self, history: Rows) -> Rows:
        """History dropout: drop random items from the input history.

        All of them remain targets, so that the model must predict items it was not shown.
        """
        if not self.options.history_dropout:
            return history
        kept = torch.rand(len(history.ids), device=history.ids.device) >= self.options.history_dropout
        return history.keep(kept)

    def _bias(self, ids: Tensor | None = None) -> Tensor:
        towers = self.towers
        trained = towers.rows.of(towers.trained.value) if ids is None else towers.trained.value[ids]
        return torch.where(trained, towers.bias if ids is None else towers.bias[ids], NOT_IN_CATALOGUE)

    def of_pairs(self, users: Tensor, items: Tensor, label: Tensor, histories: Rows) -> Tensor:
        """Compute the mean loss of labelled pairs: ``[P]`` int64 users and items, ``[P]`` labels.

        A positive pair's part is multiplied by its confidence in ``histories``.
        """
        query = self.towers.queries_of_pairs(users, items, histories)
        candidates, bias, item_row = self._candidates_of(items)
        row = torch.arange(len(users), device=users.device)
        backend = self.options.kernel_backend
        weight = histories.confidence_of(users, items, self.towers.rows.n_items)
        if weight is not None:
            weight = torch.where(label > 0, weight, 1.0)
        return pair_bce(query, candidates, row, item_row, label, item_bias=bias, weight=weight, backend=backend)

    def of_negatives(
        self,
        users: Tensor,
        items: Tensor,
        negatives: Tensor,
        histories: Rows,
        valid: Tensor | None = None,
        entries: Tensor | None = None,
    ) -> Tensor:
        """Compute the mean loss of positives against sampled negatives; a row's is multiplied by its positive's confidence.

        Args:
            users: ``[B]`` int64.
            items: ``[B]`` int64, the positives.
            negatives: ``[B * K]`` of the rows one after another, or ``[M]`` shared by the batch where ``valid`` is given.
            histories: training items of every user.
            valid: where a shared negative counts.
            entries: ``[B, 1 + K]``, positive and negatives of each row, where it is known that each counts.
        """
        if valid is None:
            loss = self.in_one_pass(users, items, negatives, histories, entries)
            if loss is not None:
                return loss
        query = self.towers.queries_of_pairs(users, items, histories)
        if valid is not None:
            candidates, bias, rows = self._candidates_of(torch.cat([items, negatives]))
            positive, negative = rows[: len(items)], rows[len(items) :]
        else:
            candidates, bias, rows = self._candidates_of(torch.cat([items[:, None], negatives.view(len(items), -1)], 1))
            positive, negative = rows[:, 0], rows[:, 1:]
        return sampled_bce(
            query,
            candidates,
            torch.arange(len(users), device=users.device),
            positive.contiguous(),
            negative.contiguous(),
            neg_valid=valid,
            item_bias=bias,
            weight=histories.confidence_of(users, items, self.towers.rows.n_items),
            neg_weight=self.options.neg_weight,
            backend=self.options.kernel_backend,
        )

    def in_one_pass(
        self, users: Tensor, items: Tensor, negatives: Tensor, histories: Rows, entries: Tensor | None = None
    ) -> Tensor | None:
        """Compute the same loss from the parts of the queries, if every entry of the batch counts; ``None`` otherwise."""
        options, towers = self.options, self.towers
        if options.loss_type != "sampled_bce" or options.scoring != "dot" or histories.confidence is not None:
            return None
        if not fuses_scaled_bce(users.device, options.kernel_backend):
            return None
        ids = self._counting(items, negatives) if entries is None else entries.contiguous()
        if ids is None:
            return None
        bias: Tensor = towers.bias
        if towers.target.adapters or is_sparse(towers.target.id):
            used, ids = distinct(ids, towers.rows.n_items)
            vectors, bias = towers.target(used), bias.index_select(0, used)
        else:
            vectors = towers.target()
        if ids.shape[1] > len(vectors):  # more than one pass takes
            return None
        user, offset, of_row = self._user_parts(users, items, histories)
        return scaled_sampled_bce(
            user, offset, towers.log_scale, vectors, bias, of_row, ids, options.neg_weight, options.kernel_backend
        )

    def _user_parts(self, users: Tensor, items: Tensor, histories: Rows) -> tuple[Tensor, Tensor | None, Tensor | None]:
        """User vectors, what is added to each, and the row of each user where the vectors are a table."""
        tower = self.towers.user
        if tower.is_a_table and tower.id is not None:
            if is_sparse(tower.id):
                used, rows = distinct(users, len(tower.id.weight))
                return tower.id(used), tower.offset, rows
            return tower.id.weight, tower.offset, users
        pooled = self.towers.pooled_of_pairs(users, items, histories)
        if tower.is_a_history and pooled is not None:
            return pooled, tower.offset, None
        return tower(users, pooled), None, None

    def _counting(self, items: Tensor, negatives: Tensor) -> Tensor | None:
        """Positive and negatives of each row, ``[B, 1 + K]`` int64, where each counts; ``None`` where one does not."""
        negatives = negatives.view(len(items), -1)
        ids = torch.cat([items[:, None], negatives], 1)
        trained = self.towers.trained.value.index_select(0, ids.view(-1))
        return ids if bool(trained.all()) and not bool((negatives == items[:, None]).any()) else None

    def _candidates_of(self, items: Tensor) -> tuple[Tensor, Tensor, Tensor]:
        """Vectors ``[n, D]`` and biases ``[n]`` that hold those of ``items``, and the row of each, shaped as ``items``.

        A table of IDs is handed over as it is. Where vectors are computed, only those of the items that occur are.
        """
        towers = self.towers
        if not towers.target.adapters and self.options.scoring == "dot" and not is_sparse(towers.target.id):
            return self.towers.candidates(), self._bias(), items
        used, rows = distinct(items, self.towers.rows.n_items)
        return self.towers.candidates(used), self._bias(used), rows
