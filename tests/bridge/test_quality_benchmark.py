"""The quality benchmark chooses on validation, tries different settings, and goes on where it stopped."""

import sys
from argparse import Namespace
from pathlib import Path

import pytest

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole_llm.bridge.experiments.experiment import Experiment, Outcome, Training


@pytest.fixture
def benchmark(monkeypatch):
    root = Path(__file__).parents[2]
    monkeypatch.syspath_prepend(str(root / "benchmarks"))
    path = list(sys.path)
    import model_quality

    sys.path[:] = path
    return model_quality


@pytest.fixture
def ran(benchmark, monkeypatch):
    """What was run; the validation score grows with the ridge, the test score falls with it."""
    found = []

    def run(experiment):
        found.append(experiment)
        value = experiment.config_dict.get("reg_weight", 0) / 1000
        if experiment.config_dict.get("reg_weight") == 500:
            return Outcome(experiment, error="MemoryError: too large")
        test = {"ndcg@10": -value} if experiment.test else {}
        trainings = tuple(Training(seed, value, {"ndcg@10": value}, test, 1.0, 0.1) for seed in experiment.seeds)
        return Outcome(experiment, trainings, deterministic=experiment.model == "EASE")

    monkeypatch.setattr(benchmark, "run_isolated", run)
    return found


def arguments(**changes):
    return Namespace(**({"dataset": "ml-100k", "budget": 5, "model_minutes": 1e9} | changes))


def test_a_search_tries_different_settings_and_never_the_test_split(benchmark, ran, tmp_path):
    best, report = benchmark.tune("EASE", arguments(), ["--seed=1"], benchmark.Pieces(tmp_path, None))
    tried = [trial["setting"]["reg_weight"] for trial in report["trials"]]
    assert len(set(tried)) == len(tried) == 5 and report["settings_in_grid"] == 6
    assert not any(experiment.test for experiment in ran)
    assert best == {"reg_weight": max(x for x in tried if x != 500)}
    assert [t["error"] for t in report["trials"] if t["setting"]["reg_weight"] == 500] in (
        [],
        ["MemoryError: too large"],
    )
    # more settings are drawn in the same order, and what has been run is not run again
    before = len(ran)
    _, report = benchmark.tune("EASE", arguments(budget=6), ["--seed=1"], benchmark.Pieces(tmp_path, None))
    assert len(report["trials"]) == 6 and len(ran) in (before, before + 1)


def test_a_slow_models_search_ends_and_ours_has_none(benchmark, ran, tmp_path):
    pieces = benchmark.Pieces(tmp_path, None)
    _, report = benchmark.tune("EASE", arguments(model_minutes=2.5 / 60), [], pieces)
    assert len(report["trials"]) == 3
    assert benchmark.tune("LLMTwoTower", arguments(), [], pieces)[0] == {}


def test_out_of_time_begins_nothing_further_and_keeps_what_is_done(benchmark, ran, tmp_path):
    experiment = Experiment("BPR", "ml-100k", seeds=(0, 1, 2))
    benchmark.Pieces(tmp_path, None)(Experiment("BPR", "ml-100k", seeds=(0, 1)))
    assert len(ran) == 2
    with pytest.raises(benchmark.OutOfTimeError):
        benchmark.Pieces(tmp_path, -1.0)(experiment)
    assert len(ran) == 2
    outcome = benchmark.Pieces(tmp_path, None)(experiment)
    assert len(ran) == 3 and [t.seed for t in outcome.trainings] == [0, 1, 2]
    assert len(benchmark.Pieces(tmp_path, None)(Experiment("EASE", "ml-100k", seeds=(0, 1, 2))).trainings) == 1


def test_every_grid_can_be_read(benchmark):
    root = Path(__file__).parents[2] / "configs"
    for path in root.glob("*/*.hyper"):
        grid = benchmark.grid_of(path.stem, path.parent.name)
        assert grid and all(grid[0].keys() == setting.keys() for setting in grid)
    assert benchmark.grid_of("Pop", "ml-100k") == [{}]


def test_further_seeds_are_not_begun_after_so_much_processor_time(benchmark, monkeypatch, tmp_path):
    def run(experiment):
        (seed,) = experiment.seeds
        return Outcome(experiment, (Training(seed, 0.1, {}, {}, 1.0, 0.1, cpu_seconds=40.0),))

    monkeypatch.setattr(benchmark, "run_isolated", run)
    experiment = Experiment("BPR", "ml-100k", seeds=(0, 1, 2, 3, 4))
    assert [t.seed for t in benchmark.Pieces(tmp_path, None, 1.0)(experiment).trainings] == [0, 1]
    assert len(benchmark.Pieces(tmp_path, None)(experiment).trainings) == 5
