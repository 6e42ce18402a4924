"""``torchrun --nproc_per_node 2 -m recbole_llm encode``: one store, that of one process, and any number of processes goes on."""

import os
import random
import subprocess
import sys
from pathlib import Path

import pytest
import torch
from waiting import LIMIT

from recbole_llm import cli

pytest.importorskip("recbole")
if not torch.distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)

ROOT = Path(__file__).resolve().parents[2]
ITEMS = 2100  # three shards


@pytest.fixture
def dataset(tmp_path):
    rng, folder = random.Random(0), tmp_path / "data" / "many"
    folder.mkdir(parents=True)
    lines = ["user_id:token\titem_id:token", *(f"u{i % 50}\ti{i}" for i in range(ITEMS))]
    (folder / "many.inter").write_text("\n".join(lines) + "\n")
    words = ["star", "rocket", "cow", "barn", "ship", "whale", "heist"]
    items = [f"i{i}\tstory {' '.join(rng.choices(words, k=8))}" for i in range(ITEMS)]
    (folder / "many.item").write_text("\n".join(["item_id:token\ttitle:token_seq", *items]) + "\n")
    return folder.parent


def files(store):
    return {path.relative_to(store): path.read_bytes() for path in store.rglob("*.safetensors")}


@pytest.mark.filterwarnings("ignore")
@pytest.mark.slow
def test_two_processes_fill_one_store(dataset, tiny_encoder, tmp_path, monkeypatch, capfd):
    monkeypatch.chdir(tmp_path)
    monkeypatch.delenv("RANK", raising=False)
    monkeypatch.delenv("WORLD_SIZE", raising=False)

    def command(store):
        given = [f"--data_path={dataset}", f"--encoder={tiny_encoder}", "--gpu_id=", "--show_progress=False"]
        return ["encode", "--dataset", "many", *given, f"--feature_cache_dir={tmp_path / store}"]

    assert cli.main(command("alone")) == 0
    said = f"items: {ITEMS} of {ITEMS} have a text vector of 32 dimensions"
    assert said in capfd.readouterr().out
    environment = {**os.environ, "PYTHONPATH": f"{ROOT}{os.pathsep}{ROOT / 'kernels'}", "OMP_NUM_THREADS": "1"}
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc_per_node", "2"]
    done = subprocess.run(
        [*torchrun, "-m", "recbole_llm", *command("shared")],
        capture_output=True,
        text=True,
        env=environment,
        timeout=4 * LIMIT,
    )
    assert done.returncode == 0, done.stderr
    assert done.stdout.count(said) == 1
    alone = files(tmp_path / "alone")
    assert len(alone) == 3 and files(tmp_path / "shared") == alone

    # stopped when a shard was missing, gone on with by the third of four processes
    (tmp_path / "shared" / next(iter(alone))).unlink()
    monkeypatch.setenv("RANK", "2")
    monkeypatch.setenv("WORLD_SIZE", "4")
    assert cli.main(command("shared")) == 0
    assert files(tmp_path / "shared") == alone
    assert said not in capfd.readouterr().out
