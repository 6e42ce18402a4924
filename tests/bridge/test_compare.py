"""The comparison's table from known trainings, and the command on the made data."""

import json
import os
import signal
import subprocess
import sys
import time
from dataclasses import replace
from pathlib import Path

import numpy as np
import pytest
from waiting import LIMIT, wait_until

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole_llm.bridge.experiments import comparison as module
from recbole_llm.bridge.experiments.experiment import Experiment, Outcome, Training, run_experiment, run_isolated
from recbole_llm.bridge.experiments.latex import as_latex

USERS = np.arange(1, 301)


def trained(seed, values, valid=None):
    """A training whose validation figure is ``valid``; by default its test figure."""
    values = np.asarray(values, dtype=float)
    test = {"ndcg@10": float(values.mean()), "hit@10": 0.5}
    valid = test if valid is None else valid
    return Training(seed, values.mean(), valid, test, 2.0, 0.1, USERS, {"ndcg@10": values})


def fake(results):
    def run(experiment):
        if experiment.model not in results:
            return Outcome(experiment, error="ValueError: no such model | at all")
        return Outcome(
            experiment, tuple(trained(s, results[experiment.model][s]) for s in experiment.seeds), peak_bytes=2**30
        )

    return run


@pytest.fixture
def table():
    rng = np.random.default_rng(0)
    base = rng.random(300) * 0.4
    results = {
        "Weak": [base, base + 0.02],
        "Strong": [base + 0.1, base + 0.12 + 0.05 * rng.standard_normal(300)],
        "Twin": [base + 1e-3 * rng.standard_normal(300), base + 0.02],
    }
    models = ["Weak", "Strong", "Absent", "Twin"]
    return module.compare(models, "made", seeds=2, reference="Weak", run=fake(results))


def test_rows_are_ordered_by_the_metric_and_failures_come_last_with_their_reason(table):
    assert table.rows[0].model == "Strong"
    assert table.rows[-1].model == "Absent"
    assert "no such model" in table.rows[-1].error
    assert table.metric == "ndcg@10"


def test_mean_and_spread_are_over_seeds_and_the_difference_over_users(table):
    rows = {row.model: row for row in table.rows}
    assert rows["Weak"].spread["ndcg@10"] == pytest.approx(0.02 / 2**0.5)
    assert rows["Weak"].difference is None
    assert rows["Strong"].difference.low > 0.08
    assert rows["Strong"].p < 0.01 < rows["Twin"].p


def test_the_table_is_written_in_every_form(table, tmp_path):
    markdown = module.as_markdown(table)
    assert len({line.count("|") - line.count("\\|") for line in markdown.splitlines()}) == 1
    latex = as_latex(table)
    assert latex.count(r"\textbf") == 1 + 3  # hit@10 is equal for the three
    json.dumps(module.as_json(table))
    pytest.importorskip("matplotlib")
    module.draw(table, tmp_path / "picture.png")
    assert (tmp_path / "picture.png").stat().st_size > 5_000


def test_rows_of_other_users_are_shown_untested():
    def run(experiment):
        values = np.linspace(0, 1, 300)
        training = trained(0, values)
        if experiment.model == "Other":
            training = Training(**{**vars(training), "user_ids": USERS + 1})
        return Outcome(experiment, (training,))

    found = module.compare(["Base", "Other"], "made", reference="Base", run=run)
    rows = {row.model: row for row in found.rows}
    assert rows["Other"].difference is None
    assert rows["Other"].mean
    cells = {line.split(" | ")[0].strip("| "): line for line in module.as_markdown(found).splitlines()}
    assert "| reference |" in cells["Base"]
    assert "| not tested |" in cells["Other"]


def test_rows_of_the_same_users_with_other_targets_are_shown_untested():
    def run(experiment):
        training = trained(0, np.linspace(0, 1, 300))
        targets = np.ones(300, dtype=np.int64) * (2 if experiment.model == "LeaveTwoOut" else 1)
        return Outcome(experiment, (Training(**{**vars(training), "user_targets": targets}),))

    models = ["LLMTwoTower", "LeaveTwoOut", "Same"]
    found = module.compare(models, "made", run=run)
    assert found.reference == "Same"  # the other has the same validation figure, of other rows than ours
    assert {row.model for row in found.rows if row.difference is not None} == {"LLMTwoTower"}


# ---------------------------------------------------------------- what the others are tested against


def of_validation(valid, test):
    """Runs whose validation and test NDCG are given by model; ``None`` stands for no validation split."""

    def run(experiment):
        values = np.linspace(0, 1, 300) * 2 * test[experiment.model]
        score = valid[experiment.model]
        return Outcome(experiment, (trained(0, values, {} if score is None else {"ndcg@10": score}),))

    return run


TEST = {"Popular": 0.1, "LLMTwoTower": 0.5, "Best": 0.3, "Lucky": 0.4}


def test_the_reference_is_the_best_stock_model_by_validation_and_not_by_test():
    valid = {"Popular": 0.1, "LLMTwoTower": 0.5, "Best": 0.4, "Lucky": 0.2}
    found = module.compare(list(TEST), "made", run=of_validation(valid, TEST))
    assert found.reference == "Best"
    assert {row.model for row in found.rows if row.difference is not None} == {"Popular", "LLMTwoTower", "Lucky"}
    ours = next(row for row in found.rows if row.model == "LLMTwoTower")
    assert ours.difference.mean == pytest.approx(0.2)
    # the test split has no say
    other = module.compare(list(TEST), "made", run=of_validation(valid, {**TEST, "Best": 0.2, "Popular": 0.9}))
    assert other.reference == "Best"
    assert module.as_json(found)["reference"] == "Best"
    assert "ndcg@10 against Best [95%]" in module.as_markdown(found).splitlines()[0]
    for text in (module.about_tests(found), as_latex(found)):
        assert "Best, the best stock model by validation (ndcg@10 0.4000)" in text
    assert module.as_json(found)["reference_reason"] == "the best stock model by validation (ndcg@10 0.4000)"


def test_of_errors_the_smaller_is_the_better():
    def run(experiment):
        error = {"BPR": 0.9, "EASE": 1.4, "Pop": 1.1, module.OURS: 1.0}[experiment.model]
        return Outcome(experiment, (Training(0, error, {"rmse": error}, {"rmse": error}, 2.0, 0.1),))

    found = module.compare(["EASE", "BPR", "Pop", module.OURS], "made", run=run)
    assert found.metric == "rmse" and found.reference == "BPR"
    assert [row.model for row in found.rows] == ["BPR", module.OURS, "Pop", "EASE"]
    assert [module.larger_is_better(name) for name in ("ndcg@10", "giniindex@5", "logloss", "auc")] == [1, 0, 0, 1]


def test_a_metric_that_is_not_measured_is_named_after_the_first_model():
    asked = []

    def run(experiment):
        asked.append(experiment.model)
        return fake({"Weak": [[0.1]], "Strong": [[0.2]]})(experiment)

    with pytest.raises(ValueError, match="metric is 'ndcg@20', and measured are ndcg@10, hit@10"):
        module.compare(["Absent", "Weak", "Strong"], "made", metric="ndcg@20", run=run)
    assert asked == ["Absent", "Weak"]


def test_what_the_spread_is_of_and_which_model_has_none_is_said():
    found = module.compare(list(TEST), "made", run=of_validation(dict.fromkeys(TEST, 0.1), TEST))
    assert "±" not in module.about_tests(found)
    several = [replace(row, seeds=1 if row.model in ("Popular", "Best") else 3) for row in found.rows]
    said = module.about_tests(replace(found, rows=several))
    once = [row.model for row in several if row.seeds == 1]
    assert sorted(once) == ["Best", "Popular"]
    assert said.endswith(
        f" ±: standard deviation over 3 seeds; {', '.join(once)}: one training, which no seed changes."
    )
    all_of_them = [replace(row, seeds=3) for row in found.rows]
    assert module.about_tests(replace(found, rows=all_of_them)).endswith(" ±: standard deviation over 3 seeds.")


def test_a_reference_that_is_asked_for_stays():
    valid = dict.fromkeys(TEST, 0.1) | {"Best": 0.4}
    found = module.compare(list(TEST), "made", reference="Popular", run=of_validation(valid, TEST))
    assert found.reference == "Popular"
    assert found.reference_reason == "as asked for"


def test_without_validation_no_stock_model_is_chosen_and_each_is_tested_against_ours():
    found = module.compare(list(TEST), "made", run=of_validation(dict.fromkeys(TEST), TEST))
    assert found.reference == "LLMTwoTower"
    assert {row.model for row in found.rows if row.difference is not None} == {"Popular", "Best", "Lucky"}
    stock = [name for name in TEST if name != "LLMTwoTower"]
    found = module.compare(stock, "made", run=of_validation(dict.fromkeys(TEST), TEST))
    assert found.reference == "Popular"
    assert "no stock model has a validation ndcg@10" in found.reference_reason


def test_a_model_that_failed_is_no_reference():
    def run(experiment):
        if experiment.model == "Best":
            return Outcome(experiment, error="MemoryError: too large")
        return of_validation(dict.fromkeys(TEST, 0.2) | {"Lucky": 0.3}, TEST)(experiment)

    assert module.compare(list(TEST), "made", run=run).reference == "Lucky"


def test_the_picture_marks_the_reference_and_what_does_not_differ_from_it(tmp_path, monkeypatch):
    figure_module = pytest.importorskip("matplotlib.figure")
    drawn = []
    savefig = figure_module.Figure.savefig
    monkeypatch.setattr(
        figure_module.Figure, "savefig", lambda self, *a, **k: (drawn.append(self), savefig(self, *a, **k))
    )
    results = {"Near": np.linspace(0, 0.6, 300), "LLMTwoTower": np.linspace(0.2, 1, 300)}
    results["Best"] = results["Near"] + 1e-4 * np.random.default_rng(0).standard_normal(300)

    def run(experiment):
        return Outcome(experiment, (trained(0, results[experiment.model], {"ndcg@10": experiment.model == "Best"}),))

    found = module.compare(list(results), "made", run=run)
    module.draw(found, tmp_path / "picture.png")
    (axes,) = drawn[0].axes
    hollow = {
        label.get_text()
        for label, (dot, *_) in zip(axes.get_yticklabels(), axes.containers, strict=True)
        if dot.get_markerfacecolor() == "white"
    }
    assert hollow == {"Near"}
    dashed = [line.get_xdata()[0] for line in axes.lines if line.get_linestyle() == "--"]
    assert dashed == [pytest.approx(found.rows[-1].mean["ndcg@10"], abs=1e-3)]
    assert "dashed: Best, the best stock model by validation" in drawn[0].get_suptitle()


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        ({"models": []}, "at least one"),
        ({"models": ["A", "A"]}, "different names"),
        ({"models": ["A"], "seeds": 0}, "seeds must be at least 1"),
        ({"models": ["A"], "reference": "B"}, "reference must be one of A"),
    ],
)
def test_mistakes_are_named(arguments, message):
    with pytest.raises(ValueError, match=message):
        module.compare(dataset="made", run=fake({}), **arguments)


@pytest.mark.slow
def test_a_real_training_keeps_per_user_metrics_whose_mean_is_recboles(run_config):
    config = {**run_config, "topk": [5, 10], "blocks": "learned"}
    outcome = run_isolated(Experiment("LLMTwoTower", "toy", (), config, seeds=(0, 1), per_user=True))
    assert outcome.error == ""
    first, second = outcome.trainings
    for name, values in first.user_metrics.items():
        assert values.mean() == pytest.approx(first.test[name], abs=5.1e-5)  # RecBole rounds to four digits
    assert set(first.user_metrics) == set(first.test)
    assert first.test != second.test  # another seed, the same split
    assert np.array_equal(first.user_ids, second.user_ids)


def test_seconds_hold_what_a_closed_form_is_fitted_in(run_config, monkeypatch):
    from recbole.model.general_recommender.ease import EASE

    stock = EASE.__init__

    def slow(self, config, dataset):
        time.sleep(0.5)
        stock(self, config, dataset)

    monkeypatch.setattr(EASE, "__init__", slow)
    outcome = run_experiment(Experiment("EASE", "toy", (), run_config))
    assert outcome.deterministic
    assert outcome.trainings[0].seconds > 0.5


@pytest.mark.slow
def test_a_process_that_dies_is_a_failed_row(run_config, monkeypatch):
    outcome = run_isolated(Experiment("LLMTwoTower", "toy", (), {**run_config, "embedding_size": 0}))
    assert "embedding_size must be an integer of at least 1" in outcome.error
    assert outcome.trainings == ()


KILLED = """
import json, multiprocessing, sys, threading, time
import recbole_llm
from recbole_llm.bridge.experiments.experiment import Experiment, run_isolated

def tell():
    while not multiprocessing.active_children():
        time.sleep(0.01)
    print(multiprocessing.active_children()[0].pid, flush=True)

if __name__ == "__main__":
    threading.Thread(target=tell).start()
    run_isolated(Experiment("BPR", "toy", (), json.loads(sys.argv[1])))
"""


def is_running(pid):
    try:
        return Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()[0] != "Z"
    except FileNotFoundError:
        return False


@pytest.mark.skipif(not Path("/proc/self/stat").exists(), reason="processes are looked up in /proc")
@pytest.mark.parametrize("trains", [False, True], ids=["as it starts", "while it trains"])
@pytest.mark.slow
def test_a_killed_comparison_leaves_no_training_behind(run_config, tmp_path, trains):
    script = tmp_path / "killed.py"
    script.write_text(KILLED, encoding="utf-8")
    config = json.dumps({**run_config, "epochs": 10**6, "stopping_step": 10**6})
    parent = subprocess.Popen([sys.executable, str(script), config], stdout=subprocess.PIPE, text=True)
    child = int(parent.stdout.readline())
    try:
        if trains:
            wait_until(lambda: list(Path(run_config["checkpoint_dir"]).glob("*.pth")), "the model trains")
        assert is_running(child)
        parent.kill()
        parent.wait(LIMIT)
        wait_until(lambda: not is_running(child), "the training has ended")
    finally:
        if is_running(child):
            os.kill(child, signal.SIGKILL)
        parent.stdout.close()
