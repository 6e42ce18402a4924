"""Run somebody's script as ``__main__``, with RecBole repaired and our model registered, as ``coverage run`` does.

Processes that the script spawns must find the same state before they import it again. ``multiprocessing`` re-imports the
main module by the name in its ``__spec__``; here that is this module, so a child imports ``recbole_llm`` first and then
executes the script under the name ``__mp_main__``.

RecBole's run_hyper.py imports ray at its top and uses it only when asked to: there the import succeeds without ray too.
"""

import os
import sys
from collections.abc import Sequence
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from recbole_llm.bridge.repairs.ray import stand_in_for_ray

_SCRIPT_VARIABLE = "RECBOLE_LLM_SCRIPT"


def run_script(path: str, argv: Sequence[str]) -> None:
    """Execute the Python file ``path`` as ``__main__``.

    Args:
        path: the script.
        argv: its ``sys.argv``, the script's own name first.

    Raises:
        ValueError: if the file is not Python source.
    """
    main = ModuleType("__main__")
    main.__dict__.update(__file__=path, __builtins__=__builtins__, __spec__=ModuleSpec(__name__, None))
    sys.modules["__main__"] = main
    sys.argv = list(argv)
    sys.path[0] = os.path.dirname(os.path.abspath(path))
    os.environ[_SCRIPT_VARIABLE] = os.path.abspath(path)
    _execute(path, main.__dict__)


def _execute(path: str, namespace: dict[str, Any]) -> None:
    stand_in_for_ray()
    with open(path, "rb") as file:
        source = file.read()
    try:
        code = compile(source, path, "exec", dont_inherit=True)
    except (SyntaxError, ValueError) as error:
        raise ValueError(f"{path} is not a Python script: {error}") from error
    exec(code, namespace)


if __name__ == "__mp_main__":
    __file__ = os.environ[_SCRIPT_VARIABLE]
    _execute(__file__, globals())
