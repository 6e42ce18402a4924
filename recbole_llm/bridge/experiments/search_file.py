"""The search space of ``recbole-llm tune``: RecBole's notation, read strictly."""

import ast

from recbole_llm.bridge.model_keys import keys_read_by, near_key
from recbole_llm.text_files import read_text

# kind of a parameter to how many numbers describe it; of a choice its values
_NUMBERS = {"uniform": 2, "quniform": 3, "loguniform": 2}
_EXAMPLE = "learning_rate choice [0.01,0.001]"


def read_space(params_file: str, model: str) -> str:
    """Read a file of a line per parameter: its name, ``choice``, ``uniform``, ``quniform`` or ``loguniform``, its values.

    Blank lines, and lines that begin with ``#``, are left out, as is a byte-order mark.

    Args:
        params_file: the file.
        model: name of the model, which must read every key; of a model that is neither RecBole's nor ours nobody knows which.

    Returns:
        The same lines in the form that RecBole's ``HyperTuning`` reads: one space between the parts.

    Raises:
        ValueError: if the file cannot be read, holds no parameter, or a line of it has another form, a name given before, or
            a name that the model does not read; names the line.
    """
    known = keys_read_by(model)
    found: dict[str, str] = {}
    for number, line in enumerate(read_text(params_file, "params_file").split("\n"), start=1):
        parts = line.split(maxsplit=2)
        if not parts or parts[0].startswith("#"):
            continue
        fault = _fault(parts, model, known) or ("the name has been given before" if parts[0] in found else "")
        if fault:
            raise ValueError(
                f"params_file {params_file!r}, line {number}: {fault}: {line.strip()[:100]!r}. A line reads: {_EXAMPLE}"
            )
        found[parts[0]] = f"{parts[0]} {parts[1]} {parts[2].strip()}"
    if not found:
        raise ValueError(f"params_file {params_file!r} holds no parameter. A line of it reads: {_EXAMPLE}")
    return "\n".join(found.values()) + "\n"


def _fault(parts: list[str], model: str, known: frozenset[str] | None) -> str:
    """What is wrong with a line, or an empty string."""
    name = parts[0]
    if len(parts) < 3:
        return "a name, a kind and values are expected"
    if known is not None and name not in known:
        near = near_key(name, known)
        return f"{model} does not read {name!r}" + (f"; is {near!r} meant?" if near else ", and would search nothing")
    kind, values = parts[1], parts[2]
    if kind == "choice":
        return "" if _is_list(values) else "the values of a choice are a list in brackets, strings in quotes"
    if kind not in _NUMBERS:
        return f"{kind!r} is none of choice, {', '.join(_NUMBERS)}"
    numbers = values.replace(" ", "").split(",")
    if len(numbers) != _NUMBERS[kind] or not all(map(_is_number, numbers)):
        return f"{kind} takes {_NUMBERS[kind]} numbers with a comma between them"
    return ""


def _is_list(text: str) -> bool:
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return False
    return isinstance(values, (list, tuple)) and len(values) > 0


def _is_number(text: str) -> bool:
    try:
        return abs(float(text)) < float("inf")
    except ValueError:
        return False
