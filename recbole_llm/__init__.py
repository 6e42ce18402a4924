"""Hybrid recommendation inside RecBole: a closed form over interactions and item content, plus two towers.

Importing this package makes RecBole work on today's NumPy, pandas, SciPy and PyTorch, and makes ``LLMTwoTower`` a
model name in every RecBole entry point. It loads neither of them: it installs a finder that repairs each RecBole
module as that module is imported, and at once those that are loaded already, so that the order of imports does not
matter.
"""

import sys
from importlib import import_module
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

__version__ = "0.1.0"

__all__ = [
    "LLMTwoTower",
    "LoadedModel",
    "__version__",
    "import_dataset",
    "load",
    "objective_function",
    "register_model",
    "repair_report",
]

_LAZY = {
    "LLMTwoTower": "recbole_llm.model",
    "LoadedModel": "recbole_llm.loaded",
    "import_dataset": "recbole_llm.importer",
    "load": "recbole_llm.loaded",
    "objective_function": "recbole_llm.bridge.register",
    "register_model": "recbole_llm.bridge.register",
    "repair_report": "recbole_llm.bridge.repairs.report",
}
_WITHOUT_RECBOLE = ("LoadedModel", "import_dataset", "load")


class _RecBoleFinder:
    """Hands RecBole's modules to ``bridge.repairs.activation`` as they are imported."""

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name != "recbole" and not name.startswith("recbole."):
            return None
        from recbole_llm.bridge.repairs import activation

        return activation.find_spec(self, name, path, target)


if not any(type(finder).__qualname__ == "_RecBoleFinder" for finder in sys.meta_path):
    sys.meta_path.insert(0, _RecBoleFinder())
    if "recbole" in sys.modules:
        import_module("recbole_llm.bridge.repairs.activation").apply_to_loaded_modules()


def __getattr__(name: str) -> Any:
    if name in _LAZY:
        if name not in _WITHOUT_RECBOLE:
            import_module("recbole_llm.bridge.repairs.activation").require_recbole()
        return getattr(import_module(_LAZY[name]), name)
    raise AttributeError(f"module {__name__!r} has no attribute {name!r}")


def __dir__() -> list[str]:
    """Public names, and the parts of the package that are loaded; what this file imports for itself is nobody's."""
    parts = (name for name in globals() if f"{__name__}.{name}" in sys.modules)
    return sorted({*__all__, *parts, *(name for name in globals() if name.startswith("__"))})
