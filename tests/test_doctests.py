"""The examples in docstrings give what they say."""

import ast
import doctest
import importlib
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]
SOURCES = (ROOT, "recbole_llm"), (ROOT / "kernels", "recbole_llm_kernels")
GIVEN = {
    "recbole_llm.loaded": "an_export",
    "recbole_llm.importer": "two_tables",
}  # what an example reads -> its fixture


@pytest.fixture
def an_export(tmp_path, monkeypatch):
    pytest.importorskip("pandas")
    monkeypatch.syspath_prepend(ROOT / "tests" / "serving")
    from made_export import make_contents

    from recbole_llm.export.writer import write_artifact

    write_artifact(tmp_path / "export", make_contents())
    return {"folder": tmp_path / "export"}


@pytest.fixture
def two_tables(tmp_path):
    orders, products = tmp_path / "orders.csv", tmp_path / "products.csv"
    orders.write_text("customer_id,product_id\nc1,p1\nc1,p2\nc2,p3\n")
    products.write_text("product_id,title\np1,Frying pan\np2,Tea towel\np3,Cycling gloves\n")
    return {"orders": orders, "products": products, "folder": tmp_path / "dataset"}


def with_examples():
    """Modules whose docstrings hold a prompt; found without importing any."""
    for root, package in SOURCES:
        for path in sorted((root / package).rglob("*.py")):
            nodes = ast.walk(ast.parse(path.read_text(encoding="utf-8")))
            documented = (ast.Module, ast.ClassDef, ast.FunctionDef, ast.AsyncFunctionDef)
            if any(">>> " in (ast.get_docstring(node) or "") for node in nodes if isinstance(node, documented)):
                yield ".".join(path.relative_to(root).with_suffix("").parts)


MODULES = list(with_examples())


@pytest.mark.parametrize("name", MODULES)
def test_the_examples_of_a_module_hold(name, request):
    pytest.importorskip("torch")
    if "bridge" in name:
        pytest.importorskip("recbole")
    given = request.getfixturevalue(GIVEN[name]) if name in GIVEN else {}
    found = doctest.testmod(importlib.import_module(name), extraglobs=given, raise_on_error=False, verbose=False)
    assert found.attempted and not found.failed


def test_public_functions_of_the_kernels_have_an_example():
    pytest.importorskip("torch")
    import recbole_llm_kernels

    functions = [getattr(recbole_llm_kernels, name) for name in recbole_llm_kernels.__all__]
    without = {f.__name__ for f in functions if callable(f) and not isinstance(f, type) and ">>> " not in f.__doc__}
    assert without <= {
        "default_backend",
        "fuses_scaled_bce",
        "pool_rows_without_own",
        "scaled_rows",
        "scaled_sampled_bce",
    }
