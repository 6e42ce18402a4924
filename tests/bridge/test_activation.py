"""When repairs and registration happen: import orders, processes, unsupported versions; in fresh interpreters."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[2]


def python(code, *paths, check=True, **environment):
    """Run ``code``; ``paths`` come before everything else on ``sys.path``."""
    search = [*map(str, paths), str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(filter(None, search)), "OMP_NUM_THREADS": "1", **environment}
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env, cwd=ROOT)
    assert done.returncode == 0 or not check, done.stderr
    return done


def tree(folder, files):
    """Write Python files, by their path in ``folder``; the packages above them are made too."""
    for name, code in files.items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        for parent in path.parents:
            if parent == folder:
                break
            (parent / "__init__.py").touch()
        path.write_text(code)
    return folder


def recbole(folder, files, version="1.2.1"):
    """A package of that name and version, with these files."""
    return tree(folder, {"recbole/__init__.py": f"__version__ = '{version}'", **files})


def test_importing_the_package_loads_nothing_else():
    """What keeps the import cheap; benchmarks/import_time.py has the seconds."""
    code = (
        "import sys\nbefore = set(sys.modules)\nimport recbole_llm\n"
        "print(*sorted({m.split('.')[0] for m in set(sys.modules) - before}))"
    )
    assert set(python(code).stdout.split()) - set(sys.stdlib_module_names) == {"recbole_llm"}


ORDER = """
import json, sys, warnings
warnings.simplefilter("ignore")
FIRST
import recbole_llm
import recbole.quick_start.quick_start as quick_start
from recbole.config import Config
from recbole.utils import get_model
from recbole.data import utils as data_utils
from recbole.trainer.trainer import Trainer
assert data_utils.get_dataloader.__closure__, "stock get_dataloader"
assert quick_start.get_model is get_model
assert quick_start.run_recboles.__module__ == "recbole_llm.bridge.register"
config = Config("BPR", "ml-100k", config_dict={"mine": "map.npy", "gpu_id": ""})
try:
    get_model("LightGCM")
except ValueError as error:
    assert "LightGCN" in str(error)
states = {r.name: r.state for r in recbole_llm.repair_report()}
loader = data_utils.get_dataloader(config, "train").__name__
print(json.dumps({"mine": config["mine"], "states": states, "loader": loader}))
"""


@pytest.fixture(scope="module")
def plugin_first():
    pytest.importorskip("recbole")
    return json.loads(python(ORDER.replace("FIRST", "")).stdout)


@pytest.mark.parametrize(
    "first",
    [
        "import recbole",
        "import recbole.config, recbole.data, recbole.trainer, recbole.utils, recbole.evaluator",
        # quick_start imports ray: this order is open to those who have one that works
        "from recbole.quick_start import run_recbole, run_recboles",
    ],
    ids=["package", "submodules", "quick_start"],
)
@pytest.mark.slow
def test_the_order_of_imports_does_not_matter(tmp_path, plugin_first, first):
    ray = tree(tmp_path, {"ray/tune.py": "def report(**metrics): pass"}) if "quick_start" in first else tmp_path
    assert json.loads(python(ORDER.replace("FIRST", first), ray).stdout) == plugin_first
    assert plugin_first["mine"] == "map.npy"
    assert plugin_first["states"]["torch_load"] == "applied"


@pytest.mark.slow
def test_functions_pickled_by_a_parent_bring_the_repairs_into_a_child():
    pytest.importorskip("recbole")
    code = (
        "import pickle, sys, recbole_llm\nfrom recbole.quick_start import objective_function, run_recboles\n"
        "sys.stdout.buffer.write(pickle.dumps((run_recboles, objective_function)).hex().encode())"
    )
    pickled = python(code).stdout
    code = (
        f"import pickle, sys\npickle.loads(bytes.fromhex({pickled!r}))\n"
        "assert 'recbole' not in sys.modules and 'torch' not in sys.modules\n"
        "from recbole.utils import get_model\n"
        "try:\n    get_model('LightGCM')\nexcept ValueError as error:\n    print(error)"
    )
    assert "LightGCN" in python(code).stdout


def test_a_repaired_module_keeps_its_own_loader_and_can_be_reloaded(tmp_path):
    recbole(tmp_path, {"recbole/utils/argument_list.py": "dataset_arguments = ['load_col']"})
    code = (
        "import importlib, inspect, recbole_llm, recbole.utils.argument_list as a\n"
        "from recbole_llm.bridge.options import DATASET_KEYS\n"
        "for module in (a, importlib.reload(a)):\n"
        "    assert module.dataset_arguments == ['load_col', *DATASET_KEYS]\n"
        "    assert type(module.__loader__).__name__ == type(module.__spec__.loader).__name__ == 'SourceFileLoader'\n"
        "    print(inspect.getsource(module), end='')"
    )
    assert python(code, tmp_path).stdout == "dataset_arguments = ['load_col']\n" * 2


def test_a_module_in_the_middle_of_its_import_is_repaired_when_it_is_done(tmp_path):
    argument_list = "import recbole_llm\ndataset_arguments = ['load_col']"
    recbole(tmp_path, {"recbole/utils/argument_list.py": argument_list, "recbole/other.py": ""})
    code = (
        "import recbole.utils.argument_list as a\nassert a.dataset_arguments == ['load_col']\n"
        "import recbole.other\nprint(len(a.dataset_arguments) > 1)"
    )
    assert python(code, tmp_path).stdout.strip() == "True"


def test_the_finder_is_installed_once():
    code = (
        "import importlib, sys, recbole_llm\nimportlib.reload(recbole_llm)\n"
        "del sys.modules['recbole_llm']\nimport recbole_llm\n"
        "print(sum(type(f).__qualname__ == '_RecBoleFinder' for f in sys.meta_path))"
    )
    assert python(code).stdout.strip() == "1"


@pytest.mark.parametrize("version", ["1.1.1", "1.3.0", "2.0"])
@pytest.mark.parametrize("order", ["import recbole_llm, recbole.utils", "import recbole.utils, recbole_llm"])
def test_an_unsupported_recbole_is_left_alone_and_said_to_be(tmp_path, version, order):
    recbole(tmp_path, {"recbole/utils/argument_list.py": "dataset_arguments = []"}, version)
    code = (
        f"{order}\nfrom recbole.utils.argument_list import dataset_arguments\nprint(dataset_arguments)\n"
        "try:\n    recbole_llm.repair_report\nexcept ImportError as error:\n    print(error)"
    )
    done = python(code, tmp_path)
    assert done.stdout.startswith(f"[]\nrecbole-llm supports RecBole >=1.2.0,<1.3, but RecBole {version} is installed")
    assert "pip install 'recbole>=1.2.0,<1.3'" in done.stdout
    assert done.stderr.count("RuntimeWarning: recbole-llm supports RecBole >=1.2.0,<1.3") == 1


def test_without_recbole_the_package_imports_and_says_what_to_install():
    code = (
        "import sys\nsys.modules['recbole'] = None\nimport recbole_llm, importlib.util\n"
        "try:\n    recbole_llm.LLMTwoTower\nexcept ImportError as error:\n    print(error)"
    )
    assert python(code).stdout == "recbole-llm needs RecBole >=1.2.0,<1.3: pip install 'recbole>=1.2.0,<1.3'\n"


def test_a_probe_for_recbole_finds_nothing_where_there_is_nothing(tmp_path):
    code = (
        "import os, sys, recbole_llm, importlib.util\n"
        "sys.path[:] = [p for p in sys.path if not os.path.isdir(os.path.join(p, 'recbole'))]\n"
        "print(importlib.util.find_spec('recbole'))"
    )
    assert python(code).stdout.strip() == "None"


def test_a_repair_that_fails_stops_the_import_with_its_name_and_can_be_left_out(tmp_path):
    recbole(tmp_path, {"recbole/utils/case_study.py": "class Renamed: pass"}, "1.2.9")
    code = "import recbole_llm, recbole.utils.case_study\nprint('imported')"
    failed = python(code, tmp_path, check=False)
    assert failed.returncode == 1
    last = failed.stderr.strip().splitlines()[-1]
    assert last.startswith("ImportError: recbole-llm could not apply its repair 'case_study'")
    assert "AttributeError" in last
    assert "RECBOLE_LLM_SKIP_REPAIRS=case_study" in last
    assert python(code, tmp_path, RECBOLE_LLM_SKIP_REPAIRS="x, case_study").stdout == "imported\n"


def test_a_real_ray_in_use_stays_and_gets_the_results(tmp_path):
    pytest.importorskip("recbole")
    tree(tmp_path, {"ray/tune.py": "got = []\ndef report(metrics, *, checkpoint=None): got.append(metrics)"})
    code = (
        "import sys, ray.tune, recbole_llm\nfrom recbole.quick_start import quick_start\n"
        "quick_start.tune.report(ndcg=0.5)\nprint(ray.tune.got, sys.modules['ray'] is ray)"
    )
    assert python(code, tmp_path).stdout.strip() == "[{'ndcg': 0.5}] True"
