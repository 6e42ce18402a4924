"""Attribute filters as boolean masks over the catalogue."""

from collections.abc import Mapping, Sequence
from heapq import nsmallest
from typing import Any

import numpy as np

COMPARISONS = {"gt": np.greater, "gte": np.greater_equal, "lt": np.less, "lte": np.less_equal}


class AttributeIndex:
    """Rows by attribute value: an inverted list for ``token`` and ``tokens``, a column for ``number``.

    Args:
        kinds: declared attributes with their kinds.
        rows: the attributes of rows 0, 1, ...
    """

    def __init__(self, kinds: Mapping[str, str], rows: Sequence[Mapping[str, Any]]) -> None:
        self.kinds = dict(kinds)
        self._lists: dict[str, dict[str, np.ndarray]] = {}
        self._columns: dict[str, np.ndarray] = {}
        for name, kind in self.kinds.items():
            if kind == "number":
                self._columns[name] = np.array([row.get(name, np.nan) for row in rows], np.float64)
            else:
                found: dict[str, list[int]] = {}
                for row, attributes in enumerate(rows):
                    for value in _values(attributes.get(name)):
                        found.setdefault(value, []).append(row)
                self._lists[name] = {value: np.array(where, np.int64) for value, where in found.items()}
        self._changed: dict[int, Mapping[str, Any]] = {}

    def put(self, row: int, attributes: Mapping[str, Any]) -> None:
        """Replace a row's attributes, or add the row."""
        self._changed[row] = attributes

    def summary(self, limit: int) -> dict[str, dict[str, Any]]:
        """Say what a filter can ask for: the most frequent values, or for a number the least and the largest.

        Args:
            limit: values of an attribute.

        Returns:
            Attribute to ``kind`` and ``values`` (pairs of value and number of items, most frequent first, ties by value),
            or ``least`` and ``largest`` (``None`` where no item has the number). Later changes are not counted.
        """
        result: dict[str, dict[str, Any]] = {}
        for name, kind in self.kinds.items():
            if kind == "number":
                known = self._columns[name][np.isfinite(self._columns[name])]
                ends = (float(known.min()), float(known.max())) if len(known) else (None, None)
                result[name] = {"kind": kind, "least": ends[0], "largest": ends[1]}
            else:
                first = nsmallest(limit, ((-len(rows), value) for value, rows in self._lists[name].items()))
                result[name] = {"kind": kind, "values": [(value, -count) for count, value in first]}
        return result

    def mask(self, condition: Mapping[str, Any], n_rows: int) -> np.ndarray:
        """Mark the rows for which every part of ``condition`` holds, ``[n_rows]`` bool.

        Args:
            condition: attribute to a value, a list of values (any of them), or for numbers bounds such as
                ``{"gte": 1990, "lt": 2000}``.
            n_rows: rows of the catalogue.

        Raises:
            ValueError: on an undeclared attribute, or a condition that does not fit its kind.

        Example:
            >>> rows = [{"year": 1994, "genres": ["Drama"]}, {"year": 2001}]
            >>> index = AttributeIndex({"year": "number", "genres": "tokens"}, rows)
            >>> index.mask({"year": {"lt": 2000}, "genres": ["Drama", "War"]}, 2).tolist()
            [True, False]
        """
        result = np.ones(n_rows, bool)
        for name, wanted in condition.items():
            kind = self.kinds.get(name)
            if kind is None:
                known = ", ".join(f"{n} ({k})" for n, k in self.kinds.items()) or "none"
                raise ValueError(f"filter: unknown attribute {name[:64]!r}; the export declares: {known}.")
            result &= self._numbers(name, wanted, n_rows) if kind == "number" else self._tokens(name, wanted, n_rows)
        return result

    def having(self, name: str, values: list[Any], n_rows: int) -> np.ndarray:
        """Mark the rows with any of these values of a declared attribute, ``[n_rows]`` bool."""
        return (
            self._numbers(name, values, n_rows) if self.kinds[name] == "number" else self._tokens(name, values, n_rows)
        )

    def _tokens(self, name: str, wanted: Any, n_rows: int) -> np.ndarray:
        values = wanted if isinstance(wanted, list) else [wanted]
        if not all(isinstance(value, str) for value in values):
            raise ValueError(f"filter: {name} is compared with a string or a list of strings.")
        mask = np.zeros(n_rows, bool)
        for value in values:
            rows = self._lists[name].get(value)
            if rows is not None:
                mask[rows] = True
        accepted = set(values)
        for row, attributes in self._changed.items():
            mask[row] = not accepted.isdisjoint(_values(attributes.get(name)))
        return mask

    def _numbers(self, name: str, wanted: Any, n_rows: int) -> np.ndarray:
        column = self._columns[name]
        if self._changed or len(column) < n_rows:
            column = np.concatenate([column, np.full(n_rows - len(column), np.nan)])
            for row, attributes in self._changed.items():
                column[row] = attributes.get(name, np.nan)
        if isinstance(wanted, Mapping):
            if not wanted or not all(key in COMPARISONS and _is_number(value) for key, value in wanted.items()):
                raise ValueError(
                    f"filter: {name} is a number; compare it with {', '.join(COMPARISONS)} and a number each."
                )
            masks = [COMPARISONS[key](column, value) for key, value in wanted.items()]  # false where there is no number
            mask: np.ndarray = masks[0] if len(masks) == 1 else np.logical_and.reduce(masks)
            return mask
        values = wanted if isinstance(wanted, list) else [wanted]
        if not all(_is_number(value) for value in values):
            raise ValueError(f"filter: {name} is a number; give a number, a list of numbers, or bounds.")
        return np.isin(column, values)


def _is_number(value: Any) -> bool:
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def _values(value: Any) -> Sequence[str]:
    if value is None:
        return ()
    return (value,) if isinstance(value, str) else value
