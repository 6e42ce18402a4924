"""Numbers and labels of cells: which sign stands before decimals, which words mean yes."""

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_PLAIN = r"^[+-]?(?:\d+\.?\d*|\.\d+)(?:[eE][+-]?\d+)?$"
# "1.299,00" and "1,299.00" hold both signs, which tells them apart; "1,299" alone may be either
_COMMA = r"^[+-]?\d+(?:,\d+)?(?:[eE][+-]?\d+)?$"
_POINTS_AND_COMMA = r"^[+-]?\d{1,3}(?:\.\d{3})+,\d+$"
_COMMAS_AND_POINT = r"^[+-]?\d{1,3}(?:,\d{3})+\.\d+$"
# no group of three digits: the comma can only stand before decimals
_SURE_COMMA = r"^[+-]?(?:\d{4,},\d+|\d*,(?:\d{1,2}|\d{4,})|\d{1,3}(?:\.\d{3})+,\d+)(?:[eE][+-]?\d+)?$"


def cast_or_null(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """Cast strings to numbers or times; null for those that are none."""
    try:
        return pc.cast(values, kind)
    except pa.ArrowInvalid:
        if len(values) == 1:
            return pa.nulls(1, kind)
        half = len(values) // 2
        return pa.concat_arrays([cast_or_null(values.slice(0, half), kind), cast_or_null(values.slice(half), kind)])


def numbers(values: pa.Array) -> np.ndarray:
    """Parse strings to float64 ``[rows]``.

    NaN stands where a trimmed string is missing or no finite number with a decimal point.
    """
    try:
        found = pc.cast(values, pa.float64())
    except pa.ArrowInvalid:
        # one look at all of them: halving down to each bad cell takes 10 microseconds for every one
        plain = pc.match_substring_regex(values, _PLAIN)
        found = cast_or_null(pc.if_else(plain, values, None), pa.float64())
    array = found.to_numpy(zero_copy_only=False).astype(np.float64, copy=False)
    return np.where(np.isfinite(array), array, np.nan)


class NumberReader:
    """Numbers of one column.

    Attributes:
        decimal: ``.`` or ``,``; ``None`` until a number tells.
        rewrites: whether some numbers must be written in another form than they stand in the file.
    """

    def __init__(self, decimal: str | None = None) -> None:
        self.decimal = decimal
        self.rewrites = decimal == ","

    def read(self, values: pa.Array) -> np.ndarray:
        """Read trimmed strings; the first number that tells the decimal sign settles it for those that follow.

        Returns:
            Float64 ``[rows]``; NaN where a string is missing or no finite number.
        """
        if self.decimal == ",":
            return _with_comma(values)
        found = numbers(values)
        unread = np.isnan(found) & ~values.is_null().to_numpy(zero_copy_only=False)
        if self.decimal is None and _any(pc.match_substring(values, ".")):
            first = values.filter(pc.match_substring_regex(values, r"[.,]")).slice(0, 1)
            self.decimal = "," if _any(pc.match_substring_regex(first, _SURE_COMMA)) else "."
            if self.decimal == ",":
                self.rewrites = True
                return _with_comma(values)
        if not unread.any():
            return found
        if self.decimal is None and _any(pc.match_substring_regex(values, _SURE_COMMA)):
            self.decimal, self.rewrites = ",", True
            return _with_comma(values)
        grouped = pc.match_substring_regex(values, _COMMAS_AND_POINT)
        if _any(grouped):
            self.rewrites = True
            found = numbers(pc.if_else(grouped, pc.replace_substring(values, ",", ""), values))
        return found

    def strings(self, values: pa.Array) -> tuple[np.ndarray, pa.Array]:
        """Read as :meth:`read`, and return the numbers as an atomic file holds them: as written, if RecBole reads that."""
        found = self.read(values)
        return found, number_strings(found) if self.rewrites else values


def _with_comma(values: pa.Array) -> np.ndarray:
    grouped = pc.match_substring_regex(values, _POINTS_AND_COMMA)
    values = pc.if_else(grouped, pc.replace_substring(values, ".", ""), values)
    plain = pc.match_substring_regex(values, _COMMA)
    return numbers(pc.if_else(plain, pc.replace_substring(values, ",", "."), None))


def _any(mask: pa.Array) -> bool:
    return bool(pc.any(mask).as_py())


_WORDS = {"false": 0, "f": 0, "no": 0, "n": 0, "true": 1, "t": 1, "yes": 1, "y": 1}


class LabelReader:
    """Labels of one column: 1 and 0 or -1, true and false, yes and no.

    Attributes:
        words: a label as written (in lower case) to what it was taken for.
    """

    def __init__(self) -> None:
        self.words: dict[str, int] = {}
        self._negative: float | None = None

    def read(self, values: pa.Array) -> np.ndarray:
        """Read trimmed strings.

        Returns:
            Int8 ``[rows]``: 0, 1, or -1 where a string is missing or no label. A column that has held 0 cannot hold -1
            too, nor the other way round: nobody knows which of them means no.
        """
        encoded = pc.utf8_lower(values).dictionary_encode()
        table = np.full(len(encoded.dictionary) + 1, -1, dtype=np.int8)
        for at, word in enumerate(encoded.dictionary.to_pylist()):
            label = _WORDS[word] if word in _WORDS else self._number(word)
            if label is not None:
                table[at] = label
                self.words.setdefault(word, label)
        return table[encoded.indices.fill_null(len(encoded.dictionary)).to_numpy(zero_copy_only=False)]

    def _number(self, word: str) -> int | None:
        try:
            value = float(word.replace(",", ".")) if len(word) < 10 else None
        except ValueError:
            return None
        if value == 1:
            return 1
        if value not in (0, -1):
            return None
        if self._negative is None:
            self._negative = value
        return 0 if value == self._negative else None

    def describe(self) -> str:
        """Say which words stand for which label; empty where they are 0 and 1 as written."""
        odd = {word: label for word, label in sorted(self.words.items()) if word not in ("0", "1", "0.0", "1.0")}
        return ", ".join(f"{word!r} is {label}" for word, label in odd.items())


def number_strings(values: np.ndarray) -> pa.Array:
    """Write float64 ``[rows]`` as the shortest decimal strings that read back the same; null for NaN."""
    array = pa.array(values, from_pandas=True)
    whole = pc.and_(pc.equal(pc.floor(array), array), pc.less(pc.abs(array), 2.0**53))
    integers = pc.cast(pc.cast(pc.if_else(whole, array, None), pa.int64()), pa.string())
    return pc.coalesce(integers, pc.cast(array, pa.string()))
