"""recbole_llm_kernels as a distribution of its own: what it needs, beside recbole-llm, and what it says of itself."""

import email
import json
import os
import re
import shutil
import subprocess
import sys
import zipfile
from importlib import metadata
from pathlib import Path

import pytest

import recbole_llm
import recbole_llm_kernels

ROOT = Path(__file__).resolve().parents[2]
OPERATORS = """
import torch
from recbole_llm_kernels import catalog_bce, score_topk
query = torch.tensor([[1.0, 0.0], [0.0, 1.0]], requires_grad=True)
item = torch.tensor([[2.0, 0.0], [0.0, 3.0], [1.0, 1.0]])
top = score_topk(query.detach(), item, 2, seen_offsets=torch.tensor([0, 1, 1]), seen_ids=torch.tensor([0]))
assert top.ids.tolist() == [[2, 1], [1, 2]] and top.scores.tolist() == [[1.0, 0.0], [3.0, 1.0]], top
loss = catalog_bce(query, item, torch.tensor([0, 1, 2]), torch.tensor([0, 1]))
loss.backward()
dense = torch.nn.functional.binary_cross_entropy_with_logits(query @ item.T, torch.eye(2, 3), reduction="none").sum(1).mean()
assert abs(loss.item() - dense.item()) < 1e-6, (loss, dense)
"""


def python(executable, *arguments, **environment):
    env = {k: v for k, v in os.environ.items() if k != "PYTHONPATH"} | {"OMP_NUM_THREADS": "1"} | environment
    return subprocess.run([executable, *arguments], capture_output=True, text=True, env=env, timeout=500)


@pytest.fixture(scope="module")
def torch_alone(tmp_path_factory):
    """A folder with links to torch and what it requires, as after ``pip install torch``."""
    folder, wanted, seen = tmp_path_factory.mktemp("torch-alone"), ["torch"], set()
    while wanted:
        name = wanted.pop()
        try:
            found = metadata.distribution(name)
        except metadata.PackageNotFoundError:
            continue  # of another platform
        if found.name in seen:
            continue
        seen.add(found.name)
        for top in {file.parts[0] for file in found.files or () if file.parts[0] not in ("..", "__pycache__")}:
            source, link = Path(found.locate_file(top)), folder / top
            if source.exists() and not link.exists():
                link.symlink_to(source)
        wanted += [re.match(r"[\w.-]+", need)[0] for need in found.requires or () if "extra ==" not in need]
    assert "torch" in seen and "numpy" not in seen
    return folder


def test_the_versions_and_licences_are_the_same():
    assert recbole_llm_kernels.__version__ == recbole_llm.__version__
    assert (ROOT / "kernels" / "LICENSE").read_text() == (ROOT / "LICENSE").read_text()


def test_the_operators_run_where_torch_alone_is_installed(torch_alone):
    paths = os.pathsep.join([str(torch_alone), str(ROOT / "kernels")])
    done = python(sys.executable, "-S", "-W", "ignore", "-c", OPERATORS, PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr


@pytest.mark.slow
def test_the_quick_benchmark_runs_where_torch_alone_is_installed(torch_alone):
    code = """
import kernel_speed
kernel_speed.QUICK = [("pair_bce", dict(P=50, n=40, D=8))]
kernel_speed.timing.ceilings = lambda *_: {"flop_per_s": 1e9, "mm_flop_per_s": 1e9, "bytes_per_s": 1e9}
kernel_speed.main(["--quick", "--device", "cpu"])
"""
    paths = os.pathsep.join([str(torch_alone), str(ROOT / "benchmarks")])
    done = python(sys.executable, "-S", "-W", "ignore", "-c", code, PYTHONPATH=paths)
    assert done.returncode == 0, done.stderr
    assert "pair_bce  P=50 n=40 D=8" in done.stdout and "stays in the cache" in done.stdout


# ------------------------------------------------------------------ installed


@pytest.fixture(scope="module")
def wheels(tmp_path_factory):
    """Both wheels, built from a copy: a build leaves folders beside its sources."""
    copy = tmp_path_factory.mktemp("source")
    for name in ("pyproject.toml", "README.md", "LICENSE"):
        shutil.copy(ROOT / name, copy)
    for name in ("recbole_llm", "kernels"):
        shutil.copytree(ROOT / name, copy / name, ignore=shutil.ignore_patterns("__pycache__", "*.egg-info", "build"))
    out = tmp_path_factory.mktemp("wheels")
    done = python(
        sys.executable, "-m", "pip", "wheel", "-q", "--no-deps", "-w", str(out), str(copy / "kernels"), str(copy)
    )
    assert done.returncode == 0, done.stderr[-3000:]
    return {path.name.partition("-")[0]: path for path in out.glob("*.whl")}


@pytest.fixture
def environment(tmp_path):
    """A fresh virtual environment that also sees the packages of this one, which has everything but ours."""
    assert python(sys.executable, "-m", "venv", "--without-pip", str(tmp_path / "venv")).returncode == 0
    executable = str(tmp_path / "venv" / "bin" / "python")
    (site,) = (tmp_path / "venv" / "lib").glob("python*/site-packages")
    others = [path for path in sys.path if path.endswith("site-packages")]
    (site / "others.pth").write_text("\n".join(others) + "\n")
    return executable, site


def pip(executable, *arguments):
    done = python(sys.executable, "-m", "pip", "-q", "--python", executable, *arguments)
    assert done.returncode == 0, done.stderr[-2000:]


@pytest.mark.slow
def test_the_distribution_needs_torch_alone(wheels):
    with zipfile.ZipFile(wheels["recbole_llm_kernels"]) as wheel:
        names = wheel.namelist()
        (described,) = (name for name in names if name.endswith("/METADATA"))
        found = email.message_from_bytes(wheel.read(described))
    assert found["Version"] == recbole_llm_kernels.__version__
    always = [need for need in found.get_all("Requires-Dist") if "extra ==" not in need]
    assert always == ["torch>=2.6"]
    own = {name.split("/")[0] for name in names}
    assert own == {"recbole_llm_kernels", described.split("/")[0]}
    assert {"recbole_llm_kernels/py.typed", "recbole_llm_kernels/torch_ops/topk.py"} <= set(names)
    assert any(name.endswith("/LICENSE") for name in names)


@pytest.mark.slow
@pytest.mark.parametrize("order", [("recbole_llm", "recbole_llm_kernels"), ("recbole_llm_kernels", "recbole_llm")])
def test_both_may_be_installed(wheels, environment, order):
    executable, site = environment
    for name in order:
        pip(executable, "install", "--no-deps", str(wheels[name]))
    said = python(executable, "-m", "recbole_llm", "info", "--json")
    assert said.returncode == 0, said.stderr[-2000:]
    found = json.loads(said.stdout)["kernels"]
    version = recbole_llm.__version__
    assert found["file"] == str(site / "recbole_llm_kernels" / "__init__.py")
    assert found["installed by"] == f"recbole-llm {version}, recbole-llm-kernels {version}"
    assert python(executable, "-c", OPERATORS).returncode == 0
    # both lists hold the files: the one that stays says how to get them back
    pip(executable, "uninstall", "-y", "recbole-llm-kernels")
    lost = python(executable, "-m", "recbole_llm", "info")
    assert lost.returncode == 2 and "--force-reinstall --no-deps" in lost.stderr
    pip(executable, "install", "--force-reinstall", "--no-deps", str(wheels["recbole_llm"]))
    assert python(executable, "-m", "recbole_llm", "info").returncode == 0
