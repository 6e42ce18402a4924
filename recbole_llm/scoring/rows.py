r"""Histories: ragged rows of item ids, their weights, and their weighted sums.

    a_uj = t_uj / (sum_k t_uk)^alpha       pooling weight of item j in the history of user u; t_uj = 1 without weights
    t_uj = w_uj exp(-rank_uj / tau)        with a decay tau; rank 0 is the newest item

The asymmetric history representation follows FISM (Kabbur et al., KDD 2013) and Asymmetric-SVD (Koren, KDD 2008).
"""

from collections.abc import Callable
from dataclasses import dataclass, replace

import torch
import torch.nn.functional as F
from torch import Tensor


@dataclass(frozen=True)
class Rows:
    """Ragged rows of item ids in CSR form.

    Attributes:
        offsets: ``[B + 1]`` int64, from 0. Row b is ``ids[offsets[b]:offsets[b + 1]]``.
        ids: ``[nnz]`` int64, ascending and unique within a row.
        weights: ``[nnz]`` float32, t_uj of the module docstring, w_uj where there are ranks. ``None`` means all ones.
        ranks: ``[nnz]`` float32, 0 for the newest item of the row. ``None`` where interactions have no order.
        confidence: ``[nnz]`` float32, positive, how much an interaction counts where a model is fitted (Hu et al., ICDM
            2008). ``None`` means all ones.

    Example:
        >>> rows = Rows(torch.tensor([0, 2, 3]), torch.tensor([4, 7, 1]))
        >>> rows.sizes.tolist()
        [2, 1]
        >>> rows.select(torch.tensor([1, 0])).ids.tolist()
        [1, 4, 7]
    """

    offsets: Tensor
    ids: Tensor
    weights: Tensor | None = None
    ranks: Tensor | None = None
    confidence: Tensor | None = None

    @property
    def sizes(self) -> Tensor:
        """Entries per row, ``[B]`` int64."""
        return self.offsets[1:] - self.offsets[:-1]

    def row_of_entry(self) -> Tensor:
        """Return the row each entry belongs to, ``[nnz]`` int64."""
        rows = torch.arange(len(self.offsets) - 1, device=self.offsets.device)
        return torch.repeat_interleave(rows, self.sizes, output_size=len(self.ids))

    def select(self, rows: Tensor, dropout: float = 0.0) -> "Rows":
        """Select rows (repeats allowed).

        Args:
            rows: ``[B]`` int64.
            dropout: chance by which each entry is left out.
        """
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
        """Take rows ``start`` to ``stop``, without copying their entries."""
        offsets = self.offsets[start : stop + 1]
        entries = slice(int(offsets[0]), int(offsets[-1]))
        return self._with(offsets - offsets[0], lambda values: values[entries])

    def keep(self, mask: Tensor) -> "Rows":
        """Keep the entries where ``mask`` (``[nnz]`` bool) holds. Rows may become empty; ranks stay as they were."""
        entry = mask.nonzero()[:, 0]
        return self._at(torch.searchsorted(entry, self.offsets), entry)

    def _at(self, offsets: Tensor, entry: Tensor) -> "Rows":
        # for many entries, ids[entry] takes several times as long
        return self._with(offsets, lambda values: values.index_select(0, entry))

    def _with(self, offsets: Tensor, change: Callable[[Tensor], Tensor]) -> "Rows":
        """Rows with other offsets, and every entry's values changed alike."""
        values = (None if value is None else change(value) for value in (self.weights, self.ranks, self.confidence))
        return Rows(offsets, change(self.ids), *values)

    def decayed(self, tau: float | None) -> "Rows":
        """Return the same rows with weights times exp(-rank / tau); as they are if ``tau`` is ``None``.

        Raises:
            ValueError: if there is a decay and no ranks.
        """
        if tau is None:
            return self
        if self.ranks is None:
            raise ValueError(f"decay is {tau:g}, and the histories have no ranks; give the time of each interaction.")
        fading = torch.exp(-self.ranks / tau)
        return replace(self, weights=fading if self.weights is None else self.weights * fading)

    def confidence_of(self, rows: Tensor, items: Tensor, n_items: int) -> Tensor | None:
        """Look up the confidence of (row, item) pairs.

        Args:
            rows: ``[P]`` int64.
            items: ``[P]`` int64 below ``n_items``.
            n_items: size of the catalogue.

        Returns:
            ``[P]`` float32, 1 for a pair that is not there; ``None`` where all are 1.
        """
        if self.confidence is None:
            return None
        row, of_pair = torch.unique(rows, return_inverse=True)
        some = self.select(row)
        assert some.confidence is not None
        # an entry that matches no key, so that every pair finds one to look at
        key = F.pad(some.row_of_entry() * n_items + some.ids, (0, 1), value=len(row) * n_items)
        wanted = of_pair * n_items + items
        at = torch.searchsorted(key, wanted)
        found = F.pad(some.confidence, (0, 1)).index_select(0, at)
        return torch.where(key.index_select(0, at) == wanted, found, 1.0)

    def to(self, device: torch.device | str) -> "Rows":
        """Return the same rows on another device."""
        return self._with(self.offsets.to(device), lambda values: values.to(device))


def rows_from_pairs(
    row_id: Tensor,
    item_id: Tensor,
    n_rows: int,
    time: Tensor | None = None,
    decay: float | None = None,
    confidence: Tensor | None = None,
) -> Rows:
    """Collect (row, item) pairs into CSR rows. A repeated pair counts once, at its latest time, with the sum of its confidence.

    Args:
        row_id: ``[P]`` int64 in ``[0, n_rows)``.
        item_id: ``[P]`` int64.
        n_rows: number of rows, empty ones included.
        time: ``[P]``, any unit, larger is newer; gives the ranks. Equal times keep the order of the pairs.
        decay: tau in t = exp(-rank / tau); ``None`` for equal weights.
        confidence: ``[P]`` of the pairs; ``None`` for ones.

    Returns:
        ``Rows`` of ``n_rows`` rows, with ranks where ``time`` is given.

    Raises:
        ValueError: if ``decay`` is given without ``time``.

    Example:
        >>> user, item = torch.tensor([1, 0, 1]), torch.tensor([3, 2, 1])
        >>> rows_from_pairs(user, item, 2).ids.tolist()
        [2, 1, 3]
    """
    if decay is not None and time is None:
        raise ValueError("decay needs the time of each interaction; load the time column or leave history_decay empty.")
    span = int(item_id.max()) + 1 if len(item_id) else 1
    key, inverse = torch.unique(row_id * span + item_id, return_inverse=True)  # sorted: by row, then item
    rows, ids = key // span, key % span
    offsets = F.pad(torch.bincount(rows, minlength=n_rows).cumsum(0), (1, 0))
    found = Rows(offsets, ids, ranks=None if time is None else _ranks(inverse, rows, offsets, time))
    if confidence is not None:
        total = torch.zeros(len(ids), dtype=torch.float64).index_add_(0, inverse, confidence.double())
        found = replace(found, confidence=total.float())
    return found if decay is None else found.decayed(decay)


def union(first: Rows, second: Rows) -> Rows:
    """Rows that hold the items of both, without weights and ranks."""
    rows = torch.cat([first.row_of_entry(), second.row_of_entry()])
    return rows_from_pairs(rows, torch.cat([first.ids, second.ids]), len(first.offsets) - 1)


def _ranks(entry_of_pair: Tensor, rows: Tensor, offsets: Tensor, time: Tensor) -> Tensor:
    """Rank of each entry in its row, ``[nnz]`` float32, 0 for the newest."""
    n = len(rows)
    arrival = torch.empty(len(time), dtype=torch.int64)
    arrival[torch.argsort(time, stable=True)] = torch.arange(len(time))
    latest = torch.full((n,), -1).scatter_reduce(0, entry_of_pair, arrival, "amax")
    newest_first = torch.argsort(rows * len(time) + (len(time) - 1 - latest))
    rank = torch.empty_like(newest_first)
    rank[newest_first] = torch.arange(n) - offsets[rows[newest_first]]
    return rank.float()


def history_weights(history: Rows, exponent: float) -> Tensor:
    """Compute the pooling weights a_uj = t_uj / (sum_k t_uk)^exponent of each history entry, ``[nnz]`` float32.

    Training, prediction, explanations and serving share them: a user's score for item i is the sum over the history of
    a_uj <v_j, w_i>, plus the parts that do not depend on the history.

    Example:
        >>> rows = Rows(torch.tensor([0, 4]), torch.tensor([1, 2, 5, 7]))
        >>> history_weights(rows, 0.5).tolist()
        [0.5, 0.5, 0.5, 0.5]
    """
    weights = torch.ones(len(history.ids), device=history.ids.device) if history.weights is None else history.weights
    row = history.row_of_entry()
    total = torch.zeros(len(history.offsets) - 1, device=row.device).index_add_(0, row, weights)
    return weights * total.clamp(min=torch.finfo(torch.float32).tiny).pow(-exponent)[row]


def log_length(history: Rows) -> Tensor:
    """Log of the number of items in each history, ``[B]``; 0 for an empty one."""
    return history.sizes.clamp(min=1).float().log()


def pool(vectors: Tensor, history: Rows, weights: Tensor | None = None) -> Tensor:
    """Sum item vectors over each row.

    Args:
        vectors: ``[N, D]``.
        history: B rows of ids below N.
        weights: ``[nnz]``; ``None`` for those of ``history``, and where it has none, all ones.

    Returns:
        ``[B, D]``; 0 for an empty row.

    Example:
        >>> rows = Rows(torch.tensor([0, 2, 2]), torch.tensor([0, 1]))
        >>> pool(torch.tensor([[1.0, 0.0], [0.0, 2.0]]), rows).tolist()
        [[1.0, 2.0], [0.0, 0.0]]
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
