"""Tables that towers hold: constants that move with a model, and the rows of a part of the items."""

from collections.abc import Callable

import torch
from torch import Tensor, nn

from recbole_llm.scoring.item_rows import AllRows
from recbole_llm.scoring.rows import Rows

CHUNK_ROWS = 2**16  # of normal numbers drawn at once; a multiple of 16, see normal_rows


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
        """Return shape and dtype, for the model's printout."""
        return f"{tuple(self.value.shape)}, {self.value.dtype}"


class FrozenRows(nn.Module):
    """Histories that follow ``.to(device)`` and are neither parameters nor buffers.

    Attributes:
        rows: the histories.
    """

    def __init__(self, rows: Rows) -> None:
        super().__init__()
        self.rows = rows

    def _apply(self, fn: Callable[[Tensor], Tensor], recurse: bool = True) -> "FrozenRows":
        super()._apply(fn, recurse)
        moved = {name: fn(tensor) for name, tensor in vars(self.rows).items() if tensor is not None}
        self.rows = Rows(**moved)
        return self


def normal_rows(n_rows: int, dim: int, own: slice, std: float) -> Tensor:
    """Draw the rows ``own`` of ``torch.empty(n_rows, dim).normal_(std=std)`` on a CPU, in the memory of those rows alone.

    The random stream moves on as if the whole had been drawn. PyTorch draws normal numbers in groups of 16, and at least
    so many at a time (ATen's ``DistributionTemplates.h``, ``normal_fill``), so that chunks of 16 rows continue each other.
    """
    kept = torch.empty(own.stop - own.start, dim)
    start = 0
    while start < n_rows:
        stop = start + CHUNK_ROWS
        if n_rows - stop < 16:  # no last chunk of fewer than 16 numbers
            stop = n_rows
        drawn = torch.empty(stop - start, dim).normal_(std=std)
        first, last = max(start, own.start), min(stop, own.stop)
        if first < last:
            kept[first - own.start : last - own.start] = drawn[first - start : last - start]
        start = stop
    return kept


def own_ids(rows: AllRows, dim: int, std: float) -> nn.Embedding:
    """Draw the ID vectors of a part of the items, as those rows of the whole table would start."""
    normal_rows(rows.n_items, dim, slice(0, 0), 1.0)  # what nn.Embedding draws first
    vectors = normal_rows(rows.n_items, dim, rows.own, std)
    vectors[: rows.padding_rows] = 0
    return nn.Embedding(rows.n_own, dim, _weight=vectors)
