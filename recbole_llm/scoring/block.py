r"""One block of a score: source vectors, target vectors, and how histories are weighted in it.

s_b(u, i) = scale_b (<q_ub, w_ib> + beta_ib)
q_ub      = temperature_b x_ub                                [temperature_b x_ub / |x_ub| with cosine]
x_ub      = sum_{j in H_u} a_uj v_jb + offset_b + part_ub     a_uj: recbole_llm.scoring.rows
part_ub   = part of the user - dislikes_b sum_{j in D_u} v_jb   D_u: items that the user has seen and not liked
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
    constants: Mapping[str, float] = field(default_factory=dict)

    is_linear: ClassVar[bool] = True  # whether a query is a weighted sum over the history

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

    def scores(self, history: Rows, part: Tensor | None = None) -> Tensor:
        """Compute the block's scores, scaled: ``[B, N]`` in a fresh tensor; arguments as of :meth:`queries`."""
        query = self.queries(history, part)
        scores = with_exceptions(query, self.exceptions) if self.target is None else query @ self.target.T
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
            part = None if users is None else self.part_of(users[rows])
            return self.scores(history.select(rows), part)

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
        if self.disliked is not None:
            moved["disliked"] = self.disliked.to(device)
        if self.exceptions is not None:
            moved["exceptions"] = Exceptions(self.exceptions.ids.to(device), self.exceptions.rows.to(device))
        return replace(self, **moved)  # type: ignore[arg-type]


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
