"""What a repair of RecBole is, and how one is applied.

Each repair names the upstream lines (paths inside the ``recbole`` package of 1.2.1), the upstream issues, and what
ends its need. It is applied when its module is imported, only if its condition holds, and changes nothing when
applied again. The environment variable ``RECBOLE_LLM_SKIP_REPAIRS=name,name`` leaves repairs out, to see what they
are for.
"""

import functools
import os
import sys
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from importlib import metadata
from types import ModuleType
from typing import Any

SKIP_VARIABLE = "RECBOLE_LLM_SKIP_REPAIRS"
_MARK = "_recbole_llm_repair"

Condition = Callable[[], tuple[bool, str]]  # whether the repair is needed here, and why (not)


@dataclass(frozen=True)
class Repair:
    """One defect of RecBole on today's stack and its cure; calling it with a freshly imported module applies it."""

    name: str
    modules: tuple[str, ...]
    upstream: str
    issues: str
    until: str
    condition: Condition = field(repr=False)
    cure: Callable[[ModuleType], None] = field(repr=False)
    during: Callable[[], AbstractContextManager[None]] | None = field(default=None, repr=False)

    def __call__(self, module: ModuleType) -> None:
        """Apply to ``module`` if needed, and record the outcome."""
        if not is_wanted(self):
            return
        try:
            self.cure(module)
        except Exception as error:
            raise ImportError(
                f"recbole-llm could not apply its repair {self.name!r} (RecBole {self.upstream}) with {installed()}: "
                f"{type(error).__name__}: {error}. Please report this; {SKIP_VARIABLE}={self.name} goes on without it."
            ) from error


@dataclass(frozen=True)
class RepairRecord:
    """What became of a repair in this process."""

    name: str
    applied: bool
    reason: str
    upstream: str
    issues: str
    until: str

    @property
    def state(self) -> str:
        """``applied`` or ``not applied``."""
        return "applied" if self.applied else "not applied"


REPAIRS: list[Repair] = []
_decisions: dict[str, tuple[bool, str]] = {}


def records() -> list[RepairRecord]:
    """List every repair with whether it is applied and why."""
    found = []
    for repair in REPAIRS:
        waiting = False, f"{' and '.join(repair.modules)} not imported yet"
        applied, reason = _decisions.get(repair.name, waiting)
        found.append(RepairRecord(repair.name, applied, reason, repair.upstream, repair.issues, repair.until))
    return found


def is_wanted(repair: Repair) -> bool:
    """Decide once per process whether ``repair`` is needed, and record why."""
    if repair.name not in _decisions:
        if repair.name in os.environ.get(SKIP_VARIABLE, "").replace(" ", "").split(","):
            _decisions[repair.name] = False, f"left out by {SKIP_VARIABLE}"
        else:
            _decisions[repair.name] = repair.condition()
    return _decisions[repair.name][0]


def installed() -> str:
    """Name the versions of RecBole and of the libraries that its defects depend on, for messages."""
    found = []
    for name in ("recbole", "numpy", "pandas", "scipy", "torch", "hyperopt"):
        try:
            found.append(f"{name} {metadata.version(name)}")
        except metadata.PackageNotFoundError:
            found.append(f"no {name}")
    return ", ".join([*found, f"Python {sys.version.split()[0]}"])


def override(owner: Any, name: str, make: Callable[[Any], Any], *, keep_name: bool = True) -> None:
    """Replace ``owner.name`` by ``make(stock)``, once, also where RecBole's loaded modules hold the stock function.

    Args:
        owner: a module or class.
        name: the attribute.
        make: called with the stock attribute; gives the new one.
        keep_name: let the new function pass for the stock one; false where it is pickled as our own.
    """
    stock = getattr(owner, name)
    mark = f"{make.__module__}.{make.__qualname__}"
    if mark in getattr(stock, _MARK, ()):
        return
    new = make(stock)
    if keep_name:
        functools.update_wrapper(new, stock)
    setattr(new, _MARK, (*getattr(stock, _MARK, ()), mark))
    setattr(owner, name, new)
    if isinstance(owner, ModuleType):
        for module_name, module in list(sys.modules.items()):
            if module_name.startswith("recbole.") and vars(module).get(name) is stock:
                setattr(module, name, new)


class ModuleView(ModuleType):
    """A module with some of its names replaced, for one importer; all others are the module's own."""

    def __init__(self, module: ModuleType, names: Mapping[str, Any]) -> None:
        super().__init__(module.__name__, module.__doc__)
        self.__dict__.update(names, _module=module)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.__dict__["_module"], name)


def repair(
    *modules: str,
    upstream: str,
    issues: str,
    until: str,
    condition: Condition,
    during: Callable[[], AbstractContextManager[None]] | None = None,
) -> Callable[[Callable[[ModuleType], None]], Callable[[ModuleType], None]]:
    """Decorate a function that changes a freshly imported module: it enters ``REPAIRS`` under its own name.

    Args:
        modules: full names of the modules it is called with, each right after the module's own code has run.
        upstream: file:line of the defect.
        issues: upstream's issues and pull requests about it.
        until: what ends the need.
        condition: whether the defect shows with the installed libraries, and why; asked once per process.
        during: entered while the module's own code runs.
    """

    def add(cure: Callable[[ModuleType], None]) -> Callable[[ModuleType], None]:
        REPAIRS.append(Repair(cure.__name__.strip("_"), modules, upstream, issues, until, condition, cure, during))
        return cure

    return add


def always(reason: str) -> Condition:
    """Return true: the condition of a defect that shows with every version."""
    return lambda: (True, reason)
