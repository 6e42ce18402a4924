"""LLMTwoTower: P(i|u) = sigmoid(<x_u, w_i> + b_i), items described by their content, users by their history."""

from typing import Any

import torch
import torch.nn.functional as F
from recbole.model.abstract_recommender import GeneralRecommender
from recbole.utils import EvaluatorType, InputType
from torch import Tensor, nn

from recbole_llm.bridge import distributed
from recbole_llm.bridge.options import Options
from recbole_llm.fitted import FittedBlocks
from recbole_llm.learned_loss import NOT_IN_CATALOGUE, LearnedLoss
from recbole_llm.recency import decayed
from recbole_llm.towers import FrozenTensor, ItemTower, Rows, UserTower, history_weights, pool
from recbole_llm_kernels import pair_dot
from recbole_llm_kernels.torch_ops.pool import pool as pool_on_cpu
from recbole_llm_kernels.torch_ops.pool import pool_without_own, scaled_rows


class LLMTwoTower(FittedBlocks, LearnedLoss, GeneralRecommender):
    """Two-tower model over frozen text vectors, trained inside RecBole.

    Source vectors, target vectors and bias are a concatenation of blocks (``blocks``), so that a score stays one dot product:
    ``closed_form`` is fitted at once (:mod:`recbole_llm.closed_form`), ``learned`` by gradient descent.

    Shapes: B users or interactions of a batch, N items with padding row 0, D ``embedding_size``, d rank of the closed form.

    Args:
        config: RecBole's ``Config``; our keys are described in ``properties/LLMTwoTower.yaml``.
        dataset: the training split, an ``LLMTwoTowerDataset``. A user's history is its interactions in this split and
            nothing else, in validation and test too.

    Raises:
        ValueError: on an invalid key of ours, or if neither features nor IDs describe the items.
    """

    input_type = InputType.PAIRWISE
    shards_items = False  # whether the rows of the items are spread over the processes
    _padding_rows = 1  # of the first of the rows that this process holds

    def __new__(cls, config: Any = None, dataset: Any = None) -> "LLMTwoTower":
        """The model, in the form whose items are spread over processes where ``shard_items`` meets several."""
        if cls is LLMTwoTower and config is not None and config["shard_items"] and distributed.active():
            from recbole_llm.sharded_model import ShardedTwoTower

            return super().__new__(ShardedTwoTower)
        return super().__new__(cls)

    def __init__(self, config: Any, dataset: Any) -> None:
        super().__init__(config, dataset)
        self.options = options = Options.from_config(config)
        self.LABEL = config["LABEL_FIELD"]
        self._gives_probabilities = config["eval_type"] == EvaluatorType.VALUE

        history = dataset.training_rows(options.history_decay)
        self._history_offsets, self._history_ids = FrozenTensor(history.offsets), FrozenTensor(history.ids)
        self._history_times = None if history.weights is None else FrozenTensor(history.weights)
        ranks = dataset.training_ranks() if options.use_order and options.history_decay is None else None
        self._ranks = None if ranks is None else FrozenTensor(ranks.weights)
        count = torch.bincount(history.ids, minlength=self.n_items)
        self._trained = FrozenTensor(count > 0)

        features = {
            name: (FrozenTensor(self._own_rows(t.vectors)), FrozenTensor(self._own_rows(t.present)))
            for name, t in dataset.item_features.items()
        }
        self._features = features
        self._make_towers(features if options.tower_features else {}, dataset)
        self.log_scale = nn.Parameter(torch.tensor(options.scale_init).log())
        # logit of the share of users who have the item: a model that knows nothing else starts calibrated
        share = (count / max(int((history.sizes > 0).sum()), 1)).clamp(1e-4, 0.99)
        self.item_bias = nn.Parameter(self._own_rows(torch.logit(share)), requires_grad=options.use_item_bias)
        if not options.use_item_bias:
            nn.init.zeros_(self.item_bias)

        self._nothing_fitted()

    def _apply(self, fn: Any, recurse: bool = True) -> "LLMTwoTower":
        for tensors in self._features.values():  # those that no tower holds
            for tensor in tensors:
                tensor._apply(fn)
        return super()._apply(fn, recurse)

    def _make_towers(self, features: dict[str, tuple[FrozenTensor, FrozenTensor]], dataset: Any) -> None:
        options = self.options
        self.target_tower = self._make_item_tower(features)
        self.source_tower = self.target_tower if options.share_parameters else self._make_item_tower(features)
        for tower in (self.target_tower, self.source_tower):
            # 0 from the start where nothing trains it: a ranking then needs no copy without it
            if tower.id is not None:
                tower.id.weight.data[~self._own_rows(self._trained.value)] = 0
        text = dataset.user_features.get("text") if "text" in options.user_tower else None
        self.user_tower = UserTower(
            self.n_users,
            options.embedding_size,
            options.user_tower,
            options.history_exponent,
            None if text is None else (FrozenTensor(text.vectors), FrozenTensor(text.present)),
            options.adapter_hidden_size,
        )

    def _make_item_tower(self, features: dict[str, tuple[FrozenTensor, FrozenTensor]]) -> ItemTower:
        options = self.options
        return ItemTower(
            self.n_items, options.embedding_size, features, options.adapter_hidden_size, options.use_item_id
        )

    def _own_rows(self, of_items: Tensor) -> Tensor:
        """Those of ``[N, ...]`` whose items have their vectors in this process: all."""
        return of_items

    # ------------------------------------------------------------------ users

    @property
    def history(self) -> Rows:
        """Training items of every user, ``n_users`` rows, on the model's device."""
        times = None if self._history_times is None else self._history_times.value
        return Rows(self._history_offsets.value, self._history_ids.value, times)

    @property
    def uses_order(self) -> bool:
        """Whether interactions are split by time, so that recency counts."""
        return self._ranks is not None

    @property
    def ranking_history(self) -> Rows:
        """Items by which users are ranked: the training items; at test, where time splits, those of validation too."""
        if self.at_test and self._later is not None:
            return decayed(self._later, self.options.history_decay)
        return self.history

    @property
    def _ranked(self) -> Rows:
        """``ranking_history`` with ranks (0 the newest) as weights."""
        if self.at_test and self._later is not None:
            return self._later
        assert self._ranks is not None
        return Rows(self._history_offsets.value, self._history_ids.value, self._ranks.value)

    def remember_later(self, ranked: Rows) -> None:
        """Histories for the test where interactions are split by time: training and validation items, weights are ranks.

        RecBole gives sequential models the same: every interaction before the one to predict.
        """
        self._later = ranked.to(self.item_bias.device)

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

    def _pool(self, vectors: Tensor, history: Rows, weights: Tensor) -> Tensor:
        """As :func:`recbole_llm.towers.pool`; where a CPU trains, with the gradient that takes a fraction of its time."""
        if vectors.is_cuda or not vectors.requires_grad:
            return pool(vectors, history, weights)
        return pool_on_cpu(vectors, history.ids, history.offsets, weights)

    def _queries_of_users(self, users: Tensor, history: Rows | None, source: Tensor) -> Tensor:
        pooled = None
        if history is not None and self.user_tower.uses_history:
            pooled = self._pool(source, history, history_weights(history, self.options.history_exponent))
        return self._scaled(self.user_tower(users, pooled))

    def _ranking_queries(self, users: Tensor) -> Tensor:
        """The learned block's queries of known users, ``[B, D]``."""
        history = self.ranking_history.select(users) if self.user_tower.uses_history else None
        return self._queries_of_users(users, history, self._ranking_tables()[0])

    def _queries_of_pairs(self, users: Tensor, items: Tensor) -> Tensor:
        """Queries ``[P, D]`` of (user, item) pairs whose item takes no part in its own user's history."""
        tower = self.user_tower
        if tower.id is not None and tower.is_a_table and self.options.scoring == "dot" and not users.is_cuda:
            return scaled_rows(tower.id.weight, users, tower.offset, self.log_scale.exp())
        return self._scaled(tower(users, self._pooled_of_pairs(users, items)))

    def _pooled_of_pairs(self, users: Tensor, items: Tensor) -> Tensor | None:
        """Pooled histories ``[P, D]`` of such pairs; ``None`` for a tower without histories."""
        if not self.user_tower.uses_history:
            return None
        user, of_pair = torch.unique(users, return_inverse=True)
        history = self.history.select(user, self.options.history_dropout)
        weights = torch.ones_like(history.ids, dtype=torch.float32) if history.weights is None else history.weights
        # an entry that matches no key, so that every pair finds one to look at
        source, position = self._sources_of(F.pad(history.ids, (0, 1)))
        row = history.row_of_entry()
        mass = history.sizes.float()
        if history.weights is not None:
            mass = torch.zeros_like(mass).index_add_(0, row, weights)

        key = F.pad(row * self.n_items + history.ids, (0, 1), value=len(user) * self.n_items)
        wanted = of_pair * self.n_items + items
        at = torch.searchsorted(key, wanted)
        own = F.pad(weights, (0, 1)).index_select(0, at) * (key.index_select(0, at) == wanted)
        left = history.sizes.index_select(0, of_pair) - (own > 0).long()
        rest = (mass.index_select(0, of_pair) - own).clamp(min=torch.finfo(torch.float32).tiny)
        norm = rest.pow(-self.options.history_exponent) * (left > 0)
        if source.is_cuda:
            total = pool(source, Rows(history.offsets, position[:-1]), weights)
            return (total[of_pair] - own[:, None] * source[position[at]]) * norm[:, None]
        lists = (position[:-1], history.offsets, row, weights)
        return pool_without_own(source, *lists, of_pair, position.index_select(0, at), own, norm)

    # ------------------------------------------------------------------ ranking and prediction

    def _ranking_tables(self) -> tuple[Tensor, Tensor, Tensor]:
        """Learned source ``[N, D]``, candidates ``[N, D]`` and bias ``[N]`` as ranking sees them, computed once per state.

        An item without a training interaction has no trained ID vector and no trained bias. Until
        :meth:`place_cold_items`, and where it has no text, it gets the map of its content and the lowest trained bias.
        """
        state = (self.training, *((id(p), p._version) for p in self.parameters()))
        if self._ranking_cache is not None and self._ranking_cache[0] == state:
            return self._ranking_cache[1:]
        with torch.no_grad():
            trained = self._own_rows(self._trained.value)
            w, source = self._without_untrained(self.target_tower), self._without_untrained(self.source_tower)
            if self.options.scoring == "cosine":
                w = F.normalize(w, dim=-1)
            bias = torch.where(trained, self.item_bias, self._lowest_bias(trained))
            bias[: self._padding_rows] = NOT_IN_CATALOGUE
            if self._cold is not None:
                w = w.index_copy(0, self._cold.ids, self._cold.learned)
                source = source.index_copy(0, self._cold.ids, self._cold.learned_source)
                place = self._cold.bias if self._cold.joint else torch.full_like(self._cold.bias, NOT_IN_CATALOGUE)
                bias = bias.index_copy(0, self._cold.ids, place)
            self._ranking_cache = (state, source, w, bias)
        return self._ranking_cache[1:]

    def _lowest_bias(self, trained: Tensor) -> Tensor:
        """Of the trained items; 0 without any."""
        return self.item_bias[trained].min() if bool(trained.any()) else self.item_bias.new_zeros(())

    def _without_untrained(self, tower: ItemTower) -> Tensor:
        """Vectors of a tower without the ID vectors that no interaction has trained, ``[N, D]``."""
        parts = tower.parts()
        if "id" in parts:
            parts["id"] = parts["id"].detach()
            trained = self._own_rows(self._trained.value)
            untrained = (~trained).nonzero()[:, 0].split(4096)
            if any(bool(parts["id"].index_select(0, some).any()) for some in untrained):
                parts["id"] = parts["id"] * trained[:, None]
        total, *others = parts.values()
        for part in others:
            total = total + part
        return total

    def train(self, mode: bool = True) -> "LLMTwoTower":
        """Switch between training and evaluation; drops the tables kept for ranking."""
        self._ranking_cache = None
        return super().train(mode)

    @torch.no_grad()
    def user_vectors(self, users: Tensor) -> Tensor:
        """Queries x_u of known users, ``[B]`` int64 -> ``[B, d + D]``; every factor of the score is in them.

        A block without a share of the score has no columns here and in :meth:`item_vectors`.
        """
        slope, _ = self.calibration
        blocks = []
        if self._closed_counts:
            blocks.append(self._closed_query(users) * (slope * self.block_scales[0]))
        if self._learned_counts or not blocks:
            blocks.append(self._ranking_queries(users) * (slope * self.block_scales[1]))
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1)

    @torch.no_grad()
    def item_vectors(self) -> tuple[Tensor, Tensor]:
        """Target vectors w_i ``[N, d + D]`` and biases b_i ``[N]``; the padding item's bias is -inf.

        The full form's targets are the identity: d = N.
        """
        _, w, bias = self._ranking_tables()
        slope, offset = self.calibration
        bias = bias * self.block_scales[1] if self._learned_counts else self._place()
        blocks = []
        if self._closed_counts:
            blocks.append(self._closed_table())
        if self._learned_counts or not blocks:
            blocks.append(w)
        return blocks[0] if len(blocks) == 1 else torch.cat(blocks, 1), slope * bias + offset

    def _closed_table(self) -> Tensor:
        """Targets of the closed form as ranking sees them, ``[N, d]``."""
        target = self._closed_targets()
        if target is None:
            target = torch.eye(self.n_items, device=self.item_bias.device)
        return target if self._cold is None else target.index_copy(0, self._cold.ids, self._cold.closed)

    @property
    def has_item_vectors(self) -> bool:
        """Whether the targets are stored vectors, and not the full closed form's identity matrix."""
        return not (self._closed_counts and self._closed_target is None)

    def _closed_query(self, users: Tensor) -> Tensor:
        assert self._closed_source is not None
        if not self.uses_order:
            return pool(self._closed_source.value, self.ranking_history.select(users))
        ranked = self._ranked.select(users)
        x = pool(self._closed_source.value, decayed(ranked, self.closed_decay))
        if self._next is None:
            return x
        y = self._next.scale * pool(self._next.source, decayed(ranked, self._next.decay))
        return x + y if self._closed_target is None else torch.cat([x, y], 1)

    def _closed_scores(self, query: Tensor) -> Tensor:
        """The closed form's scores of every item, ``[B, N]``."""
        if self.has_item_vectors:
            return query @ self._closed_table().T
        if self._cold is None:  # targets are the identity: the pooled sources are the scores
            return query
        return query.index_copy(1, self._cold.ids, query @ self._cold.closed.T)

    def _learned_logits(self, users: Tensor) -> Tensor:
        _, w, bias = self._ranking_tables()
        return torch.addmm(bias, self._ranking_queries(users), w.T)

    @property
    def _learned_counts(self) -> bool:
        return "learned" in self.options.blocks and self.block_scales[1] != 0

    @property
    def _closed_counts(self) -> bool:
        return self._closed_source is not None and self.block_scales[0] != 0

    def _place(self) -> Tensor:
        """What an item's score starts from, ``[N]``: 0, or -inf for those that no ranking may hold."""
        bias = self._ranking_tables()[2]
        return torch.where(bias.isinf(), bias, 0.0)

    def _logits(self, users: Tensor) -> Tensor:
        """Scores of every item, ``[B, N]`` in a fresh tensor; -inf for padding."""
        if self._learned_counts:
            scores = self._learned_logits(users).mul_(self.block_scales[1])
        else:
            scores = self._place().repeat(len(users), 1)
        if self._closed_counts:
            closed = self._closed_scores(self._closed_query(users))
            scores.add_(closed, alpha=self.block_scales[0])
        slope, offset = self.calibration
        return scores.mul_(slope).add_(offset)

    def _log_length(self, users: Tensor) -> Tensor:
        """Log of the number of items in each user's history, ``[B]``; 0 for an empty one."""
        return self.ranking_history.select(users).sizes.clamp(min=1).float().log()

    @torch.no_grad()
    def probabilities(self, users: Tensor) -> Tensor:
        """P(i|u) of every item for each user, ``[B, N]``, in the order of the scores; 0 for padding.

        The event is that of :meth:`calibrate`.
        """
        return torch.sigmoid(self.probability_map.logit(self._logits(users), self._log_length(users)[:, None]))

    @torch.no_grad()
    def predict(self, interaction: Any) -> Tensor:
        """Scores of (user, item) pairs, ``[P]``: probabilities where the metric is value-based, logits where it ranks.

        A sigmoid is exactly 1 from a logit of 17 on in float32, so ranking by probabilities would tie.
        """
        users, items = interaction[self.USER_ID], interaction[self.ITEM_ID]
        user, row = torch.unique(users, return_inverse=True)
        backend = self.options.kernel_backend
        logit = self._place()[items]
        if self._learned_counts:
            _, w, bias = self._ranking_tables()
            query = self._ranking_queries(user)
            logit += self.block_scales[1] * pair_dot(query, w, row, items, item_bias=bias, backend=backend)
        if self._closed_counts and self.has_item_vectors:
            query = self._closed_query(user)
            logit += self.block_scales[0] * pair_dot(query, self._closed_table(), row, items, backend=backend)
        elif self._closed_counts:  # a query is the user's scores of all items, so a few users at a time
            for few in torch.arange(len(user), device=users.device).split(max(1, 2**23 // self.n_items)):
                here = (row >= few[0]) & (row <= few[-1])
                scores = self._closed_scores(self._closed_query(user[few]))
                logit[here] += self.block_scales[0] * scores[row[here] - few[0], items[here]]
        slope, offset = self.calibration
        logit = slope * logit + offset
        if not self._gives_probabilities:
            return logit
        return torch.sigmoid(self.probability_map.logit(logit, self._log_length(user)[row]))

    @torch.no_grad()
    def full_sort_predict(self, interaction: Any) -> Tensor:
        """Logits of every item for each user, flattened, ``[B * N]``; the padding item scores -inf."""
        return self._logits(interaction[self.USER_ID]).view(-1)
