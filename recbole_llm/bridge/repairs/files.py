"""Repairs where RecBole runs code that it finds in a file: evaluated strings, and pickles that nobody named.

After them, nothing is unpickled in a run but a file that the run wrote itself, and a path that its caller gives: on the
command line, in a configuration file or dictionary, as an argument of a function. A path in a checkpoint is not the caller's,
and neither is a name that RecBole makes up (``saved/<dataset>-Dataset.pth``): somebody else may have put a file there.
"""

import ast
import copy
import os
import pickle
from collections import OrderedDict
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from contextvars import ContextVar
from logging import getLogger
from types import ModuleType
from typing import Any

from recbole_llm.bridge.repairs.registry import ModuleView, always, override, repair
from recbole_llm.content.encoder_settings import is_function

# keys of paths that RecBole unpickles by pickle.load
SAVED_DATA = {"dataset_save_path": "dataset", "dataloaders_save_path": "split of data loaders"}


# ---------------------------------------------------------------- strings


def _values(text: str) -> list[Any] | tuple[Any, ...]:
    """The values behind ``choice`` in a search space."""
    try:
        values = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        values = None
    if not isinstance(values, (list, tuple)) or not values:
        raise ValueError(
            f"params_file: {text[:200]!r} is no list of values. Write numbers, true names such as True and None, lists, and "
            "strings in quotes, as in: learning_rate choice [0.01,0.001]"
        )
    if functions := [value for value in values if isinstance(value, str) and is_function(value)]:
        raise ValueError(
            f"params_file: {functions[0]!r} is a function, which a file may not name: reading a file runs no code. Give it on "
            f"the command line, --encoder={functions[0]}, or in config_dict."
        )
    return values


@repair(
    "recbole.trainer.hyper_tuning",
    upstream="trainer/hyper_tuning.py:239 (eval of what follows `choice` in a file)",
    issues="none found",
    until="RecBole reads the values as literals",
    condition=always("a search space that somebody else has written runs any expression in it"),
)
def _search_space(module: ModuleType) -> None:
    """The values of a search space are literals; any other expression is an error that shows it."""
    module.__dict__["eval"] = _values  # the module's one use of the name


@repair(
    "recbole.model.context_aware_recommender.kd_dagfm",
    upstream="model/context_aware_recommender/kd_dagfm.py:44 (eval of config['teacher'])",
    issues="none found",
    until="KD_DAGFM looks its teacher up by name",
    condition=always("the value of a key is run as a Python expression"),
)
def _teacher(module: ModuleType) -> None:
    """KD_DAGFM's teacher is one of the networks of its module, by name."""

    def network(name: str) -> Any:
        networks = {
            known: kind
            for known, kind in vars(module).items()
            if isinstance(kind, type) and kind.__module__ == module.__name__ and hasattr(kind, "FeatureInteraction")
        }
        del networks["KD_DAGFM"]
        if name not in networks:
            raise ValueError(f"teacher must be one of {', '.join(networks)}, got {name[:200]!r}.")
        return networks[name]

    module.__dict__["eval"] = network  # the module's one use of the name


@repair(
    "recbole.config.configurator",
    upstream="config/configurator.py:107,155,233 (yaml.FullLoader)",
    issues="none found",
    until="RecBole reads configuration files with yaml.SafeLoader",
    condition=always(
        "a tag puts a function of any loaded module into the configuration; before PyYAML 5.4 it ran code"
    ),
)
def _plain_yaml(module: ModuleType) -> None:
    """Configuration files hold plain values; another tag is a ValueError that shows its line."""
    import yaml

    def load(text: str, Loader: Any) -> Any:
        class Plain(yaml.SafeLoader):
            yaml_implicit_resolvers = Loader.yaml_implicit_resolvers  # among them RecBole's of floats

        try:
            return yaml.load(text, Loader=Plain)
        except yaml.YAMLError as error:
            raise ValueError(
                f"A configuration file is no YAML of plain values: {' '.join(str(error).split())}. "
                "Correct that line; numbers, strings, lists and mappings are read, and no tags."
            ) from error

    module.__dict__["yaml"] = ModuleView(yaml, {"load": load})


# ---------------------------------------------------------------- arrays and weights


@repair(
    "recbole.model.general_recommender.ldiffrec",
    upstream="model/general_recommender/ldiffrec.py:232 (np.load(allow_pickle=True) of item_emb.npy in the dataset's folder)",
    issues="none found",
    until="LDiffRec loads its array without allow_pickle",
    condition=always("an array of objects in a dataset's folder is unpickled, though numbers are meant"),
)
def _item_embeddings(module: ModuleType) -> None:
    """LDiffRec's item embeddings are read as the array of numbers that they are."""
    import numpy as np

    def load(file: Any, *args: Any, **kwargs: Any) -> Any:
        try:
            return np.load(file, allow_pickle=False)
        except ValueError as error:
            raise ValueError(
                f"{os.fspath(file)}: {error}. Save it anew with np.save, as an array of floats of [items, columns]."
            ) from error

    module.__dict__["np"] = ModuleView(np, {"load": load})


class Inert:
    """What stands for any object of a file of which only tensors are wanted: it takes everything and does nothing."""

    def __new__(cls, *args: Any, **kwargs: Any) -> "Inert":
        """The object, whatever its arguments."""
        return super().__new__(cls)

    def __init__(self, *args: Any, **kwargs: Any) -> None:
        pass

    def __setstate__(self, state: Any) -> None:
        pass

    def __setitem__(self, key: Any, value: Any) -> None:
        pass

    def append(self, value: Any) -> None:
        """Do nothing."""

    def extend(self, values: Any) -> None:
        """Do nothing."""


def load_tensors(load: Callable[..., Any], file: Any, **kwargs: Any) -> Any:
    """Read the tensors and plain values of a ``torch.save`` file, with :class:`Inert` for every other object.

    A checkpoint of RecBole holds its ``Config`` and is of a pickle protocol that ``weights_only=True`` does not read.

    Args:
        load: ``torch.load``.
        file: a path.
        kwargs: more arguments of ``torch.load``.

    Raises:
        ValueError: if the file holds anything else.
        OSError: if it is not there.
    """
    tensors_only = ModuleType("tensors_only")
    tensors_only.__dict__.update(Unpickler=_Tensors, load=lambda f, **named: _Tensors(f, **named).load())
    try:
        return load(file, **(kwargs | {"weights_only": False, "pickle_module": tensors_only}))
    except (
        pickle.UnpicklingError,
        RuntimeError,
        ValueError,
        TypeError,
        AttributeError,
        EOFError,
        LookupError,
    ) as error:
        raise ValueError(
            f"{file}: its tensors cannot be read ({str(error)[:200]}). "
            "Give a checkpoint that RecBole saved, or one of torch.save(model.state_dict())."
        ) from error


class _Tensors(pickle.Unpickler):
    """Knows the functions that rebuild tensors; everything else that a file may call is inert."""

    def find_class(self, module: str, name: str) -> Any:
        """What a pickle calls ``module.name``."""
        import torch

        if (module, name) in _REBUILDS:
            return getattr(torch._utils, name)
        known = {
            ("collections", "OrderedDict"): OrderedDict,
            ("torch", "Size"): torch.Size,
            ("torch", "device"): torch.device,
        }
        dtype = getattr(torch, name, None) if module == "torch" else None
        return dtype if isinstance(dtype, torch.dtype) else known.get((module, name), Inert)


_REBUILDS = frozenset(("torch._utils", f"_rebuild_{what}") for what in ("tensor", "tensor_v2", "parameter"))


# ---------------------------------------------------------------- saved data


_file: ContextVar[tuple[str, Any]] = ContextVar("_file", default=("", None))  # the key, and the path given for it
_given: ContextVar[dict[str, Any] | None] = ContextVar("_given", default=None)  # of load_data_and_model


def _is_there(file: Any) -> bool:
    """``os.path.exists`` for data/utils.py, which asks it before it unpickles: true of a path that was given alone."""
    key, given = _file.get()
    there = os.path.exists(file)
    if given and file == given:
        if not there:
            getLogger().warning("%s: %s does not exist; the data are read from their files.", key, file)
        return there
    if there:
        getLogger().info("%s is there and not read, since nobody named it: %s=%s would.", file, key, file)
    return False


def _reading(key: str) -> Callable[[Callable[[Any], Any]], Callable[[Any], Any]]:
    """A maker of a function of a configuration that unpickles nothing but the path under ``key``."""

    def make(stock: Callable[[Any], Any]) -> Callable[[Any], Any]:
        def read(config: Any) -> Any:
            path = (_given.get() or {}).get(key)
            if path:
                config[key] = path
            token = _file.set((key, config[key]))
            try:
                return stock(config)
            finally:
                _file.reset(token)

        return read

    make.__qualname__ += f".{key}"  # by which an override knows itself again
    return make


@repair(
    "recbole.data.utils",
    upstream="data/utils.py:55-61, 113-122 (pickle.load of checkpoint_dir/<dataset>-<class>.pth and"
    " checkpoint_dir/<dataset>-for-<model>-dataloader.pth wherever they exist)",
    issues="none found",
    until="RecBole reads saved data only where dataset_save_path or dataloaders_save_path name them",
    condition=always("a folder saved/ that comes with somebody's project runs code in a plain run"),
)
def _unnamed_pickles(module: ModuleType) -> None:
    """A saved dataset or data loader is read where its path is given, and a file that merely lies there is named in the log."""
    module.__dict__["os"] = ModuleView(os, {"path": ModuleView(os.path, {"exists": _is_there})})
    override(module, "create_dataset", _reading("dataset_save_path"))
    override(module, "load_split_dataloaders", _reading("dataloaders_save_path"))


@repair(
    "recbole.config.configurator",
    upstream="trainer/trainer.py:297 (a checkpoint holds its whole Config), data/utils.py:58,117 (whose paths are unpickled)",
    issues="none found",
    until="checkpoints hold no paths, or RecBole reads saved data only where the caller names them",
    condition=always("what is read beside a checkpoint is up to the checkpoint"),
)
def _unpickled_config(module: ModuleType) -> None:
    """A Config that comes out of a file names no other file to unpickle; copies of one are whole."""

    def __setstate__(self: Any, state: dict[str, Any]) -> None:  # noqa: N807
        self.__dict__.update(state)
        for values in self.__dict__.values():
            for key in SAVED_DATA if isinstance(values, dict) else ():
                if values.get(key) is not None:
                    values[key] = None

    def __copy__(self: Any) -> Any:  # noqa: N807
        twin = object.__new__(type(self))
        twin.__dict__.update(self.__dict__)
        return twin

    def __deepcopy__(self: Any, memo: dict[int, Any]) -> Any:  # noqa: N807
        twin = memo[id(self)] = object.__new__(type(self))
        twin.__dict__.update(copy.deepcopy(self.__dict__, memo))
        return twin

    for method in (__setstate__, __copy__, __deepcopy__):
        setattr(module.Config, method.__name__, method)


@contextmanager
def _giving(paths: dict[str, Any]) -> Iterator[None]:
    token = _given.set(paths)
    try:
        yield
    finally:
        _given.reset(token)


@repair(
    "recbole.quick_start.quick_start",
    upstream="quick_start/quick_start.py:238 (saved data are found by the paths in the checkpoint, and by nothing else)",
    issues="none found",
    until="load_data_and_model takes the paths of saved data",
    condition=always("no path is taken from a checkpoint's Config, so the caller must be able to give one"),
)
def _data_and_model(module: ModuleType) -> None:
    """``load_data_and_model`` takes ``dataset_save_path`` and ``dataloaders_save_path`` of data that the run had saved."""

    def make(stock: Callable[[Any], Any]) -> Callable[..., Any]:
        def load_data_and_model(
            model_file: Any, dataset_save_path: Any = None, dataloaders_save_path: Any = None
        ) -> Any:
            with _giving({"dataset_save_path": dataset_save_path, "dataloaders_save_path": dataloaders_save_path}):
                return stock(model_file)

        return load_data_and_model

    override(module, "load_data_and_model", make)
