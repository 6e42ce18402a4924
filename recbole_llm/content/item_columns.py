"""Columns of the ``.item`` file as vectors: categories, brands, prices, years and dates, each a modality of its own.

    category  x_v = 1 / sqrt(c) for each of the c values v of an item that at least two items have
    number    x_k = exp(-(q - k / K)^2 / (2 w^2)), k = 0 .. K, scaled to length 1; q the item's quantile among the items

Items near in price or year have a product near 1, and far ones near 0, whatever the unit and however skew the numbers are. A cell
that is empty, or holds nothing that another item shares, makes the item absent in this modality. It is never a vector of zeros.
"""

import hashlib
import math
import re
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from datetime import date, datetime

import numpy as np
import torch

from recbole_llm.content.store.feature_table import FeatureTable
from recbole_llm.content.text.atomic_files import AtomicTable

AUTO = "auto"
KINDS = ("category", "number")
PREFIX = "column_"  # of a modality that is a column
MOST_VALUES = 512  # of a category that have a place in its vectors, those of most items
LEAST_ITEMS = 2  # that a value needs: one alone ties its item to no other
STEPS, WIDTH = 16, 0.1  # K and w of the module docstring
FORMAT = 1  # raised when the same column begins to give other vectors

# what "auto" takes
SHARED = 0.5  # least share of the items with a value that share one with another item
ITEMS_OF_A_VALUE = 4  # on average, of a token_seq; words of titles have fewer
NUMBERS = 0.95  # least share of the cells that are numbers or dates

_NUMBER_NAME = re.compile(
    r"(^|_)(year|price|cost|date|time|timestamp|age|count|size|weight|length|duration|pages?|rank)($|_)", re.IGNORECASE
)
_MONEY = re.compile(r"[$€£¥]?\s*(-?\d{1,3}(?:,\d{3})+(?:\.\d+)?|-?\d+(?:\.\d*)?(?:[eE][-+]?\d+)?)\s*[$€£¥%]?")
_DAY = re.compile(r"(\d{4})-(\d{1,2})-(\d{1,2})(?:[T ].*)?")
_DAYS = ("%d-%b-%Y", "%d %B %Y", "%B %d, %Y", "%b %d, %Y", "%Y/%m/%d", "%d.%m.%Y")
_BETWEEN = ("|", ";", ",")  # what may stand between the values of a token_seq beside RecBole's separator
_USES_IT = 0.1  # least share of the cells that hold such a separator


@dataclass(frozen=True)
class ColumnVectors:
    """A column as vectors.

    Attributes:
        name: of the column.
        table: its vectors; the modality is :func:`modality_of` the name.
        line: what was made of it, in words.
    """

    name: str
    table: FeatureTable
    line: str


def modality_of(column: str) -> str:
    """Return the modality's name, a word.

    Example:
        >>> modality_of("release year")
        'column_release_year'
    """
    return PREFIX + re.sub(r"\W", "_", column)


def column_vectors(
    table: AtomicTable,
    tokens: Sequence[str | None],
    wanted: Mapping[str, str] | str,
    taken: Iterable[str] = (),
) -> tuple[list[ColumnVectors], list[str]]:
    """Make vectors of columns.

    Args:
        table: the file.
        tokens: ids in the order wanted; ``None`` is padding.
        wanted: column to ``category``, ``number`` or ``auto``; ``auto`` alone chooses the columns too.
        taken: columns that ``auto`` leaves out, such as those of pictures.

    Returns:
        The vectors in the order of the columns, and why others were left out, in lines for a log.

    Raises:
        ValueError: if a column is not there or says nothing of an item; names the columns.
    """
    rows = [None if token is None else table.row_of.get(token) for token in tokens]
    chooses = isinstance(wanted, str)
    named: Mapping[str, str] = (
        {name: AUTO for name in table.types if name not in (table.id_field, *taken)}
        if isinstance(wanted, str)
        else wanted
    )
    _check_names(named, table)
    found, left = [], []
    for name, kind in named.items():
        if table.types[name] == "float_seq":
            reason = "holds vectors, which are given as item_features_file"
        else:
            cells = [None if row is None else table.columns[name][row] for row in rows]
            kind = _kind(name, table, cells) if kind == AUTO else kind
            made = _numbers(cells) if kind == "number" else _categories(cells, table, name, chooses)
            if isinstance(made, _Made):
                found.append(_described(name, kind, made, tokens))
                continue
            reason = made
        if not chooses:
            raise ValueError(
                f"item_columns names {name!r}, which {reason}. {table.path.name} has the columns {table.describe_columns()}."
            )
        left.append(f"Item column {name!r} {reason}: it is no kernel")
    return found, left


@dataclass(frozen=True)
class _Made:
    vectors: np.ndarray
    present: np.ndarray
    what: str


def _check_names(named: Mapping[str, str], table: AtomicTable) -> None:
    unknown = [name for name in named if name not in table.types or name == table.id_field]
    if unknown:
        raise ValueError(
            f"item_columns names {', '.join(map(repr, unknown))}; {table.path.name} has the columns {table.describe_columns()}, "
            f"of which {table.id_field!r} is the id. Name some of the others, or set item_columns to auto."
        )
    by_modality = Counter(map(modality_of, named))
    twice = [name for name in named if by_modality[modality_of(name)] > 1]
    if twice:
        raise ValueError(
            f"item_columns: {' and '.join(map(repr, twice))} differ in signs alone: rename one of the columns."
        )


def _described(name: str, kind: str, made: _Made, tokens: Sequence[str | None]) -> ColumnVectors:
    modality = modality_of(name)
    digest = hashlib.sha256(f"column {FORMAT} {kind} {made.vectors.shape}\0".encode())
    digest.update(made.vectors.tobytes())
    digest.update(made.present.tobytes())
    features = FeatureTable(
        torch.from_numpy(made.vectors), torch.from_numpy(made.present), modality, digest.hexdigest()
    )
    n, has = sum(token is not None for token in tokens), int(made.present.sum())
    line = f"Item column {name!r}, a {kind}: {made.what}; {has} of {n} items have one, the others are masked"
    return ColumnVectors(name, features, line)


def _kind(name: str, table: AtomicTable, cells: Sequence[str | None]) -> str:
    """What a column is: a number by its type, or by its name and cells; else a category."""
    if table.types[name] == "float":
        return "number"
    some = [cell for cell in cells if cell]
    if table.types[name] != "token" or not some:
        return "category"
    dates = sum(_as_date(cell) is not None for cell in some)
    if dates >= NUMBERS * len(some):
        return "number"
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    numbers = sum(_as_number(cell) is not None for cell in some)
    return "number" if _NUMBER_NAME.search(snake) and numbers >= NUMBERS * len(some) else "category"


# ------------------------------------------------------------------ numbers


def as_number(cell: str) -> float | None:
    """Read a number, an amount of money or a date, which counts in days; ``None`` for anything else.

    Example:
        >>> as_number("$1,299.50"), as_number("01-Jan-1995"), as_number("cheap")
        (1299.5, 728294.0, None)
    """
    number = _as_number(cell)
    return number if number is not None else _as_date(cell)


def _as_number(cell: str) -> float | None:
    found = _MONEY.fullmatch(cell.strip())
    if found is None:
        return None
    number = float(found[1].replace(",", ""))
    return number if math.isfinite(number) else None


def _as_date(cell: str) -> float | None:
    cell = cell.strip()
    found = _DAY.fullmatch(cell)
    try:
        if found is not None:
            return float(date(*map(int, found.groups())).toordinal())
    except ValueError:  # a 31st of February
        return None
    for form in _DAYS:
        try:
            return float(datetime.strptime(cell, form).toordinal())
        except ValueError:
            continue
    return None


def _numbers(cells: Sequence[str | None]) -> _Made | str:
    read = [as_number(cell) if cell else None for cell in cells]
    values = np.array([math.nan if number is None else number for number in read], np.float64)
    present = np.isfinite(values)
    unread = sum(bool(cell) for cell in cells) - int(present.sum())
    distinct, place, count = np.unique(values[present], return_inverse=True, return_counts=True)
    if len(distinct) < 2:
        return f"holds {len(distinct)} different numbers" if len(distinct) != 1 else "holds one number alone"
    quantile = ((count.cumsum() - count / 2) / count.sum())[place]
    bumps = np.exp(-np.square(quantile[:, None] - np.arange(STEPS + 1) / STEPS) / (2 * WIDTH**2))
    vectors = np.zeros((len(cells), STEPS + 1), np.float32)
    vectors[present] = bumps / np.linalg.norm(bumps, axis=1, keepdims=True)
    what = f"{len(distinct)} different ones from {distinct[0]:g} to {distinct[-1]:g}, by their quantiles"
    return _Made(vectors, present, what + (f", {unread} cells are no number" if unread else ""))


# ------------------------------------------------------------------ categories


def _categories(cells: Sequence[str | None], table: AtomicTable, name: str, chooses: bool) -> _Made | str:
    values_of = _values(cells, table, name)
    items_of = Counter(value for values in values_of for value in values)
    filled = sum(map(bool, values_of))
    kept = [value for value, items in items_of.items() if items >= LEAST_ITEMS]
    kept = sorted(kept, key=lambda value: (-items_of[value], value))
    if len(kept) < 2 and not (kept and items_of[kept[0]] < filled):
        return "holds no two values that several items have"
    if chooses:
        shared = sum(any(items_of[value] >= LEAST_ITEMS for value in values) for values in values_of)
        many = len(items_of) * ITEMS_OF_A_VALUE > filled if table.types[name] == "token_seq" else False
        if shared < SHARED * filled or many:
            return f"holds {len(items_of)} different values in {filled} items, too many for a category"
    column = {value: at for at, value in enumerate(kept[:MOST_VALUES])}
    vectors = np.zeros((len(cells), len(column)), np.float32)
    for row, values in enumerate(values_of):
        at = [column[value] for value in values if value in column]
        vectors[row, at] = 1 / math.sqrt(max(len(at), 1))
    present = np.array(vectors.any(1), bool)
    rare, beyond = len(items_of) - len(kept), len(kept) - len(column)
    what = f"{len(column)} values"
    what += f", {rare} that one item alone has left out" if rare else ""
    what += f", {beyond} beyond the {MOST_VALUES} of most items left out" if beyond else ""
    return _Made(vectors, present, what)


def _values(cells: Sequence[str | None], table: AtomicTable, name: str) -> list[tuple[str, ...]]:
    """The different values of each cell, without case."""
    separator = None
    if table.types[name] == "token_seq":
        separator = table.seq_separator
        filled = [cell for cell in cells if cell]
        for sign in _BETWEEN:
            if sum(sign in cell for cell in filled) > _USES_IT * len(filled):
                separator = sign
                break
    found = []
    for cell in cells:
        parts = [] if not cell else [cell] if separator is None else cell.split(separator)
        words = (" ".join(part.casefold().split()) for part in parts)
        found.append(tuple(dict.fromkeys(filter(None, words))))
    return found
