r"""Trade-offs between relevance and diversity, chosen greedily: each place goes to the open candidate with the highest gain.

Maximal marginal relevance (Carbonell and Goldstein 1998), with content vectors c of length 1 and S what is chosen already:

    gain(i) = (1 - lambda) r_i - lambda max_{j in S} <c_i, c_j>                      (the maximum over nothing is 0)

Calibration (Steck 2018), with p the shares of an attribute's values in the history and q those in the list:

    gain(i) = (1 - lambda) r_i - lambda KL(p || q~(S + i)),    q~ = (1 - alpha) q + alpha p,    alpha = .01

An item with m values counts 1/m for each, in p and in q. Relevance r_i is the chance of item i over that of the best candidate.
Cosines are float32, divergences float64.
"""

from collections.abc import Mapping, Sequence
from typing import Protocol

import numpy as np

ALPHA = 0.01  # of Steck's paper: keeps the divergence finite where the list lacks a value of the history


class TradeOff(Protocol):
    """Gains of candidates, given those chosen so far."""

    def gains(self) -> np.ndarray:
        """Compute what each candidate would add, ``[n]`` float32 or float64, -inf for closed candidates."""

    def close(self, at: int) -> None:
        """Take a candidate out of the choice."""

    def choose(self, at: int) -> None:
        """Put a candidate into the list."""


class MarginalRelevance:
    """Maximal marginal relevance; gains are divided by lambda, which moves no place.

    Args:
        weight: lambda.
    """

    def __init__(self, weight: float) -> None:
        self.weight = weight
        self._value = np.zeros(0, np.float32)  # r_i (1 - lambda) / lambda
        self._gain = self._value  # -inf for closed candidates
        self._room = self._value  # for what one choice makes of them
        self._vectors = np.zeros((0, 0), np.float32)
        self._chosen: list[np.ndarray] = []

    def extend(self, relevance: np.ndarray, vectors: np.ndarray) -> None:
        """Add candidates.

        Args:
            relevance: ``[n]`` r_i.
            vectors: ``[n, F]`` float32 of length 1, or 0 where an item has no content.
        """
        # without a lambda relevance alone counts
        value = (relevance * ((1 - self.weight) / self.weight if self.weight else 1.0)).astype(np.float32)
        gain = value.copy()
        if self._chosen and self.weight:
            gain -= (vectors @ np.stack(self._chosen, 1)).max(1)
        if len(self._value):
            value = np.concatenate([self._value, value])
            gain = np.concatenate([self._gain, gain])
            vectors = np.concatenate([self._vectors, vectors])
        self._value, self._gain, self._vectors = value, gain, vectors
        self._room = np.empty_like(value)

    def gains(self) -> np.ndarray:
        """Compute what :meth:`TradeOff.gains` says."""
        return self._gain

    def close(self, at: int) -> None:
        """Close as :meth:`TradeOff.close` says."""
        self._gain[at] = -np.inf

    def choose(self, at: int) -> None:
        """Choose as :meth:`TradeOff.choose` says.

        The least of the gains beside one chosen item each is the gain: the largest cosine takes the most away.
        """
        gain, room = self._gain, self._room
        gain[at] = -np.inf
        if not self.weight:
            return
        chosen = self._vectors[at]
        np.dot(self._vectors, chosen, room)
        if self._chosen:
            np.subtract(self._value, room, room)
            np.minimum(gain, room, out=gain)
        else:
            np.subtract(gain, room, gain)
        self._chosen.append(chosen)


class Calibrated:
    """Calibration to a mix of values.

    Args:
        weight: lambda.
        mix: value to its share p in the history, positive, of sum 1.
    """

    def __init__(self, weight: float, mix: Mapping[str, float]) -> None:
        self.weight = weight
        self._number = {value: g for g, value in enumerate(mix)}
        self._p = np.array(list(mix.values()), np.float64)
        self._negentropy = float(self._p @ np.log(self._p))
        self._counts = np.zeros(len(self._p))  # of each value in the list
        self._size = 0
        self._value = np.zeros(0)
        self._gain: np.ndarray | None = None  # of the list as it is
        # entries: the values of candidates that the mix knows
        self._of = np.zeros(0, np.int64)
        self._which = np.zeros(0, np.int64)
        self._share = np.zeros(0)

    def extend(self, relevance: np.ndarray, values: Sequence[Sequence[str]]) -> None:
        """Add candidates.

        Args:
            relevance: ``[n]`` r_i.
            values: of each candidate, each once.
        """
        first = len(self._value)
        found = [
            (first + at, self._number[value], 1 / len(own))
            for at, own in enumerate(values)
            for value in own
            if value in self._number
        ]
        if found:
            of, which, share = zip(*found, strict=True)
            self._of = np.concatenate([self._of, np.array(of, np.int64)])
            self._which = np.concatenate([self._which, np.array(which, np.int64)])
            self._share = np.concatenate([self._share, np.array(share)])
        self._value = np.concatenate([self._value, (1 - self.weight) * relevance])
        self._gain = None

    def gains(self) -> np.ndarray:
        """Compute what :meth:`TradeOff.gains` says.

        Only the values of a candidate change the logarithms of the list without it.
        """
        if self._gain is not None:
            return self._gain
        step = (1 - ALPHA) / (self._size + 1)
        before = step * self._counts + ALPHA * self._p
        logs = np.log(before)
        which = self._which
        change = self._p[which] * (np.log(before[which] + step * self._share) - logs[which])
        likelihood = np.bincount(self._of, change, minlength=len(self._value)) + self._p @ logs
        self._gain = self._value - self.weight * (self._negentropy - likelihood)
        return self._gain

    def close(self, at: int) -> None:
        """Close as :meth:`TradeOff.close` says."""
        self._value[at] = -np.inf
        if self._gain is not None:
            self._gain[at] = -np.inf

    def choose(self, at: int) -> None:
        """Choose as :meth:`TradeOff.choose` says."""
        own = self._of == at
        np.add.at(self._counts, self._which[own], self._share[own])
        self._size += 1
        self._value[at] = -np.inf
        self._gain = None


def mix_of(values: Sequence[Sequence[str]], weights: np.ndarray) -> dict[str, float]:
    """Compute the shares of values in a history; empty if no item of positive weight has one.

    Args:
        values: of each item, each once.
        weights: ``[h]`` of the items, not negative.
    """
    shares: dict[str, float] = {}
    for own, weight in zip(values, weights.tolist(), strict=True):
        for value in own:
            shares[value] = shares.get(value, 0.0) + weight / len(own)
    total = sum(shares.values())
    return {value: share / total for value, share in shares.items() if share > 0} if total > 0 else {}
