"""The record of a run: a plain dictionary of numbers and short texts, as checkpoints, ``--output`` and model cards hold it.

A checkpoint may come from somebody else. So what is read of one is checked against a form before anything is made of it.
"""

import math
import re
from collections.abc import Mapping
from typing import Any

VERSION = 1
KEY = "report"  # of the checkpoint
_TEXT = re.compile(r"[^\x00-\x1f\x7f-\x9f]{0,300}")
_MOST = 100_000  # values of a record: curves of thousands of epochs fit in


class _Form:
    """Forms of values; each is called with a value and gives it back, or raises ``ValueError``."""

    @staticmethod
    def number(value: Any) -> float | int:
        if isinstance(value, bool) or not isinstance(value, (int, float)) or not math.isfinite(value):
            raise ValueError(f"{value!r} is no finite number")
        return value

    @staticmethod
    def flag(value: Any) -> bool:
        if not isinstance(value, bool):
            raise ValueError(f"{value!r} is neither true nor false")
        return value

    @staticmethod
    def text(value: Any) -> str:
        if not isinstance(value, str) or not _TEXT.fullmatch(value):
            raise ValueError("a text is too long or holds control characters")
        return value


Form = (
    Any  # a function of _Form; [form]: a list; {str: form}: names of any kind; {name: form}: these names and no other
)

_number, _flag, _text = _Form.number, _Form.flag, _Form.text
_interval = {"value": _number, "low": _number, "high": _number}
_share = {"users": _number, "targets": _number, **_interval}
_FORM: dict[str, Form] = {
    "version": _number,
    "date": _text,
    "model": _text,
    "dataset": _text,
    "k": _number,
    "rated": _flag,
    "split": {"order": _text, "by_user": _flag, "shares": [_number], "files": _flag, "seed": _number},
    "data": {name: _number for name in ("users", "items", "interactions", "training", "test")},
    "measured": {"users": _number, "of": _number, "targets": _number},
    "best_baseline": _text,
    "models": {
        str: {
            "found": _interval,
            "users_with_a_hit": _number,
            "ndcg": _number,
            "recall": _number,
            "items_shown": _number,
            "median_place": _number,
            "shown_by_popularity": {str: _number},
            "by_popularity": {str: _share},
            "by_activity": [{"from": _number, **_share}],
        }
    },
    "about": {str: _text},
    "not_fitted": {str: _text},
    "lead": _interval,
    "order": {"users": _number, "ordered": _number, "shuffled": _number, "lost": _interval},
    "popularity": {str: {"items": _number}},
    "left_out": {
        name: _number
        for name in (
            "items_without_interactions",
            "items_that_cannot_be_shown",
            "items_never_shown",
            "users_without_history",
            "measured_users_without_history",
            "items_not_read",
            "items_placed_by_content",
        )
    },
    "calibration": [{"said": _number, "came": _number, "pairs": _number}],
    "metrics": {str: {str: _number}},
    "history": {
        "loss": [_number],
        "valid": [[_number]],
        "valid_metric": _text,
        "valid_metric_bigger": _flag,
        "most_epochs": _number,
        "search": [{"setting": _text, "metric": _text, "value": _number}],
        "stages": [{"stage": _text, "seconds": _number}],
    },
}


def checked(record: Any) -> dict[str, Any]:
    """The record, if it has the form of one.

    Args:
        record: what a checkpoint or a JSON file holds.

    Raises:
        ValueError: if it has another form; names the place.
    """
    if not isinstance(record, Mapping) or record.get("version") != VERSION:
        raise ValueError("the figures are of another version of recbole-llm; 'report --measure' measures anew.")
    budget = [_MOST]
    found = _checked(record, _FORM, "record", budget)
    models = found["models"]
    if found["model"] not in models or found["best_baseline"] not in models:
        raise ValueError("record: it has no figures of its own model or of its best baseline.")
    return found


def kept(state: Mapping[str, Any]) -> dict[str, Any] | None:
    """The figures that a checkpoint holds; ``None`` if it holds none.

    Args:
        state: of :func:`recbole_llm.bridge.checkpoint.read_checkpoint`.

    Raises:
        ValueError: if they are of another form than ours.
    """
    return None if KEY not in state else checked(state[KEY])


def _checked(value: Any, form: Form, place: str, budget: list[int]) -> Any:
    budget[0] -= 1
    if budget[0] < 0:
        raise ValueError(f"{place}: the record is too large.")
    if isinstance(form, list):
        if not isinstance(value, (list, tuple)):
            raise ValueError(f"{place} is no list.")
        return [_checked(each, form[0], f"{place}[{n}]", budget) for n, each in enumerate(value)]
    if isinstance(form, dict):
        return _checked_names(value, form, place, budget)
    try:
        return form(value)
    except ValueError as error:
        raise ValueError(f"{place}: {error}.") from None


def _checked_names(value: Any, form: dict[Any, Form], place: str, budget: list[int]) -> dict[str, Any]:
    if not isinstance(value, Mapping):
        raise ValueError(f"{place} is no mapping.")
    if str in form:
        return {_Form.text(name): _checked(each, form[str], f"{place}.{name}", budget) for name, each in value.items()}
    lacking = [name for name in form if name not in value and f"{place}.{name}" not in _OPTIONAL]
    strange = [str(name)[:40] for name in value if name not in form]
    if lacking or strange:
        raise ValueError(f"{place}: {', '.join(lacking or strange)} {'is lacking' if lacking else 'is unknown'}.")
    return {name: _checked(each, form[name], f"{place}.{name}", budget) for name, each in value.items()}


_OPTIONAL = {
    "record.order",
    "record.left_out.items_not_read",
    "record.left_out.items_placed_by_content",
    *(f"record.history.{name}" for name in _FORM["history"]),
}
