"""Scripts as RecBole's users have them run unchanged: its arguments, its imports, its ray that is not there."""

import importlib.util
import os
import subprocess
import sys
import types
from pathlib import Path

import pytest

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole_llm.bridge.repairs import libraries as compat
from recbole_llm.bridge.repairs import ray as absent

ROOT = Path(__file__).resolve().parents[2]

# the arguments and calls of RecBole's run_recbole.py
TRAIN = """
import argparse

from recbole.quick_start import run

if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("--model", "-m", type=str, default="BPR")
    options.add_argument("--dataset", "-d", type=str, default="ml-100k")
    options.add_argument("--config_files", type=str, default=None)
    options.add_argument("--nproc", type=int, default=1)
    options.add_argument("--ip", type=str, default="localhost")
    options.add_argument("--port", type=str, default="5678")
    options.add_argument("--world_size", type=int, default=-1)
    options.add_argument("--group_offset", type=int, default=0)
    known, others = options.parse_known_args()
    files = known.config_files.strip().split(" ") if known.config_files else None
    group = dict(nproc=known.nproc, world_size=known.world_size, ip=known.ip, port=known.port)
    result = run(known.model, known.dataset, config_file_list=files, group_offset=known.group_offset, **group)
    print("ended with", *result["test_result"])
"""

# the imports and calls of RecBole's run_hyper.py, whose ray is for one of its two tools
SEARCH = """
import argparse

from recbole.trainer import HyperTuning
from recbole.quick_start import objective_function
import ray
from ray import tune
from ray.tune.schedulers import ASHAScheduler


def search(known):
    files = known.config_files.strip().split(" ") if known.config_files else None
    search = HyperTuning(
        objective_function, algo="exhaustive", early_stop=10, max_evals=100,
        params_file=known.params_file, fixed_config_file_list=files, display_file=known.display_file,
    )
    search.run()
    search.export_result(output_file=known.output_file)
    print("best", search.best_params, search.params2result[search.params2str(search.best_params)]["model"])


if __name__ == "__main__":
    options = argparse.ArgumentParser()
    options.add_argument("--config_files", type=str, default=None)
    options.add_argument("--params_file", type=str, default=None)
    options.add_argument("--output_file", type=str, default="hyper_example.result")
    options.add_argument("--display_file", type=str, default=None)
    options.add_argument("--tool", type=str, default="Hyperopt")
    known, _ = options.parse_known_args()
    if known.tool == "Hyperopt":
        search(known)
    else:
        ray.init()
        print(ASHAScheduler, tune)
"""


def run(script, *arguments, folder):
    (folder / "theirs.py").write_text(script)
    search = os.pathsep.join([str(ROOT), str(ROOT / "kernels")])
    env = {**os.environ, "PYTHONPATH": search, "OMP_NUM_THREADS": "1"}
    command = [sys.executable, "-m", "recbole_llm", "theirs.py", *arguments]
    done = subprocess.run(command, capture_output=True, text=True, env=env, cwd=folder)
    assert done.returncode == 0, done.stderr
    return done.stdout


@pytest.mark.slow
def test_a_script_that_trains_by_its_arguments(toy_path, tmp_path):
    (tmp_path / "a.yaml").write_text(f"data_path: {toy_path}\nshow_progress: False\nepochs: 7\ngpu_id: ''\n")
    (tmp_path / "b.yaml").write_text("encoder: ''\nembedding_size: 8\n")
    files = ["--config_files", "a.yaml b.yaml"]
    out = run(TRAIN, "--model=LLMTwoTower", "-d", "toy", *files, "--epochs=2", folder=tmp_path)
    assert "ended with recall@10 mrr@10 ndcg@10" in out
    assert len(list((tmp_path / "saved").glob("LLMTwoTower-*.pth"))) == 2  # the best epoch's and the last one's


@pytest.mark.slow
def test_a_script_that_searches_and_imports_a_ray_it_does_not_use(toy_path, tmp_path):
    pytest.importorskip("hyperopt")
    settings = f"model: LLMTwoTower\ndataset: toy\ndata_path: {toy_path}\nepochs: 1\ngpu_id: ''\nencoder: ''\n"
    (tmp_path / "fixed.yaml").write_text(settings + "show_progress: False\nembedding_size: 8\nblocks: learned\n")
    (tmp_path / "space.hyper").write_text("learning_rate choice [0.01,1.0e-07]\n")
    out = run(SEARCH, "--config_files=fixed.yaml", "--params_file=space.hyper", folder=tmp_path)
    assert "best {'learning_rate': 0.01} LLMTwoTower" in out
    text = (tmp_path / "hyper_example.result").read_text()
    assert text.count("Valid result:") == 2


# ---------------------------------------------------------------- ray


@pytest.fixture
def installed(monkeypatch):
    """Pretend these versions and modules are installed; none is loaded."""

    def pretend(ray, numpy, *modules):
        found = {"ray": ray, "numpy": numpy}
        look = lambda name: types.SimpleNamespace() if (name == "ray" and ray) or name in modules else None  # noqa: E731
        monkeypatch.setattr(absent, "importlib", types.SimpleNamespace(util=types.SimpleNamespace(find_spec=look)))
        monkeypatch.setattr(absent.metadata, "version", found.__getitem__)
        return absent.why_ray_cannot_be_imported()

    return pretend


def test_ray_is_judged_without_importing_it(installed):
    assert installed(None, "2.4.6") == "ray is not installed: pip install 'ray[tune]>=2.45'"
    old = installed("2.6.3", "2.4.6")
    assert old.startswith(
        "ray 2.6.3 needs pkg_resources (setuptools before 82) and NumPy 1 (here is 2.4.6): pip install"
    )
    assert installed("2.6.3", "1.26.4").startswith("ray 2.6.3 needs pkg_resources (setuptools before 82): pip")
    assert installed("2.6.3", "1.26.4", "pkg_resources") is None
    assert installed("2.60.0", "2.4.6") is None


@pytest.fixture
def stand_in(monkeypatch):
    """A ray that is not there, for this process, until the test ends."""
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    monkeypatch.setattr(sys, "modules", {k: v for k, v in sys.modules.items() if k.partition(".")[0] != "ray"})
    monkeypatch.setattr(absent, "why_ray_cannot_be_imported", lambda: "it is not installed")
    before = len(sys.meta_path)
    absent.stand_in_for_ray()
    assert len(sys.meta_path) == before + 1


def test_an_absent_ray_can_be_imported_and_says_why_it_cannot_be_used(stand_in, monkeypatch):
    finder = sys.meta_path[0]
    assert finder.find_spec("raylib") is None
    monkeypatch.setattr(absent, "_asked_by_a_library", lambda: False)
    module = finder.create_module(finder.find_spec("ray.tune"))
    for use in (module.run, module.schedulers.ASHAScheduler):
        with pytest.raises(ModuleNotFoundError, match=rf"{use.__name__} cannot be used: it is not installed"):
            use(1)
    with pytest.raises(AttributeError):
        module.__version__  # noqa: B018
    sys.modules["ray.tune"] = module
    compat._Tune.report(ndcg=0.5)  # no session to report to


def test_a_library_that_looks_for_ray_finds_what_is_there(stand_in):
    finder = sys.meta_path[0]
    assert finder.find_spec("ray") is not None
    code = compile("found = finder.find_spec('ray')", importlib.util.__file__, "exec")  # as if in the standard library
    asked = {"finder": finder}
    exec(code, asked)
    assert asked["found"] is None


def test_a_ray_that_can_be_imported_or_is_in_use_stays(monkeypatch):
    monkeypatch.setattr(sys, "meta_path", list(sys.meta_path))
    before = list(sys.meta_path)
    monkeypatch.setattr(absent, "why_ray_cannot_be_imported", lambda: None)
    absent.stand_in_for_ray()
    monkeypatch.setattr(absent, "why_ray_cannot_be_imported", lambda: "it is not installed")
    monkeypatch.setitem(sys.modules, "ray", types.ModuleType("ray"))
    absent.stand_in_for_ray()
    assert sys.meta_path == before
