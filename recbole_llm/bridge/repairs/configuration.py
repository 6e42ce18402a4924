"""Repairs of how RecBole reads values, command lines and model names."""

import ast
import difflib
import importlib.util
import os
import site
import sys
import sysconfig
from collections.abc import Callable, Mapping
from functools import lru_cache
from logging import getLogger
from pathlib import Path
from types import ModuleType
from typing import Any

from recbole_llm.bridge.repairs.registry import always, override, repair

ARGUMENTS_VARIABLE = "RECBOLE_LLM_ARGUMENTS"
PROGRAM = "recbole-llm"


# ---------------------------------------------------------------- values


def parse_value(text: str) -> Any:
    """Parse a string of a configuration dictionary or a command line.

    Numbers, strings in quotes, lists, tuples, dictionaries, booleans and None are written as in Python (true and
    false also in any case); everything else is the string itself. Stock evaluates the string as a Python expression
    inside Config: ``map.npy`` and ``1/0`` raise, ``key`` becomes the key's name, ``2024-10-11`` becomes 2003.
    """
    try:
        value = ast.literal_eval(text)
    except (ValueError, SyntaxError, TypeError, MemoryError, RecursionError):
        return {"true": True, "false": False}.get(text.lower(), text)
    return value if value is None or isinstance(value, (str, int, float, list, tuple, dict)) else text


@repair(
    "recbole.config.configurator",
    upstream="config/configurator.py:124-147 (eval of every string)",
    issues="none found",
    until="RecBole parses literals instead of evaluating expressions",
    condition=always("names, paths and dates must reach the configuration as they are written"),
)
def _literals(module: ModuleType) -> None:
    """Strings of config_dict and of the command line are parsed as literals; the caller's dictionary stays as it is."""

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def _convert_config_dict(self: Any, config_dict: Mapping[str, Any]) -> dict[str, Any]:
            return {key: parse_value(value) if isinstance(value, str) else value for key, value in config_dict.items()}

        return _convert_config_dict

    override(module.Config, "_convert_config_dict", make)


# ---------------------------------------------------------------- command line


@lru_cache(maxsize=1)
def _installation_folders() -> tuple[Path, ...]:
    """Where installed programs live: the standard library, packages, and the folders of console scripts."""
    paths = [sysconfig.get_path(key) for key in ("stdlib", "platstdlib", "purelib", "platlib", "scripts")]
    paths += [*site.getsitepackages(), site.getusersitepackages(), str(Path(sys.executable).parent)]
    user_scheme = sysconfig.get_preferred_scheme("user")
    paths.append(sysconfig.get_path("scripts", user_scheme))
    return tuple({Path(os.path.realpath(path)) for path in paths})


def is_installed(path: str) -> bool:
    """Return whether the file belongs to an installed program or package, and not to a user's folder."""
    real = Path(os.path.realpath(path))
    return any(folder in real.parents for folder in _installation_folders()) or "dist-packages" in real.parts


def foreign_host() -> str | None:
    """Name the program that owns ``sys.argv`` if its arguments are not meant for RecBole, else ``None``.

    A script of the user's (``python train.py --epochs=5``, under a debugger or ``python -m recbole_llm`` too),
    ``python -c`` and our own command speak to RecBole, as with stock. A program that is installed (pytest, ipykernel,
    streamlit, unittest, celery, a Ray worker ...) speaks for itself: it is told by where ``sys.argv[0]``, or the main
    module where that is no file, lies: in the standard library, in site-packages, or among the console scripts. Test
    runners of editors lie elsewhere; they are told by the arguments of the process still being those that pytest was
    started with.

    ``RECBOLE_LLM_ARGUMENTS`` overrules: ``read`` or ``ignore``.
    """
    overruled = os.environ.get(ARGUMENTS_VARIABLE, "")
    if overruled not in ("", "read", "ignore"):
        raise ValueError(f"{ARGUMENTS_VARIABLE} must be read or ignore, got {overruled!r}.")
    program = sys.argv[0] if sys.argv else ""
    if overruled:
        return program if overruled == "ignore" else None
    if Path(program).stem == PROGRAM or program == "-c":
        return None
    if os.path.isfile(program):
        if is_installed(program):
            return program
    else:
        main = getattr(sys.modules.get("__main__"), "__file__", None)
        if main is not None and is_installed(main) and _is_original(sys.argv):
            return main
    if "_pytest" in sys.modules and "PYTEST_CURRENT_TEST" in os.environ and _is_original(sys.argv):
        return "pytest"
    return None


def _is_original(argv: list[str]) -> bool:
    """Whether the arguments are still those the process was started with."""
    rest = argv[1:]
    return not rest or sys.orig_argv[-len(rest) :] == rest


def read_command_line(argv: list[str]) -> tuple[dict[str, str], list[str]]:
    """Split ``--key=value`` arguments into a dictionary, and the others into a list.

    Args:
        argv: arguments without the program's name. The value is everything after the first ``=``.

    Raises:
        SyntaxError: if a key is given twice with different values, as in stock.
    """
    values: dict[str, str] = {}
    others = []
    for argument in argv:
        key, equals, value = argument[2:].partition("=")
        if not argument.startswith("--") or not equals or not key:
            others.append(argument)
        elif values.setdefault(key, value) != value:
            raise SyntaxError(f"There are duplicate commend arg '{argument}' with different value.")
    return values, others


@repair(
    "recbole.config.configurator",
    upstream="config/configurator.py:166-194 (every Config reads sys.argv; a value with = in it is dropped)",
    issues="none found",
    until="RecBole is handed its arguments by the program that read them",
    condition=always("the arguments of pytest, Jupyter or a server are not a configuration"),
)
def _command_line(module: ModuleType) -> None:
    """Arguments of a foreign host program stay out of the configuration; ``--key=a=b`` arrives."""

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def _load_cmd_line(self: Any) -> dict[str, Any]:
            values, others = read_command_line(sys.argv[1:])
            host = foreign_host()
            if host is not None:
                if values:
                    getLogger().debug(
                        "The arguments %s belong to %s and are not read as configuration; %s=read changes that.",
                        sys.argv[1:], host, ARGUMENTS_VARIABLE,
                    )  # fmt: skip
                return {}
            if others:
                getLogger().warning("command line args [%s] will not be used in RecBole", " ".join(others))
            return self._convert_config_dict(values)

        return _load_cmd_line

    override(module.Config, "_load_cmd_line", make)


# ---------------------------------------------------------------- model names

_TREES = ("lightgbm", "xgboost")  # RecBole's package of the two models imports both libraries
# what RecBole imports in the middle of a run without declaring it
NEEDED_MODULES = {
    "KGIN": ("torch_scatter",),
    "LightGBM": _TREES,
    "MCCLK": ("torch_scatter",),
    "NCL": ("faiss",),
    "XGBoost": _TREES,
}
_DISTRIBUTIONS = {"faiss": "faiss-cpu"}


def known_models() -> list[str]:
    """Return the names of RecBole's models and of the registered ones, sorted."""
    import recbole

    from recbole_llm.bridge.register import registered_models

    files = (Path(recbole.__file__).parent / "properties" / "model").glob("*.yaml")
    proper = {
        "xgboost": "XGBoost",
        "lightgbm": "LightGBM",
    }  # the YAML files of these two are not named like their classes
    stock = {proper.get(file.stem, file.stem) for file in files}
    return sorted({*stock, "Random", *registered_models()})  # Random has no YAML file


def _require_modules(model: str) -> None:
    missing = [
        module for module in NEEDED_MODULES.get(model, ()) if module not in sys.modules and not _is_importable(module)
    ]
    if missing:
        install = " ".join(_DISTRIBUTIONS.get(module, module) for module in missing)
        message = f"{model} needs {' and '.join(missing)}, which RecBole does not install: pip install {install}"
        raise ModuleNotFoundError(message, name=missing[0])


def _is_importable(module: str) -> bool:
    spec = importlib.util.find_spec(module)
    return spec is not None and spec.loader is not None  # a folder of that name on the path has no loader


def _unknown_model(name: str) -> ValueError:
    names = known_models()
    near = [n for n in names if n.lower() == name.lower()]
    near = near or difflib.get_close_matches(name, names, n=5, cutoff=0.5)
    hint = f" Did you mean {' or '.join(near)}?" if near else f" Known models: {', '.join(names)}."
    return ValueError(f"`model_name` [{name}] is not the name of an existing model.{hint}")


@repair(
    "recbole.utils.utils",
    upstream="utils/utils.py:73 (find_spec imports exlib_recommender, which imports xgboost and lightgbm)",
    issues="none found",
    until="exlib_recommender/__init__.py imports nothing, or get_model looks there last and by file",
    condition=always(
        "an unknown name ends in ModuleNotFoundError: xgboost, a name in the wrong case in AttributeError"
    ),
)
def _model_name(module: ModuleType) -> None:
    """An unknown model name is a ValueError that lists near ones; a missing library is named with its model."""

    def make(stock: Callable[[str], Any]) -> Callable[[str], Any]:
        def get_model(model_name: str) -> Any:
            if model_name not in known_models():
                try:
                    return stock(model_name)  # a class that somebody put into RecBole's folders
                except (ValueError, AttributeError, ModuleNotFoundError) as error:
                    raise _unknown_model(model_name) from error
            _require_modules(model_name)
            return stock(model_name)

        return get_model

    override(module, "get_model", make)
