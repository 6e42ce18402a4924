"""Values of cells: ids, numbers, labels, times, texts; what RecBole's reader would lose is told from what it keeps."""

import html
import html.entities
import re
import unicodedata
from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# what pandas, and so RecBole, reads as a missing value (pandas._libs.parsers.STR_NA_VALUES)
NA_STRINGS = frozenset(
    re.split(",", "#N/A,#N/A N/A,#NA,-1.#IND,-1.#QNAN,-NaN,-nan,1.#IND,1.#QNAN,<NA>,N/A,NA,NULL,NaN,None,n/a,nan,null")
)


def cast_or_null(values: pa.Array, kind: pa.DataType) -> pa.Array:
    """Strings as numbers or times; null for those that are none."""
    try:
        return pc.cast(values, kind)
    except pa.ArrowInvalid:
        if len(values) == 1:
            return pa.nulls(1, kind)
        half = len(values) // 2
        return pa.concat_arrays([cast_or_null(values.slice(0, half), kind), cast_or_null(values.slice(half), kind)])


def trimmed(values: pa.Array) -> pa.Array:
    """Strings without white space around them; null where nothing or a word for a missing value is left."""
    values = pc.utf8_trim_whitespace(values)
    absent = pc.or_(pc.equal(values, ""), pc.is_in(values, value_set=pa.array(sorted(NA_STRINGS))))
    return pc.if_else(absent, None, values)


def numbers(values: pa.Array) -> np.ndarray:
    """Float64 ``[rows]``; NaN where a trimmed string is missing or no finite number."""
    found = cast_or_null(values, pa.float64()).to_numpy(zero_copy_only=False).astype(np.float64, copy=False)
    return np.where(np.isfinite(found), found, np.nan)


_LABELS = {"0": 0, "0.0": 0, "false": 0, "1": 1, "1.0": 1, "true": 1}


def labels(values: pa.Array) -> np.ndarray:
    """Int8 ``[rows]``: 0, 1, or -1 where a trimmed string is neither."""
    encoded = pc.utf8_lower(values).dictionary_encode()
    table = np.array([*(_LABELS.get(value, -1) for value in encoded.dictionary.to_pylist()), -1], dtype=np.int8)
    return table[encoded.indices.fill_null(len(encoded.dictionary)).to_numpy(zero_copy_only=False)]


TIME_UNITS = {"s": 1.0, "ms": 1e3, "us": 1e6, "ns": 1e9}
# a count of seconds is below 1e11 until the year 5138; of milliseconds above it from 1973 on; and so on by 1000
_UNIT_SIZES = [1e11, 1e14, 1e17]
_ZONE = r":\d\d(\.\d+)?Z$|:\d\d(\.\d+)?[+-]\d\d(:?\d\d)?$"


@dataclass
class TimeReader:
    """Times of one column as seconds since 1970-01-01 UTC.

    Attributes:
        unit: ``iso`` for dates, else a key of ``TIME_UNITS``.
        fixed: the unit was given: values of other units' size are not doubted.
        without_zone: dates read as UTC because they name no zone.
    """

    unit: str
    fixed: bool = False
    without_zone: int = 0

    @classmethod
    def detect(cls, values: pa.Array, unit: str | None = None) -> "TimeReader | None":
        """A reader for a column that begins with the trimmed strings ``values``; ``None`` if most are no times."""
        values = values.drop_null()
        if unit is not None:
            return cls(unit, fixed=True)
        if not len(values):
            return None
        found = numbers(values)
        found = found[~np.isnan(found)]
        if 2 * len(found) >= len(values):
            units = np.searchsorted(_UNIT_SIZES, np.abs(found[found != 0]), side="right")
            return cls(list(TIME_UNITS)[np.bincount(units, minlength=1).argmax()])
        reader = cls("iso")
        dates = int(np.isfinite(reader.seconds(values)).sum())
        return cls("iso") if 2 * dates >= len(values) else None

    def seconds(self, values: pa.Array) -> np.ndarray:
        """Float64 ``[rows]`` of trimmed strings; NaN where one is missing, no time, or of another unit's size."""
        if self.unit == "iso":
            return self._dates(values)
        found = numbers(values)
        if not self.fixed:
            unit = np.searchsorted(_UNIT_SIZES, np.abs(found), side="right")
            found = np.where((unit == list(TIME_UNITS).index(self.unit)) | (found == 0), found, np.nan)
        return found / TIME_UNITS[self.unit]

    def _dates(self, values: pa.Array) -> np.ndarray:
        values = pc.replace_substring_regex(values, r"\s*(UTC|GMT|z)$", "Z")
        values = pc.replace_substring_regex(values, r"(\.\d{6})\d+", r"\1")
        zoned = pc.match_substring_regex(values, _ZONE)
        micro = pa.timestamp("us")
        seconds = np.full(len(values), np.nan)
        for kind, mask in ((pa.timestamp("us", "UTC"), zoned), (micro, pc.invert(zoned))):
            rows = mask.fill_null(False).to_numpy(zero_copy_only=False)
            if rows.any():
                found = cast_or_null(values.filter(pa.array(rows)), kind).cast(pa.int64())
                seconds[rows] = found.to_numpy(zero_copy_only=False).astype(np.float64) / 1e6
                if kind is micro:
                    self.without_zone += len(found) - found.null_count
        return seconds


def number_strings(values: np.ndarray) -> pa.Array:
    """Float64 ``[rows]`` as the shortest decimal strings that read back the same; null for NaN."""
    array = pa.array(values, from_pandas=True)
    whole = pc.and_(pc.equal(pc.floor(array), array), pc.less(pc.abs(array), 2.0**53))
    integers = pc.cast(pc.cast(pc.if_else(whole, array, None), pa.int64()), pa.string())
    return pc.coalesce(integers, pc.cast(array, pa.string()))


_TAG_NAMES = (
    "a|abbr|address|article|aside|b|big|blockquote|body|br|center|cite|code|dd|del|div|dl|dt|em|figcaption|figure|font|"
    "footer|form|h[1-6]|head|header|hr|html|i|iframe|img|input|ins|label|li|link|main|mark|meta|nav|object|ol|option|p|param|pre|"
    "q|s|section|select|small|span|strike|strong|sub|sup|table|tbody|td|tfoot|th|thead|title|tr|tt|u|ul|video|wbr"
)
_HIDDEN = re.compile(r"<!--.*?-->|<(script|style)\b[^>]*>.*?</\1\s*>", re.IGNORECASE | re.DOTALL)
# only HTML's own names: "x <y and z> 2" is not a tag
_TAG = re.compile(rf"</?(?:{_TAG_NAMES})(?:\s[^<>]*)?/?>", re.IGNORECASE)
_INLINE = re.compile(r"</?(?:a|abbr|b|big|em|font|i|mark|s|small|span|strong|sub|sup|tt|u|wbr)[\s/>]", re.IGNORECASE)
_ENTITY = re.compile(r"&(?:#\d+|#[xX][0-9a-fA-F]+|[a-zA-Z][a-zA-Z0-9]*);")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff\ud800-\udfff]")
_SPACE = re.compile(r"\s+")


def clean_text(text: str, keep_html: bool = False) -> str:
    """A text in one line: no HTML tags and entities, control characters and runs of white space; Unicode's form NFC.

    Args:
        text: any string.
        keep_html: leave tags and entities as they are.
    """
    if not keep_html and ("<" in text or "&" in text):
        text = _without_html(text)
    text = _CONTROL.sub("", text)
    if not text.isascii():
        text = unicodedata.normalize("NFC", text)
    return _SPACE.sub(" ", text).strip()


def _without_html(text: str) -> str:
    for _ in range(2):  # twice: shops store "&lt;br&gt;" and "&amp;eacute;"
        text = _HIDDEN.sub(" ", text)
        text = _TAG.sub(lambda tag: "" if _INLINE.match(tag.group()) else " ", text)
        plain = _ENTITY.sub(_character, text)
        if plain == text:
            break
        text = plain
    return text


def _character(entity: re.Match[str]) -> str:
    name = entity.group()[1:]
    # html.unescape alone reads "&nothing;" as "&not" and "hing;"
    return html.unescape(entity.group()) if name.startswith("#") else html.entities.html5.get(name, entity.group())


def protected(cell: str) -> str:
    """A cell that RecBole's reader keeps: a space goes before a leading quote, or before a word read as missing.

    RecBole splits ``token_seq`` at spaces and drops empty parts; our reader strips cells: to both it is the same text.
    """
    return f" {cell}" if cell.startswith('"') or cell in NA_STRINGS else cell


def quantiles(values: Iterable[int] | Any) -> dict[str, float]:
    """Smallest, mean, median, 95th percentile and largest value; empty for none."""
    array = np.asarray(values, dtype=np.float64)
    if not array.size:
        return {}
    low, median, high, largest = np.quantile(array, [0, 0.5, 0.95, 1])
    return {
        "min": float(low),
        "mean": float(array.mean()),
        "median": float(median),
        "p95": float(high),
        "max": float(largest),
    }
