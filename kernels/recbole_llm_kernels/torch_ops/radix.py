"""Stable order of ids by counting: NumPy sorts 16-bit integers so, in a tenth of the time of comparisons.

PyTorch compares below 32,768 ids and counts from there on, a pass for every byte. NumPy is what PyTorch itself needs for
``Tensor.numpy``; without it everything is sorted by PyTorch, with the same result.
"""

import torch
from torch import Tensor

try:
    import numpy
except ModuleNotFoundError:  # PyTorch does not require it
    numpy = None  # type: ignore[assignment]

DIGIT = 16  # bits NumPy counts at once
# two passes, 16 bits each, take 0.1 ms for 20,480 ids and comparisons 1.6 ms; from here on PyTorch counts too
COMPARED = 32_768


def stable_order(ids: Tensor, bound: int) -> Tensor:
    """The permutation ``[P]`` int64 that sorts ``ids`` (``[P]`` int32 or int64, in ``[0, bound)``), ties in their order."""
    if ids.device.type == "cpu" and numpy is not None:
        if bound <= 1 << DIGIT:
            return torch.from_numpy(ids.numpy().astype(numpy.uint16).argsort(kind="stable"))
        if bound <= 1 << 2 * DIGIT and len(ids) < COMPARED:
            values = ids.numpy()
            low = values.astype(numpy.uint16).argsort(kind="stable")
            high = (values >> DIGIT).astype(numpy.uint16)[low].argsort(kind="stable")
            return torch.from_numpy(low[high])
    return torch.sort(ids.int() if bound < 1 << 31 else ids, stable=True)[1]  # int32: half the sort's traffic
