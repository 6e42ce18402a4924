"""Applies repairs and registration to each RecBole module, right after the module's own code has run.

``recbole_llm`` puts a finder in front of Python's own; for the modules named by a repair or a hook, that finder wraps
the module's loader. Nothing of RecBole is imported that the program does not import itself, and a module can only be
seen in its repaired form.
"""

import sys
import warnings
from collections.abc import Callable, Iterator
from contextlib import ExitStack, contextmanager
from functools import lru_cache
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from recbole_llm.bridge import lookups, register
from recbole_llm.bridge.repairs import (  # noqa: F401  (they enter their repairs into REPAIRS)
    configuration,
    defects,
    distributed,
    files,
    input_files,
    labels,
    libraries,
    models,
    run_settings,
)
from recbole_llm.bridge.repairs.registry import REPAIRS, is_wanted

SUPPORTED = ">=1.2.0,<1.3"

_unsupported: str | None = None  # the version found, if we do not know it
_pending: set[str] = set()  # modules whose code was still running when we were imported


class _RepairingLoader:
    """A module's own loader, followed by our repairs; it leaves no trace on the module."""

    def __init__(self, loader: Any) -> None:
        self._loader = loader

    def __getattr__(self, name: str) -> Any:
        return getattr(self._loader, name)

    def create_module(self, spec: ModuleSpec) -> ModuleType | None:
        return self._loader.create_module(spec)

    def exec_module(self, module: ModuleType) -> None:
        if module.__spec__ is not None:
            module.__spec__.loader = self._loader
        module.__loader__ = self._loader
        with _around(module.__name__):
            self._loader.exec_module(module)
        _repair(module)


def find_spec(own: Any, name: str, path: Any, target: ModuleType | None) -> ModuleSpec | None:
    """Find the specification of a RecBole module that we repair, or of a registered model's module; else ``None``.

    Args:
        own: the finder that asks, which is left out when the others are asked.
        name: full module name.
        path: the parent package's ``__path__``.
        target: the module to be reloaded, if any.
    """
    for waiting in list(_pending):
        _repair_when_ready(waiting)
    if _unsupported is not None:
        return None
    spec = register.find_model_spec(name)
    if spec is not None or name not in steps():
        return spec
    for finder in sys.meta_path:
        find = getattr(finder, "find_spec", None)
        spec = find(name, path, target) if find is not None and finder is not own else None
        if spec is not None:
            if spec.loader is not None:
                spec.loader = _RepairingLoader(spec.loader)
            return spec
    return None


def apply_to_loaded_modules() -> None:
    """Repair what was imported before us. A module whose code is still running is repaired at the next import."""
    for name in steps():
        if name in sys.modules:
            _pending.add(name)
            _repair_when_ready(name)


def require_recbole() -> ModuleType:
    """Return the module of RecBole.

    Raises:
        ImportError: if RecBole is missing or of a version that we do not support; says how to get one.
    """
    try:
        import recbole
    except ModuleNotFoundError as error:
        if error.name != "recbole":
            raise
        raise ImportError(f"recbole-llm needs RecBole {SUPPORTED}: pip install 'recbole{SUPPORTED}'") from error
    if _unsupported is not None:
        raise ImportError(_unsupported_message())
    return recbole


@lru_cache(maxsize=1)
def steps() -> dict[str, list[Callable[[ModuleType], None]]]:
    """Return what is done to each module by name, in order."""
    steps: dict[str, list[Callable[[ModuleType], None]]] = {"recbole": [_check_version]}
    for repair in REPAIRS:
        for name in repair.modules:
            steps.setdefault(name, []).append(repair)
    for name, hook in lookups.HOOKS.items():
        steps.setdefault(name, []).append(hook)
    return steps


def _repair_when_ready(name: str) -> None:
    module = sys.modules.get(name)
    if module is not None and getattr(module.__spec__, "_initializing", False):
        return
    _pending.discard(name)
    if module is not None:
        _repair(module)


def _repair(module: ModuleType) -> None:
    for step in steps()[module.__name__]:
        if _unsupported is None:
            step(module)


@contextmanager
def _around(name: str) -> Iterator[None]:
    with ExitStack() as stack:
        for repair in REPAIRS:
            if name in repair.modules and repair.during is not None and is_wanted(repair):
                stack.enter_context(repair.during())
        yield


def _check_version(recbole: ModuleType) -> None:
    global _unsupported
    version = str(getattr(recbole, "__version__", "unknown"))
    if version.split(".")[:2] != ["1", "2"]:
        _unsupported = version
        warnings.warn(_unsupported_message(), RuntimeWarning, stacklevel=2)


def _unsupported_message() -> str:
    return (
        f"recbole-llm supports RecBole {SUPPORTED}, but RecBole {_unsupported} is installed: nothing is repaired and "
        f"LLMTwoTower is not registered. Install a supported version: pip install 'recbole{SUPPORTED}'"
    )
