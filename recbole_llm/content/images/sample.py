"""A picture ready for an encoder."""

from dataclasses import dataclass
from typing import Any

FORMAT = 1  # raised when the same pictures and settings begin to give other vectors


@dataclass(frozen=True)
class PictureSample:
    """A picture ready for a batch.

    Attributes:
        pixels: ``[3, height, width]`` float32; for a function the picture itself.
        size: 1; pictures are all of one size.
        cut: 0.
    """

    pixels: Any
    size: int = 1
    cut: int = 0
