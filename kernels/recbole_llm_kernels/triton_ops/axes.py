"""The rows or the columns of a logit matrix, and how a kernel loads some of their vectors."""

from typing import NamedTuple

import triton
import triton.language as tl
from torch import Tensor


class Axis(NamedTuple):
    """The rows or the columns of the logit matrix."""

    matrix: Tensor  # [n, D]
    ids: Tensor | None = None  # [R] rows of ``matrix``; None: all
    bias: Tensor | None = None  # [R]; -inf: outside the catalogue
    shift: Tensor | None = None  # [R] float32, "softmax": log Z less the log of the number of targets, of a query
    scale: Tensor | None = None  # [R] float32, of a query: factor of its gradients
    key: Tensor | None = None  # [R]; entries with equal keys are left out

    @property
    def length(self) -> int:
        """How many rows or columns there are."""
        return len(self.matrix) if self.ids is None else len(self.ids)


@triton.jit
def load_rows(ptr, index, live, start, D: tl.constexpr, BLOCK_D: tl.constexpr):
    """Columns ``start`` and on of the rows ``index``, 0 where they do not live or end."""
    d = start + tl.arange(0, BLOCK_D)
    # int64 row offsets: index * D passes 2**31 at 33.5M rows of D = 64
    at = index.to(tl.int64)[:, None] * D + d[None, :]
    return tl.load(ptr + at, mask=live[:, None] & (d < D)[None, :], other=0.0)
