"""Texts of items and users: which columns of an atomic file make them, and in which sentence."""

import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from recbole_llm.content.atomic_files import AtomicTable, read_atomic_table

__all__ = [
    "AtomicTable",
    "Template",
    "TextReport",
    "choose_text_fields",
    "default_template",
    "read_atomic_table",
    "render_texts",
    "texts_of_tokens",
]

# values looked at to tell a text column from ids, numbers, dates and addresses
SAMPLED_VALUES = 1000
# a column is text when at least this share of its sampled values is
TEXT_SHARE = 0.5


@dataclass(frozen=True)
class TextReport:
    """What became of the texts of a list of tokens.

    Attributes:
        path: the file that was read.
        n: tokens asked for, padding not counted.
        missing: tokens without a row in the file.
        empty: tokens whose chosen columns are all empty.
        duplicates: rows of the file left out because their id had come before.
        fields: the chosen columns.
        example: the first text, as the encoder sees it.
    """

    path: Path
    n: int
    missing: int
    empty: int
    duplicates: int
    fields: tuple[str, ...]
    example: str

    def lines(self) -> list[str]:
        """The report as lines for a log."""
        lines = [f"Text of {self.path.name}: columns {', '.join(self.fields)}; first text: {self.example!r}"]
        counts = []
        if self.missing:
            counts.append(f"{self.missing} of {self.n} ids have no row in {self.path.name}")
        if self.empty:
            counts.append(f"{self.empty} of {self.n} have only empty text columns")
        if self.duplicates:
            counts.append(
                f"{self.duplicates} rows repeat an earlier id and were not read (the first row counts, as in RecBole)"
            )
        lines.append("; ".join(counts) if counts else f"All {self.n} ids have a text")
        return lines


def choose_text_fields(
    table: AtomicTable, requested: Sequence[str] | None = None, template: str | None = None
) -> tuple[str, ...]:
    """The columns that make the text: those of the template, those requested, or those that look like text.

    Found by themselves are, in file order, the ``token_seq`` and ``token`` columns whose values are words; out are ids,
    numbers, dates, web addresses and one-letter codes. A column of years counts as text when its name says ``year``.

    Args:
        table: the file.
        requested: ``item_text_fields`` or ``user_text_fields``.
        template: ``item_text_template``; its columns are the chosen ones, and must include those requested.

    Raises:
        ValueError: on an unknown column (lists the columns with their types), on a requested column that the template
            leaves out, or when no column looks like text.
    """
    named = Template(template).fields if template else ()
    unknown = [name for name in (*named, *(requested or ())) if name not in table.types]
    if unknown:
        source = "item_text_template" if unknown[0] in named else "item_text_fields / user_text_fields"
        raise ValueError(
            f"{source} names {', '.join(map(repr, dict.fromkeys(unknown)))}, and {table.path.name} has the columns "
            f"{table.describe_columns()}."
        )
    if template:
        unused = [name for name in requested or () if name not in named]
        if unused:
            raise ValueError(
                f"item_text_template does not use {', '.join(map(repr, unused))} of item_text_fields. "
                "Add it to the template in braces, or leave item_text_fields empty."
            )
        return named
    if requested:
        return tuple(dict.fromkeys(requested))
    found = tuple(name for name, kind in table.types.items() if _is_text_column(name, kind, table))
    if not found:
        raise ValueError(
            f"No column of {table.path.name} looks like text; its columns are {table.describe_columns()}. "
            "Name the columns in item_text_fields (or user_text_fields), give vectors with item_features_file, "
            "or set encoder to empty for a model without text."
        )
    return found


_IDENTIFIER_NAME = re.compile(
    r"(^|_)(ids?|asin|isbn\d*|ean|upc|gtin|sku|uuid|guid|urls?|uri|link|href|images?|img|thumbnail|poster|zip|"
    r"zip_?code|postal_?code|phone|e?mail|timestamp|date|time)$",
    re.IGNORECASE,
)
_NUMBERS = re.compile(r"[\s\d.,;:|/+\-%$€£¥eE]*\d[\s\d.,;:|/+\-%$€£¥eE]*")
_ADDRESS = re.compile(r"(https?://|www\.|ftp://|data:|/[\w./-]+\.\w{2,4}$|\S+@\S+\.\w+$)\S*", re.IGNORECASE)
_MONTH = r"(jan|feb|mar|apr|may|jun|jul|aug|sep|oct|nov|dec)[a-z]*"
_DATE = re.compile(
    rf"\d{{1,4}}[-/ .]{_MONTH}[-/ ., ]+\d{{1,4}}.*|{_MONTH}\s+\d{{1,2}},?\s+\d{{4}}.*|\d{{4}}-\d\d-\d\dT.*",
    re.IGNORECASE,
)
# one word of letters and digits (B00001P4ZH, V0R2M, 3fa85f64-5717-4562), or of hexadecimal digits
_CODE = re.compile(r"(?=\S*\d)(?=\S*[A-Za-z])[A-Z0-9_\-]{4,}|[0-9a-f]{8}[0-9a-f\-]*|(?=\S*\d)\S{16,}")
_YEAR = re.compile(r"(1[5-9]|20|21)\d\d(\.0)?")


def _is_text_column(name: str, kind: str, table: AtomicTable) -> bool:
    if name == table.id_field or kind not in ("token", "token_seq"):
        return False
    cells = [cell for cell in table.columns[name] if cell]
    step = max(len(cells) // SAMPLED_VALUES, 1)
    sample = table.words(name, cells[::step])
    if not sample:
        return False
    if "year" in name.lower() and _share(sample, lambda cell: _YEAR.fullmatch(cell) is not None) >= TEXT_SHARE:
        return True
    snake = re.sub(r"(?<=[a-z])(?=[A-Z])", "_", name)
    return not _IDENTIFIER_NAME.search(snake) and _share(sample, _is_words) >= TEXT_SHARE


def _share(sample: Sequence[str], claim: Callable[[str], bool]) -> float:
    return sum(map(claim, sample)) / len(sample)


def _is_words(cell: str) -> bool:
    """Whether a cell holds words: not a number, date, address or code, and letters are at least half of it."""
    if any(pattern.fullmatch(cell) for pattern in (_NUMBERS, _ADDRESS, _DATE, _CODE)):
        return False
    letters = sum(character.isalpha() for character in cell)
    # one Latin letter is a code (gender M, F); one CJK character is a word
    wordy = letters >= 2 or (letters == 1 and ord(max(cell)) > 0x2E80)
    return wordy and 2 * letters >= len(cell) - cell.count(" ")


# between two parts of a template: the end of a clause before white space, a dash or bar between spaces, a line break
_SEPARATOR = re.compile(r"\s*[.;,!?]\s+|\s+[|/\u2013\u2014\u00b7\u2022-]\s+|\s*\n\s*")
_BRACKETS = {"(": ")", "[": "]", "{": "}", '"': '"', "'": "'", "“": "”", "«": "»"}


class Template:
    """A sentence with column names in braces, such as ``"{title} ({year}). Genres: {genres}"``.

    An empty column takes its part of the sentence with it: its brackets, the words that lead to it, and the whole
    clause when nothing else is in the clause. ``{{`` and ``}}`` are braces.

    Raises:
        ValueError: if the braces do not match, a pair of braces holds no plain column name, or there is no column.
    """

    def __init__(self, text: str) -> None:
        try:
            pieces = list(Formatter().parse(text))
        except ValueError as error:
            raise ValueError(
                f"item_text_template {text!r}: {error}. Write {{{{ and }}}} for braces that are text."
            ) from error
        for _, name, spec, conversion in pieces:
            if name is not None and (not name or spec or conversion):
                raise ValueError(f"item_text_template {text!r}: braces must hold a column's name and nothing else.")
        # alternating literals and names, a literal first and last
        literals, names = [""], []
        for literal, name, _, _ in pieces:
            literals[-1] += literal
            if name is not None:
                names.append(name)
                literals.append("")
        if not names:
            raise ValueError(
                f"item_text_template {text!r} has no column: write the columns in braces, such as {{title}}."
            )
        self.fields = tuple(dict.fromkeys(names))
        self._parts = _split_into_parts(literals, names)

    def render(self, row: Mapping[str, str]) -> str:
        """The sentence for one row (column to cell); empty when all of its columns are."""
        if not any(row[name] for name in self.fields):
            return ""
        text = ""
        for separator, slots, tail in self._parts:
            values = [row[name] for _, _, name, _ in slots]
            if slots and not any(values):
                continue
            part = "".join(
                lead + opening + value + closing
                for (lead, opening, _, closing), value in zip(slots, values, strict=True)
                if value
            )
            part = (part + tail).strip()
            if text and part:
                # "owner." + ". " + "Genres" would double the full stop
                text += separator.lstrip()[1:] if text[-1] in ".!?" and separator.lstrip()[:1] == "." else separator
            text += part
        return text


# (words that lead to the column, opening bracket, column, closing bracket)
_Slot = tuple[str, str, str, str]
_Part = tuple[str, list[_Slot], str]


def _split_into_parts(literals: list[str], names: list[str]) -> list[_Part]:
    """Cut a template at its separators into (separator before, slots, literal tail)."""
    parts: list[_Part] = []
    slots: list[_Slot] = []
    separator = lead = ""
    for index, literal in enumerate(literals):
        closing = ""
        if slots and slots[-1][1] and literal.startswith(_BRACKETS[slots[-1][1]]):
            closing, literal = literal[0], literal[1:]
            slots[-1] = (*slots[-1][:3], closing)
        elif slots and slots[-1][1]:
            # the bracket closes further on: it belongs to the words, not to the column
            words, opening, name, _ = slots[-1]
            slots[-1] = (words + opening, "", name, "")
        start = 0
        for match in _SEPARATOR.finditer(literal):
            tail = literal[start : match.start()]
            parts.append((separator, slots, lead + tail))
            separator, slots, lead, start = match.group(), [], "", match.end()
        lead += literal[start:]
        if index < len(names):
            opening = lead[-1] if lead and lead[-1] in _BRACKETS else ""
            slots.append((lead[: len(lead) - len(opening)], opening, names[index], ""))
            lead = ""
    parts.append((separator, slots, lead))
    return parts


def default_template(fields: Sequence[str]) -> str:
    """Every column with its name in words: ``"Movie title: {movie_title}. Genres: {genres}"``."""
    words = (re.sub(r"[\s_\-.{}]+", " ", name).strip().capitalize() for name in fields)
    return ". ".join(f"{label}: {{{name}}}" for label, name in zip(words, fields, strict=True))


def render_texts(table: AtomicTable, fields: Sequence[str], template: str | None = None) -> dict[str, str]:
    """The text of every id in the file.

    Args:
        table: the file.
        fields: the columns, from :func:`choose_text_fields`.
        template: ``item_text_template``; empty: :func:`default_template`.

    Returns:
        Id to text; the text is empty where all of the columns are.
    """
    sentence = Template(template or default_template(fields))
    columns = {name: table.words(name) for name in sentence.fields}
    return {
        token: sentence.render({name: column[row] for name, column in columns.items()})
        for token, row in table.row_of.items()
    }


def texts_of_tokens(
    table: AtomicTable, tokens: Sequence[str | None], fields: Sequence[str], template: str | None = None
) -> tuple[list[str | None], TextReport]:
    """Texts aligned to a list of ids.

    Args:
        table: the file.
        tokens: ids in the order wanted, such as a dataset's internal order; ``None`` is padding.
        fields: the columns, from :func:`choose_text_fields`.
        template: ``item_text_template``.

    Returns:
        One text per token, ``None`` for padding and where there is no text, and the counts.

    Raises:
        ValueError: if not one token has a text; shows ids of both sides.
    """
    texts = render_texts(table, fields, template)
    aligned = [(texts.get(token) or None) if token is not None else None for token in tokens]
    asked = [token for token in tokens if token is not None]
    missing = sum(token not in texts for token in asked)
    example = next((text for text in aligned if text), None)
    if asked and example is None:
        reason = (
            f"the ids do not match (there {_some(texts)}; here {_some(asked)})"
            if missing == len(asked)
            else f"the columns {', '.join(fields)} are empty for every id"
        )
        raise ValueError(f"None of the {len(asked)} ids has a text in {table.path.name}: {reason}.")
    empty = sum(text is None for text in aligned) - (len(tokens) - len(asked)) - missing
    report = TextReport(table.path, len(asked), missing, empty, table.duplicates, tuple(fields), example or "")
    return aligned, report


def _some(ids: Iterable[str]) -> str:
    return ", ".join(repr(token) for token, _ in zip(ids, range(3), strict=False))
