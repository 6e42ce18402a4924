"""Runs that start at one moment have checkpoints of their own, whatever the model and its trainer."""

import json
import os
import subprocess
import sys
import time
import types
from pathlib import Path

ROOT = Path(__file__).resolve().parents[2]
SECOND = "Nov-30-2025_12-00-00"


def settings(checkpoint_dir, **more):
    base = dict(epochs=4, train_batch_size=64, embedding_size=8, gpu_id="", show_progress=False, state="ERROR")
    return {
        **base,
        "metrics": ["NDCG"],
        "topk": [10],
        "valid_metric": "NDCG@10",
        "checkpoint_dir": checkpoint_dir,
        **more,
    }


def train(model, meet, **given):
    """The figures of one run, whose best checkpoint is read after ``meet`` returns."""
    from recbole.config import Config
    from recbole.data import create_dataset, data_preparation
    from recbole.utils import get_model, get_trainer, init_seed

    config = Config(model, "toy", config_dict=given)
    init_seed(config["seed"], True)
    train_data, valid, test = data_preparation(config, create_dataset(config))
    network = get_model(config["model"])(config, train_data._dataset)
    trainer = get_trainer(config["MODEL_TYPE"], config["model"])(config, network)
    best = trainer.fit(train_data, valid, verbose=False)[1]
    meet()
    return {
        "best": best,
        "valid": trainer.evaluate(valid, load_best_model=True),
        "test": trainer.evaluate(test, load_best_model=True),
        "file": trainer.saved_model_file,
    }


if __name__ == "__main__":  # one of the runs: MODEL NUMBER FOLDER DATA
    import recbole.trainer.trainer as module

    import recbole_llm

    model, number, folder, data = sys.argv[1], int(sys.argv[2]), Path(sys.argv[3]), sys.argv[4]
    sys.argv = sys.argv[:1]
    module.get_local_time = lambda: SECOND  # what four starts at one moment come to, on a machine that is busy too

    def meet():
        """Wait until every run has written its best checkpoint and none has read its own."""
        (folder / f"trained-{number}").touch()
        end = time.monotonic() + 120
        while len(list(folder.glob("trained-*"))) < 4:
            if time.monotonic() > end:
                sys.exit("the others did not come")
            time.sleep(0.02)

    given = dict(data_path=data, seed=number, learning_rate=0.05)
    alone = train(model, lambda: None, **settings(str(folder / f"alone-{number}"), **given))
    together = train(model, meet, **settings(str(folder / "together"), **given))
    print(json.dumps({"alone": alone, "together": together}))
    sys.exit()


import pytest  # noqa: E402

import recbole_llm  # noqa: E402, F401

pytest.importorskip("recbole")
import torch  # noqa: E402
from recbole.config import Config  # noqa: E402
from recbole.trainer import trainer as trainers  # noqa: E402

from recbole_llm.bridge.repairs.defects import unique_file  # noqa: E402


@pytest.fixture
def one_second(monkeypatch):
    monkeypatch.setattr(trainers, "get_local_time", lambda: SECOND)


@pytest.mark.slow
def test_four_runs_of_one_moment_have_the_figures_that_each_has_alone(tmp_path, toy_path):
    paths = [str(ROOT), str(ROOT / "kernels"), *filter(None, [os.environ.get("PYTHONPATH")])]
    env = {**os.environ, "PYTHONPATH": os.pathsep.join(paths), "OMP_NUM_THREADS": "1"}
    runs = [
        subprocess.Popen(
            [sys.executable, "-W", "ignore", __file__, "BPR", str(number), str(tmp_path), str(toy_path)],
            stdout=subprocess.PIPE,
            stderr=subprocess.PIPE,
            text=True,
            cwd=tmp_path,
            env=env,
        )
        for number in range(4)
    ]
    ended = [(run, *run.communicate(timeout=300)) for run in runs]
    assert [run.returncode for run, *_ in ended] == [0] * 4, [errors[-500:] for *_, errors in ended]
    found = [json.loads(printed.splitlines()[-1]) for _, printed, _ in ended]
    for run in found:
        assert run["together"]["valid"] == run["together"]["best"]
        assert run["together"]["test"] == run["alone"]["test"]
    assert len({json.dumps(run["alone"]["test"]) for run in found}) > 1  # seeds differ, so that an exchange would show
    files = {run["together"]["file"] for run in found}
    assert len(files) == 4
    assert {str(file) for file in (tmp_path / "together").glob("*.pth")} == files


class Network(torch.nn.Module):
    """The parts that trainers of single models ask for."""

    def __init__(self):
        super().__init__()
        self.encoder, self.decoder = torch.nn.Linear(2, 2), torch.nn.Linear(2, 2)

    def other_parameter(self):
        return {}


def names_of(trainer):
    """Every path that ``trainer`` writes."""
    return [value for key, value in vars(trainer).items() if key.endswith("_file")]


TRAINERS = [
    name
    for name, kind in sorted(vars(trainers).items())
    if isinstance(kind, type)
    and issubclass(kind, trainers.AbstractTrainer)
    and kind is not trainers.AbstractTrainer
    and kind.__module__ == trainers.__name__
]


@pytest.fixture
def config(run_config):
    return Config("BPR", "toy", config_dict={**run_config, "m_step": 1})


@pytest.mark.parametrize("name", TRAINERS)
def test_two_trainers_of_one_second_share_no_file(name, config, run_config, one_second, monkeypatch):
    for library in ("xgboost", "lightgbm"):
        monkeypatch.setitem(sys.modules, library, types.ModuleType(library))
    first, second = (getattr(trainers, name)(config, Network()) for _ in range(2))
    assert first.saved_model_file in names_of(first)
    assert len(names_of(first)) == (3 if issubclass(type(first), trainers.DecisionTreeTrainer) else 1)
    assert not set(names_of(first)) & set(names_of(second))
    for file in names_of(first):
        assert os.path.dirname(file) == run_config["checkpoint_dir"]
        assert os.path.basename(file).startswith("BPR-") and file.endswith(".pth")
        assert SECOND in file
    assert not os.listdir(run_config["checkpoint_dir"])  # a name alone leaves nothing behind


def test_every_trainer_of_recbole_is_tried():
    assert {"Trainer", "PretrainTrainer", "DecisionTreeTrainer", "RecVAETrainer"} <= set(TRAINERS)
    assert len(TRAINERS) >= 13


def test_seeded_streams_give_no_two_runs_the_same_name(tmp_path):
    names = set()
    for _ in range(3):
        torch.manual_seed(0)
        names.add(unique_file(str(tmp_path / f"BPR-{SECOND}.pth")))
    assert len(names) == 3


def test_pretrainings_read_their_own_file_and_leave_the_one_that_is_configured(config, run_config, one_second):
    conventional = os.path.join(run_config["checkpoint_dir"], "BPR-toy-1.pth")
    first, second = (trainers.PretrainTrainer(config, Network()) for _ in range(2))
    for trainer in (first, second, first):
        trainer.save_pretrained_model(0, conventional)
        published = torch.load(conventional, weights_only=False)["state_dict"]
        assert torch.equal(published["encoder.weight"], trainer.model.encoder.weight)
    assert first.saved_model_file != second.saved_model_file
    for trainer in (first, second):
        own = torch.load(trainer.saved_model_file, weights_only=False)["state_dict"]
        assert torch.equal(own["encoder.weight"], trainer.model.encoder.weight)
    left = sorted(os.listdir(run_config["checkpoint_dir"]))
    assert len(left) == 4 and "BPR-toy-1.pth" in left  # three savings and the name that configurations give


def test_a_pretraining_is_published_without_hard_links(config, run_config, monkeypatch):
    def link(*paths):
        raise OSError("no links here")

    monkeypatch.setattr(os, "link", link)
    conventional = os.path.join(run_config["checkpoint_dir"], "BPR-toy-1.pth")
    trainer = trainers.PretrainTrainer(config, Network())
    trainer.save_pretrained_model(0, conventional)
    assert Path(conventional).read_bytes() == Path(trainer.saved_model_file).read_bytes()
    assert len(os.listdir(run_config["checkpoint_dir"])) == 2
