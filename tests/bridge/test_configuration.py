"""How values, command lines and model names are read."""

import os
import sys
import sysconfig
import types

import pytest

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole_llm.bridge.repairs import configuration

# ---------------------------------------------------------------- values


@pytest.mark.parametrize(
    ("text", "value"),
    [
        ("5", 5), ("-1", -1), ("1e-3", 1e-3), ("0.5", 0.5), ("1_000", 1000), ("0x10", 16),
        ("[64, 32]", [64, 32]), ("['a','b']", ["a", "b"]), ("(1,2)", (1, 2)), ("0,1", (0, 1)), ("[]", []),
        ("{'mode': 'full', 'split': {'RS': [0.8,0.1,0.1]}}", {"mode": "full", "split": {"RS": [0.8, 0.1, 0.1]}}),
        ("True", True), ("true", True), ("False", False), ("FALSE", False), ("None", None),
        ("'quoted'", "quoted"), ("", ""),
    ],
)  # fmt: skip
def test_literals_are_parsed_as_stock_does(text, value):
    parsed = configuration.parse_value(text)
    assert parsed == value
    assert type(parsed) is type(value)
    if text.lower() not in ("true", "false", ""):
        assert eval(text) == value


@pytest.mark.parametrize(
    "text",
    [
        "map.npy", "re.bin", "1/0", "Qwen/Qwen3-Embedding-0.6B", "key", "param", "value", "config_dict", "self", "list",
        "__name__", "os.getcwd()", "2024-10-11", "2024/10/11", "sys.exit()", "bert-base-uncased", "a b",
        "NDCG@10", "null", "{1, 2}", "1+2j", "[0,inf)", "inf", "~", "(" * 300 + ")" * 300,
    ],
)  # fmt: skip
def test_other_strings_survive(text):
    assert configuration.parse_value(text) == text


def test_the_callers_dictionary_is_not_changed(tmp_path):
    from recbole.config import Config

    given = {"learning_rate": "0.5", "epochs": 3}
    assert Config("BPR", "ml-100k", config_dict=given)["learning_rate"] == 0.5
    assert given == {"learning_rate": "0.5", "epochs": 3}


# ---------------------------------------------------------------- command line


def test_a_value_may_hold_an_equals_sign():
    values, others = configuration.read_command_line(["--x=a=b", "--y=", "-m", "BPR", "--flag", "--=1", "z=1"])
    assert values == {"x": "a=b", "y": ""}
    assert others == ["-m", "BPR", "--flag", "--=1", "z=1"]


def test_a_key_given_twice_with_two_values_is_an_error():
    assert configuration.read_command_line(["--x=1", "--x=1"]) == ({"x": "1"}, [])
    with pytest.raises(SyntaxError, match="--x=2"):
        configuration.read_command_line(["--x=1", "--x=2"])


@pytest.fixture
def started_as(monkeypatch):
    """Pretend that the process was started with these arguments and is in no test."""

    def start(argv, main=None, environment=""):
        monkeypatch.setattr(sys, "argv", list(argv))
        monkeypatch.setattr(sys, "orig_argv", [sys.executable, *argv])
        monkeypatch.setitem(sys.modules, "__main__", types.SimpleNamespace(**({"__file__": main} if main else {})))
        monkeypatch.delenv("PYTEST_CURRENT_TEST", raising=False)
        monkeypatch.setenv(configuration.ARGUMENTS_VARIABLE, environment)
        return configuration.foreign_host()

    return start


SCRIPTS, PACKAGES, LIBRARY = (sysconfig.get_path(key) for key in ("scripts", "purelib", "stdlib"))


@pytest.mark.parametrize(
    "program",
    [
        os.path.join(PACKAGES, "pytest", "__main__.py"),
        os.path.join(LIBRARY, "unittest", "__main__.py"),
        os.path.join(SCRIPTS, "pytest"),
    ],
)
def test_an_installed_program_keeps_its_arguments(started_as, program):
    if not os.path.isfile(program):
        pytest.skip(f"no {program} here")
    assert started_as([program, "--tb=short", "--epochs=7"]) == program


def test_a_program_that_renames_itself_is_told_by_its_main_module(started_as):
    main = os.path.join(LIBRARY, "unittest", "__main__.py")
    assert started_as(["python -m unittest", "--locals=1"], main) == main


@pytest.mark.parametrize("name", ["train.py", "recbole-llm", "-c", "", "tool/recbole-llm"])
def test_the_arguments_of_scripts_and_of_our_command_are_read(started_as, tmp_path, name):
    if name == "train.py":
        (tmp_path / name).write_text("")
        name = str(tmp_path / name)
    assert started_as([name, "--epochs=7"]) is None


def test_our_own_console_script_is_read_though_it_is_installed(started_as, tmp_path, monkeypatch):
    monkeypatch.setattr(configuration, "_installation_folders", lambda: (tmp_path,))
    for name in ("recbole-llm", "recbole-llm.exe", "pytest"):
        (tmp_path / name).write_text("")
    assert started_as([str(tmp_path / "pytest"), "--epochs=7"]) is not None
    assert started_as([str(tmp_path / "recbole-llm"), "--epochs=7"]) is None
    assert started_as([str(tmp_path / "recbole-llm.exe"), "--epochs=7"]) is None


def test_a_script_in_a_folder_beside_the_environment_is_a_script(started_as, tmp_path):
    link = tmp_path / "train"
    link.write_text("")
    assert started_as([str(link)], main=str(link)) is None


def test_an_editors_test_runner_is_told_by_pytests_own_arguments(started_as, tmp_path, monkeypatch):
    runner = tmp_path / "_jb_pytest_runner.py"
    runner.write_text("")
    started_as([str(runner), "--path=x"])
    monkeypatch.setenv("PYTEST_CURRENT_TEST", "test_x (call)")
    assert configuration.foreign_host() == "pytest"
    monkeypatch.setattr(sys, "argv", ["run.py", "--epochs=7"])  # a test that sets arguments of its own means them
    assert configuration.foreign_host() is None


def test_the_environment_overrules(started_as, tmp_path):
    script = tmp_path / "train.py"
    script.write_text("")
    assert started_as([str(script)], environment="ignore") == str(script)
    assert started_as([os.path.join(PACKAGES, "pytest", "__main__.py")], environment="read") is None
    with pytest.raises(ValueError, match="must be read or ignore, got 'maybe'"):
        started_as([str(script)], environment="maybe")


def test_arguments_reach_the_configuration_of_a_script_only(started_as, tmp_path):
    from recbole.config import Config

    script = tmp_path / "train.py"
    script.write_text("")
    started_as([str(script), "--epochs=7", "--note=a=b"])
    config = Config("BPR", "ml-100k")
    assert (config["epochs"], config["note"]) == (7, "a=b")
    started_as([os.path.join(PACKAGES, "pytest", "__main__.py"), "--epochs=7", "--note=a=b"])
    config = Config("BPR", "ml-100k")
    assert (config["epochs"], config["note"]) == (300, None)


# ---------------------------------------------------------------- model names


@pytest.mark.parametrize(
    ("given", "named"),
    [
        ("LLMTwoTowr", "LLMTwoTower"),
        ("llmtwotower", "LLMTwoTower?"),
        ("bpr", "BPR?"),
        ("LightGCM", "LightGCN"),
        ("xgboost", "XGBoost?"),
    ],
)
def test_an_unknown_name_lists_near_ones(given, named):
    from recbole.utils import get_model

    with pytest.raises(ValueError, match=rf"`model_name` \[{given}\] is not the name of an existing model.*{named}"):
        get_model(given)


def test_a_name_like_no_other_lists_them_all():
    from recbole.utils import get_model

    with pytest.raises(ValueError, match=r"Known models: ADMMSLIM, .*LLMTwoTower.*xDeepFM"):
        get_model("qqqqqqq")


def test_every_known_name_is_a_model():
    from recbole.utils import get_model

    missing = {}
    for name in configuration.known_models():
        try:
            assert get_model(name).__name__ == name
        except ModuleNotFoundError as error:
            missing[name] = str(error)
    assert set(missing) <= set(configuration.NEEDED_MODULES)
    assert len(configuration.known_models()) >= 90


@pytest.mark.parametrize(("name", "modules"), configuration.NEEDED_MODULES.items())
def test_a_missing_package_is_named_before_anything_runs(monkeypatch, name, modules):
    from recbole.utils import get_model

    for module in modules:
        monkeypatch.delitem(sys.modules, module, raising=False)
    monkeypatch.setattr(configuration.importlib.util, "find_spec", lambda module, package=None: None)
    with pytest.raises(ModuleNotFoundError, match=f"{name} needs {' and '.join(modules)}, which .*: pip install "):
        get_model(name)
