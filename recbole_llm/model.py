"""LLMTwoTower: P(i|u) = sigmoid(<x_u, w_i> + b_i), items described by their content, users by their history."""

from typing import Any

import torch
import torch.nn.functional as F
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.utils import EvaluatorType, InputType
from recbole_llm_kernels import catalog_bce, catalog_ce, pair_bce, pair_dot, sampled_bce
from torch import Tensor, nn

from recbole_llm.bridge.options import Options
from recbole_llm.towers import FrozenTensor, ItemTower, Rows, UserTower, history_weights, pool

NOT_IN_CATALOGUE = float("-inf")  # the kernels' mark for an item that no loss, gradient or ranking may see


class LLMTwoTower(GeneralRecommender):
    """Two-tower model over frozen text vectors, trained inside RecBole.

    Shapes: B users or interactions of a batch, N items with padding row 0, D ``embedding_size``.

    Args:
        config: RecBole's ``Config``; our keys are described in ``properties/LLMTwoTower.yaml``.
        dataset: the training split, an ``LLMTwoTowerDataset``. A user's history is its interactions in this split and
            nothing else, in validation and test too.

    Raises:
        ValueError: on an invalid key of ours, or if neither features nor IDs describe the items.
    """

    input_type = InputType.PAIRWISE

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.options = options = Options.from_config(config)
        self.LABEL = config["LABEL_FIELD"]
        self._gives_probabilities = config["eval_type"] == EvaluatorType.VALUE

        history = dataset.training_rows(options.history_decay)
        self._history_offsets, self._history_ids = FrozenTensor(history.offsets), FrozenTensor(history.ids)
        self._history_times = None if history.weights is None else FrozenTensor(history.weights)
        count = torch.bincount(history.ids, minlength=self.n_items)
        self._trained = FrozenTensor(count > 0)

        sources = {name: (FrozenTensor(t.vectors), FrozenTensor(t.present)) for name, t in dataset.item_features.items()}
        make_items = dict(
            n_items=self.n_items, dim=options.embedding_size, sources=sources, hidden=options.adapter_hidden_size
        )
        self.target_tower = ItemTower(use_id=options.use_item_id, **make_items)
        self.source_tower = (
            self.target_tower if options.share_parameters else ItemTower(use_id=options.use_item_id, **make_items)
        )
        user_text = dataset.user_features.get("text") if "text" in options.user_tower else None
        self.user_tower = UserTower(
            self.n_users,
            options.embedding_size,
            options.user_tower,
            options.history_exponent,
            None if user_text is None else (FrozenTensor(user_text.vectors), FrozenTensor(user_text.present)),
            options.adapter_hidden_size,
        )
        self.log_scale = nn.Parameter(torch.tensor(options.scale_init).log())
        # logit of the share of users who have the item: a model that knows nothing else starts calibrated
        share = (count / max(int((history.sizes > 0).sum()), 1)).clamp(1e-4, 0.99)
        self.item_bias = nn.Parameter(torch.logit(share), requires_grad=options.use_item_bias)
        if not options.use_item_bias:
            nn.init.zeros_(self.item_bias)
        self._ranking_cache: tuple[Any, Tensor, Tensor, Tensor] | None = None

    # ------------------------------------------------------------------ users

    @property
    def history(self) -> Rows:
        """Training items of every user, ``n_users`` rows, on the model's device."""
        times = None if self._history_times is None else self._history_times.value
        return Rows(self._history_offsets.value, self._history_ids.value, times)

    def _scaled(self, x: Tensor) -> Tensor:
        """Queries from user vectors: training, ranking and prediction multiply the same factor into the same vector."""
        if self.options.scoring == "cosine":
            x = F.normalize(x, dim=-1)
        return x * self.log_scale.exp()

    def _candidates(self, ids: Tensor | None = None) -> Tensor:
        w = self.target_tower(ids)
        return F.normalize(w, dim=-1) if self.options.scoring == "cosine" else w

    def _drop(self, history: Rows) -> Rows:
        """Hide a random share of each history from its own vector; a target the user has not "seen" must be explained."""
        if not self.options.history_dropout:
            return history
        kept = torch.rand(len(history.ids), device=history.ids.device) >= self.options.history_dropout
        return history.keep(kept)

    def _queries_of_users(self, users: Tensor, history: Rows, source: Tensor) -> Tensor:
        pooled = pool(source, history, history_weights(history, self.options.history_exponent))
        return self._scaled(self.user_tower(users, pooled))

    def _queries_of_pairs(self, users: Tensor, items: Tensor) -> Tensor:
        """Queries ``[P, D]`` of (user, item) pairs whose item takes no part in its own user's history."""
        user, of_pair = torch.unique(users, return_inverse=True)
        history = self._drop(self.history.select(user))
        weights = torch.ones_like(history.ids, dtype=torch.float32) if history.weights is None else history.weights
        used, position = torch.unique(history.ids, return_inverse=True)
        source = self.source_tower(used)
        row = history.row_of_entry()
        total = pool(source, Rows(history.offsets, position), weights)
        mass = weights.new_zeros(len(user)).index_add_(0, row, weights)

        key, wanted = row * self.n_items + history.ids, of_pair * self.n_items + items
        at = torch.searchsorted(key, wanted).clamp(max=max(len(key) - 1, 0))
        present = key[at] == wanted if len(key) else torch.zeros_like(wanted, dtype=torch.bool)
        own = torch.where(present, weights[at], 0.0) if len(key) else torch.zeros_like(wanted, dtype=torch.float32)
        own_vector = source[position[at]] if len(key) else source.new_zeros(len(wanted), self.options.embedding_size)
        left = history.sizes[of_pair] - present.long()
        norm = (mass[of_pair] - own).clamp(min=torch.finfo(torch.float32).tiny).pow(-self.options.history_exponent)
        pooled = (total[of_pair] - own[:, None] * own_vector) * (norm * (left > 0))[:, None]
        return self._scaled(self.user_tower(users, pooled))

    # ------------------------------------------------------------------ training

    def calculate_loss(self, interaction: Any) -> Tensor:
        """Training loss of a batch in nats, a float32 scalar.

        Under a catalogue loss the batch is users, each with all its training items as targets, and the loss is per target;
        under ``sampled_bce`` and ``pair_bce`` it is interactions, and the loss is the mean over them.
        """
        if self.options.trains_on_users:
            return self._catalog_loss(interaction[self.USER_ID])
        return self._interaction_loss(interaction)

    def _training_bias(self, ids: Tensor | None = None) -> Tensor:
        trained = self._trained.value if ids is None else self._trained.value[ids]
        bias = self.item_bias if ids is None else self.item_bias[ids]
        return torch.where(trained, bias, NOT_IN_CATALOGUE)

    def _catalog_loss(self, users: Tensor) -> Tensor:
        targets = self.history.select(users)
        query = self._queries_of_users(users, self._drop(targets), self.source_tower())
        shared = dict(item_bias=self._training_bias(), reduction="sum", backend=self.options.kernel_backend)
        arguments = (query, self._candidates(), targets.offsets, targets.ids)
        if self.options.loss_type == "catalog_ce":
            loss = catalog_ce(*arguments, **shared)
        else:
            loss = catalog_bce(*arguments, neg_weight=self.options.neg_weight, **shared)
        return loss / max(len(targets.ids), 1)

    def _interaction_loss(self, interaction: Any) -> Tensor:
        users, items = interaction[self.USER_ID], interaction[self.ITEM_ID]
        query = self._queries_of_pairs(users, items)
        row = torch.arange(len(users), device=users.device)
        if self.options.loss_type == "pair_bce":
            used, item_row = torch.unique(items, return_inverse=True)
            shared = dict(item_bias=self._training_bias(used), backend=self.options.kernel_backend)
            return pair_bce(query, self._candidates(used), row, item_row, interaction[self.LABEL], **shared)
        negatives = interaction[self.NEG_ITEM_ID]
        used, rows = torch.unique(torch.cat([items[:, None], negatives], 1), return_inverse=True)
        return sampled_bce(
            query,
            self._candidates(used),
            row,
            rows[:, 0].contiguous(),
            rows[:, 1:].contiguous(),
            item_bias=self._training_bias(used),
            neg_weight=self.options.neg_weight,
            backend=self.options.kernel_backend,
        )

    # ------------------------------------------------------------------ ranking and prediction

    def _ranking_tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """Source ``[N, D]``, candidates ``[N, D]`` and bias ``[N]`` as ranking sees them, computed once per state.

        An item without a training interaction has no trained ID vector and no trained bias: it gets the map of its
        content, and the lowest trained bias.
        """
        state = (self.training, *((id(p), p._version) for p in self.parameters()))
        if self._ranking_cache is not None and self._ranking_cache[0] == state:
            return self._ranking_cache[1:]
        with torch.no_grad():
            trained = self._trained.value
            parts = self.target_tower.parts()
            residual = parts.pop("id", None)
            w = sum(parts.values()) if parts else torch.zeros_like(residual)
            if residual is not None:
                w = w + residual * trained[:, None]
            if self.options.scoring == "cosine":
                w = F.normalize(w, dim=-1)
            floor = self.item_bias[trained].min() if bool(trained.any()) else self.item_bias.new_zeros(())
            bias = torch.where(trained, self.item_bias, floor)
            bias[0] = NOT_IN_CATALOGUE
            self._ranking_cache = (state, self.source_tower(), w, bias)
        return self._ranking_cache[1:]

    def train(self, mode: bool = True) -> "LLMTwoTower":
        """Switch between training and evaluation; drops the tables kept for ranking."""
        self._ranking_cache = None
        return super().train(mode)

    @torch.no_grad()
    def user_vectors(self, users: Tensor) -> Tensor:
        """Queries x_u of known users, ``[B]`` int64 -> ``[B, D]``; the score's factor is in them."""
        source, _, _ = self._ranking_tables()
        return self._queries_of_users(users, self.history.select(users), source)

    @torch.no_grad()
    def item_vectors(self) -> tuple[Tensor, Tensor]:
        """Target vectors w_i ``[N, D]`` and biases b_i ``[N]``; the padding item's bias is -inf."""
        _, w, bias = self._ranking_tables()
        return w, bias

    @torch.no_grad()
    def predict(self, interaction: Any) -> Tensor:
        """Scores of (user, item) pairs, ``[P]``: probabilities where the metric is value-based, logits where it ranks.

        A sigmoid is exactly 1 from a logit of 17 on in float32, so ranking by probabilities would tie.
        """
        users, items = interaction[self.USER_ID], interaction[self.ITEM_ID]
        user, row = torch.unique(users, return_inverse=True)
        w, bias = self.item_vectors()
        logit = pair_dot(self.user_vectors(user), w, row, items, item_bias=bias, backend=self.options.kernel_backend)
        return torch.sigmoid(logit) if self._gives_probabilities else logit

    @torch.no_grad()
    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Logits of every item for each user, flattened, ``[B * N]``; the padding item scores -inf."""
        w, bias = self.item_vectors()
        return torch.addmm(bias, self.user_vectors(interaction[self.USER_ID]), w.T).view(-1)
