r"""One block of a score: source vectors, target vectors, and how histories are weighted in it.

s_b(u, i) = scale_b (<q_ub, w_ib> + beta_ib)
q_ub      = temperature_b x_ub                                [temperature_b x_ub / |x_ub| with cosine]
x_ub      = sum_{j in H_u} a_uj v_jb + offset_b + part_ub     a_uj: recbole_llm.scoring.rows
part_ub   = part of the user - dislikes_b sum_{j in D_u} v_jb   D_u: items that the user has seen and not liked

A block with direct rows M adds to <q_ub, w_ib>, of a dot product alone,

m_ub(i)   = temperature_b (sum_{j in H_u} a_uj M_ji - dislikes_b sum_{j in D_u} M_ji)

M has few entries a row, so that the block is sparse rows plus a product of low rank.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field, replace
from typing import ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor

from recbole_llm.scoring.item_rows import AllRows
from recbole_llm.scoring.rows import Rows, history_weights, pool

Scorer = Callable[[Tensor], Tensor]
"""Row ids ``[B]`` int64 -> scores ``[B, N]`` in a fresh tensor, which the caller may overwrite."""


@dataclass(frozen=True, eq=False)
class Exceptions:
    """Rows of an identity target that are other vectors.

    Attributes:
        ids: ``[C]`` int64.
        rows: ``[C, N]``.
    """

    ids: Tensor
    rows: Tensor


@dataclass(frozen=True, eq=False)
class LinearBlock:
    """One block of a score, a value.

    Raises:
        ValueError: if a block with direct rows has queries of length 1, or no sources.

    Attributes:
        name: ``closed_form``, ``next_item``, ``learned``, ``content``...
        source: ``[N, d]``, what an item of the history contributes; ``None`` where histories do not count.
        target: ``[N, d]``; ``None`` for the identity (d = N), where the pooled sources are the scores.
        scale: factor of the block's scores, its bias included.
        exponent: alpha of the pooling weights.
        decay: tau by which histories fade in this block; ``None`` for the history's own weights.
        cosine: whether queries have length 1.
        temperature: factor of the query that the bias does not have.
        offset: ``[d]``, added to every user's pooled history.
        bias: ``[N]``, finite.
        user_part: ``[U, d]``, a summand of each known user (ID, profile text).
        dislikes: how much a disliked item counts against what it would add to a history; 0 for not at all.
        disliked: a row for every known user; ``None`` where nobody dislikes an item.
        exceptions: rows of the identity that are other vectors.
        direct: M of the module docstring, N rows of target items with the entries as weights; ``None`` for none. ``target``
            is then of vectors.
        constants: numbers that the block was solved with, for a fit that repeats it.

    Example:
        >>> block = LinearBlock("closed_form", source=torch.tensor([[0.0, 2.0], [3.0, 0.0]]), target=None)
        >>> block.scores(Rows(torch.tensor([0, 1]), torch.tensor([1]))).tolist()
        [[3.0, 0.0]]
    """

    name: str
    source: Tensor | None
    target: Tensor | None = None
    scale: float = 1.0
    exponent: float = 0.0
    decay: float | None = None
    cosine: bool = False
    temperature: float = 1.0
    offset: Tensor | None = None
    bias: Tensor | None = None
    user_part: Tensor | None = field(default=None, repr=False)
    dislikes: float = 0.0
    disliked: Rows | None = field(default=None, repr=False)
    exceptions: Exceptions | None = field(default=None, repr=False)
    direct: Rows | None = field(default=None, repr=False)
    constants: Mapping[str, float] = field(default_factory=dict)

    is_linear: ClassVar[bool] = True  # whether a query is a weighted sum over the history

    def __post_init__(self) -> None:
        if self.direct is not None and (self.cosine or self.target is None or self.source is None):
            raise ValueError(
                f"The {self.name} block has direct rows, which need source and target vectors and no cosine: leave direct out."
            )

    @property
    def dim(self) -> int:
        """Columns d of the block."""
        tables = (self.target, self.source, self.offset, self.user_part, self.bias)
        return next(table.shape[-1] for table in tables if table is not None)

    def weights(self, history: Rows) -> Tensor | None:
        """Return the pooling weights of a history's entries in this block, ``[nnz]``; ``None`` for all ones."""
        if self.decay is not None and history.ranks is not None:
            history = history.decayed(self.decay)
        return history_weights(history, self.exponent) if self.exponent else history.weights

    def part_of(self, users: Tensor) -> Tensor | None:
        """Compute the summand of known users, ``[B]`` int64 -> ``[B, d]``; ``None`` where there is none."""
        part = None if self.user_part is None else self.user_part[users]
        if self.dislikes and self.disliked is not None and self.source is not None:
            against = pool(self.source, self.disliked.select(users)) * -self.dislikes
            part = against if part is None else part + against
        return part

    def direct_part_of(self, users: Tensor) -> Tensor | None:
        """Compute what the disliked items of known users take from every item, ``[B]`` int64 -> ``[B, N]``.

        ``None`` where there is nothing.
        """
        if not self.dislikes or self.disliked is None or self.direct is None:
            return None
        disliked = self.disliked.select(users)
        zeros = torch.zeros(len(users), len(self.direct.sizes), device=users.device)
        return add_direct(zeros, self.direct, disliked, disliked.weights, -self.dislikes)

    def add_direct(self, scores: Tensor, history: Rows, part: Tensor | None = None, factor: float = 1.0) -> Tensor:
        """Add ``factor`` times what direct rows give, without the block's scale, to ``scores`` ``[B, N]`` in place.

        Args:
            scores: changed and returned.
            history: B rows.
            part: ``[B, N]`` of :meth:`direct_part_of`; ``None`` for none.
            factor: of what is added.
        """
        if self.direct is None:
            return scores
        factor *= self.temperature
        add_direct(scores, self.direct, history, self.weights(history), factor)
        return scores if part is None else scores.add_(part, alpha=factor)

    def queries(self, history: Rows, part: Tensor | None = None, rows: AllRows | None = None) -> Tensor:
        """Compute the queries q_u without the block's scale.

        Args:
            history: B rows.
            part: ``[B, d]``, a summand of each user; ``None`` for none.
            rows: which items are in this process; ``None`` for all.

        Returns:
            ``[B, d]``.
        """
        x: Tensor | None = None
        if self.source is not None:
            plain = replace(history, weights=None)
            x = (pool if rows is None else rows.pool)(self.source, plain, self.weights(history))
        for summand in (self.offset, part):
            if summand is not None:
                x = summand.expand(len(history.sizes), -1).clone() if x is None else x + summand
        if x is None:  # a block of biases alone
            x = torch.zeros(len(history.sizes), self.dim, device=history.offsets.device)
        if self.cosine:
            x = F.normalize(x, dim=-1)
        return x if self.temperature == 1.0 else x * self.temperature

    def scores(self, history: Rows, part: Tensor | None = None, direct_part: Tensor | None = None) -> Tensor:
        """Compute the block's scores, scaled.

        Args:
            history: B rows.
            part: as of :meth:`queries`.
            direct_part: as of :meth:`add_direct`.

        Returns:
            ``[B, N]`` in a fresh tensor.
        """
        query = self.queries(history, part)
        scores = with_exceptions(query, self.exceptions) if self.target is None else query @ self.target.T
        scores = self.add_direct(scores, history, direct_part)
        if self.bias is not None:
            scores = scores.add_(self.bias)
        return scores if self.scale == 1.0 else scores.mul_(self.scale)

    def scorer(self, history: Rows, users: Tensor | None = None) -> Scorer:
        """Return a function that scores chosen rows.

        Args:
            history: R rows.
            users: ``[R]`` int64, the known user of each row, whose own part counts; ``None`` for new users.
        """

        def scores(rows: Tensor) -> Tensor:
            if users is None:
                return self.scores(history.select(rows))
            some = users[rows]
            return self.scores(history.select(rows), self.part_of(some), self.direct_part_of(some))

        return scores

    def with_rows(self, ids: Tensor, source: Tensor | None, target: Tensor, bias: Tensor | None) -> "LinearBlock":
        """Return the block with other rows for some items.

        Args:
            ids: ``[C]`` int64.
            source: ``[C, d]``.
            target: ``[C, d]``; for the identity ``[C, N]``.
            bias: ``[C]``.
        """
        changed: dict[str, Tensor | Exceptions | None] = {}
        if self.source is not None and source is not None:
            changed["source"] = self.source.index_copy(0, ids, source)
        if self.target is None:
            changed["exceptions"] = Exceptions(ids, target)
        else:
            changed["target"] = self.target.index_copy(0, ids, target)
        if self.bias is not None and bias is not None:
            changed["bias"] = self.bias.index_copy(0, ids, bias)
        return replace(self, **changed)  # type: ignore[arg-type]

    def to(self, device: torch.device | str) -> "LinearBlock":
        """Return the same block on another device."""
        moved: dict[str, Tensor | Exceptions | Rows] = {}
        for name in ("source", "target", "offset", "bias", "user_part"):
            tensor = getattr(self, name)
            if tensor is not None:
                moved[name] = tensor.to(device)
        for name in ("disliked", "direct"):
            rows = getattr(self, name)
            if rows is not None:
                moved[name] = rows.to(device)
        if self.exceptions is not None:
            moved["exceptions"] = Exceptions(self.exceptions.ids.to(device), self.exceptions.rows.to(device))
        return replace(self, **moved)  # type: ignore[arg-type]


def add_direct(scores: Tensor, direct: Rows, history: Rows, weights: Tensor | None, factor: float) -> Tensor:
    """Add ``factor`` times the weighted direct rows of each history's items to ``scores`` ``[B, N]`` in place, and return it.

    Args:
        scores: changed; it lies in memory without gaps.
        direct: N rows of target items, with entries as weights.
        history: B rows of items.
        weights: of their entries; ``None`` for ones.
        factor: of what is added.
    """
    assert direct.weights is not None
    found = direct.select(history.ids)
    assert found.weights is not None
    sizes, n = found.sizes, scores.shape[1]
    row = torch.repeat_interleave(history.row_of_entry() * n, sizes, output_size=len(found.ids))
    values = found.weights.to(scores.dtype) * factor
    if weights is not None:
        values = values * torch.repeat_interleave(weights.to(scores.dtype), sizes, output_size=len(found.ids))
    scores.view(-1).index_add_(0, row.add_(found.ids), values)
    return scores


def direct_entries(direct: Rows, sources: Tensor, targets: Tensor) -> Tensor:
    """Look entries of direct rows up, ``[h]`` and ``[M]`` int64 -> ``[M, h]`` float64, 0 where there is none.

    Args:
        direct: rows of target items, ascending within a row, with entries as weights.
        sources: items whose rows are asked for.
        targets: items in them.
    """
    found = direct.select(sources)
    assert found.weights is not None
    n = len(direct.sizes)
    keys = F.pad(found.row_of_entry() * n + found.ids, (0, 1), value=len(sources) * n)
    values = F.pad(found.weights.double(), (0, 1))
    wanted = torch.arange(len(sources), device=targets.device) * n + targets[:, None]
    at = torch.searchsorted(keys, wanted)
    return torch.where(keys[at] == wanted, values[at], 0.0)


def with_exceptions(query: Tensor, exceptions: Exceptions | None) -> Tensor:
    """Compute the scores of identity targets, ``[B, N]``: the query itself, but for the exceptions."""
    if exceptions is None:
        return query
    return query.index_copy(1, exceptions.ids, query @ exceptions.rows.T)


def identity_rows(items: Tensor, n: int, exceptions: Exceptions | None) -> Tensor:
    """Write out rows of identity targets, ``[C]`` int64 -> ``[C, n]`` float32, the exceptions among them."""
    rows = F.one_hot(items, n).float()
    if exceptions is not None:
        at, exception = (items[:, None] == exceptions.ids).nonzero(as_tuple=True)
        rows[at] = exceptions.rows[exception].to(rows.dtype)
    return rows
