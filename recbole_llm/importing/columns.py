"""Which column is which: by flag, by name, by content."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from recbole_llm.importing.table import Batch, Source
from recbole_llm.importing.values import TimeReader, labels, numbers, trimmed


def _words(text: str) -> tuple[str, ...]:
    return tuple(text.split())


# names of public datasets and of common exports, in order of preference; in lower case, letters and digits only
USER_NAMES = _words(
    "userid user uid reviewerid customerid visitorid memberid accountid clientid profileid playerid readerid buyerid "
    "customer visitor username reviewer sessionid session"
)
ITEM_NAMES = _words(
    "itemid item iid parentasin asin productid movieid bookid newsid articleid artistid trackid songid videoid gameid "
    "appid businessid recipeid courseid jobid postid adid contentid isbn sku product movie book news article artist "
    "track song id"
)
RATING_NAMES = _words(
    "rating ratings overall score stars star ratingvalue reviewrating reviewscore bookrating userrating"
)
LABEL_NAMES = _words("label click clicked isclick isclicked liked islike target")
TIME_NAMES = _words(
    "timestamp time unixreviewtime datetime eventtime eventtimestamp createdat date ts reviewdate ratedat viewedat "
    "purchasedat orderdate ratingtimestamp"
)

# "shipped_at", "orderTime", "EVENT DATE": of unknown names, those that end in such a word
_TIME_ENDING = re.compile(
    r"(?:^|[^a-zA-Z])(?i:at|on|ts|date|time|datetime|timestamp|day)$|(?<=[a-z])(?:At|On|Date|Time|DateTime|Timestamp|Day)$"
)
# seconds, 1973; what is smaller may be a duration
_FIRST_TIME = 1e8
_YEAR = re.compile(r"(1[5-9]|20|21)\d\d")


@dataclass(frozen=True)
class InteractionColumns:
    """Columns of the interactions; an empty string where there is none."""

    user: str
    item: str
    rating: str = ""
    label: str = ""
    time: str = ""

    def used(self) -> list[str]:
        """The columns that are there, in the order of the atomic file."""
        return [name for name in (self.user, self.item, self.rating, self.label, self.time) if name]


def simple_name(name: str) -> str:
    """A column's name in lower case, letters and digits only."""
    return re.sub(r"[^0-9a-z]", "", name.lower())


def _by_name(names: Iterable[str], known: Sequence[str]) -> list[str]:
    ranked = [(known.index(simple_name(name)), name) for name in names if simple_name(name) in known]
    return [name for _, name in sorted(ranked, key=lambda pair: pair[0])]


def require(source: Source, flag: str, name: str) -> str:
    """``name`` if it is a column of ``source``.

    Raises:
        ValueError: naming the flag and the columns there are.
    """
    if name not in source.names:
        raise source.error(f"{flag} names {name!r}, and the columns are {_listed(source)}.")
    return name


def _listed(source: Source) -> str:
    unreadable = "".join(f"; not usable: {name} ({why})" for name, why in source.unused.items())
    return ", ".join(map(repr, source.names)) + unreadable


def interaction_columns(source: Source, first: Batch, flags: Mapping[str, str | None]) -> InteractionColumns:
    """Find the columns of the interactions.

    Args:
        source: the interactions.
        first: their first rows, all columns.
        flags: ``user``, ``item``, ``rating``, ``label``, ``time``: a name, ``None`` to look for it, "" for none.

    Raises:
        ValueError: if user or item is not found, a flag names no column, or two flags name the same.
    """
    found: dict[str, str] = {}
    for role, name in flags.items():
        if name:
            found[role] = require(source, f"--{role}-column", name)
    if len(set(found.values())) < len(found):
        raise source.error(
            f"one column was given for two purposes: {', '.join(f'--{r}-column {n}' for r, n in found.items())}."
        )
    for role, known in (
        ("user", USER_NAMES),
        ("item", ITEM_NAMES),
        ("label", LABEL_NAMES),
        ("rating", RATING_NAMES),
        ("time", TIME_NAMES),
    ):
        if flags.get(role) is not None:
            continue
        free = [name for name in source.names if name not in found.values()]
        fitting = [name for name in _by_name(free, known) if role in ("user", "item") or _holds(role, first, name)]
        if fitting:
            found[role] = fitting[0]
    if flags.get("time") is None and "time" not in found:
        free = [name for name in source.names if name not in found.values() and _TIME_ENDING.search(name)]
        fitting = [name for name in free if _is_moment(first, name)]
        if len(fitting) == 1:  # of several nobody knows which one counts; the report lists them
            found["time"] = fitting[0]
    for role in ("user", "item"):
        if not found.get(role):
            example = {name: first.columns[name][0].as_py() if len(first.lines) else None for name in source.names}
            raise source.error(
                f"which column holds the {role}s? Give --{role}-column. The columns are {_listed(source)}; the "
                f"first row is {example}. If that is data and not a header, put a line with the columns' names on top."
            )
    return InteractionColumns(**found)


def _holds(role: str, first: Batch, name: str) -> bool:
    """Whether half of the first values of a column are ratings, labels or times."""
    values = trimmed(first.columns[name]).drop_null()
    if not len(values):
        return False
    if role == "time":
        return TimeReader.detect(values) is not None
    if role == "label":
        return bool((labels(values) >= 0).all())
    return 2 * int(np.isfinite(numbers(values)).sum()) >= len(values)


def _is_moment(first: Batch, name: str) -> bool:
    """Whether the first values of a column are dates, or counts since 1970 that are too large for durations."""
    values = trimmed(first.columns[name]).drop_null()
    reader = TimeReader.detect(values)
    return reader is not None and (reader.unit == "iso" or float(np.nanmedian(reader.seconds(values))) >= _FIRST_TIME)


def id_column(source: Source, first: Batch, known: pa.Array, same_name: str, aliases: Sequence[str], flag: str) -> str:
    """The id column of items or users: that of the interactions' name, that with the most known ids, or by its name.

    Args:
        source: the items or users.
        first: their first rows, all columns.
        known: ids of the interactions.
        same_name: the interactions' column.
        aliases: ``USER_NAMES`` or ``ITEM_NAMES``.
        flag: the flag that settles it.

    Raises:
        ValueError: if none is found.
    """
    hits = {name: pc.sum(pc.is_in(first.columns[name], value_set=known)).as_py() or 0 for name in source.names}
    most = max(hits.values())
    candidates = [
        name for name in [same_name, *_by_name(source.names, aliases), *source.names] if hits.get(name) == most
    ]
    if most == 0:  # only new ids among the first rows, or another form of the ids
        candidates = [name for name in source.names if name == same_name] or _by_name(source.names, aliases)
    if not candidates:
        raise source.error(
            f"which column holds the ids? None of {_listed(source)} holds ids of the interactions. Give {flag}."
        )
    return candidates[0]


def field_names(columns: Sequence[str], taken: Iterable[str], prefix: str, source: Source) -> dict[str, str]:
    """Names for RecBole: letters, digits and underscores, none of ``taken`` (those get ``prefix`` in front).

    Raises:
        ValueError: if two columns get the same name.
    """
    used = set(taken)
    found: dict[str, str] = {}
    for column in columns:
        name = re.sub(r"\W+", "_", column).strip("_") or "column"
        if name in used:
            name = prefix + name
        if name in found.values() or name in used:
            other = next((c for c, n in found.items() if n == name), name)
            raise source.error(f"the columns {other!r} and {column!r} would both be called {name!r}. Rename one.")
        found[column] = name
    return found


def is_amount(name: str, sample: Sequence[str]) -> bool:
    """Whether numbers are amounts, to be stored as float, and neither codes (ids, postal codes) nor years."""
    simple = simple_name(name)
    coded = simple.endswith(("id", "code", "zip", "isbn", "phone", "sku", "ean", "upc", "gtin"))
    years = "year" in simple and all(map(_YEAR.fullmatch, sample))
    return not coded and not years
