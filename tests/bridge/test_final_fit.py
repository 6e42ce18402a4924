"""run --final and fit: what validation chose, fitted once more on more rows; test is measured where it is held out."""

import glob
import os
import subprocess
import sys

import pytest
import torch
from waiting import LIMIT

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.quick_start import run_recbole

from recbole_llm import cli
from recbole_llm.bridge.checkpoint import read_checkpoint
from recbole_llm.bridge.training.choices import read_choices
from recbole_llm.checkpoints import load_trained, newest_checkpoint
from recbole_llm.recommend import open_model, recommend_users

BY_TIME = {
    "eval_args": {"order": "TO", "split": {"RS": [0.7, 0.15, 0.15]}, "group_by": "user", "mode": "full"},
    "load_col": {"inter": ["user_id", "item_id", "timestamp"]},
}
RANDOM = {"eval_args": {"order": "RO", "split": {"RS": [0.7, 0.15, 0.15]}, "group_by": "user", "mode": "full"}}


@pytest.fixture
def command(run_config):
    """Arguments of a run as its configuration says; and of a command that reads its checkpoint."""

    def arguments(**changes):
        return ["run", "-d", "toy", *(f"--{key}={value}" for key, value in (run_config | changes).items())]

    return arguments


def own(toy_path):
    lines = (toy_path / "toy" / "toy.inter").read_text().splitlines()[1:]
    return {tuple(line.split("\t")[:2]) for line in lines}


def parts(checkpoint, paths):
    """Interactions of the training split and of the later ones, as the checkpoint's run had them."""
    model, train = load_trained(checkpoint, **paths)
    return model, [len(train.inter_feat), *(len(split.inter_feat) for split in train.later_splits)]


@pytest.mark.parametrize("split", [RANDOM, BY_TIME], ids=["random", "by time"])
@pytest.mark.filterwarnings("ignore")
def test_run_final_leaves_a_model_of_every_row(command, run_config, paths, toy_path, capsys, split):
    assert cli.main([*command(epochs=2, **split), "--final"]) == 0
    out = capsys.readouterr().out
    assert "fitted once more on every row" in out and "no figures: nothing is held out" in out
    first, last = sorted(
        (file for file in glob.glob("saved/*.pth") if not file.endswith("-last.pth")), key=os.path.getmtime
    )
    assert newest_checkpoint("saved") is not None and str(newest_checkpoint("saved")) == last
    chosen, repeated = read_choices(first), read_choices(last)
    assert (chosen == repeated and 1 <= chosen.epochs <= 2) or not chosen.block("learned")
    model, sizes = parts(last, paths)
    assert sizes[0] == 840 and sum(sizes[1:]) == 0 and len(model.history.ids) == 840
    assert {block.name for block in model.score.counting} == {b.name for b in chosen.blocks if b.weight}
    before, _ = parts(first, paths)
    assert before.score.probability == model.score.probability
    opened = open_model(last, texts=False, **paths)
    assert opened.manifest.counts["fitted_interactions"] == opened.manifest.counts["interactions"] == 840
    rows = list(recommend_users(opened, k=10))
    assert not {(row.user, row.item) for row in rows} & own(toy_path)


@pytest.mark.parametrize("split", [RANDOM, BY_TIME], ids=["random", "by time"])
@pytest.mark.filterwarnings("ignore")
def test_final_valid_holds_test_out_and_fit_takes_it_from_the_checkpoint(command, run_config, paths, capsys, split):
    assert cli.main([*command(epochs=2, **split), "--final=valid"]) == 0
    told = capsys.readouterr().out.partition("fitted once more on training and validation")[2]
    first, last = sorted(
        (file for file in glob.glob("saved/*.pth") if not file.endswith("-last.pth")), key=os.path.getmtime
    )
    _, (train, valid, test) = parts(first, paths)
    _, sizes = parts(last, paths)
    assert sizes == [train + valid, 0, test]
    figure = float(next(line.split()[-1] for line in told.splitlines() if line.startswith("ndcg@10")))
    assert 0 < figure < 1
    # the same from the checkpoint, afterwards
    arguments = [f"--{key}={value}" for key, value in paths.items()]
    assert cli.main(["fit", first, "--rows", "valid", *arguments]) == 0
    again = capsys.readouterr().out
    assert [line for line in again.splitlines() if "@" in line] == [line for line in told.splitlines() if "@" in line]
    states = [read_checkpoint(file) for file in (last, newest_checkpoint("saved"))]
    for name, tensor in states[0]["state_dict"].items():
        torch.testing.assert_close(states[1]["state_dict"][name], tensor)
    # a fit of a fit has the same choices
    assert cli.main(["fit", "saved", *arguments]) == 0
    assert "fitted once more on every row" in capsys.readouterr().out
    assert read_choices(str(newest_checkpoint("saved"))) == read_choices(first)
    assert parts(newest_checkpoint("saved"), paths)[1] == [840, 0, 0]


@pytest.mark.filterwarnings("ignore")
def test_rows_of_label_0_stay_out_of_a_final_fit(command, paths, toy_path):
    threshold = {"threshold": {"rating": 3}, "load_col": {"inter": ["user_id", "item_id", "rating"]}}
    assert cli.main([*command(epochs=1, blocks="closed_form", **threshold), "--final"]) == 0
    lines = [line.split("\t") for line in (toy_path / "toy" / "toy.inter").read_text().splitlines()[1:]]
    liked = sum(int(line[2]) >= 3 for line in lines)
    opened = open_model(newest_checkpoint("saved"), texts=False, **paths)
    assert opened.manifest.counts["interactions"] == liked and len(opened.disliked_items) == 840 - liked


@pytest.mark.filterwarnings("ignore")
def test_without_a_test_or_a_validation_part(command, capsys, paths):
    for ratio, told in (([0.8, 0.2, 0], "the split has no test part"), ([0.8, 0, 0.2], "no validation part")):
        split = {"eval_args": RANDOM["eval_args"] | {"split": {"RS": ratio}}}
        assert cli.main([*command(epochs=1, **split), "--final=valid"]) == 0
        assert told in capsys.readouterr().out


@pytest.mark.filterwarnings("ignore")
def test_mistakes_are_named(run_config, command, paths, capsys):
    assert cli.main(["run", "--model", "BPR", "-d", "toy", "--final"]) == 2
    assert "--final belongs to LLMTwoTower" in capsys.readouterr().err
    with pytest.raises(ValueError, match="Runs, compare and tune choose by validation themselves"):
        run_recbole("LLMTwoTower", "toy", config_dict=run_config | {"refit_rows": "valid", "blocks": "closed_form"})
    with pytest.raises(ValueError, match="refit_from belongs to refit_rows"):
        run_recbole("LLMTwoTower", "toy", config_dict=run_config | {"refit_from": "x", "blocks": "closed_form"})
    with pytest.raises(ValueError, match="refit_rows must be one of valid, all"):
        run_recbole("LLMTwoTower", "toy", config_dict=run_config | {"refit_rows": "some"})
    assert cli.main(command(blocks="closed_form")) == 0
    file = str(newest_checkpoint("saved"))
    arguments = [f"--{key}={value}" for key, value in paths.items()]
    assert cli.main(["fit", "nowhere.pth"]) == 2
    assert "does not exist" in capsys.readouterr().err
    assert cli.main(["fit", file]) == 2  # the paths
    assert "Give it again" in capsys.readouterr().err
    content = read_checkpoint(file)
    content["other_parameter"]["chosen"] = None
    torch.save(content, file)
    assert cli.main(["fit", file, *arguments]) == 2
    assert "holds no choices: it was written by an earlier recbole-llm" in capsys.readouterr().err


@pytest.mark.skipif(not torch.distributed.is_available(), reason="torch was built without torch.distributed")
@pytest.mark.slow
@pytest.mark.parametrize("changes", [{}, {"blocks": "learned", "shard_items": True}], ids=["whole", "shards"])
@pytest.mark.filterwarnings("ignore")
def test_processes_of_torchrun_choose_and_fit_once_more(command, paths, changes):
    """The second group of a process meets at the store that the first one has used."""
    torchrun = [sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node=2"]
    arguments = [*command(epochs=2, **changes), "--no-baselines", "--final=valid"]
    out = subprocess.run(
        [*torchrun, "-m", "recbole_llm", *arguments], capture_output=True, text=True, timeout=LIMIT, check=False
    )
    assert out.returncode == 0, out.stdout[-2000:] + out.stderr[-4000:]
    assert out.stdout.count("fitted once more on training and validation") == 1  # rank 0 tells
    first, last = sorted(
        (file for file in glob.glob("saved/*.pth") if not file.endswith("-last.pth")), key=os.path.getmtime
    )
    _, (train, valid, test) = parts(first, paths)
    model, sizes = parts(last, paths)
    assert sizes == [train + valid, 0, test] and model.chosen == read_choices(first)


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_a_resumed_run_is_fitted_once_more_with_its_own_settings(command, paths, capsys):
    assert cli.main([*command(epochs=1, blocks="learned", **BY_TIME), "--no-baselines"]) == 0
    (last,) = glob.glob("saved/*-last.pth")
    given = [f"--{key}={value}" for key, value in paths.items()]
    assert cli.main(["run", "--resume", last, "--final=valid", "--no-baselines", *given]) == 0
    assert "fitted once more on training and validation" in capsys.readouterr().out
    files = [file for file in glob.glob("saved/*.pth") if not file.endswith("-last.pth")]
    first, again = (read_checkpoint(file)["settings"]["given"] for file in sorted(files, key=os.path.getmtime))
    assert again.pop("refit_rows") == "valid"
    assert {key: again.get(key) for key in first if key != "checkpoint_dir"} == {
        key: value for key, value in first.items() if key != "checkpoint_dir"
    }
