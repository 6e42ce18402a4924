"""Texts of cells; what RecBole's reader would lose is told from what it keeps."""

import html
import html.entities
import re
import unicodedata
from collections.abc import Iterable
from functools import lru_cache
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

# what pandas, and so RecBole, reads as a missing value (pandas._libs.parsers.STR_NA_VALUES)
NA_STRINGS = frozenset(
    re.split(",", "#N/A,#N/A N/A,#NA,-1.#IND,-1.#QNAN,-NaN,-nan,1.#IND,1.#QNAN,<NA>,N/A,NA,NULL,NaN,None,n/a,nan,null")
)


def trimmed(values: pa.Array) -> pa.Array:
    """Trim strings; null where nothing or a word for a missing value is left."""
    values = pc.utf8_trim_whitespace(values)
    absent = pc.or_(pc.equal(values, ""), pc.is_in(values, value_set=pa.array(sorted(NA_STRINGS))))
    return pc.if_else(absent, None, values)


_TAG_NAMES = (
    "a|abbr|address|article|aside|b|big|blockquote|body|br|center|cite|code|dd|del|div|dl|dt|em|figcaption|figure|font|"
    "footer|form|h[1-6]|head|header|hr|html|i|iframe|img|input|ins|label|li|link|main|mark|meta|nav|object|ol|option|p|param|pre|"
    "q|s|section|select|small|span|strike|strong|sub|sup|table|tbody|td|tfoot|th|thead|title|tr|tt|u|ul|video|wbr"
)
_HIDDEN = re.compile(r"<!--|<(script|style)\b[^<>]*>", re.IGNORECASE)
_ENDS = {
    "comment": re.compile("-->"),
    "script": re.compile(r"</script\s*>", re.IGNORECASE),
    "style": re.compile(r"</style\s*>", re.IGNORECASE),
}
# only HTML's own names: "x <y and z> 2" is not a tag
_TAG = re.compile(rf"</?(?:{_TAG_NAMES})(?:\s[^<>]*)?/?>", re.IGNORECASE)
_INLINE = re.compile(r"</?(?:a|abbr|b|big|em|font|i|mark|s|small|span|strong|sub|sup|tt|u|wbr)[\s/>]", re.IGNORECASE)
# Python refuses to read an integer of thousands of digits
_ENTITY = re.compile(r"&(?:#\d{1,8}|#[xX][0-9a-fA-F]{1,8}|[a-zA-Z][a-zA-Z0-9]*);")
_CONTROL = re.compile("[\x00-\x08\x0e-\x1b\x7f-\x84\x86-\x9f\ufeff\ufffe\uffff\ud800-\udfff]")
_SPACE = re.compile(r"\s+")


def clean_text(text: str, keep_html: bool = False) -> str:
    """Clean a text to one line: no HTML tags and entities, control characters and runs of white space; Unicode's form NFC.

    Args:
        text: any string.
        keep_html: leave tags and entities as they are.
    """
    if not keep_html and ("<" in text or "&" in text):
        text = _without_html(text)
    text = _CONTROL.sub("", text)
    if not text.isascii() and not (len(text) > _LONG and _marks().search(text)):
        text = unicodedata.normalize("NFC", text)
    return _SPACE.sub(" ", text).strip()


# characters; in shorter texts the square of a run's length is nothing
_LONG = 2000


@lru_cache(maxsize=1)
def _marks() -> re.Pattern[str]:
    """A run of combining marks that no language has: Python takes the square of its length to sort it."""
    marks = [code for code in range(0x300, 0x110000) if unicodedata.combining(chr(code))]
    ends = [code for code in marks if not unicodedata.combining(chr(code + 1))]
    starts = [code for code in marks if not unicodedata.combining(chr(code - 1))]
    ranges = "".join(f"{chr(start)}-{chr(end)}" for start, end in zip(starts, ends, strict=True))
    return re.compile(f"[{ranges}]{{200}}")


def _without_html(text: str) -> str:
    for _ in range(2):  # twice: shops store "&lt;br&gt;" and "&amp;eacute;"
        text = _without_hidden(text)
        text = _TAG.sub(lambda tag: "" if _INLINE.match(tag.group()) else " ", text)
        plain = _ENTITY.sub(_character, text)
        if plain == text:
            break
        text = plain
    return text


def _without_hidden(text: str) -> str:
    """A text without comments, scripts and styles.

    One regular expression would look for the end of a comment that never ends from each of its beginnings.
    """
    parts: list[str] = []
    endless: set[str] = set()
    at = 0
    while begin := _HIDDEN.search(text, at):
        kind = (begin.group(1) or "comment").lower()
        end = None if kind in endless else _ENDS[kind].search(text, begin.end())
        if end is None:
            endless.add(kind)
            parts.append(text[at : begin.end()])
            at = begin.end()
        else:
            parts += [text[at : begin.start()], " "]
            at = end.end()
    return "".join([*parts, text[at:]])


def _character(entity: re.Match[str]) -> str:
    name = entity.group()[1:]
    # html.unescape alone reads "&nothing;" as "&not" and "hing;"
    return html.unescape(entity.group()) if name.startswith("#") else html.entities.html5.get(name, entity.group())


def protected(cell: str) -> str:
    """Change a cell so that RecBole's reader keeps it: a space goes before a leading quote, or before a word read as missing.

    RecBole splits ``token_seq`` at spaces and drops empty parts; our reader strips cells: to both it is the same text.
    """
    return f" {cell}" if cell.startswith('"') or cell in NA_STRINGS else cell


def quantiles(values: Iterable[int] | Any) -> dict[str, float]:
    """Compute smallest, mean, median, 95th percentile and largest value; empty for none."""
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
