"""Allow-list of the encoder settings that a file may hold: names, types and ranges.

No torch here: whoever reads an export checks its settings with this list before anything is loaded.
"""

import re
from collections.abc import Callable, Mapping
from typing import Any

POOLINGS = ("mean", "cls", "last", "max")
OVERFLOWS = ("truncate", "chunk_mean", "head_tail")
DTYPES = ("float32", "bfloat16", "float16")
MAX_COUNT = 1_000_000  # tokens of a text, or dimensions of a vector: above what any encoder has
MAX_PROMPT = 10_000  # characters

ONNX = "onnx:"
_FUNCTION = re.compile(r"[A-Za-z_]\w*(\.[A-Za-z_]\w*)*:[A-Za-z_]\w*")


def is_function(encoder: str | None) -> bool:
    """Return whether the name of an encoder is that of a function, ``module:function``.

    Loading it runs the user's code.
    """
    return encoder is not None and not is_onnx(encoder) and _FUNCTION.fullmatch(encoder) is not None


def is_onnx(encoder: str | None) -> bool:
    """Return whether the name of an encoder is ``onnx:FILE``; such a file holds numbers and no code."""
    return encoder is not None and encoder.startswith(ONNX)


def _is_count(value: Any) -> bool:
    return value is None or (type(value) is int and 1 <= value <= MAX_COUNT)


def _one_of(names: tuple[str, ...]) -> tuple[str, Callable[[Any], bool]]:
    return f"one of {', '.join(names)}", lambda value: isinstance(value, str) and value in names


# what load_encoder takes besides is no property of the model: device, and trust_remote_code, which only a caller may give
_EXPECTED: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "pooling": _one_of(("auto", *POOLINGS)),
    "prompt": (
        f"null or a string of at most {MAX_PROMPT} characters",
        lambda value: value is None or (isinstance(value, str) and len(value) <= MAX_PROMPT),
    ),
    "max_tokens": (f"null or an integer from 1 to {MAX_COUNT}", _is_count),
    "overflow": _one_of(OVERFLOWS),
    "dim": (f"null or an integer from 1 to {MAX_COUNT}", _is_count),
    "dtype": _one_of(DTYPES),
}
SETTINGS = tuple(_EXPECTED)


def check_settings(settings: Any) -> None:
    """Accept settings that came out of a file; they are then safe arguments of ``load_encoder``.

    Args:
        settings: any subset of ``SETTINGS``.

    Raises:
        ValueError: on any other key, and on a value of another type or out of its range.
    """
    if not isinstance(settings, Mapping):
        raise ValueError(f"the settings of an encoder must be an object, got {type(settings).__name__}")
    for name, value in settings.items():
        if name not in _EXPECTED:
            raise ValueError(
                f"an encoder has no setting {str(name)[:64]!r} that a file may give; expected {', '.join(SETTINGS)}"
            )
        expected, fits = _EXPECTED[name]
        if not fits(value):
            raise ValueError(f"the encoder's {name} must be {expected}, got {str(value)[:64]!r}")
