"""Register models by name; :mod:`recbole_llm.bridge.lookups` lets RecBole find them."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, overload

from recbole_llm.bridge.repairs.registry import override

# RecBole's get_model finds a class in the module of its lower-case name in one of five packages; this is the first it
# asks
MODEL_PACKAGE = "recbole.model.general_recommender"

Target = str | type | Callable[[], type]
"""A class, "module:name", or a function that gives the class; the last two are called when it is first needed."""


@dataclass(frozen=True)
class Registration:
    """A model by name, with what RecBole looks up beside it; ``None``: that of a registered base class, or RecBole's own."""

    name: str
    model: Target
    yaml: Path | None = None
    trainer: Target | None = None
    dataset: Target | None = None
    train_dataloader: Callable[[Any], type | None] | str | None = None
    count_flops: bool | None = None


# what a model inherits of a registered base class
INHERITED = ("yaml", "trainer", "dataset", "train_dataloader", "count_flops")
_registrations: dict[str, Registration] = {}
_Model = TypeVar("_Model", bound=type)


@overload
def register_model(name: _Model) -> _Model: ...


@overload
def register_model(
    name: str,
    loader: Target,
    yaml: str | Path | None = ...,
    trainer: Target | None = ...,
    dataset: Target | None = ...,
    *,
    train_dataloader: Callable[[Any], type | None] | str | None = ...,
    count_flops: bool | None = ...,
) -> None: ...


@overload
def register_model(
    *,
    yaml: str | Path | None = ...,
    trainer: Target | None = ...,
    dataset: Target | None = ...,
    train_dataloader: Callable[[Any], type | None] | str | None = ...,
    count_flops: bool | None = ...,
) -> Callable[[_Model], _Model]: ...


def register_model(
    name: Any = None,
    loader: Target | None = None,
    yaml: str | Path | None = None,
    trainer: Target | None = None,
    dataset: Target | None = None,
    *,
    train_dataloader: Callable[[Any], type | None] | str | None = None,
    count_flops: bool | None = None,
) -> Any:
    """Make a model known by name in RecBole's functions; nothing is imported before the model is used.

    A decorator too: ``@register_model``, or ``@register_model(yaml="my.yaml")``. What is not given comes from the nearest base
    class that is registered, so that a subclass of LLMTwoTower has its defaults, trainer, dataset and data loader.

    Args:
        name: the model's name, the same as its class's; or the class itself.
        loader: the class, ``"module:class"``, or a function that returns it.
        yaml: its default configuration. It takes the place of ``recbole/properties/model/<name>.yaml``: over RecBole's
            overall defaults, under ``properties/dataset/*.yaml``, files, dictionaries and the command line.
        trainer: trainer class; the one of the model's type if not given.
        dataset: dataset class; the one of the model's type if not given.
        train_dataloader: called with the configuration, gives the class of the training data loader, or ``None`` for
            the stock one.
        count_flops: whether RecBole may copy the model and trace ``predict`` to log its FLOPs; it may where nothing is said.

    Returns:
        The class, as a decorator; ``None`` where a name is given.

    Raises:
        ValueError: if the name is no identifier, is taken by a stock model, or the YAML file does not exist or sets a key
            that RecBole's ``properties/dataset/sample.yaml`` would overwrite (found when the model is configured).

    Example:
        ```python
        @recbole_llm.register_model
        class MyTower(recbole_llm.LLMTwoTower):
            pass

        run_recbole(model="MyTower", dataset="ml-100k")
        ```
    """
    more: dict[str, Any] = {"yaml": yaml, "trainer": trainer, "dataset": dataset,
                            "train_dataloader": train_dataloader, "count_flops": count_flops}  # fmt: skip
    if name is None and loader is None:
        return lambda model: register_model(model, **more)
    if isinstance(name, type):
        if loader is not None:
            raise ValueError(
                f"loader is given beside the class {name.__name__}; give the class alone, or a name and a loader."
            )
        register_model(name.__name__, name, **more)
        return name
    if not isinstance(name, str) or not name.isidentifier():
        raise ValueError(f"name must be a class name, got {name!r}.")
    if loader is None:
        raise ValueError(f"loader: give the class of {name!r}, 'module:class', or a function that returns it.")
    path = None if yaml is None else Path(yaml)
    if path is not None and not path.is_file():
        raise ValueError(f"yaml: {yaml} does not exist. Give the model's default configuration, or leave yaml out.")
    if isinstance(loader, type) and loader.__name__ != name:
        raise ValueError(
            f"name must be the class's own name, {loader.__name__!r}, got {name!r}: RecBole finds it by that."
        )
    if name not in _registrations and name.lower() in _stock_module_names():
        raise ValueError(f"name: RecBole has a model {name!r}, in a module that yours would hide. Choose another name.")
    _set(Registration(name, loader, path, trainer, dataset, train_dataloader, count_flops))
    return None


def _set(registration: Registration) -> None:
    """Register; a module made for another class of that name is forgotten."""
    before = _registrations.get(registration.name)
    if before is not None and before.name in _BUILT_IN and before.model != registration.model:
        raise ValueError(f"name: {before.name!r} is the model of recbole-llm. Choose another name for your class.")
    _registrations[registration.name] = registration
    # also without a registration before: one that was taken back leaves its module
    sys.modules.pop(f"{MODEL_PACKAGE}.{registration.name.lower()}", None)


def registered(name: str) -> Registration | None:
    """Return the registration of a model, with what it inherits; ``None`` for a model that is not registered."""
    registration = _registrations.get(name)
    if registration is None:
        return None
    given = {field: getattr(registration, field) for field in INHERITED}
    if all(value is not None for value in given.values()):
        return registration
    for base in resolve(registration.model).__mro__[1:]:
        known = _registrations.get(base.__name__)
        if known is not None and known is not registration and resolve(known.model) is base:
            inherited = registered(known.name)
            given = {field: getattr(inherited, field) if value is None else value for field, value in given.items()}
            return replace(registration, **given)
    return registration


def take_over(name: str, kind: type) -> None:
    """Register a class that a ``Config`` was given, in the place of another class of its name."""
    known = _registrations.get(name)
    if known is None:
        register_model(kind)
    elif resolve(known.model) is not kind:  # such as a cell of a notebook that ran again
        _set(replace(known, model=kind))


def is_ours(name: str) -> bool:
    """Return whether a registered model is LLMTwoTower or a subclass of it."""
    if name in _BUILT_IN or name not in _registrations:
        return name in _BUILT_IN
    model = resolve(_registrations[name].model)
    return any(base.__name__ in _BUILT_IN and base.__module__ == "recbole_llm.model" for base in model.__mro__)


def registered_models() -> list[str]:
    """List the models registered here, LLMTwoTower first."""
    return list(_registrations)


def _stock_module_names() -> set[str]:
    spec = importlib.util.find_spec("recbole")
    folders = [] if spec is None else spec.submodule_search_locations or []
    return {file.stem for folder in folders for file in Path(folder, "model").glob("*_recommender/*.py")}


def our_models() -> list[str]:
    """Return the names of LLMTwoTower and of its registered subclasses; nothing is imported to look for more."""
    return [
        name
        for name, known in _registrations.items()
        if name in _BUILT_IN or (isinstance(known.model, type) and is_ours(name))
    ]


def resolve(target: Target) -> Any:
    """Return the object behind a target.

    An AttributeError, which RecBole reads as "there is none", becomes an ImportError.
    """
    if isinstance(target, type) or not isinstance(target, str):
        return target if isinstance(target, type) else target()
    module, _, attribute = target.partition(":")
    try:
        return getattr(importlib.import_module(module), attribute)
    except AttributeError as error:
        raise ImportError(f"{target} cannot be imported: {error}") from error


class _ModelLoader:
    """Loads the module in which get_model expects a registered model."""

    def __init__(self, registration: Registration) -> None:
        self._registration = registration

    def create_module(self, spec: ModuleSpec) -> None:
        return None

    def exec_module(self, module: ModuleType) -> None:
        setattr(module, self._registration.name, resolve(self._registration.model))


def find_model_spec(module_name: str) -> ModuleSpec | None:
    """Find the specification of a registered model's module.

    Such a module is ``recbole.model.general_recommender.llmtwotower``.
    """
    package, _, stem = module_name.rpartition(".")
    if package == MODEL_PACKAGE:
        for registration in _registrations.values():
            if registration.name.lower() == stem:
                return ModuleSpec(module_name, _ModelLoader(registration), origin="recbole_llm.bridge.register")  # type: ignore[arg-type]
    return None


# ---------------------------------------------------------------- other processes


def put_entry_points(module: ModuleType) -> None:
    """Replace the functions of RecBole's quick start that other processes begin with."""
    for own in (run_recboles, objective_function):
        if getattr(module, own.__name__) is not own:
            _stock_functions[own.__name__] = getattr(module, own.__name__)
        override(module, own.__name__, lambda stock, own=own: own, keep_name=False)  # type: ignore[misc]


def run_recboles(rank: int, *args: Any) -> None:
    """Run RecBole's worker function.

    A child process finds it by our module's name, so it imports us before RecBole.
    """
    _stock("run_recboles")(rank, *args)


def objective_function(*args: Any, **kwargs: Any) -> Any:
    """Run RecBole's objective function for HyperTuning and Ray Tune, with repairs and registration in every worker."""
    return _stock("objective_function")(*args, **kwargs)


_stock_functions: dict[str, Callable[..., Any]] = {}


def _stock(name: str) -> Callable[..., Any]:
    if name not in _stock_functions:
        importlib.import_module("recbole.quick_start.quick_start")
    return _stock_functions[name]


_BUILT_IN = ("LLMTwoTower",)
_registrations["LLMTwoTower"] = Registration(
    name="LLMTwoTower",
    model="recbole_llm.model:LLMTwoTower",
    yaml=Path(__file__).resolve().parent.parent / "properties" / "LLMTwoTower.yaml",
    trainer="recbole_llm.bridge.training.trainer:LLMTwoTowerTrainer",
    dataset="recbole_llm.bridge.dataset:LLMTwoTowerDataset",
    train_dataloader="recbole_llm.bridge.batches:train_dataloader_class",
    count_flops=False,
)
