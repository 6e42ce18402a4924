r"""The two towers: items from their features and ID, users from their history.

    w_i = sum_s A_s f_si + e_i                  target vector of item i: adapters A_s of its features f_si, ID residual e_i
    v_j = the same with other parameters        source vector of item j, what a history is made of (unless shared)
    x_u = sum_{j in H_u} a_uj v_j + c [+ e_u] [+ B g_u]

:class:`TwoTowers` holds both and gives them to the score as one :class:`recbole_llm.scoring.score.LinearBlock`.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from recbole_llm.scoring.block import LinearBlock
from recbole_llm.scoring.item_rows import AllRows
from recbole_llm.scoring.rows import Rows, history_weights
from recbole_llm.scoring.tables import FrozenTensor, own_ids
from recbole_llm_kernels import pool_rows_without_own, scaled_rows

ID_INIT_STD = 0.01  # small against a text vector's norm of about 1: the content speaks first


def _adapter(in_features: int, out_features: int, hidden: int | None) -> nn.Module:
    if hidden is None:
        return nn.Linear(in_features, out_features, bias=False)
    return nn.Sequential(nn.Linear(in_features, hidden), nn.GELU(), nn.Linear(hidden, out_features, bias=False))


class ItemTower(nn.Module):
    """Item vectors as a sum of named parts: a map of each feature source, and an ID residual.

    Args:
        n_items: rows N, padding row 0 included.
        dim: D.
        sources: for each modality, frozen vectors ``[N, F]`` and which rows are present ``[N]`` (bool);
            a row that is not present contributes 0. The tensors may be shared with other towers: they are not copied.
        hidden: hidden units of the adapters; ``None`` for linear maps.
        use_id: whether items have a learned vector of their own.
        rows: which of the catalogue's rows these are; ``None`` for all of it.

    Raises:
        ValueError: if an item would have neither a source nor an ID, or a source has another number of rows.
    """

    def __init__(
        self,
        n_items: int,
        dim: int,
        sources: Mapping[str, tuple[FrozenTensor, FrozenTensor]],
        hidden: int | None = None,
        use_id: bool = True,
        rows: AllRows | None = None,
    ) -> None:
        super().__init__()
        if not sources and not use_id:
            raise ValueError(
                "An item tower needs features or IDs, got neither: set use_item_id to true, "
                "or give an encoder or an item_features_file."
            )
        for name, (vectors, _) in sources.items():
            if len(vectors.value) != n_items:
                raise ValueError(f"source {name!r} has {len(vectors.value)} rows, the catalogue has {n_items}.")
        self.dim = dim
        self.features = nn.ModuleDict({name: vectors for name, (vectors, _) in sources.items()})
        self.present = nn.ModuleDict({name: mask for name, (_, mask) in sources.items()})
        self.adapters = nn.ModuleDict(
            {name: _adapter(vectors.value.shape[1], dim, hidden) for name, (vectors, _) in sources.items()}
        )
        self.id = None
        if use_id:
            self.id = (
                own_ids(rows, dim, ID_INIT_STD) if rows is not None and rows.sharded else self._make_ids(n_items, dim)
            )

    @staticmethod
    def _make_ids(n_items: int, dim: int) -> nn.Embedding:
        table = nn.Embedding(n_items, dim, padding_idx=0)
        nn.init.normal_(table.weight, std=ID_INIT_STD)
        with torch.no_grad():
            table.weight[0] = 0
        return table

    def parts(self, ids: Tensor | None = None) -> dict[str, Tensor]:
        """Compute the summands of each item's vector, ``{"text": [n, D], ..., "id": [n, D]}``.

        Args:
            ids: ``[n]`` int64; ``None`` for the whole catalogue, n = N.
        """
        parts = {}
        for name, adapter in self.adapters.items():
            features, present = self._rows(self.features[name], ids), self._rows(self.present[name], ids)
            parts[name] = adapter(features) * present[:, None]
        if self.id is not None:
            parts["id"] = self.id.weight if ids is None else self.id(ids)
        return parts

    def forward(self, ids: Tensor | None = None) -> Tensor:
        """Compute item vectors, ``[n, D]``; ``ids`` as in :meth:`parts`."""
        total, *others = self.parts(ids).values()
        for part in others:
            total = total + part
        return total

    def table(self, name: str) -> tuple[Tensor, Tensor]:
        """Return the frozen vectors ``[N, F]`` of a source and which rows are present, ``[N]`` bool."""
        return self._rows(self.features[name], None), self._rows(self.present[name], None)

    @staticmethod
    def _rows(table: Any, ids: Tensor | None) -> Tensor:
        return table.value if ids is None else table.value[ids]


class UserTower(nn.Module):
    """User vectors as a sum of parts: pooled history, an ID vector, a map of the user's text, and a common offset.

    Args:
        n_users: rows of the ID table, padding row 0 included.
        dim: D.
        parts: any of ``history``, ``id``, ``text``.
        exponent: alpha of :func:`history_weights`.
        text: frozen vectors ``[n_users, F]`` and present rows ``[n_users]``; needed with part ``text``.
        hidden: hidden units of the text adapter; ``None`` for linear.

    Raises:
        ValueError: if part ``text`` is asked for without ``text``.
    """

    def __init__(
        self,
        n_users: int,
        dim: int,
        parts: Sequence[str] = ("history",),
        exponent: float = 0.5,
        text: tuple[FrozenTensor, FrozenTensor] | None = None,
        hidden: int | None = None,
    ) -> None:
        super().__init__()
        if "text" in parts and text is None:
            raise ValueError(
                "user_tower contains text, but there are no user texts: add a .user file with text columns."
            )
        self.uses_history = "history" in parts
        self.exponent = exponent
        self.offset = nn.Parameter(torch.zeros(dim))
        self.id = nn.Embedding(n_users, dim, padding_idx=0) if "id" in parts else None
        if self.id is not None:
            nn.init.normal_(self.id.weight, std=ID_INIT_STD)
            with torch.no_grad():
                self.id.weight[0] = 0
        self.text = self.has_text = self.adapter = None
        if "text" in parts and text is not None:
            self.text, self.has_text = text
            self.adapter = _adapter(self.text.value.shape[1], dim, hidden)

    def own_part(self) -> Tensor | None:
        """Compute what each known user adds to the pooled history, ``[U, D]``: ID and text; ``None`` without either."""
        part = None if self.id is None else self.id.weight
        if self.adapter is not None and self.text is not None and self.has_text is not None:
            text = self.adapter(self.text.value) * self.has_text.value[:, None]
            part = text if part is None else part + text
        return part

    @property
    def is_a_table(self) -> bool:
        """Whether x_u = e_u + c: neither history nor text."""
        return self.id is not None and not self.uses_history and self.adapter is None

    @property
    def is_a_history(self) -> bool:
        """Whether x_u is the pooled history + c: neither ID nor text."""
        return self.uses_history and self.id is None and self.adapter is None

    def forward(self, users: Tensor, pooled: Tensor | None) -> Tensor:
        """Compute user vectors x_u, ``[B, D]``.

        Args:
            users: ``[B]`` int64.
            pooled: pooled history ``[B, D]`` (:func:`pool`); ignored by a tower without history.
        """
        x = self.offset.expand(len(users), -1)
        if self.uses_history and pooled is not None:
            x = x + pooled
        if self.id is not None:
            # on a CPU the gradient of index_select is formed in a third of the time of Embedding's
            gathered = users.is_cuda or is_sparse(self.id)
            x = x + (self.id(users) if gathered else self.id.weight.index_select(0, users))
        if self.adapter is not None and self.text is not None and self.has_text is not None:
            x = x + self.adapter(self.text.value[users]) * self.has_text.value[users][:, None]
        return x


@dataclass(frozen=True)
class TowerOptions:
    """The options that shape the towers, named and meant as the configuration keys."""

    embedding_size: int
    adapter_hidden_size: int | None
    use_item_id: bool
    use_item_bias: bool
    share_parameters: bool
    user_tower: tuple[str, ...]
    history_exponent: float
    history_dropout: float
    scoring: str
    scale_init: float


class TwoTowers:
    """Both towers, the items' bias and the temperature: the block that gradient descent trains.

    No module of its own: a model registers the parts under its own names, which checkpoints keep.

    Args:
        options: shapes and sources.
        n_users: rows of the users' tables, padding included.
        count: training interactions of each item, ``[N]``.
        active_users: users with a training interaction.
        features: by modality, vectors ``[n, F]`` and present rows ``[n]`` of the items here; only what the towers read.
        user_text: the same of the users' texts, ``[U, F]``; ``None`` without.
        rows: which items are in this process.

    Attributes:
        target: tower of the candidates.
        source: tower of the histories.
        user: user tower.
        log_scale: logarithm of the temperature, ``[]``.
        bias: ``[n]``.
        trained: ``[N]`` bool, items with a training interaction.
    """

    def __init__(
        self,
        options: TowerOptions,
        n_users: int,
        count: Tensor,
        active_users: int,
        features: Mapping[str, tuple[FrozenTensor, FrozenTensor]],
        user_text: tuple[FrozenTensor, FrozenTensor] | None,
        rows: AllRows,
    ) -> None:
        self.options, self.rows = options, rows
        self.trained = FrozenTensor(count > 0)
        self.target = self._item_tower(features)
        self.source = self.target if options.share_parameters else self._item_tower(features)
        for tower in (self.target, self.source):
            # 0 from the start where nothing trains it: a ranking then needs no copy without it
            if tower.id is not None:
                tower.id.weight.data[~self._own_trained()] = 0
        self.user = UserTower(
            n_users,
            options.embedding_size,
            options.user_tower,
            options.history_exponent,
            user_text if "text" in options.user_tower else None,
            options.adapter_hidden_size,
        )
        self.log_scale = nn.Parameter(torch.tensor(options.scale_init).log())
        # logit of the share of users who have the item: a model that knows nothing else starts calibrated
        share = (count / max(active_users, 1)).clamp(1e-4, 0.99)
        self.bias = nn.Parameter(rows.of(torch.logit(share)), requires_grad=options.use_item_bias)
        if not options.use_item_bias:
            nn.init.zeros_(self.bias)

    def _item_tower(self, features: Mapping[str, tuple[FrozenTensor, FrozenTensor]]) -> ItemTower:
        options = self.options
        return ItemTower(
            self.rows.n_own,
            options.embedding_size,
            features,
            options.adapter_hidden_size,
            options.use_item_id,
            self.rows,
        )

    def _own_trained(self) -> Tensor:
        return self.rows.of(self.trained.value)

    def to(self, device: torch.device | str) -> "TwoTowers":
        """Move everything to a device, in place."""
        for module in (self.trained, self.target, self.source, self.user):
            module.to(device)
        for parameter in (self.log_scale, self.bias):
            parameter.data = parameter.data.to(device)
        return self

    def parameters(self) -> list[nn.Parameter]:
        """List what training changes, each once."""
        modules = (self.target, self.source, self.user)
        found = [parameter for module in modules for parameter in module.parameters()]
        found += [self.log_scale, self.bias]
        return [each for each in dict.fromkeys(found) if each.requires_grad]

    @torch.no_grad()
    def start_at_principal_axes(self) -> None:
        """Start the linear maps of content at its principal axes over the trained items, at a mean length of 1.

        Items begin as their content then, and their IDs as a small residual.
        """
        trained = self._own_trained()
        for name in self.target.adapters:
            vectors, present = self.target.table(name)
            known = vectors[present & trained]
            if not len(known) or not isinstance(self.target.adapters[name], nn.Linear):
                continue
            axes = torch.linalg.eigh(known.T.double() @ known.double()).eigenvectors.flip(1)[:, : self.target.dim]
            length = (known.double() @ axes).norm(dim=1).mean() * len(self.target.adapters)
            start = F.pad(axes / length, (0, self.target.dim - axes.shape[1])).T
            for tower in {self.target, self.source}:
                adapter = tower.adapters[name]
                assert isinstance(adapter, nn.Linear)
                adapter.weight.copy_(start)

    # ------------------------------------------------------------------ while training

    @property
    def cosine(self) -> bool:
        """Whether queries and candidates have length 1."""
        return self.options.scoring == "cosine"

    def _scaled(self, x: Tensor) -> Tensor:
        """Queries from user vectors: training and ranking multiply the same factor into the same vector."""
        return (F.normalize(x, dim=-1) if self.cosine else x) * self.log_scale.exp()

    def candidates(self, ids: Tensor | None = None) -> Tensor:
        """Compute target vectors of some items, or of all that are here: ``[n, D]``."""
        w = self.target(ids)
        return F.normalize(w, dim=-1) if self.cosine else w

    def queries(self, users: Tensor, history: Rows) -> Tensor:
        """Compute queries ``[B, D]`` of users with these histories."""
        pooled = None
        if self.user.uses_history:
            weights = history_weights(history, self.options.history_exponent)
            pooled = self.rows.pool(self.source(), history, weights)
        return self._scaled(self.user(users, pooled))

    def queries_of_pairs(self, users: Tensor, items: Tensor, histories: Rows) -> Tensor:
        """Compute queries ``[P, D]`` of (user, item) pairs whose item takes no part in its own user's history."""
        tower = self.user
        at_once = tower.is_a_table and not self.cosine and not users.is_cuda
        if tower.id is not None and at_once and not is_sparse(tower.id):
            return scaled_rows(tower.id.weight, users, tower.offset, self.log_scale.exp())
        return self._scaled(tower(users, self.pooled_of_pairs(users, items, histories)))

    def pooled_of_pairs(self, users: Tensor, items: Tensor, histories: Rows) -> Tensor | None:
        """Pool the histories of such pairs, ``[P, D]``; ``None`` for a tower without histories.

        Args:
            users: ``[P]`` int64.
            items: ``[P]`` int64.
            histories: a row for every user; entries are dropped by ``history_dropout``.
        """
        if not self.user.uses_history:
            return None
        user, of_pair = torch.unique(users, return_inverse=True)
        history = histories.select(user, self.options.history_dropout)
        weights = torch.ones_like(history.ids, dtype=torch.float32) if history.weights is None else history.weights
        # an entry that matches no key, so that every pair finds one to look at
        source, position = self._sources_of(F.pad(history.ids, (0, 1)))
        row = history.row_of_entry()
        mass = history.sizes.float()
        if history.weights is not None:
            mass = torch.zeros_like(mass).index_add_(0, row, weights)

        n_items = self.rows.n_items
        key = F.pad(row * n_items + history.ids, (0, 1), value=len(user) * n_items)
        wanted = of_pair * n_items + items
        at = torch.searchsorted(key, wanted)
        own = F.pad(weights, (0, 1)).index_select(0, at) * (key.index_select(0, at) == wanted)
        left = history.sizes.index_select(0, of_pair) - (own > 0).long()
        rest = (mass.index_select(0, of_pair) - own).clamp(min=torch.finfo(torch.float32).tiny)
        norm = rest.pow(-self.options.history_exponent) * (left > 0)
        own_id = position.index_select(0, at)
        lists = history.offsets, position[:-1], weights
        return pool_rows_without_own(source, *lists, of_pair, own_id, own, norm, row)

    def _sources_of(self, items: Tensor) -> tuple[Tensor, Tensor]:
        """Source vectors ``[n, D]`` that hold those of ``items`` (``[m]``), and the row of each, ``[m]``."""
        if not self.source.adapters and not is_sparse(self.source.id):
            return self.source(), items
        used, rows = distinct(items, self.rows.n_items)
        return self.source(used), rows

    # ------------------------------------------------------------------ as a block of the score

    @torch.no_grad()
    def block(self) -> LinearBlock:
        """Read the block off the towers as they are now. Tables that need no computing are the parameters themselves.

        An item without a training interaction has no trained ID vector and no trained bias. Until its content places it, it
        gets the map of its content and the lowest trained bias.
        """
        trained = self._own_trained()
        target = self._without_untrained(self.target)
        source = self._without_untrained(self.source) if self.user.uses_history else None
        part = self.user.own_part()
        return LinearBlock(
            "learned",
            source,
            F.normalize(target, dim=-1) if self.cosine else target,
            exponent=self.options.history_exponent,
            cosine=self.cosine,
            temperature=float(self.log_scale.detach().exp()),
            offset=self.user.offset.detach(),
            bias=torch.where(trained, self.bias, self.rows.lowest(self.bias, trained)),
            user_part=None if part is None else part.detach(),
        )

    def _without_untrained(self, tower: ItemTower) -> Tensor:
        """Vectors of a tower without the ID vectors that no interaction has trained, ``[n, D]``."""
        parts = tower.parts()
        if "id" in parts:
            parts["id"] = parts["id"].detach()
            trained = self._own_trained()
            untrained = (~trained).nonzero()[:, 0].split(4096)
            if any(bool(parts["id"].index_select(0, some).any()) for some in untrained):
                parts["id"] = parts["id"] * trained[:, None]
        total, *others = parts.values()
        for part in others:
            total = total + part
        return total


def is_sparse(table: nn.Embedding | None) -> bool:
    """Whether the rows of a table get sparse gradients, and a step visits those alone."""
    return table is not None and table.sparse


def distinct(items: Tensor, n_items: int) -> tuple[Tensor, Tensor]:
    """Find unique values and their inverse, as ``torch.unique``.

    Marks in a table of the catalogue take a fraction of a sort's time, unless the catalogue is far longer than the batch.

    Args:
        items: any shape, int64 below ``n_items``.
        n_items: size of the catalogue.
    """
    if items.numel() * 16 < n_items:
        return torch.unique(items, return_inverse=True)
    marks = torch.zeros(n_items, dtype=torch.int64, device=items.device)
    marks[items] = 1
    return marks.nonzero()[:, 0], (marks.cumsum(0) - 1)[items]
