"""Sounds as windows that lie side by side: each is encoded by itself, and a sound's vector is their mean."""

from abc import ABC, abstractmethod
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.content.sounds.reading import MAX_SECONDS, require_soundfile, windows_of

FORMAT = 1  # raised when the same sounds and settings begin to give other vectors
SECONDS = 10.0  # of a window, where neither the caller nor the encoder says it
LEAST_SECONDS = 0.1  # of a last window, and to which shorter sounds are padded
WINDOWS = 16  # of a forward pass


@dataclass(frozen=True)
class SoundSample:
    """A sound ready for an encoder.

    Attributes:
        windows: each ``[n]`` float32 at the encoder's rate.
        size: windows.
        cut: 0; all of the sound is read.
    """

    windows: tuple[np.ndarray, ...]
    size: int
    cut: int = 0


def windows_mean(batch: Sequence[SoundSample], vectors_of_windows: Callable[[np.ndarray], Tensor]) -> Tensor:
    """Encode the windows of several sounds; the vectors are each sound's mean, windows weighted by their length.

    Args:
        batch: the sounds, one at least.
        vectors_of_windows: windows of one length ``[w, n]`` to vectors ``[w, d]``.

    Returns:
        ``[len(batch), d]`` float32.
    """
    by_length: dict[int, list[tuple[int, np.ndarray]]] = {}
    for at, sample in enumerate(batch):
        for window in sample.windows:
            by_length.setdefault(len(window), []).append((at, window))
    total: Tensor | None = None
    weights = torch.zeros(len(batch), dtype=torch.float64)
    for length, members in sorted(by_length.items()):
        for first in range(0, len(members), WINDOWS):
            some = members[first : first + WINDOWS]
            vectors = vectors_of_windows(np.stack([window for _, window in some])).double()
            total = vectors.new_zeros(len(batch), vectors.shape[1]) if total is None else total
            owner = torch.tensor([at for at, _ in some])
            total = total.index_add(0, owner.to(total.device), vectors * length)
            weights.index_add_(0, owner, torch.full((len(some),), float(length), dtype=torch.float64))
    assert total is not None
    return (total / weights.to(total.device)[:, None]).float()


class WindowedEncoder(ABC):
    """What encoders of sounds have in common."""

    modality = "audio"
    batch_cost: int | None = None
    batch_size = 4  # sounds, each of several windows
    name: str
    rate: int
    seconds: float

    def prepare(self, raw: Sequence[np.ndarray]) -> list[SoundSample]:
        """Cut sounds at the encoder's rate, each ``[n]`` float32, into windows."""
        length, least = round(self.seconds * self.rate), max(round(LEAST_SECONDS * self.rate), 1)
        found = (windows_of(np.asarray(sound, np.float32), length, min(least, length)) for sound in raw)
        return [SoundSample(tuple(windows), len(windows)) for windows in found]

    def encode(self, batch: Sequence[SoundSample]) -> Tensor:
        """Encode sounds to float32 vectors ``[len(batch), dim]``."""
        return windows_mean(batch, self._vectors) if batch else torch.zeros(0, self.dim)

    @property
    @abstractmethod
    def dim(self) -> int:
        """Length of the vectors."""

    @abstractmethod
    def _vectors(self, windows: np.ndarray) -> Tensor:
        """Encode windows ``[w, n]`` float32 to ``[w, dim]`` float32."""


def probe(rate: int) -> np.ndarray:
    """A second of noise, ``[rate]`` float32, to learn the length of an encoder's vectors by."""
    return (0.1 * np.random.default_rng(0).standard_normal(rate)).astype(np.float32)


def read_seconds(name: str, seconds: float | None) -> float | None:
    """Check the length of a window.

    Raises:
        ValueError: if it is not between ``LEAST_SECONDS`` and ``MAX_SECONDS``.
    """
    if seconds is not None and not LEAST_SECONDS <= seconds <= MAX_SECONDS:
        raise ValueError(
            f"encoder {name!r}: seconds is {seconds!r}; expected the length of a window, {LEAST_SECONDS} to {MAX_SECONDS}."
        )
    return seconds


def decoder_identity() -> dict[str, Any]:
    """What decides about the samples of a file."""
    import scipy

    return {"libsndfile": require_soundfile().__libsndfile_version__, "scipy": scipy.__version__.rsplit(".", 1)[0]}
