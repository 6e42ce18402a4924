"""Times of one column as seconds: counts since 1970, ISO dates, and dates in other notations."""

from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recbole_llm.importing import dates
from recbole_llm.importing.dates import DateFormat
from recbole_llm.importing.numbers import cast_or_null, numbers

TIME_UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
# a count of seconds is below 1e11 until the year 5138; of milliseconds above it from 1973 on; and so on by 1000
_UNIT_SIZES = [1e11, 1e14, 1e17]
_ZONE = r":\d\d(\.\d+)?Z$|:\d\d(\.\d+)?[+-]\d\d(:?\d\d)?$"
_WORDS = {
    "iso": "date such as 2024-05-31T12:00:00Z",
    "s": "number of seconds like the first ones",
    "ms": "number of milliseconds like the first ones",
    "us": "number of microseconds like the first ones",
    "ns": "number of nanoseconds like the first ones",
}


@dataclass
class TimeReader:
    """Times of one column as seconds since 1970-01-01 UTC.

    Attributes:
        unit: ``iso`` for ISO dates, ``format`` for dates of another notation, else a key of ``TIME_UNITS``.
        fixed: the unit was given: values of other units' size are not doubted.
        format: the notation; ``None`` with ``unit="format"`` while nothing has told the day from the month.
        without_zone: dates read as UTC because they name no zone.
    """

    unit: str
    fixed: bool = False
    format: DateFormat | None = None
    without_zone: int = 0

    @classmethod
    def detect(cls, values: pa.Array, unit: str | None = None, form: str | None = None) -> "TimeReader | None":
        """Make a reader for a column that begins with the trimmed strings ``values``.

        Args:
            values: the first of the column.
            unit: ``iso`` or a key of ``TIME_UNITS``; found if ``None``.
            form: a format of ``strptime``.

        Returns:
            ``None`` if most of the values are no times.
        """
        values = values.drop_null()
        if form is not None:
            return cls("format", format=DateFormat.of(form))
        if unit is not None:
            return cls(unit, fixed=True)
        if not len(values):
            return None
        for pattern, with_clock in ((dates.COMPACT_DATE, False), (dates.COMPACT_TIME, True)):
            if pc.all(pc.match_substring_regex(values.slice(0, 1000), pattern)).as_py():
                return cls("format", format=dates.compact_format(with_clock))
        found = numbers(values)
        found = found[~np.isnan(found)]
        if 2 * len(found) >= len(values):
            units = np.searchsorted(_UNIT_SIZES, np.abs(found[found != 0]), side="right")
            return cls(list(TIME_UNITS)[np.bincount(units, minlength=1).argmax()])
        reader = cls("iso")
        if 2 * int(np.isfinite(reader.seconds(values)).sum()) >= len(values):
            return cls("iso")
        if 2 * int((dates.day_and_month(values)[0] > 0).sum()) >= len(values):
            return cls("format")
        return None

    @property
    def is_date(self) -> bool:
        """Whether the column holds dates and not counts."""
        return self.unit in ("iso", "format")

    @property
    def is_undecided(self) -> bool:
        """Whether nothing has told the day from the month yet."""
        return self.unit == "format" and self.format is None

    def settle(self, values: pa.Array) -> int | None:
        """Tell the day from the month by the first of ``values`` that has a number above 12.

        Returns:
            Its place, or ``None`` if there is none.
        """
        first, second = dates.day_and_month(values)
        telling = np.flatnonzero(((first > 12) & (second <= 12)) | ((second > 12) & (first <= 12) & (first > 0)))
        if not len(telling):
            return None
        self.format = dates.numeric_format(day_first=bool(first[telling[0]] > 12))
        return int(telling[0])

    def seconds(self, values: pa.Array) -> np.ndarray:
        """Parse trimmed strings to float64 ``[rows]``.

        NaN stands where one is missing, no time, or of another unit's size.
        """
        if self.unit == "iso":
            return self._dates(values)
        if self.unit == "format":
            return self._of_format(values, self.format or dates.numeric_format(day_first=True))
        found = numbers(values)
        if not self.fixed:
            unit = np.searchsorted(_UNIT_SIZES, np.abs(found), side="right")
            found = np.where((unit == list(TIME_UNITS).index(self.unit)) | (found == 0), found, np.nan)
        return found / TIME_UNITS[self.unit]

    def describe(self) -> str:
        """Say in words what a time of this column is."""
        if self.unit == "format":
            return f"date of the form {self.format.shown if self.format else 'day/month/year'}"
        return _WORDS[self.unit]

    def _of_format(self, values: pa.Array, form: DateFormat) -> np.ndarray:
        seconds, zoned = form.seconds(values)
        self.without_zone += int((np.isfinite(seconds) & ~zoned).sum())
        return seconds

    def _dates(self, values: pa.Array) -> np.ndarray:
        given = values
        values = pc.replace_substring_regex(values, r"\s*(UTC|GMT|z)$", "Z")
        values = pc.replace_substring_regex(values, r"(\.\d{6})\d+", r"\1")
        zoned = pc.match_substring_regex(values, _ZONE)
        micro = pa.timestamp("us")
        seconds = np.full(len(values), np.nan)
        for kind, mask in ((pa.timestamp("us", "UTC"), zoned), (micro, pc.invert(zoned))):
            rows = mask.fill_null(False).to_numpy(zero_copy_only=False)
            if rows.any():
                found = _timestamps(values.filter(pa.array(rows)), kind).cast(pa.int64())
                seconds[rows] = found.to_numpy(zero_copy_only=False).astype(np.float64) / 1e6
                if kind is micro:
                    self.without_zone += len(found) - found.null_count
        unread = np.isnan(seconds) & ~values.is_null().to_numpy(zero_copy_only=False)
        if unread.any():  # 2024/5/31 9:05
            seconds[unread] = self._of_format(given.filter(pa.array(unread)), DateFormat(dates.YEAR_FIRST, ""))
        return seconds


def _timestamps(values: pa.Array, kind: pa.DataType) -> pa.Array:
    try:
        return pc.cast(values, kind)
    except pa.ArrowInvalid:
        likely = pc.match_substring_regex(values, r"^\d{4}-\d\d-\d\d")
        return cast_or_null(pc.if_else(likely, values, None), kind)
