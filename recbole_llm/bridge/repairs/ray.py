"""Ray in a script that imports it at its top and may never use it, where ray is missing or cannot be imported."""

import importlib.util
import sys
from importlib import metadata
from importlib.machinery import ModuleSpec
from types import ModuleType
from typing import Any

from recbole_llm.bridge.repairs.configuration import is_installed


class AbsentModule(ModuleType):
    """Any name of a library that is not there: it can be imported and passed around, and says why when it is called."""

    def __init__(self, name: str, reason: str) -> None:
        super().__init__(name)
        self.__path__: list[str] = []
        self.reason = reason

    def __getattr__(self, name: str) -> Any:
        if name.startswith("__"):
            raise AttributeError(f"module {self.__name__!r} has no attribute {name!r}")
        return AbsentModule(f"{self.__name__}.{name}", self.reason)

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        """Raise the error that importing the library would have raised."""
        raise ModuleNotFoundError(f"{self.__name__} cannot be used: {self.reason}", name="ray")


class _RayFinder:
    def __init__(self, reason: str) -> None:
        self._reason = reason

    def find_spec(self, name: str, path: Any = None, target: ModuleType | None = None) -> ModuleSpec | None:
        if name.partition(".")[0] != "ray" or _asked_by_a_library():
            return None
        return ModuleSpec(name, self, is_package=True)  # type: ignore[arg-type]

    def create_module(self, spec: ModuleSpec) -> ModuleType:
        return AbsentModule(spec.name, self._reason)

    def exec_module(self, module: ModuleType) -> None:
        return None


def _asked_by_a_library() -> bool:
    """Return whether the import statement (or ``find_spec`` call) comes from an installed package, which copes without ray."""
    frame = sys._getframe(2)
    while frame.f_back is not None and frame.f_globals.get("__name__", "").partition(".")[0] == "importlib":
        frame = frame.f_back
    return is_installed(frame.f_code.co_filename)


def why_ray_cannot_be_imported() -> str | None:
    """Say why an import of ray would fail, without trying it; ``None`` if nothing speaks against it.

    Ray 2.6.3 and older, all that RecBole 1.2.1 allows, need pkg_resources, which setuptools 82 dropped, and NumPy 1.
    """
    install = "pip install 'ray[tune]>=2.45'"
    if importlib.util.find_spec("ray") is None:
        return f"ray is not installed: {install}"
    try:
        version = metadata.version("ray")
        numpy = metadata.version("numpy")
    except metadata.PackageNotFoundError:
        return None
    if tuple(int(part) for part in version.split(".")[:2] if part.isdigit()) > (2, 6):
        return None
    missing = []
    if importlib.util.find_spec("pkg_resources") is None:
        missing.append("pkg_resources (setuptools before 82)")
    if int(numpy.partition(".")[0]) >= 2:
        missing.append(f"NumPy 1 (here is {numpy})")
    return f"ray {version} needs {' and '.join(missing)}: {install}" if missing else None


def stand_in_for_ray() -> None:
    """Let ``import ray`` succeed in this process where it would fail; an importable ray, or one in use, stays."""
    if "ray" not in sys.modules:
        reason = why_ray_cannot_be_imported()
        if reason is not None:
            sys.meta_path.insert(0, _RayFinder(reason))  # type: ignore[arg-type]
