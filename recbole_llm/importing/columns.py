"""Which column of the interactions is which: by flag, by name, by content."""

import re
import unicodedata
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from recbole_llm.importing.names import (
    EVENT_NAMES,
    ITEM_NAMES,
    LABEL_NAMES,
    RATING_NAMES,
    TIME_NAMES,
    USER_NAMES,
    WEAK_NAMES,
)
from recbole_llm.importing.numbers import LabelReader, NumberReader
from recbole_llm.importing.table import INDEX, Batch, Source
from recbole_llm.importing.times import TimeReader
from recbole_llm.importing.values import trimmed

# "shipped_at", "orderTime", "EVENT DATE": of unknown names, those that end in such a word
_TIME_ENDING = re.compile(
    r"(?:^|[^a-zA-Z])(?i:at|on|ts|date|time|datetime|timestamp|day)$|(?<=[a-z])(?:At|On|Date|Time|DateTime|Timestamp|Day)$"
)
# seconds, 1973; what is smaller may be a duration
_FIRST_TIME = 1e8
_YEAR = re.compile(r"(1[5-9]|20|21)\d\d")


@dataclass(frozen=True)
class InteractionColumns:
    """Columns of the interactions; an empty string where there is none.

    Attributes:
        others: columns with a known name that were not taken, to why.
    """

    user: str
    item: str
    rating: str = ""
    label: str = ""
    time: str = ""
    weight: str = ""
    event: str = ""
    others: dict[str, str] = field(default_factory=dict)

    def used(self) -> list[str]:
        """List the columns that are there, in the order of the atomic file; the weights may be the ratings."""
        names = (self.user, self.item, self.rating, self.label, self.time, self.weight, self.event)
        return list(dict.fromkeys(name for name in names if name))


def simple_name(name: str) -> str:
    """Reduce a column's name to lower case, letters and digits of any script."""
    return re.sub(r"[\W_]+", "", unicodedata.normalize("NFKC", name).casefold())


def by_name(names: Iterable[str], known: Sequence[str]) -> list[str]:
    """Find those of ``names`` that are known, in the order of ``known``."""
    ranked = [(known.index(simple_name(name)), name) for name in names if simple_name(name) in known]
    return [name for _, name in sorted(ranked, key=lambda pair: pair[0])]


def require(source: Source, flag: str, name: str) -> str:
    """Return ``name`` if it is a column of ``source``.

    Raises:
        ValueError: naming the flag and the columns there are.
    """
    if source.unused.get(name) == INDEX:  # nobody's data, unless somebody says so
        del source.unused[name]
        source.names.append(name)
    if name not in source.names:
        raise source.error(f"{flag} names {name!r}, and the columns are {listed(source)}.")
    return name


def listed(source: Source) -> str:
    """List the columns of a table for a message; of very many the first."""
    shown = [repr(name) for name in source.names[:50]] + (["..."] if len(source.names) > 50 else [])
    unreadable = "".join(f"; not usable: {name} ({why})" for name, why in list(source.unused.items())[:10])
    return ", ".join(shown) + unreadable


@dataclass(frozen=True)
class Notation:
    """How values are written, where it was told.

    Attributes:
        decimal: the decimal sign, ``.`` or ``,``.
        time_unit: ``s``, ``ms``, ``us``, ``ns`` or ``iso``.
        time_format: a format of ``strptime``.
    """

    decimal: str | None = None
    time_unit: str | None = None
    time_format: str | None = None


_KNOWN = {
    "user": USER_NAMES,
    "item": ITEM_NAMES,
    "label": LABEL_NAMES,
    "rating": RATING_NAMES,
    "time": TIME_NAMES,
    "event": EVENT_NAMES,
}
_EXPECTED = {
    "label": "1 and 0, 1 and -1, true and false, or yes and no",
    "rating": "a number (--decimal says which sign stands before its decimals)",
    "time": "a count since 1970, an ISO date, or a date whose form --time-format gives, such as '%d.%m.%Y %H:%M'",
}


def interaction_columns(
    source: Source, first: Batch, flags: Mapping[str, str | None], notation: Notation
) -> InteractionColumns:
    """Find the columns of the interactions.

    Args:
        source: the interactions.
        first: their first rows, all columns.
        flags: ``user``, ``item``, ``rating``, ``label``, ``time``, ``event``: a name, ``None`` to look for it, "" for none.
            ``weight``: a name, or nothing.
        notation: how values are written.

    Raises:
        ValueError: if user or item is not found, a flag names no column, two flags name the same, or a column with the
            name of ratings, labels or times holds something else.
    """
    found, weight = _given(source, flags)
    others: dict[str, str] = {}
    for role, known in _KNOWN.items():
        if flags.get(role, "" if role == "event" else None) is not None:  # events are looked for if they have weights
            continue
        named = by_name([name for name in source.names if name not in found.values()], known)
        if role in ("user", "item", "event"):
            fitting = [name for name in named if simple_name(name) not in WEAK_NAMES or _repeats(first, name)]
        else:
            fitting = _readable(source, role, first, named, notation)
        if fitting:
            found[role] = fitting[0]
            others |= {name: f"the {role} is read from {fitting[0]}" for name in named if name != fitting[0]}
    if flags.get("time") is None and "time" not in found:
        free = [name for name in source.names if name not in found.values() and _TIME_ENDING.search(name)]
        fitting = [name for name in free if _is_moment(first, name, notation)]
        if len(fitting) == 1:  # of several nobody knows which one counts; the report lists them
            found["time"] = fitting[0]
    if flags.get("event", "") is None and "event" not in found:
        raise source.error(
            f"--event-weights: which column holds the events? Give --event-column. There are {listed(source)}."
        )
    for role in ("user", "item"):
        if not found.get(role):
            example = {name: first.columns[name][0].as_py() if len(first.lines) else None for name in source.names[:50]}
            raise source.error(
                f"which column holds the {role}s? Give --{role}-column. The columns are {listed(source)}; the "
                f"first row is {example}. If that is data and not a header, put a line with the columns' names on top."
            )
    taken = {*found.values(), weight}
    return InteractionColumns(
        **found, weight=weight, others={name: why for name, why in others.items() if name not in taken}
    )


def _given(source: Source, flags: Mapping[str, str | None]) -> tuple[dict[str, str], str]:
    """The columns that flags name, and that of the weights, which may be another one's too."""
    found = {role: require(source, f"--{role}-column", name) for role, name in flags.items() if name}
    weight = found.pop("weight", "")
    if len(set(found.values())) < len(found):
        raise source.error(
            f"one column was given for two purposes: {', '.join(f'--{r}-column {n}' for r, n in found.items())}."
        )
    return found, weight


def _repeats(first: Batch, name: str) -> bool:
    """Whether a value occurs twice among the first ones: the number of a row does not."""
    values = first.columns[name].drop_null()
    return len(values.unique()) < len(values)


def _readable(source: Source, role: str, first: Batch, named: Sequence[str], notation: Notation) -> list[str]:
    """Those of the columns with the name of a rating, label or time that hold such values.

    Raises:
        ValueError: if there are such columns and most values of each are something else.
    """
    unreadable = {name: _unread(role, first, name, notation) for name in named}
    fitting = [name for name, place in unreadable.items() if place is None]
    for name, place in unreadable.items() if not fitting else ():
        if place is not None and place >= 0:
            raise source.error(
                f"{source.unit} {first.lines[place]}: the column {name!r} has the name of a {role}, and "
                f"{first.columns[name][place].as_py()[:60]!r} is none: expected is {_EXPECTED[role]}. Correct the values, name "
                f"another column with --{role}-column, or give --{role}-column '' to leave it out."
            )
    return fitting


def _unread(role: str, first: Batch, name: str, notation: Notation) -> int | None:
    """The place of the first value that is no rating, label or time, if most are not; -1 if there is no value at all."""
    values = trimmed(first.columns[name])
    filled = values.is_valid().to_numpy(zero_copy_only=False)
    if not filled.any():
        return -1
    if role == "time":
        reader = TimeReader.detect(values, notation.time_unit, notation.time_format)
        if reader is not None and reader.is_undecided:
            reader.settle(values)
        read = np.zeros(len(values), dtype=bool) if reader is None else np.isfinite(reader.seconds(values))
    elif role == "label":
        read = LabelReader().read(values) >= 0
    else:
        read = np.isfinite(NumberReader(notation.decimal).read(values))
    return None if 2 * int(read.sum()) >= int(filled.sum()) else int(np.flatnonzero(filled & ~read)[0])


def _is_moment(first: Batch, name: str, notation: Notation) -> bool:
    """Whether the first values of a column are dates, or counts since 1970 that are too large for durations."""
    values = trimmed(first.columns[name]).drop_null()
    reader = TimeReader.detect(values)
    if reader is None and notation.time_format is not None:
        reader = TimeReader.detect(values, form=notation.time_format)
        return reader is not None and 2 * int(np.isfinite(reader.seconds(values)).sum()) >= len(values) > 0
    return reader is not None and (reader.is_date or float(np.nanmedian(reader.seconds(values))) >= _FIRST_TIME)


def field_names(columns: Sequence[str], taken: Iterable[str], prefix: str, source: Source) -> dict[str, str]:
    """Make names for RecBole: letters (with their marks), digits and underscores.

    A name among ``taken`` gets ``prefix`` in front.

    Raises:
        ValueError: if two columns get the same name.
    """
    used = set(taken)
    found: dict[str, str] = {}
    for column in columns:
        name = "".join(c if c.isalnum() or unicodedata.category(c).startswith("M") else "_" for c in column)
        name = re.sub("_+", "_", name).strip("_") or "column"
        if name in used:
            name = prefix + name
        if name in found.values() or name in used:
            other = next((c for c, n in found.items() if n == name), name)
            raise source.error(f"the columns {other!r} and {column!r} would both be called {name!r}. Rename one.")
        found[column] = name
    return found


def is_amount(name: str, sample: Sequence[str]) -> bool:
    """Return whether numbers are amounts, to be stored as float, and neither codes (ids, postal codes) nor years."""
    simple = simple_name(name)
    coded = simple.endswith(("id", "code", "zip", "isbn", "phone", "sku", "ean", "upc", "gtin"))
    years = "year" in simple and all(map(_YEAR.fullmatch, sample))
    return not coded and not years
