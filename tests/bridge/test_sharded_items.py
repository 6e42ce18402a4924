"""Items spread over two and three processes train, rank and are saved as in one; no process ever holds a whole table."""

import glob
import json
import os
import shutil
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest
import torch
from ports import free_port
from waiting import LIMIT

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
if not torch.distributed.is_available():
    pytest.skip("torch was built without torch.distributed", allow_module_level=True)
from recbole.quick_start import load_data_and_model, run_recbole

from recbole_llm.bridge.checkpoint import read_checkpoint
from recbole_llm.checkpoints import load_trained
from recbole_llm.scoring.tables import normal_rows

WORKER = Path(__file__).with_name("sharded_worker.py")
USERS = 50
WARM, COLD = 31, 16  # with padding 48 rows of items: nobody trains the last third of them


def write(folder, name, warm, cold):
    """Users with seven training items and two to be held out; every second user's are cold items if there are any."""
    rng = np.random.default_rng(0)
    kept, held = [], []
    for user in range(USERS):
        liked = rng.choice(warm, 9, replace=False)
        kept += [(user, item, time) for time, item in enumerate(liked[:7])]
        last = [warm + (user + n) % cold for n in (0, 1)] if cold and user % 2 else liked[7:]
        held += [(user, item, 100 + time) for time, item in enumerate(last)]
    rows = sorted(kept, key=lambda row: row[1]) + held  # ids are given in the order of the file
    lines = ["user_id:token\titem_id:token\ttimestamp:float", *(f"u{u}\ti{i}\t{t}" for u, i, t in rows)]
    (folder / name).mkdir()
    (folder / name / f"{name}.inter").write_text("\n".join(lines) + "\n")
    np.save(folder / name / "vectors.npy", rng.normal(size=(warm + cold, 7)).astype(np.float32))
    (folder / name / "vectors.ids.txt").write_text("".join(f"i{item}\n" for item in range(warm + cold)))


OTHER = {"loss_type": "catalog_ce", "share_parameters": True, "adapter_hidden_size": 5, "scoring": "cosine"}
OTHER |= {"user_tower": "history+id", "clip_grad_norm": {"max_norm": 0.01, "norm_type": 2}, "use_item_bias": False}
IDS = {"item_features_file": "", "encoder": ""}
RUNS = {  # processes, dataset, what is not as in all
    "torchrun": (3, "ragged", {"epochs": 4}),
    "two": (2, "ragged", {"epochs": 3} | OTHER),
    "cold": (3, "cold", {"epochs": 3}),
    "ids": (2, "cold", {"epochs": 2, "neg_weight": 0.5} | IDS),
    "first": (3, "ragged", {"epochs": 2}),
    "resumed": (3, "ragged", {"epochs": 4}),
    "refused": (2, "ragged", {"metrics": ["GAUC"], "valid_metric": "GAUC"}),
}


def settings(folder, data, name, **changes):
    _, dataset, special = RUNS[name]
    common = {
        "data_path": str(data),
        "checkpoint_dir": str(folder / name),
        "item_features_file": str(data / dataset / "vectors.npy"),
        "blocks": "learned",
        "embedding_size": 16,
        "train_batch_size": 20,
        "history_dropout": 0.5,
        "show_progress": False,
        "gpu_id": "",
        "eval_args": {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"},
        "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
    }
    return common | special | changes


def checkpoint(folder, last=False):
    (file,) = glob.glob(f"{folder}/*-last.pth" if last else f"{folder}/*[0-9].pth")
    return file


@pytest.fixture(scope="module")
def data(tmp_path_factory):
    folder = tmp_path_factory.mktemp("data")
    write(folder, "ragged", 46, 0)  # 47 rows: 23 and 24, or 15, 16 and 16
    write(folder, "cold", WARM, COLD)
    return folder


@pytest.fixture(scope="module")
def shards(tmp_path_factory, data):
    """The folder of every run, by three processes that torchrun starts once."""
    folder = tmp_path_factory.mktemp("shards")
    jobs = {}
    for name, (ranks, dataset, _) in RUNS.items():
        more = {"resume_from": str(folder / "first" / "*-last.pth")} if name == "resumed" else {}
        given = settings(folder, data, name, shard_items=True, **more)
        jobs[name] = {"ranks": ranks, "dataset": dataset, "settings": given}
        jobs[name]["port"] = None if name == "torchrun" else free_port()
    jobs["refused"]["error"] = "metrics must be of the first places, got ['GAUC'], which need rec.meanrank"
    (folder / "jobs.json").write_text(json.dumps(jobs))
    command = [
        "-m",
        "torch.distributed.run",
        "--standalone",
        "--nproc-per-node=3",
        str(WORKER),
        str(folder / "jobs.json"),
    ]
    environment = {**os.environ, "OMP_NUM_THREADS": "1"}
    out = subprocess.run(
        [sys.executable, *command], capture_output=True, text=True, cwd=folder, timeout=4 * LIMIT, env=environment
    )
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-9000:]
    assert sorted(line for line in out.stdout.splitlines() if line.endswith("done")) == [
        f"rank {n} done" for n in range(3)
    ]
    return folder


def close(first, second):
    assert first.keys() == second.keys()
    for name, value in first.items():
        torch.testing.assert_close(
            second[name], value, rtol=1e-4, atol=2e-6, msg=lambda text, name=name: f"{name}: {text}"
        )


@pytest.mark.parametrize("name", ["torchrun", "two", "cold", "ids"])
@pytest.mark.slow
def test_shards_train_and_rank_as_one_process_that_then_reads_them(tmp_path, monkeypatch, data, shards, name):
    monkeypatch.chdir(tmp_path)
    dataset = RUNS[name][1]
    alone = run_recbole("LLMTwoTower", dataset, config_dict=settings(tmp_path, data, name, cold_map="none"))
    together = json.loads((shards / f"{name}.json").read_text())
    for split in ("best_valid_result", "test_result"):
        assert together[split] == pytest.approx({k: float(v) for k, v in alone[split].items()}, abs=1e-12)
    for last in (False, True):
        one, all_ = (read_checkpoint(checkpoint(folder / name, last)) for folder in (tmp_path, shards))
        close(one["state_dict"], all_["state_dict"])
        close(one["train_loss_dict"], all_["train_loss_dict"])
        assert one["optimizer"]["param_groups"] == all_["optimizer"]["param_groups"]
        for index, moments in one["optimizer"]["state"].items():
            close(moments, all_["optimizer"]["state"][index])
    assert together.get("trained", [True] * 3) == ([True, True, False] if name == "cold" else [True] * RUNS[name][0])
    file = checkpoint(shards / name)
    _, model, *_ = load_data_and_model(file)
    given = settings(tmp_path, data, name)
    trained, _ = load_trained(file, **{key: given[key] or None for key in ("data_path", "item_features_file")})
    for other in (model, trained):
        assert type(other).__name__ == "LLMTwoTower"
        for key, value in other.state_dict().items():
            assert torch.equal(value, read_checkpoint(file)["state_dict"][key])


@pytest.mark.slow
def test_a_resumed_run_ends_as_one_that_was_left_alone(shards):
    straight, resumed = (read_checkpoint(checkpoint(shards / name, True)) for name in ("torchrun", "first"))
    assert straight["epoch"] == resumed["epoch"] == 3
    for name, value in straight["state_dict"].items():
        assert torch.equal(resumed["state_dict"][name], value)
    for index, moments in straight["optimizer"]["state"].items():
        assert all(torch.equal(resumed["optimizer"]["state"][index][key], value) for key, value in moments.items())


@pytest.mark.slow
def test_one_process_goes_on_where_two_stopped(tmp_path, monkeypatch, data, shards):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(shards / "two", tmp_path / "two")
    last = checkpoint(tmp_path / "two", True)
    run_recbole(
        "LLMTwoTower",
        "ragged",
        config_dict=settings(tmp_path, data, "two", shard_items=True, epochs=5, resume_from=last),
    )
    before, after = read_checkpoint(checkpoint(shards / "two", True)), read_checkpoint(last)
    assert (before["epoch"], after["epoch"]) == (2, 4)
    steps = [{int(moments["step"]) for moments in x["optimizer"]["state"].values()} for x in (before, after)]
    assert steps == [{9}, {15}]


@pytest.mark.parametrize(("rows", "dim", "chunk"), [(1, 3, 64), (100, 3, 16), (77, 5, 32), (97, 16, 48), (70, 1, 64)])
def test_rows_drawn_apart_are_those_of_the_whole_table(monkeypatch, rows, dim, chunk):
    monkeypatch.setattr("recbole_llm.scoring.tables.CHUNK_ROWS", chunk)
    torch.manual_seed(5)
    whole, after = torch.empty(rows, dim).normal_(std=0.3), torch.rand(4)
    for parts in (1, 3):
        for part in range(parts):
            own = slice(rows * part // parts, rows * (part + 1) // parts)
            torch.manual_seed(5)
            assert torch.equal(normal_rows(rows, dim, own, 0.3), whole[own])
            assert torch.equal(torch.rand(4), after)
