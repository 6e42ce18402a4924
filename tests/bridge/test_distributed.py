"""Two processes over gloo train on the batches of one, and leave a checkpoint that one process reads."""

import glob
import re
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from ports import free_port
from waiting import LIMIT

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
if not torch.distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)
from recbole.quick_start import load_data_and_model

from recbole_llm.bridge import distributed
from recbole_llm.bridge.checkpoint import read_checkpoint
from recbole_llm.cli import main

ROOT = Path(__file__).resolve().parents[2]


def test_one_process_is_the_trivial_case():
    rows = torch.arange(6).view(3, 2)
    assert distributed.own_part(5) == slice(0, 5)
    assert distributed.gather_rows(rows, torch.device("cpu")) is rows
    assert distributed.agreed("name") == "name"
    assert distributed.gather_objects(3) == [3]


@pytest.mark.parametrize(("total", "size"), [(7, 2), (1, 3), (0, 2), (10, 5)])
def test_the_parts_of_all_processes_cover_the_rows_once(monkeypatch, total, size):
    monkeypatch.setattr(distributed, "world_size", lambda: size)
    parts = []
    for number in range(size):
        monkeypatch.setattr(distributed, "rank", lambda number=number: number)
        parts += list(range(total))[distributed.own_part(total)]
    assert parts == list(range(total))


def test_torchrun_says_which_process_this_is_and_starts_them_alone(monkeypatch, capsys):
    assert distributed.settings_of_torchrun() == {}
    said = {
        "RANK": 5,
        "LOCAL_RANK": 1,
        "WORLD_SIZE": 6,
        "LOCAL_WORLD_SIZE": 2,
        "MASTER_ADDR": "10.0.0.1",
        "MASTER_PORT": 29500,
    }
    for name, value in said.items():
        monkeypatch.setenv(name, str(value))
    place = {"local_rank": 1, "offset": 4, "world_size": 6, "nproc": 2, "ip": "10.0.0.1", "port": "29500"}
    assert distributed.settings_of_torchrun() == place
    assert main(["run", "--nproc", "2"]) == 2
    assert "torchrun has started the processes" in capsys.readouterr().err
    monkeypatch.setenv("WORLD_SIZE", "1")
    assert distributed.settings_of_torchrun() == {}


SHARED = "{'distribution': 'uniform', 'sample_num': 1, 'alpha': 1.0, 'dynamic': False, 'shared': 30}"
RUNS = {
    "catalog_bce": ["--loss_type=catalog_bce"],
    "sampled_bce": ["--loss_type=sampled_bce"],
    "shared negatives": ["--loss_type=sampled_bce", f"--train_neg_sample_args={SHARED}"],
}


def arguments(folder, data, processes, name):
    command = ["run", "-m", "LLMTwoTower", "-d", "toy", f"--data_path={data}", "--nproc", str(processes)]
    command += ["--ip", "127.0.0.1", "--port", str(free_port()), "--gpu_id=", "--encoder=", "--epochs=2"]
    command += ["--embedding_size=16", "--train_batch_size=25", "--show_progress=False", "--history_dropout=0.0"]
    return [*command, f"--checkpoint_dir={folder}", *RUNS[name]]


def table(printed):
    found = re.findall(r"^\S+@\d+ +\d\.\d+ +\d\.\d+$", printed, re.MULTILINE)
    assert len(found) == 5, printed
    return found


def checkpoint_in(folder):
    (best,) = glob.glob(f"{folder}/LLMTwoTower*[0-9].pth")
    return best


@pytest.fixture(scope="module")
def together(tmp_path_factory, toy_path):
    """All runs of two processes from one interpreter: what is printed and the checkpoint, by name."""
    folder = tmp_path_factory.mktemp("two")
    runs = [arguments(folder / name, toy_path, 2, name) for name in RUNS]
    script = folder / "recbole-llm.py"
    script.write_text(
        f"""
import sys
sys.path[:0] = [{str(ROOT)!r}, {str(ROOT / "kernels")!r}]
from recbole_llm.cli import main
if __name__ == "__main__":
    for arguments in {runs!r}:
        code = main(arguments)
        if code:
            sys.exit(code)
        print("end of a run", flush=True)
"""
    )
    out = subprocess.run([sys.executable, str(script)], capture_output=True, text=True, cwd=folder, timeout=4 * LIMIT)
    assert out.returncode == 0, out.stderr[-3000:]
    printed = out.stdout.split("end of a run\n")
    return {name: (table(printed[n]), checkpoint_in(folder / name)) for n, name in enumerate(RUNS)}


@pytest.mark.parametrize("name", RUNS)
@pytest.mark.slow
def test_two_processes_train_as_one_and_leave_a_readable_checkpoint(
    tmp_path, toy_path, name, together, capfd, monkeypatch
):
    monkeypatch.chdir(tmp_path)
    printed, two = together[name]
    assert main(arguments(tmp_path / "one", toy_path, 1, name)) in (None, 0)
    assert printed == table(capfd.readouterr().out)
    first, second = read_checkpoint(checkpoint_in(tmp_path / "one"))["state_dict"], read_checkpoint(two)["state_dict"]
    for name, value in first.items():
        torch.testing.assert_close(second[name], value, rtol=1e-4, atol=1e-6)
    _, model, *_ = load_data_and_model(two)
    for name, value in model.state_dict().items():
        assert torch.equal(value, second[name])
