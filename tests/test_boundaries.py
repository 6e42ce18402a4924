"""What each layer may import, checked in a fresh interpreter (DESIGN: layers)."""

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
        ("recbole_llm.content.encoders.transformer", "recbole"),
        ("recbole_llm.content.features", "recbole"),
        ("recbole_llm.content.features", "recbole_llm_kernels"),
        ("recbole_llm.scoring.rows", "recbole_llm_kernels"),
        ("recbole_llm.scoring.probability", "torch"),
        ("recbole_llm.scoring.towers", "recbole"),
        ("recbole_llm.scoring.losses", "recbole"),
        ("recbole_llm.scoring.state", "recbole"),
        ("recbole_llm.importer", "torch"),
        ("recbole_llm.importer", "recbole"),
        ("recbole_llm.serving", "torch"),
        ("recbole_llm.retrieval.recommender", "torch"),
        ("recbole_llm.retrieval.recommender", "recbole"),
        ("recbole_llm.fitting.closed_form", "recbole"),
        ("recbole_llm.fitting.pipeline", "recbole"),
    ],
)
def test_import_does_not_load(module, forbidden):
    loaded = f"import sys, {module}; print([m for m in sys.modules if m.split('.')[0] == {forbidden!r}][:3])"
    result = run(loaded)
    assert result.returncode == 0, result.stderr
    assert result.stdout.strip() == "[]"


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
