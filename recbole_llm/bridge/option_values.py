"""What a value of one of our configuration keys may be: functions that check one and give its final form.

Each takes the key's name and the value as RecBole's ``Config`` holds it, and raises a ``ValueError`` that names both.
"""

import difflib
from collections.abc import Callable, Iterable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import yaml

Reader = Callable[[str, Any], Any]


def fail(name: str, value: Any, expected: str, hint: str = "") -> ValueError:
    """Build the error of a wrong value."""
    return ValueError(f"{name} must be {expected}, got {value!r}.{' ' + hint if hint else ''}")


def is_number(value: Any) -> bool:
    """Return whether a value is a number and no bool."""
    return isinstance(value, (int, float)) and not isinstance(value, bool)


def text(name: str, value: Any) -> str | None:
    """Check for a string; an empty one becomes ``None``."""
    if value is None or isinstance(value, str):
        return value or None
    if isinstance(value, Path):
        return str(value)
    # RecBole turns a command-line value such as 2020 into a number; a name may well look like one
    if is_number(value):
        return str(value)
    raise fail(name, value, "a string or empty")


def names(name: str, value: Any) -> tuple[str, ...] | None:
    """Check for names of columns."""
    if value is None:
        return None
    if isinstance(value, str):
        value = [part.strip() for part in value.split(",")]
    if isinstance(value, Iterable) and not isinstance(value, Mapping):
        names = tuple(value)
        if all(isinstance(n, str) and n for n in names):
            return names
    raise fail(name, value, "a list of column names", f"For example {name}: [title, description].")


def flag(name: str, value: Any) -> bool:
    """Check for true or false."""
    if isinstance(value, bool):
        return value
    raise fail(name, value, "true or false")


def choice(*known: str) -> Reader:
    """Check for one of these words."""

    def read(name: str, value: Any) -> str:
        if isinstance(value, str) and value in known:
            return value
        near = difflib.get_close_matches(str(value), known, n=1)
        raise fail(name, value, f"one of {', '.join(known)}", f"Did you mean {near[0]!r}?" if near else "")

    return read


def optional_choice(*known: str) -> Reader:
    """One of these words, or nothing."""
    read_word = choice(*known)

    def read(name: str, value: Any) -> str | None:
        return None if value in (None, "") else read_word(name, value)

    return read


def count(name: str, value: Any) -> int:
    """Check for an integer of at least 1."""
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise fail(name, value, "an integer of at least 1")


def optional_count(name: str, value: Any) -> int | None:
    """Check for an integer of at least 1, or ``None``."""
    return None if value is None else count(name, value)


def hidden(name: str, value: Any) -> int | None:
    """Check for a number of hidden units; 0, false and ``None`` become ``None``."""
    return None if value in (None, 0, False) else count(name, value)


def positive(name: str, value: Any) -> float:
    """Check for a finite number above 0."""
    if is_number(value) and 0 < value < float("inf"):
        return float(value)
    raise fail(name, value, "a finite number above 0")


def optional_positive(name: str, value: Any) -> float | None:
    """Check for a finite number above 0, or ``None``."""
    return None if value is None else positive(name, value)


def not_negative(name: str, value: Any) -> float:
    """Check for a finite number of at least 0."""
    if is_number(value) and 0 <= value < float("inf"):
        return float(value)
    raise fail(name, value, "a finite number of at least 0")


def share(name: str, value: Any) -> float:
    """Check for a number in [0, 1)."""
    if is_number(value) and 0 <= value < 1:
        return float(value)
    raise fail(name, value, "a number in [0, 1)")


def auto_flag(name: str, value: Any) -> bool | None:
    """Check for true, false or ``auto``, which becomes ``None``."""
    if value == "auto" or isinstance(value, bool):
        return None if value == "auto" else value
    raise fail(name, value, "auto, true or false")


def boost(name: str, value: Any) -> float | str:
    """Check for a number above 0, or ``auto``."""
    if value == "auto":
        return value
    if is_number(value) and 0 < value < float("inf"):
        return float(value)
    raise fail(name, value, "auto or a number above 0")


def auto_or_not_negative(name: str, value: Any) -> float | str:
    """Check for a finite number of at least 0, or ``auto``."""
    return value if value == "auto" else not_negative(name, value)


def rank(name: str, value: Any) -> int | str:
    """Check for an integer of at least 1, ``auto`` or ``full``."""
    if value in ("auto", "full"):
        return value
    if isinstance(value, int) and not isinstance(value, bool) and value >= 1:
        return value
    raise fail(name, value, "auto, full or an integer of at least 1")


def sum_of(known: tuple[str, ...]) -> Callable[[str, Any], tuple[str, ...]]:
    """Check for one of these words, or a sum of them."""
    expected = f"one of {', '.join(known)}, or a sum such as {'+'.join(known[:2])}"

    def read(name: str, value: Any) -> tuple[str, ...]:
        parts = [p.strip() for p in value.split("+")] if isinstance(value, str) else value
        if not isinstance(parts, (list, tuple)) or not parts:
            raise fail(name, value, expected)
        unknown = [p for p in parts if p not in known]
        if unknown:
            raise fail(name, value, expected, f"Unknown: {unknown}.")
        return tuple(dict.fromkeys(parts))

    return read


MODALITIES = ("image", "audio")  # that files of a dataset may hold beside texts


@dataclass(frozen=True)
class ModalitySource:
    """Where the vectors of a modality come from.

    Attributes:
        encoder: its name.
        column: of the item file; ``None`` for that of the modality's name where there is one, and else for file names.
        seconds: of a window of sound; ``None`` for the encoder's own.
    """

    encoder: str
    column: str | None = None
    seconds: float | None = None


def modalities(name: str, value: Any) -> dict[str, ModalitySource]:
    """Check for encoders by modality; an encoder alone stands for one with the usual column."""
    given = from_text(name, value) or {}
    example = f"For example {name}: {{image: {{encoder: google/siglip2-base-patch16-224, column: image}}}}."
    if not isinstance(given, Mapping):
        raise fail(name, value, "encoders by modality", example)
    found = {}
    for modality, source in given.items():
        if modality not in MODALITIES:
            hint = "Texts are the key encoder." if modality == "text" else f"Built are {', '.join(MODALITIES)}."
            raise fail(
                name, value, f"encoders of {', '.join(MODALITIES)}", f"{str(modality)!r} is none of them. {hint}"
            )
        parts = {"encoder": source} if isinstance(source, str) else source
        known = ["encoder", "column", *(["seconds"] if modality == "audio" else [])]
        expected = f"an encoder, or {{{', '.join(known)}}}"
        if not isinstance(parts, Mapping) or not set(parts) <= set(known):
            raise fail(f"{name}.{modality}", source, expected, example)
        encoder, column = (text(f"{name}.{modality}.{key}", parts.get(key)) for key in ("encoder", "column"))
        if encoder is None:
            raise fail(f"{name}.{modality}", source, expected, f"It names no encoder. {example}")
        seconds = optional_positive(f"{name}.{modality}.seconds", parts.get("seconds"))
        found[str(modality)] = ModalitySource(encoder, column, seconds)
    return found


COLUMN_KINDS = ("auto", "category", "number")


def columns(name: str, value: Any) -> dict[str, str] | str | None:
    """Check for columns with their kinds, ``auto``, or nothing; a list leaves the kinds open."""
    value = from_text(name, value)
    if value in (None, "", False) or value == "auto":
        return value or None
    example = f"For example {name}: [brand, price], or {name}: {{brand: category, price: number}}."
    if not isinstance(value, Mapping):
        if isinstance(value, Iterable) and not isinstance(value, str):
            value = list(value)
            if not value:
                return None
        return dict.fromkeys(names(name, value) or (), "auto")
    wrong = [kind for kind in value.values() if kind not in COLUMN_KINDS]
    if wrong or not all(isinstance(column, str) and column for column in value):
        raise fail(name, value, f"columns, each with one of {', '.join(COLUMN_KINDS)}", example)
    return {str(column): str(kind) for column, kind in value.items()} or None


def from_text(name: str, value: Any) -> Any:
    """A mapping that a command line gives as text, ``{image: a.npy}``."""
    if not isinstance(value, str) or not value.lstrip().startswith("{"):
        return value
    try:
        return yaml.safe_load(value)
    except yaml.YAMLError:
        return value


def files(name: str, value: Any) -> str | dict[str, str] | None:
    """Check for a path, or paths by modality."""
    value = from_text(name, value)
    if isinstance(value, Mapping):
        by_modality = {str(modality): text(name, path) for modality, path in value.items()}
        if all(modality.isidentifier() for modality in by_modality):
            return {modality: path for modality, path in by_modality.items() if path is not None} or None
        raise fail(name, value, "a path, or paths by modality", f"For example {name}: {{text: a.npy, image: b.npy}}.")
    return text(name, value)
