"""How much each interaction counts: a column, the kind of event, its age, how often it happened."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recbole_llm.importing.columns import InteractionColumns
from recbole_llm.importing.numbers import NumberReader
from recbole_llm.importing.values import trimmed

FIELD = "weight:float"
SECONDS_OF_A_DAY = 86_400.0
# an interaction that is older than thirty half-lives is as good as none, and stays one
LEAST = 1e-9
SMALLEST, LARGEST = 1e-30, 1e30  # of a row's weight: with its age and in a sum still a positive number of float32

Reject = Callable[[np.ndarray, str, str, str], None]
"""Rows ``[rows]`` bool that are wrong, why, the column with a value that cannot be read, what helps."""

_NUMBER_HINT = "A weight is a number above 0; rows of weight 0 are left out and counted."


@dataclass(frozen=True)
class WeightRules:
    """Where weights come from; they are multiplied.

    Attributes:
        from_column: whether a column of numbers holds them.
        of_events: weight by kind of event; ``None`` where events have none.
        half_life: days after which an interaction counts half, from the newest one back; ``None`` for never.
        adds_up: whether rows of the same user and item add up to one.
    """

    from_column: bool = False
    of_events: Mapping[str, float] | None = None
    half_life: float | None = None
    adds_up: bool = False

    @property
    def any(self) -> bool:
        """Whether interactions have weights."""
        return self.from_column or self.of_events is not None or self.half_life is not None or self.adds_up

    def describe(self, columns: InteractionColumns) -> str:
        """Say in words what makes a weight."""
        parts = []
        if self.from_column:
            parts.append(f"the column {columns.weight!r}")
        if self.of_events is not None:
            kinds = ", ".join(f"{kind} {weight:g}" for kind, weight in self.of_events.items())
            parts.append(f"the event in {columns.event!r} ({kinds})")
        if self.half_life is not None:
            parts.append(f"age (half after {self.half_life:g} days)")
        if self.adds_up:
            parts.append("how often it happened")
        return " times ".join(parts)


class WeightReader:
    """Weights of the rows of one file, batch by batch.

    Args:
        rules: where they come from.
        columns: of the file.
        decimal: the sign before decimals, where it was told.
    """

    def __init__(self, rules: WeightRules, columns: InteractionColumns, decimal: str | None) -> None:
        self.rules, self.columns = rules, columns
        self._numbers = NumberReader(decimal)

    def read(self, cells: Mapping[str, pa.Array], n_rows: int, reject: Reject) -> np.ndarray:
        """Read the weights of a batch, ``[rows]`` float64; of rejected rows 1.

        Args:
            cells: its columns.
            n_rows: rows.
            reject: drops or refuses rows.
        """
        weights = np.ones(n_rows)
        if self.rules.from_column:
            name = self.columns.weight
            text = trimmed(cells[name])
            value = self._numbers.read(text)
            absent = text.is_null().to_numpy(zero_copy_only=False)
            reject(absent, "weight missing", "", "")
            reject(np.isnan(value) & ~absent, "weight is not a number", name, _NUMBER_HINT)
            reject(value < 0, "weight is negative", name, _NUMBER_HINT)
            weights = np.where(np.isnan(value), 1.0, value)
        if self.rules.of_events is not None:
            weights = weights * self._of_events(trimmed(cells[self.columns.event]), reject)
        reject(weights == 0, "weight 0", "", "")
        beyond = (weights > 0) & ((weights < SMALLEST) | (weights > LARGEST))
        column = self.columns.weight if self.rules.from_column else self.columns.event
        reject(beyond, f"weight is not between {SMALLEST:g} and {LARGEST:g}", column, "Write weights in another unit.")
        return np.where(weights > 0, weights, 1.0)

    def _of_events(self, text: pa.Array, reject: Reject) -> np.ndarray:
        assert self.rules.of_events is not None
        encoded = text.dictionary_encode()
        known = self.rules.of_events
        table = np.array([*(known.get(kind, np.nan) for kind in encoded.dictionary.to_pylist()), np.nan])
        value = table[encoded.indices.fill_null(len(encoded.dictionary)).to_numpy(zero_copy_only=False)]
        absent = text.is_null().to_numpy(zero_copy_only=False)
        reject(absent, "event missing", "", "")
        hint = f"--event-weights names {', '.join(known)}; a weight of 0 leaves a kind of event out."
        reject(np.isnan(value) & ~absent, "event without a weight", self.columns.event, hint)
        return np.where(np.isnan(value), 1.0, value)


def final_weights(
    weights: np.ndarray, rules: WeightRules, groups: np.ndarray | None, time: np.ndarray, keep: np.ndarray
) -> np.ndarray:
    """Let weights fade with age and add them up, ``[rows]`` float64.

    Args:
        weights: of all rows.
        rules: where they come from.
        groups: ``[rows]`` int64 by which rows add up; ``None`` where they do not.
        time: ``[rows]`` in seconds.
        keep: ``[rows]`` bool, the rows that are written.
    """
    if rules.half_life is not None:
        weights = weights * np.exp2((time - time[keep].max()) / (SECONDS_OF_A_DAY * rules.half_life)).clip(LEAST)
    if groups is not None:
        _, group = np.unique(groups, return_inverse=True)
        weights = np.bincount(group, weights)[group]
    return weights


def as_cells(weights: np.ndarray) -> pa.Array:
    """Write weights as RecBole reads them, in float32."""
    return pc.cast(pa.array(weights.astype(np.float32)), pa.string())
