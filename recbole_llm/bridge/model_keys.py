"""Which configuration keys a model reads, so that a key that changes nothing is said to change nothing."""

import ast
import difflib
import inspect
import sys
from collections.abc import Iterable
from functools import lru_cache
from logging import getLogger
from pathlib import Path
from typing import Any

import yaml

from recbole_llm.bridge.options import DATASET_KEYS, MISSPELLING_RATIO, OWN_KEYS
from recbole_llm.bridge.register import registered_models
from recbole_llm.bridge.repairs.configuration import known_models

# read by Config and by the quick-start functions, and in none of RecBole's lists
_OF_STARTING = frozenset(
    ["model", "dataset", "config_file", "config_files", "nproc", "world_size", "ip", "port", "offset", "local_rank"]
)
MOST_OWNERS = 2  # of a key of other models, named in the warning
# modules of one model each; what the others read, every model reads
_MODELS = tuple(
    f"{kind}_recommender" for kind in ("general", "sequential", "context_aware", "knowledge_aware", "exlib")
)


def keys_read_by(model: str) -> frozenset[str] | None:
    """List the configuration keys that a model reads: RecBole's own of every model, and those of its code and its YAML file.

    Args:
        model: its name.

    Returns:
        The keys; ``None`` for a model that is neither RecBole's nor LLMTwoTower, of which nobody knows, or whose libraries
        are not installed.
    """
    if model == "LLMTwoTower":
        return _read_by_all() | _read_by_trainers(("Trainer", "AbstractTrainer")) | frozenset(OWN_KEYS)
    if model in registered_models() or model not in known_models():
        return None
    try:
        return _read_by_stock(model)
    except ModuleNotFoundError:
        return None


def unread_keys(model: str, given: Iterable[str]) -> list[str]:
    """List the keys among ``given`` that the model does not read, sorted.

    Keys of ours are none of them, whatever the model: one file is often given to several models.
    """
    rest = [key for key in given if key not in _OF_STARTING and key not in OWN_KEYS and key not in _listed()]
    # the code is looked at only where that does not tell
    known = keys_read_by(model) if rest else None
    return [] if known is None else sorted(key for key in rest if key not in known)


def near_key(key: str, known: Iterable[str]) -> str | None:
    """Find the key of ``known`` that ``key`` looks like; ``None`` if there is none."""
    names = sorted(known)
    near = [name for name in names if name.lower() == key.lower()]
    near = near or difflib.get_close_matches(key, names, n=1, cutoff=MISSPELLING_RATIO)
    return near[0] if near else None


def warn_of_unread_keys(config: Any) -> None:
    """Say in one WARNING which of the given keys the model does not read."""
    model = config["model"]
    unread = unread_keys(model, config.external_config_dict)
    if unread:
        getLogger().warning(
            "%s does not read these configuration keys, and they change nothing: %s.",
            model, ", ".join(_described(key, model) for key in unread),
        )  # fmt: skip


def _described(key: str, model: str) -> str:
    of = _yaml_keys()
    owners = [name for name in known_models() if key in of.get(name.lower(), ())]
    if owners:
        more = f" and {len(owners) - MOST_OWNERS} more" if len(owners) > MOST_OWNERS else ""
        return f"{key} (of {', '.join(owners[:MOST_OWNERS])}{more})"
    near = near_key(key, keys_read_by(model) or ())
    return key if near is None else f"{key} (is {near} meant?)"


# ---------------------------------------------------------------- what RecBole's code reads


def _read_by_stock(model: str) -> frozenset[str]:
    from recbole.utils import get_model, get_trainer

    kind = get_model(model)
    trainer = get_trainer(kind.type, model)
    found = _read_by_all() | _read_by_trainers(tuple(c.__name__ for c in trainer.__mro__))
    found |= _yaml_keys().get(model.lower(), frozenset())
    for base in kind.__mro__:
        file = getattr(sys.modules.get(base.__module__), "__file__", None)
        if file and base.__module__.startswith("recbole."):
            found |= _keys_of(_tree(Path(file)))
    return found


@lru_cache(maxsize=1)
def _listed() -> frozenset[str]:
    """The keys of RecBole's lists of arguments and of its overall defaults."""
    from recbole.utils import argument_list

    names = {key for value in vars(argument_list).values() if isinstance(value, list) for key in value}
    names -= set(DATASET_KEYS)  # which we add to one of the lists
    for name in ("overall.yaml", "dataset/sample.yaml"):
        names |= set(yaml.safe_load((_folder() / "properties" / name).read_text(encoding="utf-8")) or ())
    return frozenset(names) | _OF_STARTING


@lru_cache(maxsize=1)
def _read_by_all() -> frozenset[str]:
    found = set(_listed())
    for path in _folder().rglob("*.py"):
        parts = path.relative_to(_folder()).parts
        if not (parts[0] == "model" and parts[1] in _MODELS) and parts[0] != "trainer":
            found |= _keys_of(_tree(path))
    return frozenset(found)


@lru_cache(maxsize=1)
def _trainer_keys() -> dict[str, frozenset[str]]:
    """Name of a trainer class of RecBole to the keys that its own code reads."""
    from recbole.trainer import trainer

    classes = [node for node in _tree(Path(inspect.getfile(trainer))).body if isinstance(node, ast.ClassDef)]
    return {node.name: _keys_of(node) for node in classes}


def _read_by_trainers(names: Iterable[str]) -> frozenset[str]:
    of = _trainer_keys()
    return frozenset().union(*(of.get(name, frozenset()) for name in names))


@lru_cache(maxsize=1)
def _yaml_keys() -> dict[str, frozenset[str]]:
    """Name of a stock model's YAML file, in lower case, to its keys."""
    files = sorted((_folder() / "properties" / "model").glob("*.yaml"))
    # in lower case, since the files of two models are not named like their classes
    return {file.stem.lower(): frozenset(yaml.safe_load(file.read_text(encoding="utf-8")) or ()) for file in files}


def _folder() -> Path:
    import recbole

    return Path(recbole.__file__).parent


def _tree(path: Path) -> ast.Module:
    return ast.parse(path.read_text(encoding="utf-8"))


def _keys_of(tree: ast.AST) -> frozenset[str]:
    """The keys in ``config["key"]``, ``"key" in config`` and ``config.get("key")``, of names that hold "config"."""
    found = set()
    for node in ast.walk(tree):
        key: ast.AST | None = None
        if isinstance(node, ast.Subscript) and _is_config(node.value):
            key = node.slice
        elif isinstance(node, ast.Compare) and isinstance(node.ops[0], (ast.In, ast.NotIn)):
            key = node.left if _is_config(node.comparators[0]) else None
        elif isinstance(node, ast.Call) and isinstance(node.func, ast.Attribute) and node.func.attr == "get":
            key = node.args[0] if node.args and _is_config(node.func.value) else None
        if isinstance(key, ast.Constant) and isinstance(key.value, str):
            found.add(key.value)
    return frozenset(found)


def _is_config(node: ast.AST) -> bool:
    name = node.id if isinstance(node, ast.Name) else node.attr if isinstance(node, ast.Attribute) else ""
    return "config" in name.lower()
