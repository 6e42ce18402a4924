"""Dates in the notations of people: a format such as ``%d/%m/%Y %H:%M``, or day, month and year in an order to be found."""

import re

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

_CLOCK = r"(?P<H>\d{1,2}):(?P<M>\d{2})(?::(?P<S>\d{2})(?:\.(?P<f>\d{1,9}))?)?(?:\s*(?P<p>[AaPp])\.?[Mm]\.?)?"
_ZONE = r"(?:\s*(?P<z>[Zz]|UTC|GMT|[+-]\d{2}:?\d{2}))?"
_REST = rf"(?:(?:T|,?\s+){_CLOCK}{_ZONE})?$"
# two numbers and a year; which of the two is the day is another question
NUMERIC_DATE = rf"^(?P<a>\d{{1,2}})(?P<sep>[/.\-])(?P<b>\d{{1,2}})[/.\-](?P<Y>\d{{4}}){_REST}"
YEAR_FIRST = rf"^(?P<Y>\d{{4}})[/.\-](?P<m>\d{{1,2}})[/.\-](?P<d>\d{{1,2}}){_REST}"
# 20240531 and 20240531120000: as seconds they would lie in August 1970, as milliseconds in the years 2605 to 2636
_DIGITS = r"(?:19|20)\d{2}(?:0[1-9]|1[0-2])(?:0[1-9]|[12]\d|3[01])"
COMPACT_DATE = rf"^{_DIGITS}$"
COMPACT_TIME = rf"^{_DIGITS}(?:[01]\d|2[0-3])[0-5]\d[0-5]\d$"

_MONTHS = ("jan", "feb", "mar", "apr", "may", "jun", "jul", "aug", "sep", "oct", "nov", "dec")
_DIRECTIVES = {
    "Y": r"(?P<Y>\d{4})",
    "y": r"(?P<y>\d{2})",
    "m": r"(?P<m>\d{1,2})",
    "d": r"(?P<d>\d{1,2})",
    "b": r"(?P<b>[A-Za-z]{3,9})\.?",
    "H": r"(?P<H>\d{1,2})",
    "I": r"(?P<H>\d{1,2})",
    "M": r"(?P<M>\d{1,2})",
    "S": r"(?P<S>\d{1,2})",
    "f": r"(?P<f>\d{1,9})",
    "p": r"(?P<p>[AaPp])\.?[Mm]\.?",
    "z": r"(?P<z>[Zz]|UTC|GMT|[+-]\d{2}:?\d{2})",
    "a": r"[A-Za-z]{2,9}\.?",
}
_SAME = {"B": "b", "h": "b", "A": "a", "e": "d", "Z": "z"}
_SHORT = {"T": "%H:%M:%S", "R": "%H:%M", "F": "%Y-%m-%d", "D": "%m/%d/%y"}


class DateFormat:
    """Dates of one notation, read strictly: a day that its month does not have is none.

    Args:
        pattern: a regular expression for whole strings with the groups ``Y`` or ``y``, ``m`` or ``b``, ``d``, and any of
            ``H``, ``M``, ``S``, ``f``, ``p``, ``z``.
        shown: the notation for people.
    """

    def __init__(self, pattern: str, shown: str) -> None:
        self.pattern, self.shown = pattern, shown
        self._groups = set(re.compile(pattern).groupindex)

    @classmethod
    def of(cls, form: str) -> "DateFormat":
        """Parse a format of ``strptime``.

        Raises:
            ValueError: if it holds an unknown directive, one twice, or no year, month and day.
        """
        expanded = re.sub(r"%([TRFD])", lambda short: _SHORT[short.group(1)], form)
        pattern, used = "", []
        for part in re.findall(r"%.?|\s+|[^%\s]", expanded, re.DOTALL):
            if part.isspace():
                pattern += r"\s+"
            elif not part.startswith("%"):
                pattern += re.escape(part)
            elif part == "%%":
                pattern += "%"
            else:
                name = _SAME.get(part[1:], part[1:])
                if name not in _DIRECTIVES:
                    raise _wrong(form, f"{part!r} is not known")
                used.append({"I": "H", "y": "Y", "b": "m"}.get(name, name))
                pattern += _DIRECTIVES[name]
        missing = [f"%{name}" for name in "Ymd" if name not in used]
        if missing or len(set(used)) < len(used):
            raise _wrong(form, f"{' and '.join(missing)} is missing" if missing else "a part of the date occurs twice")
        return cls(f"^{pattern}$", form)

    def seconds(self, values: pa.Array) -> tuple[np.ndarray, np.ndarray]:
        """Read trimmed strings.

        Returns:
            Seconds since 1970-01-01 UTC, float64 ``[rows]``, NaN where a string is missing or of another notation; and
            bool ``[rows]``: whether the string names its zone.
        """
        found = pc.extract_regex(values, self.pattern)
        parts = {name: pc.struct_field(found, name) for name in self._groups}
        valid = found.is_valid().to_numpy(zero_copy_only=False)

        def number(name: str, default: int) -> np.ndarray:
            if name not in parts:
                return np.full(len(values), default, dtype=np.int64)
            text = pc.if_else(pc.equal(parts[name], ""), None, parts[name])
            return pc.cast(text, pa.int64()).fill_null(default).to_numpy(zero_copy_only=False)

        year = number("Y", 1970)
        if "y" in parts:
            year = number("y", 70)
            year = np.where(year < 69, year + 2000, year + 1900)  # as POSIX does
        month, day = number("m", 1), number("d", 1)
        if "b" in parts:
            start = pc.utf8_lower(pc.utf8_slice_codeunits(parts["b"], 0, 3))
            place = pc.index_in(start, value_set=pa.array(_MONTHS)).fill_null(-1)
            month = place.to_numpy(zero_copy_only=False).astype(np.int64) + 1
        valid &= (month >= 1) & (month <= 12) & (year >= 1)
        months = (np.where(valid, year, 1970) - 1970) * 12 + np.where(valid, month, 1) - 1
        days = months.astype("datetime64[M]").astype("datetime64[D]") + (day - 1)
        valid &= (day >= 1) & (days.astype("datetime64[M]") == months.astype("datetime64[M]"))
        hour, minute, second = number("H", 0), number("M", 0), number("S", 0)
        if "p" in parts:
            half = pc.utf8_lower(parts["p"]).fill_null("").to_numpy(zero_copy_only=False)
            told = half != ""
            valid &= ~told | ((hour >= 1) & (hour <= 12))
            hour = np.where(told, hour % 12 + np.where(half == "p", 12, 0), hour)
        valid &= (hour < 24) & (minute < 60) & (second < 60)
        seconds = days.astype(np.int64) * 86400.0 + hour * 3600 + minute * 60 + second
        if "f" in parts:
            text = pc.binary_join_element_wise("0.", parts["f"], "0", "").fill_null("0")
            seconds = seconds + pc.cast(text, pa.float64()).to_numpy(zero_copy_only=False)
        zoned = np.zeros(len(values), dtype=bool)
        if "z" in parts:
            offset, zoned = _offsets(parts["z"])
            seconds = seconds - offset
        return np.where(valid, seconds, np.nan), zoned


def _offsets(zone: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Seconds east of Greenwich, and where a zone stands at all."""
    zone = zone.fill_null("")
    parts = pc.extract_regex(zone, r"^(?P<sign>[+-])(?P<h>\d{2}):?(?P<m>\d{2})$")
    hours, minutes = (
        pc.cast(pc.struct_field(parts, name), pa.int64()).fill_null(0).to_numpy(zero_copy_only=False) for name in "hm"
    )
    west = pc.equal(pc.struct_field(parts, "sign"), "-").fill_null(False).to_numpy(zero_copy_only=False)
    return np.where(west, -1, 1) * (hours * 3600 + minutes * 60), pc.not_equal(zone, "").to_numpy(zero_copy_only=False)


def _wrong(form: str, why: str) -> ValueError:
    return ValueError(
        f"time_format {form!r}: {why}. Write it as for Python's strptime, with %Y %m %d (or %b for Jan, Feb, ...), and "
        "where they occur %H %M %S %f %p %z; for example '%d/%m/%Y %H:%M'."
    )


def day_and_month(values: pa.Array) -> tuple[np.ndarray, np.ndarray]:
    """Read the first and second number of dates such as 5/31/2024, int64 ``[rows]`` each; 0 for other strings."""
    found = pc.extract_regex(values, NUMERIC_DATE)
    first, second = (
        pc.cast(pc.struct_field(found, name), pa.int64()).fill_null(0).to_numpy(zero_copy_only=False) for name in "ab"
    )
    return first, second


def numeric_format(day_first: bool) -> DateFormat:
    """Build the format of dates such as 31/05/2024 12:00, with slashes, points or hyphens and with or without a clock."""
    day, month = ("a", "b") if day_first else ("b", "a")
    pattern = NUMERIC_DATE.replace("(?P<sep>", "(?:")
    for group, name in ((day, "d"), (month, "m")):
        pattern = pattern.replace(f"(?P<{group}>", f"(?P<{name}>")
    return DateFormat(pattern, "day/month/year" if day_first else "month/day/year")


def compact_format(with_clock: bool) -> DateFormat:
    """Build the format of dates such as 20240531, or 20240531120000."""
    date = r"(?P<Y>\d{4})(?P<m>\d{2})(?P<d>\d{2})"
    clock = r"(?P<H>\d{2})(?P<M>\d{2})(?P<S>\d{2})"
    return DateFormat(f"^{date}{clock}$" if with_clock else f"^{date}$", "year, month and day without separators")
