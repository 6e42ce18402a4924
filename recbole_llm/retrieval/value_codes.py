"""What rows hold of an attribute, as numbers: rows with the same values have the same one."""

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np

SPARE = 64  # values beside those of all rows, before numbers are given anew


class ValueCodes:
    """Numbers of values, each row's found when somebody first asks for it.

    Args:
        values_of: lists the values of a row.

    Attributes:
        values: of each number.
        single: whether no row that anybody has asked for holds two values.
        none: the number of no value, -1 where nobody has asked for a row without one.
    """

    def __init__(self, values_of: Callable[[int], Sequence[Any]]) -> None:
        self._values_of = values_of
        self.values: list[tuple[Any, ...]] = []
        self.single, self.none = True, -1
        self._number: dict[tuple[Any, ...], int] = {}
        self._codes = np.zeros(0, np.int32)  # -1 where nobody has asked

    def of(self, rows: np.ndarray, n_rows: int) -> np.ndarray:
        """Return the numbers of rows, ``[n]`` int32.

        Args:
            rows: ``[n]`` int64.
            n_rows: rows of the catalogue.
        """
        if len(self._codes) < n_rows:
            self._codes = np.concatenate([self._codes, np.full(n_rows - len(self._codes), -1, np.int32)])
        codes = self._codes.take(rows)
        if len(codes) and codes.min() < 0:
            for row in rows[codes < 0].tolist():
                values = tuple(self._values_of(row))
                code = self._number.setdefault(values, len(self.values))
                if code == len(self.values):
                    self.values.append(values)
                    self.single &= len(values) < 2
                    self.none = self.none if values else code
                self._codes[row] = code
            codes = self._codes.take(rows)
        return codes

    def forget(self, row: int) -> None:
        """Note that the values of a row have changed."""
        if row < len(self._codes):
            self._codes[row] = -1
        if len(self.values) > len(self._codes) + SPARE:  # of values that no row has any more
            self.values, self._number, self.single, self.none = [], {}, True, -1
            self._codes.fill(-1)
