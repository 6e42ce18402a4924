"""Columns of text on a terminal: how wide characters are, and texts cut or filled to a width.

Chinese, Japanese and Korean characters take two columns, combining marks none.
"""

import shutil
import sys
import unicodedata

CUT = "…"


def terminal_columns() -> int | None:
    """Return the number of columns of the terminal; ``None`` where standard output is a file or a pipe."""
    return shutil.get_terminal_size().columns if sys.stdout.isatty() else None


def columns_of(text: str) -> int:
    """Return how many columns a text takes.

    Args:
        text: printable characters.

    Example:
        >>> columns_of("Kolya"), columns_of("千と千尋")
        (5, 8)
    """
    if text.isascii():
        return len(text)
    return sum(map(_columns_of_character, text))


def cut(text: str, columns: int) -> str:
    """Return the text, or its beginning and ``…`` where it takes more than so many columns.

    Args:
        text: printable characters.
        columns: at most so many; at least 1.

    Example:
        >>> cut("Kolya", 5), cut("Fargo (1996)", 5), cut("千と千尋", 6)
        ('Kolya', 'Farg…', '千と…')
    """
    if columns_of(text) <= columns:
        return text
    left, kept = columns - 1, []
    for character in text:
        left -= _columns_of_character(character)
        if left < 0:
            break
        kept.append(character)
    return "".join(kept) + CUT


def filled(text: str, columns: int) -> str:
    """Return the text with blanks behind it, so that it takes at least so many columns.

    Args:
        text: printable characters.
        columns: at least so many.

    Example:
        >>> filled("千と", 6), filled("Kolya", 3)
        ('千と  ', 'Kolya')
    """
    return text + " " * (columns - columns_of(text))


def printable(text: str) -> str:
    """Return the text with a blank for each character that is not printable: none commands a terminal.

    Args:
        text: any characters.
    """
    return text if text.isprintable() else "".join(c if c.isprintable() else " " for c in text)


def _columns_of_character(character: str) -> int:
    if unicodedata.combining(character) or unicodedata.category(character) in ("Mn", "Me", "Cf"):
        return 0
    return 2 if unicodedata.east_asian_width(character) in "WF" else 1
