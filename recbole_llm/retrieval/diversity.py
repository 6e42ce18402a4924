r"""Trade-offs between relevance and diversity, chosen greedily: each place goes to the open candidate with the highest gain.

Maximal marginal relevance (Carbonell and Goldstein 1998), with content vectors c of length 1 and S what is chosen already:

    gain(i) = (1 - lambda) r_i - lambda max_{j in S} <c_i, c_j>                      (the maximum over nothing is 0)

Calibration (Steck 2018), with p the shares of an attribute's values in the history and q those in the list:

    gain(i) = (1 - lambda) r_i - lambda KL(p || q~(S + i)),    q~ = (1 - alpha) q + alpha p,    alpha = .01

An item with m values counts 1/m for each, in p and in q. Relevance r_i is the chance of item i over that of the best candidate.
Cosines are float32, divergences float64.
"""

from typing import Protocol

import numpy as np

from recbole_llm.retrieval.mixes import Mix

AT_ONCE = 128  # candidates whose cosines are computed together; of more, only those with what is chosen
ALPHA = 0.01  # of Steck's paper: keeps the divergence finite where the list lacks a value of the history


class TradeOff(Protocol):
    """Gains of candidates, given those chosen so far."""

    def gains(self) -> np.ndarray:
        """Compute what each candidate would add, ``[n]`` float32 or float64, -inf for closed ones; for order, not for size."""

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
        self._beside: np.ndarray | None = None  # [n, n]: what each choice makes of the values of all, -inf of its own
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
        if not self.weight:
            return
        if len(value) > AT_ONCE:
            self._beside, self._room = None, np.empty_like(value)
        else:
            self._beside = value - vectors @ vectors.T
            self._beside.ravel()[:: len(value) + 1] = -np.inf

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
        gain = self._gain
        if not self.weight:
            gain[at] = -np.inf
            return
        if self._beside is not None:
            beside = self._beside[at]
        else:
            beside = self._room
            np.dot(self._vectors, self._vectors[at], out=beside)
            np.subtract(self._value, beside, out=beside)
            beside[at] = -np.inf
        if self._chosen:
            np.minimum(gain, beside, out=gain)
        else:  # a negative cosine raises what was the value alone
            np.copyto(gain, beside, where=gain > -np.inf)
        self._chosen.append(self._vectors[at])


class Calibrated:
    """Calibration to a mix of values.

    Of the divergence only what a candidate changes is computed; the rest is the same for all. With n items in the list, c of them
    with value g, and b = alpha p / (1 - alpha), a share s of g more lowers it by p log((c + s + b (n + 1)) / (c + b (n + 1))).

    Args:
        weight: lambda.
        mix: of the history; it numbers what candidates hold of its values.
    """

    def __init__(self, weight: float, mix: Mix) -> None:
        self._weight, self._mix = weight, mix
        self._factor = weight * mix.p
        self._smoothing = mix.p * (ALPHA / (1 - ALPHA))  # b
        self._base = self._smoothing.copy()  # c + b (n + 1)
        self._value = np.zeros(0)  # (1 - lambda) r_i, -inf for closed candidates
        self._kind = np.zeros(0, np.int64)

    def extend(self, relevance: np.ndarray, codes: np.ndarray) -> None:
        """Add candidates.

        Args:
            relevance: ``[n]`` r_i.
            codes: ``[n]`` int32, numbers of their values.
        """
        kind = self._mix.kinds(codes)
        value = (1 - self._weight) * relevance
        if len(self._value):
            kind, value = np.concatenate([self._kind, kind]), np.concatenate([self._value, value])
        self._kind, self._value = kind, value

    def gains(self) -> np.ndarray:
        """Compute what :meth:`TradeOff.gains` says, up to a term that is the same for all."""
        gains = self._mix.lowered(self._base, self._factor).take(self._kind)
        gains += self._value
        return gains

    def close(self, at: int) -> None:
        """Close as :meth:`TradeOff.close` says."""
        self._value[at] = -np.inf

    def choose(self, at: int) -> None:
        """Choose as :meth:`TradeOff.choose` says."""
        self._base += self._smoothing
        self._mix.add(int(self._kind[at]), self._base)
        self._value[at] = -np.inf
