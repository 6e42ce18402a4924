"""Checkpoints: whole or not there, read without running code, refused when they do not fit, enough for an exact resume."""

import glob
import logging
import math
import os
import pickle
import random
import signal

import numpy as np
import pytest
import torch

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.config import Config
from recbole.data import create_dataset, data_preparation
from recbole.quick_start import load_data_and_model, run_recbole
from recbole.utils import get_model, get_trainer, init_seed

from recbole_llm.bridge import checkpoint
from recbole_llm.bridge.checkpoint import atomic_file, last_file, plain, read_checkpoint, settings_for_resume
from recbole_llm.bridge.training.tower_choice import patience
from recbole_llm.scoring.probability import ProbabilityMap


def build(config_dict, model="LLMTwoTower"):
    config = Config(model=model, dataset="toy", config_dict=dict(config_dict))
    init_seed(config["seed"], True)
    train, valid, test = data_preparation(config, create_dataset(config))
    init_seed(config["seed"], True)
    model = get_model(config["model"])(config, train._dataset)
    return get_trainer(config["MODEL_TYPE"], config["model"])(config, model), train, valid, test


def files(config_dict):
    (best,) = glob.glob(config_dict["checkpoint_dir"] + "/LLMTwoTower*[0-9].pth")
    return best, last_file(best)


@pytest.fixture
def quick(run_config):
    return run_config | {"encoder": "", "epochs": 4}


SHARED = {"distribution": "uniform", "sample_num": 1, "alpha": 1.0, "dynamic": False, "shared": 8}


class StoppedError(Exception):
    pass


def stop_after(epoch):
    def callback(done, score):
        if done == epoch:
            raise StoppedError

    return callback


@pytest.mark.parametrize(
    ("changes", "seconds"),
    [
        ({}, 0),
        ({}, 1e9),
        ({"loss_type": "sampled_bce"}, 0),
        ({"loss_type": "sampled_bce", "train_neg_sample_args": SHARED}, 0),
        ({"learner": "adagrad"}, 0),
        ({"eval_step": 2}, 0),
        ({"blocks": "learned", "user_tower": "history+id"}, 0),
    ],
    ids=str,
)
def test_a_resumed_run_equals_one_that_was_left_alone(quick, changes, seconds, tmp_path, monkeypatch):
    monkeypatch.setattr("recbole_llm.bridge.training.trainer.SECONDS_BETWEEN_CHECKPOINTS", seconds)
    quick |= changes
    whole, train, valid, test = build(quick)
    expected = whole.fit(train, valid, verbose=False), whole.evaluate(test)
    quick |= {"checkpoint_dir": str(tmp_path / "stopped")}
    first, train, valid, test = build(quick)
    with pytest.raises(StoppedError):
        first.fit(train, valid, verbose=False, callback_fn=stop_after(1))
    second, train, valid, test = build(quick | {"resume_from": files(quick)[1]})
    torch.rand(7), random.random(), np.random.rand()  # noqa: NPY002  (the process has another past)
    found = second.fit(train, valid, verbose=False), second.evaluate(test)
    assert found == expected
    assert second.train_loss_dict == whole.train_loss_dict
    assert second.start_epoch in ((0,) if seconds else (1, 2))
    for name, value in whole.model.state_dict().items():
        assert torch.equal(value, second.model.state_dict()[name]), name


@pytest.mark.parametrize("number", [signal.SIGTERM, signal.SIGINT], ids=lambda number: number.name)
def test_a_signal_between_two_writings_waits_for_the_epoch_and_writes(quick, number, tmp_path, monkeypatch):
    monkeypatch.setattr("recbole_llm.bridge.training.trainer.SECONDS_BETWEEN_CHECKPOINTS", 1e9)
    whole, train, valid, test = build(quick)
    expected = whole.fit(train, valid, verbose=False), whole.evaluate(test)
    quick |= {"checkpoint_dir": str(tmp_path / "stopped")}
    first, train, valid, test = build(quick)
    written, sent, write, loss = [], [], first._write, first.model.calculate_loss
    monkeypatch.setattr(
        first, "_write", lambda file, state: (written.append((file, state["epoch"])), write(file, state))
    )

    def interrupted(batch):
        if first._epochs_done == 2 and not sent:
            sent.append(number)
            os.kill(os.getpid(), number)
        return loss(batch)

    monkeypatch.setattr(first.model, "calculate_loss", interrupted)
    with pytest.raises(KeyboardInterrupt if number == signal.SIGINT else SystemExit):
        first.fit(train, valid, verbose=False)
    last = last_file(first.saved_model_file)
    assert [epoch for file, epoch in written if file == last] == [-1, 2]  # before the first, and the one of the signal
    second, train, valid, test = build(quick | {"resume_from": last})
    assert (second.fit(train, valid, verbose=False), second.evaluate(test)) == expected
    assert second.start_epoch == 3


def test_the_state_is_not_written_after_every_epoch(quick, monkeypatch):
    trainer, train, valid, _ = build(quick)
    written, write, now = [], trainer._write, iter(range(100))
    monkeypatch.setattr(
        trainer, "_write", lambda file, state: (written.append((file, state["epoch"])), write(file, state))
    )
    # the clock is read once where a writing is considered, once where it has been made: epochs of 2 s
    monkeypatch.setattr("recbole_llm.bridge.training.trainer.time.monotonic", lambda: 2.0 * next(now))
    trainer.fit(train, valid, verbose=False)
    last = last_file(trainer.saved_model_file)
    assert [epoch for file, epoch in written if file == last] == [-1, 2, 3]


def test_early_stopping_goes_on_counting(quick):
    quick |= {"epochs": 40, "stopping_step": 2, "learning_rate": 0.3}
    whole, train, valid, _ = build(quick)
    whole.fit(train, valid, verbose=False)
    stopped = max(whole.train_loss_dict)
    assert stopped < 39
    again, train, valid, _ = build(quick | {"resume_from": last_file(whole.saved_model_file)})
    again.fit(train, valid, verbose=False)
    assert max(again.train_loss_dict) == stopped  # nothing is trained on a run that had ended


def test_small_data_are_given_steps_before_training_stops(quick, caplog):
    trainer, train, valid, _ = build(
        {key: value for key, value in quick.items() if key != "stopping_step"} | {"epochs": 1}
    )
    assert trainer.stopping_step == 15 and len(train) < 7
    with caplog.at_level(logging.INFO):
        trainer.fit(train, valid)
    assert trainer.stopping_step == math.ceil(100 / len(train))
    assert f"stopping_step is {trainer.stopping_step} and not 15" in caplog.text
    apart, train, valid, _ = build(
        {key: value for key, value in quick.items() if key != "stopping_step"} | {"eval_step": 5}
    )
    apart.stopping_step = patience(apart, 5 * len(train))
    assert apart.stopping_step == max(15, math.ceil(20 / len(train)))
    given, train, valid, _ = build(quick | {"epochs": 1, "stopping_step": 3})
    given.fit(train, valid, verbose=False)
    assert given.stopping_step == 3
    # a run in the middle of that patience has not ended
    trainer.cur_step, trainer.epochs = 20, 3
    trainer._write(last_file(trainer.saved_model_file), trainer._state(0))
    again, train, valid, _ = build(quick | {"epochs": 3, "resume_from": last_file(trainer.saved_model_file)})
    again.fit(train, valid, verbose=False)
    assert max(again.train_loss_dict) == 2


def test_a_finished_run_goes_on_with_more_epochs(quick):
    first, train, valid, _ = build(quick)
    first.fit(train, valid, verbose=False)
    more, train, valid, _ = build(quick | {"resume_from": last_file(first.saved_model_file), "epochs": 6})
    more.fit(train, valid, verbose=False)
    assert sorted(more.train_loss_dict) == list(range(6))
    assert more.saved_model_file == first.saved_model_file


def test_weights_are_read_without_running_code_and_recbole_reads_the_same_file(quick):
    run_recbole("LLMTwoTower", "toy", config_dict=dict(quick))
    best, last = files(quick)
    safe = torch.serialization.safe_globals([(lambda content: content, "recbole_llm.bridge.checkpoint.unpickled")])
    with safe:
        state = torch.load(best, weights_only=True)
    assert state["config"].dtype == torch.uint8
    config, model, *_ = load_data_and_model(best)
    assert isinstance(config, Config)
    for name, value in model.state_dict().items():
        assert torch.equal(value, state["state_dict"][name])
    assert model.score.block("closed_form") is not None
    assert read_checkpoint(last)["other_parameter"]["score"] is None  # not written again each epoch
    assert os.path.getsize(last) < 300_000


def test_a_checkpoint_that_would_run_code_is_not_read(tmp_path):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "harm"),)

    path = tmp_path / "x.pth"
    torch.save({"format": checkpoint.FORMAT, "version": 1, "state_dict": Harmful()}, path)
    with pytest.raises(ValueError, match="was not written by recbole-llm"):
        read_checkpoint(path)
    assert not (tmp_path / "harm").exists()


def damage(path, how):
    content = bytearray(open(path, "rb").read())
    if how == "cut":
        content = content[: len(content) // 2]
    elif how == "flipped":
        middle = len(content) // 2  # more bytes than there are between two tensors, where a change does no harm
        content[middle : middle + 256] = bytes(byte ^ 255 for byte in content[middle : middle + 256])
    elif how == "empty":
        content = b""
    else:
        content = b"epoch,loss\n0,1.2\n"
    open(path, "wb").write(content)


@pytest.mark.parametrize("how", ["cut", "flipped", "empty", "text"])
def test_a_damaged_file_is_refused(quick, how):
    run_recbole("LLMTwoTower", "toy", config_dict=quick | {"epochs": 1})
    _, last = files(quick)
    damage(last, how)
    trainer, *_ = build(quick)
    with pytest.raises(ValueError, match="is damaged or no checkpoint at all"):
        trainer.resume_checkpoint(last)


def test_every_flipped_byte_is_noticed(tmp_path):
    path = tmp_path / "x.pth"
    with atomic_file(path) as file:
        torch.save({"format": checkpoint.FORMAT, "version": 1, "w": torch.rand(50)}, file)
    content = path.read_bytes()
    good = read_checkpoint(path)
    rng = random.Random(0)
    for place in rng.sample(range(len(content)), 150):
        path.write_bytes(content[:place] + bytes([content[place] ^ 1]) + content[place + 1 :])
        try:
            found = read_checkpoint(path)
        except ValueError:
            continue
        assert torch.equal(found["w"], good["w"])  # a byte of padding or a date


def test_a_stock_checkpoint_is_refused(quick):
    run_recbole("BPR", "toy", config_dict=quick | {"epochs": 1})
    (path,) = glob.glob(quick["checkpoint_dir"] + "/BPR*.pth")
    with pytest.raises(ValueError, match=r"was not written by recbole-llm.*load_data_and_model"):
        settings_for_resume(path)


def test_a_missing_file_is_named(quick):
    with pytest.raises(ValueError, match="'nowhere.pth' does not exist"):
        build(quick)[0].resume_checkpoint("nowhere.pth")


def test_other_data_and_another_shape_are_refused(quick):
    run_recbole("LLMTwoTower", "toy", config_dict=quick | {"epochs": 1})
    _, last = files(quick)
    with pytest.raises(ValueError, match="other interactions than this run's training split"):
        build(quick | {"seed": 7})[0].resume_checkpoint(last)
    with pytest.raises(ValueError, match="a model of another shape"):
        build(quick | {"embedding_size": 8})[0].resume_checkpoint(last)


def test_a_last_file_without_its_best_file_is_refused(quick):
    run_recbole("LLMTwoTower", "toy", config_dict=quick | {"epochs": 1})
    best, last = files(quick)
    os.remove(best)
    with pytest.raises(ValueError, match="the file of the best epoch"):
        build(quick)[0].resume_checkpoint(last)


def test_an_error_while_writing_leaves_the_file_as_it_was(tmp_path):
    path = tmp_path / "x.pth"
    path.write_bytes(b"earlier")
    with pytest.raises(OSError, match="full"), atomic_file(path) as file:
        file.write(b"half")
        raise OSError("disk full")
    assert path.read_bytes() == b"earlier"
    assert os.listdir(tmp_path) == ["x.pth"]


def test_what_a_killed_process_left_is_removed_on_resume(quick):
    run_recbole("LLMTwoTower", "toy", config_dict=quick | {"epochs": 1})
    _, last = files(quick)
    leftover = os.path.join(os.path.dirname(last), f".{os.path.basename(last)}.tmp-1")
    open(leftover, "wb").close()
    build(quick)[0].resume_checkpoint(last)
    assert not os.path.exists(leftover)


def test_settings_come_back_as_they_were_given(quick):
    given = quick | {"epochs": 1, "item_text_template": "1/2", "LIST_SUFFIX": "007", "seed": 11}
    given["encoder_prompt"] = "'12'"
    trainer, train, valid, _ = build(given)
    trainer.fit(train, valid, verbose=False)
    model, dataset, settings = settings_for_resume(last_file(trainer.saved_model_file), {"data_path"})
    assert (model, dataset) == ("LLMTwoTower", "toy")
    again = Config(model=model, dataset=dataset, config_dict=settings)
    for key in given.keys() - {"data_path", "feature_cache_dir"}:
        assert again[key] == trainer.config[key], key
    assert again["encoder_prompt"] == "12"
    assert again["resume_from"].endswith("-last.pth")


def test_runs_of_the_same_second_do_not_share_a_file(quick, monkeypatch):
    first, train, valid, _ = build(quick | {"epochs": 1})
    first.fit(train, valid, verbose=False)
    monkeypatch.setattr("recbole.trainer.trainer.get_local_time", lambda: first.saved_model_file[-24:-4])
    second, *_ = build(quick)
    assert second.saved_model_file != first.saved_model_file


def test_random_streams_are_restored():
    loader = torch.Generator().manual_seed(3)
    state = pickle.loads(pickle.dumps(plain(checkpoint.random_state(loader))))
    draw = lambda: (random.random(), np.random.rand(), torch.rand(1), torch.rand(1, generator=loader))  # noqa: E731, NPY002
    first = draw()
    checkpoint.set_random_state(state, loader)
    assert draw() == first


def test_nan_ends_the_run_and_names_the_epoch(quick, monkeypatch):
    trainer, train, valid, _ = build(quick)
    loss = trainer.model.calculate_loss
    monkeypatch.setattr(trainer.model, "calculate_loss", lambda batch: loss(batch) * float("nan"))
    with pytest.raises(ValueError, match="Training loss is nan, in epoch 0"):
        trainer.fit(train, valid, verbose=False)
    assert read_checkpoint(last_file(trainer.saved_model_file))["epoch"] == -1


def test_a_closed_form_alone_is_fitted_at_once_and_read_back_exactly(quick):
    quick |= {"blocks": "closed_form", "closed_form_dim": "full", "encoder": ""}
    trainer, train, valid, test = build(quick)
    valid_score, result = trainer.fit(train, valid, verbose=False)
    assert not trainer.train_loss_dict  # no epoch
    (only,) = glob.glob(quick["checkpoint_dir"] + "/*.pth")
    users = torch.arange(1, trainer.model.n_users)
    found = trainer.model.full_sort_predict({"user_id": users}).view(len(users), -1)
    # the definition: a user's score is the sum of the rows of the items in the history, on the scale of a probability
    score, history = trainer.model.score, trainer.model.history
    source = score.block("closed_form").source
    held = torch.zeros(trainer.model.n_users, trainer.model.n_items)
    held[history.row_of_entry(), history.ids] = 1
    items = score.listed.nonzero()[:, 0]
    assert items.tolist() == list(range(1, trainer.model.n_items))
    expected = score.slope * (held[1:] @ source) + score.intercept
    torch.testing.assert_close(found[:, items], expected[:, items], rtol=1e-4, atol=1e-5)
    assert result == trainer.evaluate(valid, load_best_model=False)
    _, model, *_ = load_data_and_model(only)
    assert torch.equal(model.full_sort_predict({"user_id": users}).view(len(users), -1), found)
    assert model.score.probability == score.probability != ProbabilityMap()
    assert model.fitted.setting == trainer.model.fitted.setting
    again, train, valid, _ = build(quick)
    assert again.fit(train, valid, verbose=False) == (valid_score, result)
