"""The comparison's table from known trainings, and the command on the made data."""

import json
import os
import signal
import subprocess
import sys
import time
from pathlib import Path

import numpy as np
import pytest
from waiting import LIMIT, wait_until

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole_llm.bridge import compare as module
from recbole_llm.bridge.experiment import Experiment, Outcome, Training, run_experiment, run_isolated

USERS = np.arange(1, 301)


def trained(seed, values):
    values = np.asarray(values, dtype=float)
    metrics = {"ndcg@10": float(values.mean()), "hit@10": 0.5}
    return Training(seed, values.mean(), metrics, metrics, 2.0, 0.1, USERS, {"ndcg@10": values})


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
    return module.compare(["Weak", "Strong", "Absent", "Twin"], "made", seeds=2, run=fake(results))


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
    latex = module.as_latex(table)
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

    rows = {row.model: row for row in module.compare(["Base", "Other"], "made", run=run).rows}
    assert rows["Other"].difference is None
    assert rows["Other"].mean


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


def test_a_process_that_dies_is_a_failed_row(run_config, monkeypatch):
    outcome = run_isolated(Experiment("LLMTwoTower", "toy", (), {**run_config, "embedding_size": 0}))
    assert "embedding_size must be an integer of at least 1" in outcome.error
    assert outcome.trainings == ()


KILLED = """
import json, multiprocessing, sys, threading, time
import recbole_llm
from recbole_llm.bridge.experiment import Experiment, run_isolated

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
