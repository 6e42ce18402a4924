"""The id column of items or users: by its name first, by its values where no name tells, and never one that repeats."""

from collections.abc import Sequence
from dataclasses import dataclass, field

import pyarrow as pa
import pyarrow.compute as pc

from recbole_llm.identifiers import MAX_ID_CHARACTERS
from recbole_llm.importing.columns import by_name, listed, simple_name
from recbole_llm.importing.names import ITEM_NAMES, USER_NAMES, WEAK_NAMES
from recbole_llm.importing.table import Batch, Source, is_nameless

# columns whose values are compared with the ids of the interactions, beside those with a known name
MOST_COMPARED = 200
# a key of a known name may repeat a few times (the same item on two lines), and not more often than not
_LEAST_DISTINCT = 0.5


@dataclass
class _Values:
    """What is known of a column.

    Attributes:
        rows: cells that are not empty.
        distinct: different ones among them.
        hits: ids of the interactions among those.
    """

    rows: int = 0
    distinct: int = 0
    hits: int = 0
    chunks: list[pa.Array] = field(default_factory=list)

    @property
    def is_unique(self) -> bool:
        return self.rows > 0 and self.distinct == self.rows

    @property
    def is_key(self) -> bool:
        return self.rows > 0 and self.distinct >= _LEAST_DISTINCT * self.rows

    def settle(self, known: pa.Array) -> None:
        """Count what ``chunks`` hold, and let them go."""
        values = pa.chunked_array(self.chunks, pa.string()).unique() if self.chunks else pa.array([], pa.string())
        self.distinct = len(values)
        self.hits = pc.sum(pc.is_in(values, value_set=known)).as_py() or 0
        self.chunks = []


@dataclass(frozen=True)
class Key:
    """The id column.

    Attributes:
        name: the column.
        note: why it was taken, and against what, as a sentence.
    """

    name: str
    note: str


def find_key(source: Source, first: Batch, known: pa.Array, same_name: str, kind: str) -> Key:
    """Find the id column of items or users.

    A column with the name of the interactions' column is taken if its values are unique and one of them is an id of the
    interactions. Otherwise the whole file is read to find, of the columns that are unique, the one that holds their ids.

    Args:
        source: the items or users.
        first: their first rows, all columns.
        known: ids of the interactions.
        same_name: the interactions' column.
        kind: ``item`` or ``user``.

    Raises:
        ValueError: if there is none, or two that fit equally.
    """
    aliases = by_name(source.names, ITEM_NAMES if kind == "item" else USER_NAMES)
    same = [name for name in source.names if name == same_name]
    same = same or [name for name in source.names if simple_name(name) == simple_name(same_name) != ""]
    named = list(dict.fromkeys([*same, *aliases]))
    compared = [*named, *(name for name in source.names if name not in named and not is_nameless(name))]
    values = {name: _of_first(first, name, known) for name in compared[: MOST_COMPARED + len(named)]}
    if not (same and values[same[0]].is_unique and values[same[0]].hits):
        unique = [name for name in values if values[name].is_unique]
        looked_at = list(dict.fromkeys([*named, *([name for name in unique if values[name].hits] or unique)]))
        values |= _of_all(source, looked_at, named, known)
        chosen = _choose(source, {name: values[name] for name in looked_at}, same, aliases, kind)
    else:
        chosen = same[0]
    why = "has the name of the interactions' column" if chosen in same else "has the name of an id"
    if chosen not in named:
        why = f"holds {values[chosen].hits:,} of the {len(known):,} ids of the interactions"
    return Key(chosen, f"ids are read from {chosen!r}, which {why}{_rivals(chosen, values)}.")


def check_key(source: Source, name: str, rows: int, distinct: int, kind: str) -> None:
    """Refuse a column whose values repeat more often than not: it holds groups of items, not items.

    Raises:
        ValueError: names the column, and the option that takes it all the same.
    """
    if distinct < _LEAST_DISTINCT * rows:
        raise source.error(
            f"the column {name!r} has the name of an id, and its {rows:,} rows hold only {distinct:,} different ones: no key "
            f"of {kind}s. Name the id column with --{kind}s-id-column; --{kind}s-id-column {name!r} keeps one row of each."
        )


def _of_first(first: Batch, name: str, known: pa.Array) -> _Values:
    cells = _filled(first.columns[name])
    found = _Values(rows=len(cells), chunks=[cells])
    found.settle(known)
    return found


def _filled(cells: pa.Array) -> pa.Array:
    return cells.filter(pc.not_equal(cells, ""))


def _of_all(source: Source, names: Sequence[str], named: Sequence[str], known: pa.Array) -> dict[str, _Values]:
    """The same for the whole file. Columns without a known name are dropped at the first repeat, or the first long text."""
    found = {name: _Values() for name in names}
    open_ = set(names)
    for batch in source.batches(list(names)) if names else ():
        for name in list(open_):
            cells = _filled(batch.columns[name])
            distinct = cells.unique()
            found[name].rows += len(cells)
            found[name].chunks.append(distinct)
            long = len(cells) and pc.max(pc.binary_length(distinct)).as_py() > 4 * MAX_ID_CHARACTERS
            if name not in named and (long or len(distinct) < len(cells)):
                found[name] = _Values()
                open_.remove(name)
    for values in found.values():
        values.settle(known)
    return found


def _choose(source: Source, values: dict[str, _Values], same: Sequence[str], aliases: Sequence[str], kind: str) -> str:
    flag = f"--{kind}s-id-column"
    unique = {name: found.hits for name, found in values.items() if found.is_unique}
    best = max(unique.values(), default=0)
    own = values[same[0]] if same else _Values()
    if same and own.is_unique and (own.hits or not best):
        return same[0]
    if same and own.is_key and own.hits and own.hits >= best:  # a few rows repeat
        return same[0]
    if best:
        strong = [name for name in aliases if simple_name(name) not in WEAK_NAMES and 2 * unique.get(name, 0) >= best]
        fitting = strong[:1] or [name for name, hits in unique.items() if 2 * hits >= best]
        if len(fitting) > 1:
            shown = ", ".join(f"{name!r} ({unique[name]:,} of them)" for name in fitting)
            raise source.error(
                f"which column holds the ids? Several hold ids of the interactions: {shown}. Give {flag}."
            )
        return fitting[0]
    for name in [*same, *aliases]:
        if values[name].is_key:
            return name
    repeating = [name for name in [*same, *aliases] if values[name].rows]
    if not repeating and (same or aliases):  # nothing but a header
        return [*same, *aliases][0]
    if repeating:
        check_key(source, repeating[0], values[repeating[0]].rows, values[repeating[0]].distinct, kind)
    raise source.error(
        f"which column holds the ids? None of {listed(source)} holds ids of the interactions, each once. Give {flag}."
    )


def _rivals(chosen: str, values: dict[str, _Values]) -> str:
    """What was not chosen and holds ids of the interactions too, in as many rows or more than a quarter as often."""
    own = values[chosen]
    found = [name for name in values if name != chosen and values[name].hits and 4 * values[name].hits >= own.hits]
    shown = [f"{name!r}{'' if values[name].is_unique else ' (they repeat)'}" for name in found[:3]]
    return f"; not taken, though it holds such ids too: {', '.join(shown)}" if shown else ""
