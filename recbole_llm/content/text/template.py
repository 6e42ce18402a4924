"""Render the texts of items and users from columns of an atomic file, by a template."""

import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from string import Formatter

from recbole_llm.content.text.atomic_files import AtomicTable

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
        """Render the sentence for one row (column to cell); empty if all of its columns are."""
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
    """Write a template of every column with its name: ``"Movie title: {movie_title}. Genres: {genres}"``."""
    words = (re.sub(r"[\s_\-.{}]+", " ", name).strip().capitalize() for name in fields)
    return ". ".join(f"{label}: {{{name}}}" for label, name in zip(words, fields, strict=True))


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
        """Format the report as lines for a log."""
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


def render_texts(table: AtomicTable, fields: Sequence[str], template: str | None = None) -> dict[str, str]:
    """Render the text of every id in the file.

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
    """Align texts to a list of ids.

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
