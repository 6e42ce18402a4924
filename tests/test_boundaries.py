"""What each layer may import, checked in a fresh interpreter (DESIGN: layers)."""

import functools
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def run(code, **environment):
    import os

    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", **environment}
    return subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)


@pytest.mark.parametrize(
    ("module", "forbidden"),
    [
        ("recbole_llm", "torch"),
        ("recbole_llm", "recbole"),
        ("recbole_llm", "numpy"),
        ("recbole_llm.cli", "torch"),
        ("recbole_llm_kernels", "recbole"),
        ("recbole_llm_kernels", "recbole_llm"),
        ("recbole_llm_kernels", "triton"),
        ("recbole_llm_kernels.functional", "triton"),
        ("recbole_llm.content.text", "recbole"),
        ("recbole_llm.content.text", "recbole_llm_kernels"),
        ("recbole_llm.content.encoders", "recbole"),
        ("recbole_llm.content.features", "recbole"),
        ("recbole_llm.content.features", "recbole_llm_kernels"),
        ("recbole_llm.towers", "recbole"),
        ("recbole_llm.towers", "recbole_llm_kernels"),
        ("recbole_llm.importer", "torch"),
        ("recbole_llm.importer", "recbole"),
        ("recbole_llm.serving", "torch"),
        ("recbole_llm.serving.recommend", "torch"),
        ("recbole_llm.serving.recommend", "recbole"),
        ("recbole_llm.closed_form", "recbole"),
        ("recbole_llm.closed_form", "recbole_llm_kernels"),
    ],
)
def test_import_does_not_load(module, forbidden):
    assert forbidden not in loaded_by(module)


@functools.cache
def loaded_by(module):
    """Top-level packages that an interpreter holds after importing a module."""
    result = run(f"import sys, {module}; print(*{{name.split('.')[0] for name in sys.modules}})")
    assert result.returncode == 0, result.stderr
    assert module.split(".")[0] in result.stdout.split()
    return frozenset(result.stdout.split())


def test_python_in_the_repository_root_does_not_shadow_kernels_of_hugging_face():
    """A package `kernels` on sys.path breaks `import transformers`; ours is a source root without __init__.py."""
    assert not (ROOT / "kernels" / "__init__.py").exists()
    result = run("import importlib.util as u; s = u.find_spec('kernels'); print(s is None or s.origin is None)")
    assert result.stdout.strip() == "True", result.stderr


def test_no_file_or_folder_called_kernels_in_tests_or_benchmarks():
    for folder in ("tests", "benchmarks"):
        assert not [p for p in (ROOT / folder).rglob("kernels*") if p.stem == "kernels"]


def test_top_level_is_the_agreed_layout():
    tracked = subprocess.run(["git", "ls-files"], capture_output=True, text=True, cwd=ROOT)
    if tracked.returncode != 0:
        pytest.skip("not a git checkout")
    names = {line.split("/")[0] for line in tracked.stdout.splitlines()}
    agreed = {"pyproject.toml", "README.md", "LICENSE", "recbole_llm", "kernels", "configs", "benchmarks", "tests"}
    assert {n for n in names if not n.startswith(".")} <= agreed
