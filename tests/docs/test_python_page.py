"""What is public is documented: docs/python.md holds every name of both packages, kernels/README.md every operator."""

import importlib
import inspect
import re
from pathlib import Path

import pytest
import yaml

pytest.importorskip("torch")
pytest.importorskip("recbole")

import recbole_llm
import recbole_llm_kernels

ROOT = Path(__file__).resolve().parents[2]
DIRECTIVE = re.compile(r"^::: ([\w.]+)\n((?: +.*\n)*)", re.M)
PACKAGES = (recbole_llm, recbole_llm_kernels)


def found(path):
    """The object of a dotted path, and whether it is a module."""
    try:
        return importlib.import_module(path), True
    except ModuleNotFoundError:
        module, _, name = path.rpartition(".")
        return getattr(importlib.import_module(module), name), False


def documented():
    """Every object that the page shows, by the directives that mkdocstrings reads."""
    for path, options in DIRECTIVE.findall((ROOT / "docs" / "python.md").read_text() + "\n"):
        members = (yaml.safe_load(options) or {}).get("options", {}).get("members") if options else None
        thing, is_module = found(path)
        if not is_module:
            assert all(hasattr(thing, name) for name in members or ()), path
            yield thing
            continue
        for name in members or getattr(thing, "__all__", None) or [n for n in vars(thing) if not n.startswith("_")]:
            yield getattr(thing, name)


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_every_public_name_is_on_the_page(package):
    shown = list(documented())
    names = [name for name in package.__all__ if not name.startswith("__")]
    assert names
    assert not [name for name in names if not any(getattr(package, name) is thing for thing in shown)]


def test_every_operator_is_in_the_kernels_readme():
    text = (ROOT / "kernels" / "README.md").read_text()
    names = [name for name in recbole_llm_kernels.__all__ if not name.startswith("__")]
    assert not [name for name in names if not re.search(rf"\b{name}\b", text)]


@pytest.mark.parametrize("package", PACKAGES, ids=lambda package: package.__name__)
def test_a_name_without_an_underscore_is_public_or_a_part(package):
    """As httpx: nothing that a package imports for itself looks like its own."""
    for name in dir(package):
        if not name.startswith("_") and name not in package.__all__:
            part = getattr(package, name)
            assert inspect.ismodule(part) and part.__name__ == f"{package.__name__}.{name}", name
    assert sorted(set(package.__all__)) == sorted(package.__all__)
    assert set(package.__all__) <= set(dir(package))


def public_functions():
    for package in PACKAGES:
        for name in package.__all__:
            thing = getattr(package, name)
            if inspect.isclass(thing):
                members = [m for m in vars(thing).values() if inspect.isfunction(m) and not m.__name__.startswith("_")]
                yield from ((f"{name}.{member.__name__}", member) for member in members)
            elif callable(thing):
                yield name, thing


@pytest.mark.parametrize(
    ("name", "function"), list(public_functions()), ids=lambda value: value if isinstance(value, str) else ""
)
def test_a_public_function_is_annotated_and_documented(name, function):
    signature = inspect.signature(function)
    given = [p for p in signature.parameters.values() if p.name != "self"]
    assert not [p.name for p in given if p.annotation is inspect.Parameter.empty], name
    assert signature.return_annotation is not inspect.Signature.empty, name
    assert inspect.getdoc(function), name


def test_what_a_program_begins_with_has_an_example():
    objects = [recbole_llm.load, recbole_llm.LoadedModel, recbole_llm.import_dataset, recbole_llm.register_model]
    objects.append(recbole_llm.repair_report)
    assert not [thing.__name__ for thing in objects if "Example:" not in inspect.getdoc(thing)]
