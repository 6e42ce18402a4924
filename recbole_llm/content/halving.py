"""Encode batches, in halves where they do not fit into memory."""

from collections.abc import Callable, Sequence
from logging import getLogger
from typing import Any

import torch
from torch import Tensor

log = getLogger(__name__)


class Halving:
    """An encoder that runs out of memory less and less.

    A batch that does not fit is encoded in halves, and no later batch is tried beyond what that leaves.

    Args:
        encode: samples to vectors ``[n, F]``.
        limit: most samples of one call.
        setting: what the log says is lowered.
        alone: what to say of a sample that does not fit by itself.
    """

    def __init__(
        self, encode: Callable[[list[Any]], Tensor], limit: int, setting: str, alone: Callable[[Any], str]
    ) -> None:
        self._encode, self._setting, self._alone = encode, setting, alone
        self.limit = limit

    def __call__(self, samples: Sequence[Any]) -> Tensor:
        """Encode samples, ``[n, F]`` without gradients.

        Raises:
            MemoryError: if a single one does not fit.
        """
        samples = list(samples)
        if len(samples) <= self.limit:
            try:
                with torch.inference_mode():
                    return self._encode(samples)
            except (MemoryError, RuntimeError) as error:
                if not is_out_of_memory(error):
                    raise
                if len(samples) == 1:
                    raise MemoryError(self._alone(samples[0])) from error
        half = (len(samples) + 1) // 2
        if half < self.limit:
            self.limit = half
            log.warning("Out of memory: %s is lowered to %d", self._setting, half)
        if torch.cuda.is_available():
            torch.cuda.empty_cache()
        return torch.cat([self(samples[:half]), self(samples[half:])])


def is_out_of_memory(error: BaseException) -> bool:
    """Return whether an error says that memory did not suffice."""
    text = str(error)
    return (
        isinstance(error, (MemoryError, torch.OutOfMemoryError))
        or "DefaultCPUAllocator" in text
        or "not enough memory" in text
    )
