"""The search goes on where it stopped, survives failures, and chooses on validation."""

import json

import pytest

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
pytest.importorskip("hyperopt", reason="needs the extra 'tune'")
from recbole_llm.bridge.experiments import tuning as module
from recbole_llm.bridge.experiments.experiment import Outcome, Training


@pytest.fixture
def space(tmp_path):
    path = tmp_path / "space.hyper"
    path.write_text("learning_rate choice [0.1,0.01,0.001]\nembedding_size choice [8,16]\n")
    return path


def score(params):
    return 0.5 - abs(params["learning_rate"] - 0.01) + params["embedding_size"] / 1000


class Runner:
    def __init__(self, fail=lambda params: False, stop_after=None):
        self.ran, self.fail, self.stop_after = [], fail, stop_after

    def __call__(self, experiment):
        if self.stop_after is not None and len(self.ran) >= self.stop_after:
            raise KeyboardInterrupt
        params = dict(experiment.config_dict)
        self.ran.append(params)
        if self.fail(params):
            return Outcome(experiment, error="RuntimeError: out of luck")
        value = score(params)
        # the test metric falls where validation rises: it must choose nothing
        return Outcome(experiment, (Training(0, value, {"ndcg@10": value}, {"ndcg@10": -value}, 1.0, 0.1),))


def search(space, tmp_path, runner, **changes):
    arguments = dict(algorithm="exhaustive", output=tmp_path / "out", run=runner) | changes
    return module.tune("BPR", "ml-100k", str(space), **arguments)


def test_the_exhaustive_search_tries_every_setting_and_validation_chooses(space, tmp_path):
    runner = Runner()
    trials = search(space, tmp_path, runner)
    assert len(runner.ran) == 6
    assert module.ranked(trials)[0].params == {"learning_rate": 0.01, "embedding_size": 16}


@pytest.mark.parametrize("algorithm", ["exhaustive", "random", "bayes"])
def test_a_stopped_search_goes_on_and_ends_as_an_undisturbed_one(space, tmp_path, algorithm):
    whole = search(space, tmp_path, Runner(), algorithm=algorithm, max_evals=8, output=tmp_path / "whole")
    with pytest.raises(KeyboardInterrupt):
        search(space, tmp_path, Runner(stop_after=2), algorithm=algorithm, max_evals=8)
    second = Runner()
    resumed = search(space, tmp_path, second, algorithm=algorithm, max_evals=8)
    assert [t.params for t in resumed] == [t.params for t in whole]
    assert len(second.ran) == len({json.dumps(t.params, sort_keys=True) for t in whole}) - 2


def test_a_line_cut_short_by_a_kill_is_run_again(space, tmp_path):
    search(space, tmp_path, Runner())
    path = tmp_path / "out" / "trials.jsonl"
    path.write_text(path.read_text()[:-20])
    runner = Runner()
    assert len(search(space, tmp_path, runner)) == 6
    assert len(runner.ran) == 1
    again = Runner()
    assert len(search(space, tmp_path, again)) == 6
    assert again.ran == []  # the trial after the line that was cut short is there


def test_failures_are_kept_with_their_reason_and_the_search_goes_on(space, tmp_path):
    trials = search(space, tmp_path, Runner(fail=lambda p: p["embedding_size"] == 16))
    assert len(trials) == 6
    assert module.ranked(trials)[0].params == {"learning_rate": 0.01, "embedding_size": 8}
    assert {t.error for t in trials if t.score is None} == {"RuntimeError: out of luck"}


@pytest.mark.parametrize("algorithm", ["exhaustive", "random"])
def test_workers_find_what_one_finds(space, tmp_path, algorithm):
    one = search(space, tmp_path, Runner(), algorithm=algorithm, max_evals=5, output=tmp_path / "one")
    two = search(space, tmp_path, Runner(), algorithm=algorithm, max_evals=5, output=tmp_path / "two", workers=2)
    assert [t.params for t in one] == [t.params for t in two]


def test_trials_of_another_search_are_refused(space, tmp_path):
    search(space, tmp_path, Runner())
    with pytest.raises(ValueError, match="different: algorithm"):
        search(space, tmp_path, Runner(), algorithm="random")


@pytest.mark.parametrize(
    ("changes", "message"),
    [
        ({"algorithm": "grid"}, "algo must be one of"),
        ({"algorithm": "bayes", "workers": 2}, "workers must be 1 with bayes"),
    ],
)
def test_mistakes_are_named(space, tmp_path, changes, message):
    with pytest.raises(ValueError, match=message):
        search(space, tmp_path, Runner(), **changes)


def test_every_trial_is_told_while_the_search_runs(space, tmp_path, capsys):
    search(space, tmp_path, Runner(), progress=print)
    assert capsys.readouterr().out.count("valid 0.") == 6


def test_a_missing_space_is_named(tmp_path):
    with pytest.raises(ValueError, match="does not exist"):
        search(tmp_path / "absent.hyper", tmp_path, Runner())
