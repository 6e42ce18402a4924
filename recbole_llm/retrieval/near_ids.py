"""Which known id somebody meant who wrote it without its zeros, as a number, or in other letters.

A spreadsheet turns 000505 into 505, and pandas a column with gaps into 505.0.
"""

from collections.abc import Iterable, Sequence

NAMED = 10  # ids that a message names


def near_id(asked: str, known: Iterable[str]) -> str | None:
    """The one known id that differs in leading zeros, a trailing ``.0``, blanks or the case of letters alone.

    Args:
        asked: an id that is not known.
        known: all ids.

    Returns:
        ``None`` where none or several come into question.
    """
    wanted = _bare(asked)
    found = [each for each in known if _bare(each) == wanted] if wanted else []
    return found[0] if len(found) == 1 else None


def _bare(text: str) -> str:
    bare = text.strip().casefold()
    number, point, rest = bare.partition(".")
    if point and number.isdigit() and not rest.strip("0"):
        bare = number
    return bare.lstrip("0") or ("0" if bare else "")


def unknown_ids(asked: Sequence[str], known: Iterable[str]) -> str:
    """Unknown ids for a message: the first few, each with what was meant, and how many more there are.

    Args:
        asked: ids that are not known.
        known: all ids.
    """
    every = list(known)
    shown = []
    for each in asked[:NAMED]:
        meant = near_id(each, every)
        shown.append(repr(each) if meant is None else f"{each!r} (did you mean {meant!r}?)")
    more = f" and {len(asked) - NAMED} more" if len(asked) > NAMED else ""
    return ", ".join(shown) + more
