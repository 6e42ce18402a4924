"""Numbers drawn at random for a subject, the same on every machine and in every version."""

from hashlib import shake_256

import numpy as np

AT_FIRST = 16  # one block of the hash


class Draws:
    """Uniform numbers read off a hash of a seed and a name.

    Number i is made of the first 53 bits of bytes 8 i to 8 i + 7 of SHAKE-256, the least significant byte first.

    Args:
        seed: from 0.
        name: of a subject.

    Example:
        >>> one, same = Draws(0, b"somebody"), Draws(0, b"somebody")
        >>> [one.below(10) for _ in range(100)] == [same.below(10) for _ in range(100)]
        True
    """

    def __init__(self, seed: int, name: bytes) -> None:
        self._hash = shake_256(b"%d " % seed + name)
        self._numbers: list[float] = []
        self._at = 0

    def random(self) -> float:
        """Draw a number from 0 to 1, 1 excluded."""
        if self._at == len(self._numbers):
            words = np.frombuffer(self._hash.digest(16 * self._at or 8 * AT_FIRST), "<u8")
            self._numbers = ((words >> np.uint64(11)) * 2.0**-53).tolist()
        self._at += 1
        return self._numbers[self._at - 1]

    def below(self, n: int) -> int:
        """Draw a whole number from 0 to n - 1."""
        return int(self.random() * n)
