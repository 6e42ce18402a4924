"""A dataset written to CSV and imported again trains to the same metrics, and to the same parameters."""

import csv
import glob

import pytest
import torch

import recbole_llm  # noqa: F401

pytest.importorskip("pyarrow", reason="the extra 'import'")
pytest.importorskip("recbole")
from recbole.quick_start import run_recbole

from recbole_llm import cli
from recbole_llm.bridge.checkpoint import read_checkpoint


@pytest.mark.filterwarnings("ignore")
def test_csv_imported_encoded_and_trained_gives_the_same_metrics(toy_path, run_config, tmp_path, capsys):
    for kind in ("inter", "item", "user"):
        lines = (toy_path / "toy" / f"toy.{kind}").read_text().splitlines()
        rows = [line.split("\t") for line in lines]
        rows[0] = [cell.split(":")[0] for cell in rows[0]]
        with open(tmp_path / f"{kind}.csv", "w", newline="") as file:
            csv.writer(file).writerows(rows)
    files = ["inter.csv", "--items", "item.csv", "--users", "user.csv"]
    assert cli.main(["import", *files, "--dataset", "again", "--text-columns", "title"]) == 0
    assert "0 dropped" in capsys.readouterr().out
    settings = tmp_path / "dataset" / "again" / "again.yaml"
    features = [f"--encoder={run_config['encoder']}", f"--feature_cache_dir={run_config['feature_cache_dir']}"]
    assert cli.main(["encode", "--dataset", "again", "--config_files", str(settings), *features, "--gpu_id="]) == 0
    assert "items: 47 of 48 have a text vector" in capsys.readouterr().out

    results = {}
    for name, files, changes in (
        ("toy", [], {"load_col": {"inter": ["user_id", "item_id", "rating", "timestamp"], "item": ["item_id"]}}),
        ("again", [str(settings)], {"data_path": "dataset"}),
    ):
        given = run_config | {"user_tower": ["history", "text"], "checkpoint_dir": str(tmp_path / name)} | changes
        result = run_recbole("LLMTwoTower", name, config_file_list=files, config_dict=given)
        (checkpoint,) = glob.glob(f"{tmp_path / name}/*-[0-9][0-9].pth")
        results[name] = result, read_checkpoint(checkpoint)
    (ours, state), (again, other) = results["toy"], results["again"]
    assert ours["test_result"] == again["test_result"] and ours["best_valid_result"] == again["best_valid_result"]
    assert state["state_dict"].keys() == other["state_dict"].keys()
    for name, value in state["state_dict"].items():
        assert torch.equal(value, other["state_dict"][name]), name
