"""The mix of an attribute's values in a history, and what candidates hold of it."""

from collections.abc import Sequence

import numpy as np

from recbole_llm.retrieval.value_codes import ValueCodes

TABLE = 4096  # numbers of values that are looked up in a table; of more, one by one


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


class Mix:
    """The mix of a history.

    Candidates that hold the same of its values are of one kind, a number. Where no item has two values, the kinds are the values of
    the history, and one more for all others.

    Args:
        codes: ``[h]`` int32, numbers of the items' values.
        known: what numbers mean; more may follow.
        weights: ``[h]`` of the items, not negative.

    Attributes:
        p: shares of the values, positive, of sum 1; empty if no item of positive weight has one.
    """

    def __init__(self, codes: np.ndarray, known: ValueCodes, weights: np.ndarray) -> None:
        self._known = known
        self._table: np.ndarray | None = None  # number of values -> kind
        self._own: list[list[tuple[int, float]]] = []  # of each kind: values of the mix with their shares
        self._kind_of: dict[int, int] = {}  # number of values -> kind
        n_values = len(known.values)
        if known.single and n_values <= TABLE:
            weight = np.bincount(codes, weights, n_values).astype(np.float64, copy=False)
            if known.none >= 0:
                weight[known.none] = 0
            self._held = weight.nonzero()[0]
            p = weight.take(self._held)
            self.p = p / p.sum() if len(p) else p
            # what no item of the history holds is of the last kind, as are numbers that are given later
            self._table = np.full(n_values + 1, len(p))
            self._table[self._held] = np.arange(len(p))
            self._lowered = np.zeros(len(p) + 1)
            return
        weight_of: dict[int, float] = {}
        for code, one in zip(codes.tolist(), weights.tolist(), strict=True):
            weight_of[code] = weight_of.get(code, 0.0) + one
        mix = mix_of([known.values[code] for code in weight_of], np.array(list(weight_of.values())))
        self._place = {value: g for g, value in enumerate(mix)}
        self.p = np.array(list(mix.values()), np.float64)

    def kinds(self, codes: np.ndarray) -> np.ndarray:
        """Number what candidates hold, ``[n]`` int64, by the numbers of their values ``[n]`` int32."""
        if self._table is not None:
            if self._known.single:
                return self._table.take(codes, mode="clip")
            self._without_table()
        found = []
        for code in codes.tolist():
            kind = self._kind_of.get(code)
            if kind is None:
                kind = self._kind_of[code] = len(self._own)
                own = self._known.values[code]
                self._own.append([(self._place[value], 1 / len(own)) for value in own if value in self._place])
            found.append(kind)
        entries = [(kind, *entry) for kind, own in enumerate(self._own) for entry in own]
        of, which, share = zip(*entries, strict=True) if entries else ((), (), ())
        self._of, self._which = np.array(of, np.int64), np.array(which, np.int64)
        self._share = np.array(share, np.float64)
        return np.array(found, np.int64)

    def _without_table(self) -> None:
        """Go on where a candidate has two values after all; kinds that were numbered stay what they are."""
        self._place = {self._known.values[code][0]: g for g, code in enumerate(self._held.tolist())}
        self._own = [*([(g, 1.0)] for g in range(len(self.p))), []]
        self._table = None

    def lowered(self, base: np.ndarray, factor: np.ndarray) -> np.ndarray:
        """Sum factor_g log(1 + share_g / base_g) over the values of each kind, ``[kinds]`` float64, overwritten by the next call.

        Args:
            base: ``[G]`` float64, positive.
            factor: ``[G]`` float64.
        """
        if self._table is not None:
            own = self._lowered[: len(base)]
            np.reciprocal(base, out=own)
            np.log1p(own, out=own)
            own *= factor
            return self._lowered
        parts = self._share / base.take(self._which)
        sums = np.bincount(self._of, np.log1p(parts) * factor.take(self._which), len(self._own))
        return sums.astype(np.float64, copy=False)  # whole numbers where there is no entry

    def add(self, kind: int, base: np.ndarray) -> None:
        """Add the shares of a kind to the values' counts ``[G]``."""
        if self._table is None:
            for g, share in self._own[kind]:
                base[g] += share
        elif kind < len(base):
            base[kind] += 1
