"""The console script, in processes of its own: what it prints, writes and refuses."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).resolve().parents[1]


def recbole_llm(*arguments, cwd, module="recbole_llm", code=None, **environment):
    env = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1", **environment}
    command = [sys.executable, "-m", module] if code is None else [sys.executable, "-c", code]
    return subprocess.run(
        [*command, *map(str, arguments)], capture_output=True, text=True, env=env, cwd=cwd, stdin=subprocess.DEVNULL
    )


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


def test_config_files_are_read_and_the_command_line_wins(quick, tmp_path):
    (tmp_path / "a.yaml").write_text("epochs: 7\nembedding_size: 4\n")
    (tmp_path / "b.yaml").write_text("learning_rate: 0.5\nembedding_size: 8\n")
    rest = [q for q in quick if not q.startswith("--embedding_size")]
    done = recbole_llm("run", *rest, "--config_files", "a.yaml b.yaml", "--output=r.json", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
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


@pytest.mark.parametrize("value", ["Qwen/Qwen3-Embedding-0.6B", "map.npy", "re.bin"])
def test_values_that_look_like_code_survive(toy_path, tmp_path, value):
    code = (
        "import sys, recbole_llm; sys.argv = ['recbole-llm', *sys.argv[1:]];"
        "from recbole.config import Config; c = Config('LLMTwoTower', 'toy'); print(c['encoder'], c['item_features_file'])"
    )
    done = recbole_llm(f"--encoder={value}", f"--item_features_file={value}", cwd=tmp_path, code=code)
    assert done.stdout.split() == [value, value], done.stderr


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--dataset=nowhere"], "--data_path=FOLDER"),
        (["--dataset=toy", "epochs=5"], "write values as --key=value"),
        (["--dataset=toy", "--epochs", "5"], "write values as --key=value"),
        (["--model=LLMTwoTowr", "--dataset=ml-100k"], "LLMTwoTower"),
        (["--config_files=absent.yaml"], "'absent.yaml' does not exist"),
        (["--dataset=ml-100k", "--loss_type=bce"], "loss_type must be one of"),
        (["--dataset=ml-100k", "--embeding_size=8"], "did you mean 'embedding_size'"),
    ],
)
def test_a_mistake_is_one_error_that_says_what_to_do(tmp_path, arguments, message):
    done = recbole_llm("run", *arguments, cwd=tmp_path)
    assert done.returncode == 2
    assert message in done.stderr
    assert "Traceback" not in done.stderr


def test_info_prints_versions_backend_and_repairs_and_as_json(tmp_path):
    done = recbole_llm("info", cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert all(word in done.stdout for word in ("recbole", "torch", "backend", "repairs", "caches"))
    report = json.loads(recbole_llm("info", "--json", cwd=tmp_path).stdout)
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


def test_encode_fills_the_cache_that_a_run_reads_and_info_lists_and_prunes_it(quick, tmp_path):
    cache = f"--feature_cache_dir={tmp_path / 'features'}"
    arguments = [q for q in quick if not q.startswith("--embedding_size")]
    done = recbole_llm("encode", *arguments, cwd=tmp_path)
    assert done.returncode == 0, done.stderr
    assert "items: 43 of 44 have a text vector of 32 dimensions" in done.stdout
    listed = recbole_llm("info", "--cache", cache, cwd=tmp_path)
    assert "tiny-bert" in listed.stdout, listed.stderr
    again = recbole_llm("run", *quick, cwd=tmp_path)
    assert "Encoded" not in again.stderr + again.stdout
    pruned = recbole_llm("info", "--prune", "0", cache, cwd=tmp_path)
    assert "no stored vectors" in pruned.stdout, pruned.stderr
