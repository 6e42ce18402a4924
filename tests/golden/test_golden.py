"""Four small trainings give what they gave when they were recorded: metrics, checkpoint, recommendations, export.

Recorded by ``record.py`` from the code before it was moved (97b2c22), and to be recorded anew only where a change of the numbers
is meant. Other processors, thread counts and libraries stay far within the tolerances; a change of the arithmetic does not.
"""

import sys

import golden_runs
import pytest
import torch

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")


@pytest.fixture(
    scope="module",
    params=[pytest.param(n, marks=[pytest.mark.slow] * (r.processes > 1)) for n, r in golden_runs.RUNS.items()],
)
def run(request, tmp_path_factory):
    """Name of a run, what it gave, and what is recorded."""
    name = request.param
    if golden_runs.RUNS[name].processes > 1 and not torch.distributed.is_available():
        pytest.skip("torch was built without torch.distributed")
    with pytest.MonkeyPatch.context() as patch:
        patch.chdir(tmp_path_factory.mktemp(name))
        patch.setattr(sys, "argv", sys.argv)
        golden_runs.perform(name)
        return name, golden_runs.summary(name), golden_runs.read_expected(name)


def test_the_made_data_are_those_of_the_record(run):
    _, found, expected = run
    assert found["data"] == expected["data"]


@pytest.mark.parametrize("part", ["metrics", "checkpoint", "export"])
def test_the_numbers_are_those_of_the_record(run, part):
    _, found, expected = run
    assert golden_runs.differences(found[part], expected[part], f"/{part}") == []


def test_the_recommendations_are_those_of_the_record(run):
    _, found, expected = run
    assert expected["answers"]["checkpoint"]["items"].shape == (300, golden_runs.K)
    for what, answer in expected["answers"].items():
        assert golden_runs.of_answers(found["answers"][what], answer, what)[:10] == []


def test_the_export_recommends_as_the_checkpoint(run):
    _, found, _ = run
    told = golden_runs.of_answers(found["answers"]["export"], found["answers"]["checkpoint"], "export", relative=1e-5)
    assert told[:10] == []


def test_each_run_holds_what_it_is_for(run):
    """A record of a score without some block could not tell that the block is lost."""
    name, _, expected = run
    numbers, blocks = expected["checkpoint"]["numbers"], expected["export"]["numbers"]["blocks"]
    assert numbers["calibration"][0] != 1 and expected["export"]["numbers"]["probability"]["slopes"]
    wanted = {"closed_form", "learned"} | ({"next_item"} if name == "time" else set())
    assert blocks.keys() == ({"learned"} if name == "shards" else wanted)
    assert all(abs(block["scale"]) > 0.01 for block in blocks.values())
    if name != "shards":
        assert numbers["setting"]["text_weight"] > 0
    if name == "time":
        assert blocks["closed_form"]["decay"] and blocks["next_item"]["decay"]
        assert "later ids" in expected["checkpoint"]["tensors"]
    if name == "cold":
        items = expected["answers"]["checkpoint"]["items"]
        cold = (items >= 169) & (items < 199)
        assert numbers["cold"]["joint"] and 0.01 < cold.mean() < 0.6
        assert "mapped texts" in expected["export"]["tensors"] and "text" in expected["answers"]
    if name == "shards":
        assert "user_part" in expected["export"]["tensors"]
