"""A function of the user's as a text encoder: ``encoder: "module:function"``.

    def encode(texts: list[str]) -> numpy.ndarray: ...  # [len(texts), d], any float dtype

Naming a function runs it, so that only a caller may name one: an option of a command, a keyword, a dictionary of a program.
Whoever reads a configuration file, a checkpoint or an export checks that with
:func:`recbole_llm.content.encoder_settings.is_function` before anything is imported.
"""

import hashlib
import importlib
import inspect
import sys
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

FORMAT = 1
PROBE = "recbole-llm"
# settings of a transformer, in the order of load_encoder, with the values that leave them out
_WITHOUT_MEANING: dict[str, tuple[Any, ...]] = {
    "revision": (None,),
    "pooling": ("auto",),
    "prompt": (None, ""),
    "max_tokens": (None,),
    "overflow": ("truncate",),
    "dim": (None,),
    "dtype": ("float32",),
}


@dataclass(frozen=True)
class FunctionText:
    """A text as a function sees it: whole.

    Attributes:
        text: the text.
        size: its characters.
        cut: 0.
    """

    text: str
    size: int
    cut: int = 0


class FunctionEncoder:
    """A function as a text encoder.

    The fingerprint is a hash of the function's name and of its module's source: stored vectors are used again until that file
    changes. What the module imports is not part of it.

    Args:
        name: ``module:function``. The module is imported as Python finds it, and else from the working directory.
        settings: revision, pooling, prompt, max_tokens, overflow, dim and dtype; none of them has a meaning here.

    Raises:
        ValueError: if the module or the function is not there, it gives no vectors, or a setting is given.
    """

    modality = "text"
    batch_cost: int | None = None

    def __init__(self, name: str, settings: Sequence[Any] = ()) -> None:
        for (key, without), value in zip(_WITHOUT_MEANING.items(), settings, strict=False):
            if value not in without:
                raise ValueError(
                    f"encoder {name!r} is a function: encoder_{key} {value!r} has no meaning for it. Leave it empty."
                )
        self.name = name
        self._function = load_function(name)
        self.dim = vectors_of(name, self._function, [PROBE], "texts").shape[1]
        self.fingerprint = function_fingerprint(name, self._function, self.dim)

    def prepare(self, raw: Sequence[str]) -> list[FunctionText]:
        """Return texts as they are."""
        return [FunctionText(text, len(text)) for text in raw]

    def encode(self, batch: Sequence[FunctionText]) -> Tensor:
        """Encode texts to vectors ``[len(batch), dim]`` float32 on the CPU.

        Raises:
            ValueError: if the function gives another shape.
        """
        vectors = vectors_of(self.name, self._function, [sample.text for sample in batch], "texts")
        if vectors.shape[1] != self.dim:
            raise ValueError(
                f"encoder {self.name!r} gave vectors of {self.dim} dimensions, and now of {vectors.shape[1]}. "
                "Every text must have a vector of the same length."
            )
        return torch.from_numpy(vectors)

    def describe(self) -> dict[str, Any]:
        """Name and dimension."""
        return {"name": self.name, "kind": "function", "dim": self.dim}


def vectors_of(name: str, function: Callable[[list[Any]], Any], inputs: list[Any], what: str) -> np.ndarray:
    """Call an encoder's function and check what it gives.

    Args:
        name: of the encoder, for messages.
        function: as :func:`load_function` gives it.
        inputs: what it encodes.
        what: their kind in words, "texts" or "pictures".

    Returns:
        ``[len(inputs), d]`` float32, d at least 1.

    Raises:
        ValueError: if it gives no numbers, or another shape.
    """
    found = function(inputs)
    if isinstance(found, Tensor):
        found = found.detach().float().cpu().numpy()
    try:
        vectors = np.array(found, dtype=np.float32)
    except (TypeError, ValueError) as error:
        raise ValueError(f"encoder {name!r} gave no array of numbers ({error}).") from error
    if vectors.ndim != 2 or len(vectors) != len(inputs) or not vectors.shape[1]:
        raise ValueError(
            f"encoder {name!r} gave shape {vectors.shape} for {len(inputs)} {what}; expected ({len(inputs)}, d)."
        )
    return vectors


def load_function(name: str) -> Callable[[list[Any]], Any]:
    """Import a function, from the working directory where it is installed nowhere.

    Args:
        name: ``module:function``.

    Raises:
        ValueError: if the module or the function is not there.
    """
    module_name, _, attribute = name.partition(":")
    try:
        module = importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        if error.name != module_name.partition(".")[0]:
            raise ValueError(f"encoder {name!r}: {error}.") from error
        module = _from_here(name, module_name)
    found = getattr(module, attribute, None)
    if not callable(found):
        raise ValueError(
            f"encoder {name!r}: {module_name} ({getattr(module, '__file__', 'built in')}) has no function {attribute!r}."
        )
    return found


def _from_here(name: str, module_name: str) -> Any:
    """The module from the working directory, which a command does not search."""
    here = str(Path.cwd())
    sys.path.append(here)  # last: a file here hides no installed module
    try:
        return importlib.import_module(module_name)
    except ModuleNotFoundError as error:
        raise ValueError(
            f"encoder {name!r}: there is no module {module_name!r}, neither installed nor in {here} ({error})."
        ) from error
    finally:
        sys.path.remove(here)


def function_fingerprint(name: str, function: Callable[..., Any], dim: int) -> str:
    """Compute a hash of a function's name, of its module's source and of the length of its vectors."""
    digest = hashlib.sha256(f"function {FORMAT} {name} {dim}\0".encode())
    try:
        file = inspect.getsourcefile(inspect.unwrap(function))
    except TypeError:  # an object with __call__
        file = inspect.getsourcefile(type(function))
    if file is not None and Path(file).is_file():
        digest.update(Path(file).read_bytes())
    return digest.hexdigest()
