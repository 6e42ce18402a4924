"""The console script: what it prints, writes and refuses; in a process of its own where that matters."""

import json
import logging
import os
import subprocess
import sys
from pathlib import Path

import pytest

from recbole_llm import cli

ROOT = Path(__file__).resolve().parents[1]


def recbole_llm(*arguments, cwd, module="recbole_llm", code=None, **environment):
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", module] if code is None else [sys.executable, "-c", code]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=env, cwd=cwd, stdin=subprocess.DEVNULL
    )


@pytest.fixture
def command(tmp_path, monkeypatch, capfd):
    """The command in this process: exit code, standard output and error. A fresh interpreter takes seconds to load PyTorch."""
    monkeypatch.chdir(tmp_path)

    def run(*arguments):
        capfd.readouterr()
        return (cli.main(list(map(str, arguments))), *capfd.readouterr())

    return run


@pytest.fixture
def quick(toy_path, tiny_encoder, tmp_path):
    """Arguments of a quick run on the made dataset."""
    return [
        "--dataset=toy",
        f"--data_path={toy_path}",
        f"--encoder={tiny_encoder}",
        f"--feature_cache_dir={tmp_path / 'features'}",
        "--gpu_id=",
        "--epochs=2",
        "--embedding_size=16",
        "--show_progress=False",
    ]


def test_run_prints_the_table_and_writes_the_result(quick, tmp_path):
    done = recbole_llm("run", "--model", "LLMTwoTower", *quick, "--output", "out/result.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "recall@10" in done.stdout
    assert "ndcg@10" in done.stdout
    result = json.loads((tmp_path / "out" / "result.json").read_text())
    assert result["config"]["embedding_size"] == 16
    assert result["config"]["epochs"] == 2
    assert 0 < result["test_result"]["ndcg@10"] <= 1
    assert result["seconds"] > 0
    assert {"recbole", "torch", "recbole-llm", "python"} <= set(result["versions"])


@pytest.mark.filterwarnings("ignore")
def test_config_files_are_read_and_the_command_line_wins(command, quick, tmp_path):
    (tmp_path / "a.yaml").write_text("epochs: 7\nembedding_size: 4\n")
    (tmp_path / "b.yaml").write_text("learning_rate: 0.5\nembedding_size: 8\n")
    rest = [q for q in quick if not q.startswith("--embedding_size")]
    code, _, err = command("run", *rest, "--config_files", "a.yaml b.yaml", "--output=r.json")
    assert code == 0, err
    config = json.loads((tmp_path / "r.json").read_text())["config"]
    assert (config["epochs"], config["embedding_size"], config["learning_rate"]) == (2, 8, 0.5)


@pytest.mark.parametrize(
    ("value", "files"),
    [
        ("a.yaml", ["a.yaml"]),
        ("a.yaml  b.yaml", ["a.yaml", "b.yaml"]),
        ("my data/c.yaml", ["my data/c.yaml"]),
        ("'my data/c.yaml' a.yaml", ["my data/c.yaml", "a.yaml"]),
        ('a.yaml "my data/c.yaml"', ["a.yaml", "my data/c.yaml"]),
        ("it's.yaml", ["it's.yaml"]),
        (None, []),
        ("", []),
    ],
)
def test_names_of_config_files_may_hold_blanks(tmp_path, monkeypatch, value, files):
    from recbole_llm import cli

    monkeypatch.chdir(tmp_path)
    (tmp_path / "my data").mkdir()
    for name in ("a.yaml", "b.yaml", "my data/c.yaml", "it's.yaml"):
        (tmp_path / name).write_text("epochs: 1\n")
    assert cli._config_files(value) == files


@pytest.mark.parametrize(
    ("value", "message"), [("my data/d.yaml", "'my' does not exist"), ("'a.yaml", "does not close")]
)
def test_config_files_that_are_not_there(tmp_path, monkeypatch, value, message):
    from recbole_llm import cli

    monkeypatch.chdir(tmp_path)
    with pytest.raises(ValueError, match=message):
        cli._config_files(value)


def test_values_that_look_like_code_survive(tmp_path):
    values = ["Qwen/Qwen3-Embedding-0.6B", "map.npy", "re.bin"]
    code = (
        "import sys, recbole_llm\nfrom recbole.config import Config\n"
        "for value in sys.argv[1:]:\n"
        "    sys.argv = ['recbole-llm', f'--encoder={value}', f'--item_features_file={value}']\n"
        "    c = Config('LLMTwoTower', 'toy')\n    print(c['encoder'], c['item_features_file'])\n"
    )
    done = recbole_llm(*values, cwd=tmp_path, code=code)
    assert done.stdout.splitlines() == [f"{value} {value}" for value in values], done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset=nowhere"], "--data-path=FOLDER"),
        (["--dataset=toy", "epochs=5"], "write values as --key=value"),
        (["--dataset=toy", "--epochs", "5"], "write values as --key=value"),
        (["--model=LLMTwoTowr", "--dataset=ml-100k"], "LLMTwoTower"),
        (["--config_files=absent.yaml"], "'absent.yaml' does not exist"),
        (["--dataset=ml-100k", "--loss_type=softmax"], "loss_type must be one of"),
        (["--dataset=ml-100k", "--embeding_size=8"], "did you mean 'embedding_size'"),
    ],
)
def test_a_mistake_is_one_error_that_says_what_to_do(command, arguments, message):
    code, _, err = command("run", *arguments)
    assert code == 2
    assert message in err
    assert "Traceback" not in err


@pytest.mark.slow
def test_a_mistake_ends_the_process_with_an_exit_code(tmp_path):
    done = recbole_llm("run", "--dataset=nowhere", cwd=tmp_path)
    assert done.returncode == 2
    assert "--data-path=FOLDER" in done.stderr
    assert "Traceback" not in done.stderr


def test_info_prints_versions_backend_and_repairs_and_as_json(command, tmp_path):
    done = recbole_llm("info", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("recbole", "torch", "backend", "repairs", "caches"))
    report = json.loads(command("info", "--json")[1])
    assert report["versions"]["python"].startswith("3.")
    assert report["repairs"]


def test_an_existing_script_runs_unchanged_as_main(tmp_path):
    (tmp_path / "neighbour.py").write_text("VALUE = 41\n")
    (tmp_path / "old_script.py").write_text(
        "import sys\nfrom neighbour import VALUE\nfrom recbole.utils import get_model\n"
        "if __name__ == '__main__':\n    print(VALUE + 1, get_model('LLMTwoTower').__name__, sys.argv[1:], __file__)\n"
    )
    done = recbole_llm("old_script.py", "--model=BPR", "x", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert done.stdout.split("\n")[0] == "42 LLMTwoTower ['--model=BPR', 'x'] old_script.py"


@pytest.mark.slow
def test_processes_that_a_script_spawns_find_recbole_repaired(tmp_path):
    (tmp_path / "spawning.py").write_text(
        "import multiprocessing as mp\nfrom recbole.utils import get_model\n"
        "def work(name):\n    return get_model(name).__name__\n"
        "if __name__ == '__main__':\n    with mp.get_context('spawn').Pool(1) as pool:\n"
        "        print(pool.map(work, ['LLMTwoTower', 'BPR']))\n"
    )
    done = recbole_llm("spawning.py", cwd=tmp_path)
    assert "['LLMTwoTower', 'BPR']" in done.stdout, done.stderr


def test_neither_a_command_nor_a_file_lists_both(tmp_path):
    done = recbole_llm("rum", cwd=tmp_path)
    assert done.returncode != 0
    assert "neither a command nor an existing file" in done.stderr
    assert "run" in done.stderr
    assert "script" in done.stderr


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_encode_fills_the_cache_that_a_run_reads_and_info_lists_and_prunes_it(command, quick, tmp_path, caplog):
    cache = f"--feature_cache_dir={tmp_path / 'features'}"
    arguments = [q for q in quick if not q.startswith("--embedding_size")]
    done = recbole_llm("encode", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "items: 43 of 44 have a text vector of 32 dimensions" in done.stdout
    _, listed, err = command("info", "--cache", cache)
    assert "tiny-bert" in listed, err
    with caplog.at_level(logging.INFO):
        code, _, err = command("run", *quick)
    assert code == 0, err
    assert "distinct texts came from the store" in caplog.text and "Encoded" not in caplog.text
    _, pruned, err = command("info", "--prune", "0", cache)
    assert "no stored vectors" in pruned, err
