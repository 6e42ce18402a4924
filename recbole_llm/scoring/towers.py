r"""The two towers: items from their features and ID, users from their history.

    w_i = sum_s A_s f_si + e_i                 target vector of item i: adapters A_s of its frozen features f_si, ID residual e_i
    v_j = the same with parameters of its own   source vector of item j, what a user's history is made of (unless shared)
    x_u = sum_{j in H_u} a_uj v_j [+ e_u] [+ B g_u] + c
    a_uj = t_uj / (sum_k t_uk)^alpha            t_uj = 1, or exp(-rank/tau) where time counts

The asymmetric history representation follows FISM (Kabbur et al., KDD 2013) and Asymmetric-SVD (Koren, KDD 2008).
Knows neither RecBole nor the kernels.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

ID_INIT_STD = 0.01  # small against a text vector's norm of about 1: the content speaks first


class FrozenTensor(nn.Module):
    """A constant that follows ``.to(device)`` and is neither a parameter nor a buffer.

    DistributedDataParallel broadcasts every buffer in every step, and checkpoints hold them; frozen features need neither.

    Attributes:
        value: the tensor.
    """

    def __init__(self, value: Tensor) -> None:
        super().__init__()
        self.value = value

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenTensor":
        super()._apply(fn, recurse)
        self.value = fn(self.value)
        return self

    def extra_repr(self) -> str:
        """Shape and dtype, for the model's printout."""
        return f"{tuple(self.value.shape)}, {self.value.dtype}"


@dataclass(frozen=True)
class Rows:
    """Ragged rows of item ids in CSR form.

    Attributes:
        offsets: ``[B + 1]`` int64, from 0; row b is ``ids[offsets[b]:offsets[b + 1]]``.
        ids: ``[nnz]`` int64, ascending and unique within a row.
        weights: ``[nnz]`` float32, t_uj of the module docstring; ``None`` for all ones.
    """

    offsets: Tensor
    ids: Tensor
    weights: Tensor | None = None

    @property
    def sizes(self) -> Tensor:
        """Entries per row, ``[B]`` int64."""
        return self.offsets[1:] - self.offsets[:-1]

    def row_of_entry(self) -> Tensor:
        """The row each entry belongs to, ``[nnz]`` int64."""
        rows = torch.arange(len(self.offsets) - 1, device=self.offsets.device)
        return torch.repeat_interleave(rows, self.sizes, output_size=len(self.ids))

    def select(self, rows: Tensor, dropout: float = 0.0) -> "Rows":
        """The given rows (repeats allowed), ``[B]`` int64, as new ``Rows`` of B rows, each entry left out by this chance."""
        begin, end = self.offsets[:-1].index_select(0, rows), self.offsets[1:].index_select(0, rows)
        sizes = end - begin
        offsets = F.pad(sizes.cumsum(0), (1, 0))
        shift, total = begin - offsets[:-1], int(offsets[-1])
        if dropout:
            entry = (torch.rand(total, device=rows.device) >= dropout).nonzero()[:, 0]
            offsets = torch.searchsorted(entry, offsets)
            sizes = offsets.diff()
        else:
            entry = torch.arange(total, device=rows.device)
        entry += torch.repeat_interleave(shift, sizes, output_size=len(entry))
        return self._at(offsets, entry)

    def stretch(self, start: int, stop: int) -> "Rows":
        """Rows ``start`` to ``stop``; their entries are not copied."""
        offsets = self.offsets[start : stop + 1]
        entries = slice(int(offsets[0]), int(offsets[-1]))
        weights = None if self.weights is None else self.weights[entries]
        return Rows(offsets - offsets[0], self.ids[entries], weights)

    def keep(self, mask: Tensor) -> "Rows":
        """The entries where ``mask`` (``[nnz]`` bool) holds; rows may become empty."""
        entry = mask.nonzero()[:, 0]
        return self._at(torch.searchsorted(entry, self.offsets), entry)

    def _at(self, offsets: Tensor, entry: Tensor) -> "Rows":
        # of many entries, ids[entry] takes several times as long
        weights = None if self.weights is None else self.weights.index_select(0, entry)
        return Rows(offsets, self.ids.index_select(0, entry), weights)

    def to(self, device: torch.device | str) -> "Rows":
        """The same rows on another device."""
        weights = None if self.weights is None else self.weights.to(device)
        return Rows(self.offsets.to(device), self.ids.to(device), weights)


def rows_from_pairs(
    row_id: Tensor, item_id: Tensor, n_rows: int, time: Tensor | None = None, decay: float | None = None
) -> Rows:
    """Collect (row, item) pairs into CSR rows; a repeated pair counts once, at its latest time.

    Args:
        row_id: ``[P]`` int64 in ``[0, n_rows)``.
        item_id: ``[P]`` int64.
        n_rows: number of rows, empty ones included.
        time: ``[P]``, any unit, larger is newer; needed with ``decay``. Equal times keep the order of the pairs.
        decay: tau in t = exp(-rank/tau), rank 0 for the newest item of a row; ``None`` for equal weights.

    Returns:
        ``Rows`` of ``n_rows`` rows.

    Raises:
        ValueError: if ``decay`` is given without ``time``.
    """
    if decay is not None and time is None:
        raise ValueError("decay needs the time of each interaction; load the time column or leave history_decay empty.")
    span = int(item_id.max()) + 1 if len(item_id) else 1
    key, inverse = torch.unique(row_id * span + item_id, return_inverse=True)  # sorted: by row, then item
    rows, ids = key // span, key % span
    offsets = F.pad(torch.bincount(rows, minlength=n_rows).cumsum(0), (1, 0))
    weights = None
    if decay is not None and time is not None:
        weights = torch.exp(-_ranks(inverse, rows, offsets, time) / decay)
    return Rows(offsets, ids, weights)


def ranked_rows(row_id: Tensor, item_id: Tensor, n_rows: int, time: Tensor) -> Rows:
    """As :func:`rows_from_pairs`, with each item's rank in its row, 0 for the newest, as ``weights``."""
    span = int(item_id.max()) + 1 if len(item_id) else 1
    key, inverse = torch.unique(row_id * span + item_id, return_inverse=True)
    rows = key // span
    offsets = F.pad(torch.bincount(rows, minlength=n_rows).cumsum(0), (1, 0))
    return Rows(offsets, key % span, _ranks(inverse, rows, offsets, time))


def _ranks(entry_of_pair: Tensor, rows: Tensor, offsets: Tensor, time: Tensor) -> Tensor:
    """Rank of each entry in its row, ``[nnz]`` float32: 0 for the newest."""
    n = len(rows)
    arrival = torch.empty(len(time), dtype=torch.int64)
    arrival[torch.argsort(time, stable=True)] = torch.arange(len(time))
    latest = torch.full((n,), -1).scatter_reduce(0, entry_of_pair, arrival, "amax")
    newest_first = torch.argsort(rows * len(time) + (len(time) - 1 - latest))
    rank = torch.empty_like(newest_first)
    rank[newest_first] = torch.arange(n) - offsets[rows[newest_first]]
    return rank.float()


def history_weights(history: Rows, exponent: float) -> Tensor:
    """Pooling weights a_uj = t_uj / (sum_k t_uk)^exponent of each history entry, ``[nnz]`` float32.

    They are what training, prediction, explanations and serving share: a user's score for item i is the sum over the
    history of a_uj <v_j, w_i>, plus the parts that do not depend on the history.
    """
    weights = torch.ones(len(history.ids), device=history.ids.device) if history.weights is None else history.weights
    row = history.row_of_entry()
    total = torch.zeros(len(history.offsets) - 1, device=row.device).index_add_(0, row, weights)
    return weights * total.clamp(min=torch.finfo(torch.float32).tiny).pow(-exponent)[row]


def pool(vectors: Tensor, history: Rows, weights: Tensor | None = None) -> Tensor:
    """Weighted sum of item vectors over each row: ``[N, D]`` vectors, ``[nnz]`` weights -> ``[B, D]``; empty rows give 0.

    Without ``weights`` those of ``history`` count, and without these each item once.
    """
    if weights is None:
        weights = torch.ones_like(history.ids, dtype=torch.float32) if history.weights is None else history.weights
    return F.embedding_bag(
        history.ids,
        vectors,
        history.offsets,
        mode="sum",
        per_sample_weights=weights.to(vectors.dtype),
        include_last_offset=True,
    )


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
        self.id = self._make_ids(n_items, dim) if use_id else None

    def _make_ids(self, n_items: int, dim: int) -> nn.Embedding:
        table = nn.Embedding(n_items, dim, padding_idx=0)
        nn.init.normal_(table.weight, std=ID_INIT_STD)
        with torch.no_grad():
            table.weight[0] = 0
        return table

    def parts(self, ids: Tensor | None = None) -> dict[str, Tensor]:
        """The summands of each item's vector, ``{"text": [n, D], ..., "id": [n, D]}``.

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
        """Item vectors, ``[n, D]``; ``ids`` as in :meth:`parts`."""
        total, *others = self.parts(ids).values()
        for part in others:
            total = total + part
        return total

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

    @property
    def is_a_table(self) -> bool:
        """Whether x_u = e_u + c: neither history nor text."""
        return self.id is not None and not self.uses_history and self.adapter is None

    @property
    def is_a_history(self) -> bool:
        """Whether x_u is the pooled history + c: neither ID nor text."""
        return self.uses_history and self.id is None and self.adapter is None

    def forward(self, users: Tensor, pooled: Tensor | None) -> Tensor:
        """User vectors x_u, ``[B, D]``.

        Args:
            users: ``[B]`` int64.
            pooled: pooled history ``[B, D]`` (:func:`pool`); ignored by a tower without history.
        """
        x = self.offset.expand(len(users), -1)
        if self.uses_history and pooled is not None:
            x = x + pooled
        if self.id is not None:
            # on a CPU the gradient of index_select is formed in a third of the time of Embedding's
            x = x + (self.id(users) if users.is_cuda else self.id.weight.index_select(0, users))
        if self.adapter is not None and self.text is not None and self.has_text is not None:
            x = x + self.adapter(self.text.value[users]) * self.has_text.value[users][:, None]
        return x
