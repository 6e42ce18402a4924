"""Makes models of ours known to every place where RecBole looks a model up by its name."""

import importlib.util
import sys
from collections.abc import Callable
from dataclasses import dataclass, replace
from importlib.machinery import ModuleSpec
from pathlib import Path
from types import ModuleType
from typing import Any, TypeVar, overload

from recbole_llm.bridge.evaluation import hooks
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
    if before is not None:
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


def is_ours(name: str) -> bool:
    """Whether a registered model is LLMTwoTower or a subclass of it."""
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


# ---------------------------------------------------------------- lookups


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


def _serve(module: ModuleType, suffix: str, target_of: Callable[[Registration], Target | None]) -> None:
    """Make ``module.<name><suffix>`` available for every registered model that brings one."""
    stock = vars(module).get("__getattr__")
    if getattr(stock, "__module__", None) == __name__:
        return

    def __getattr__(attribute: str) -> Any:  # noqa: N807
        found = registered(attribute.removesuffix(suffix)) if attribute.endswith(suffix) else None
        target = None if found is None else target_of(found)
        if target is not None:
            return resolve(target)
        if stock is not None:
            return stock(attribute)
        raise AttributeError(f"module {module.__name__!r} has no attribute {attribute!r}")

    module.__dict__["__getattr__"] = __getattr__


def _trainers(module: ModuleType) -> None:
    """get_trainer (utils/utils.py:88) asks ``recbole.trainer`` for <name>Trainer."""
    _serve(module, "Trainer", lambda registration: registration.trainer)


def _datasets(module: ModuleType) -> None:
    """create_dataset (data/utils.py:41) asks ``recbole.data.dataset`` for <name>Dataset."""
    _serve(module, "Dataset", lambda registration: registration.dataset)


def _models(module: ModuleType) -> None:
    """``from recbole.model.general_recommender import <name>``, as for stock models."""
    _serve(module, "", lambda registration: registration.model)


def _defaults(module: ModuleType) -> None:
    """Config (configurator.py:238) reads overall.yaml, then the model's YAML, then the dataset's: ours comes second."""

    def make(stock: Callable[[Any, str], Any]) -> Callable[[Any, str], Any]:
        def _update_internal_config_dict(self: Any, file: str) -> Any:
            result = stock(self, file)
            registration = registered(self.model)
            if registration is not None and registration.yaml is not None and Path(file).name == "overall.yaml":
                own = stock(self, str(registration.yaml)) or {}
                _reject_overwritten(registration, own, Path(file).parent / "dataset" / "sample.yaml", self.yaml_loader)
            return result

        return _update_internal_config_dict

    override(module.Config, "_update_internal_config_dict", make)


def _classes(module: ModuleType) -> None:
    """Config (configurator.py:202) takes a class, and run_recbole (quick_start.py:137) looks it up by its name."""

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def _get_model_and_dataset(self: Any, model: Any, dataset: Any) -> Any:
            found = stock(self, model, dataset)
            name, kind, _ = found
            if not kind.__module__.startswith("recbole."):
                known = _registrations.get(name)
                if known is None:
                    register_model(kind)
                elif resolve(known.model) is not kind:  # such as a cell of a notebook that ran again
                    _set(replace(known, model=kind))
            return found

        return _get_model_and_dataset

    override(module.Config, "_get_model_and_dataset", make)


def _configuration(module: ModuleType) -> None:
    _defaults(module)
    _classes(module)


def _reject_overwritten(registration: Registration, own: dict[str, Any], sample: Path, loader: Any) -> None:
    import yaml

    lost = sorted(set(own) & set(yaml.load(sample.read_text(encoding="utf-8"), Loader=loader)))
    if lost:
        raise ValueError(
            f"{registration.yaml} sets {', '.join(lost)}, which RecBole's properties/dataset/sample.yaml overwrites. "
            "Set it in a configuration file, or let the model's dataset class see to it."
        )


def _dataset_keys(module: ModuleType) -> None:
    """A saved dataset is used again if no key of this list changed (data/utils.py:63): ours belong to it."""
    from recbole_llm.bridge.options import DATASET_KEYS

    module.dataset_arguments.extend(key for key in DATASET_KEYS if key not in module.dataset_arguments)


def _dataloaders(module: ModuleType) -> None:
    """get_dataloader (data/utils.py:241) has a table inside the function; a registered model's choice comes first."""

    def make(stock: Callable[[Any, str], type]) -> Callable[[Any, str], type]:
        def get_dataloader(config: Any, phase: str) -> type:
            registration = registered(config["model"])
            if phase == "train" and registration is not None and registration.train_dataloader is not None:
                choose = registration.train_dataloader
                if isinstance(choose, str):
                    choose = resolve(choose)
                own = choose(config)
                if own is not None:
                    return own
            return stock(config, phase)

        return get_dataloader

    override(module, "get_dataloader", make)


def _flops(module: ModuleType) -> None:
    """get_flops (utils/utils.py:250) deep-copies the model, feature tables included."""

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def get_flops(model: Any, *args: Any, **kwargs: Any) -> Any:
            known = (registered(kind.__name__) for kind in type(model).__mro__ if kind.__name__ in _registrations)
            registration = next(known, None)
            if registration is not None and registration.count_flops is False:
                return float("nan")
            return stock(model, *args, **kwargs)

        return get_flops

    override(module, "get_flops", make)


# ---------------------------------------------------------------- other processes


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


def _entry_points(module: ModuleType) -> None:
    for own in (run_recboles, objective_function):
        if getattr(module, own.__name__) is not own:
            _stock_functions[own.__name__] = getattr(module, own.__name__)
        override(module, own.__name__, lambda stock, own=own: own, keep_name=False)  # type: ignore[misc]


HOOKS: dict[str, Callable[[ModuleType], None]] = {
    "recbole.trainer": _trainers,
    "recbole.trainer.trainer": hooks.evaluation,
    "recbole.evaluator.collector": hooks.collector,
    "recbole.data.dataset": _datasets,
    MODEL_PACKAGE: _models,
    "recbole.config.configurator": _configuration,
    "recbole.utils.argument_list": _dataset_keys,
    "recbole.data.utils": _dataloaders,
    "recbole.utils.utils": _flops,
    "recbole.quick_start.quick_start": _entry_points,
}

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
