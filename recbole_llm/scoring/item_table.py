"""The targets of all blocks side by side, in the form in which scores are made and in that of an export."""

from dataclasses import dataclass
from typing import NamedTuple

import torch
from torch import Tensor

from recbole_llm.scoring.block import Exceptions, identity_rows, with_exceptions


@dataclass(frozen=True, eq=False)
class ItemTable:
    """Every block's targets side by side; row i belongs to the queries of :meth:`Score.queries`.

    Attributes:
        vectors: ``[n, D]``; without the first n columns where ``identity`` holds.
        bias: ``[n]``; -inf for items that have no place.
        identity: whether each row begins with that row of the identity, N columns that are not stored.
        exceptions: rows of that identity that are other vectors.
    """

    vectors: Tensor
    bias: Tensor
    identity: bool = False
    exceptions: Exceptions | None = None

    def scores(self, query: Tensor) -> Tensor:
        """Compute <q, w_i> + bias_i of all items, ``[B, D]`` -> ``[B, n]`` in a fresh tensor."""
        if not self.identity:
            return torch.addmm(self.bias, query, self.vectors.T)
        n = len(self.bias)
        own = with_exceptions(query[:, :n], self.exceptions)
        if not self.vectors.shape[1]:
            return own + self.bias
        return torch.addmm(self.bias, query[:, n:], self.vectors.T).add_(own)

    def of(self, items: Tensor) -> "ItemTable":
        """Take the rows of some items, ``[C]`` int64; those of the identity are written out."""
        vectors = self.vectors[items]
        if self.identity:
            vectors = torch.cat([identity_rows(items, len(self.bias), self.exceptions), vectors], 1)
        return ItemTable(vectors, self.bias[items])

    def dense(self) -> Tensor:
        """Return the vectors, ``[n, D]``, the identity's columns included."""
        if not self.identity:
            return self.vectors
        eye = torch.eye(len(self.bias), device=self.bias.device)
        if self.exceptions is not None:
            eye = eye.index_copy(0, self.exceptions.ids, self.exceptions.rows)
        return torch.cat([eye, self.vectors], 1) if self.vectors.shape[1] else eye


class OwnColumns(NamedTuple):
    """Every block that counts in columns of its own, as an export holds them."""

    target: Tensor  # [N, D]
    source: Tensor  # [N, D]
    offset: Tensor  # [D]
    user_part: Tensor  # [U, D]
