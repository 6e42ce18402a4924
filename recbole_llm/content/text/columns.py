"""Choose which columns of an atomic file are text."""

import re
from collections.abc import Callable, Sequence

from recbole_llm.content.text.atomic_files import AtomicTable
from recbole_llm.content.text.template import Template

# values looked at to tell a text column from ids, numbers, dates and addresses
SAMPLED_VALUES = 1000
# a column is text when at least this share of its sampled values is
TEXT_SHARE = 0.5


def choose_text_fields(
    table: AtomicTable, requested: Sequence[str] | None = None, template: str | None = None
) -> tuple[str, ...]:
    """Choose the columns that make the text: those of the template, those requested, or those that look like text.

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
    r"(^|_)(ids?|asin|isbn\d*|ean|upc|gtin|sku|uuid|guid|urls?|uri|link|href|images?|img|thumbnail|poster|audio|zip|"
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
    """Return whether a cell holds words.

    A number, date, address or code is none, and letters are at least half of words.
    """
    if any(pattern.fullmatch(cell) for pattern in (_NUMBERS, _ADDRESS, _DATE, _CODE)):
        return False
    letters = sum(character.isalpha() for character in cell)
    # one Latin letter is a code (gender M, F); one CJK character is a word
    wordy = letters >= 2 or (letters == 1 and ord(max(cell)) > 0x2E80)
    return wordy and 2 * letters >= len(cell) - cell.count(" ")
