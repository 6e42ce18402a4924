"""The measurement of the whole model on a card, rehearsed on a CPU: lines as they are made, and what fails stops no other."""

import json
import sys
from pathlib import Path

import pytest
import torch

pytest.importorskip("recbole")
sys.path.insert(0, str(Path(__file__).parents[2] / "benchmarks"))

import gpu_model


def rows_of(folder):
    return [json.loads(line) for line in (folder / "model.jsonl").read_text().splitlines()]


@pytest.fixture
def given(run_config, tmp_path):
    """Arguments for the made dataset and encoder."""
    keys = {
        key: run_config[key]
        for key in ("encoder", "feature_cache_dir", "checkpoint_dir", "embedding_size", "topk", "metrics")
    }
    (tmp_path / "settings.yaml").write_text(json.dumps(keys))
    return ["--out", str(tmp_path / "out"), "--device", "cpu", "--dataset", "toy", "--data-path", run_config["data_path"],
            "--config", str(tmp_path / "settings.yaml"), "--encoder", str(run_config["encoder"]), "--epochs", "2",
            "--texts", "20"]  # fmt: skip


@pytest.mark.filterwarnings("ignore")
def test_both_models_and_the_encoder_are_measured(given, tmp_path):
    assert gpu_model.main(given) == 0
    rows = rows_of(tmp_path / "out")
    assert [(row["what"], row.get("model")) for row in rows] == [
        ("machine", None),
        ("training", "BPR"),
        ("evaluation", "BPR"),
        ("training", "LLMTwoTower"),
        ("evaluation", "LLMTwoTower"),
        ("encoding", None),
    ]
    for row in rows[1:5:2]:
        assert len(row["epochs_s"]) == 2 and row["fit_s"] >= sum(row["epochs_s"]) > 0
    assert {"ndcg@10", "recall@5"} <= set(rows[2]["result"]) and rows[5]["texts_per_s"] > 0


@pytest.mark.filterwarnings("ignore")
def test_what_fails_stops_no_other_and_nothing_begins_too_late(given, tmp_path, monkeypatch):
    def broken(name, options, lines):
        raise RuntimeError(f"{name} does not fit")

    monkeypatch.setattr(gpu_model, "trained", broken)
    assert gpu_model.main(given) == 1
    found = rows_of(tmp_path / "out")
    assert [row.get("failed") for row in found[1:3]] == [
        f"RuntimeError: {name} does not fit" for name in gpu_model.MODELS
    ]
    assert found[3]["texts"] == 20
    assert gpu_model.main([*given, "--limit", "0"]) == 1
    assert [row.get("skipped") for row in rows_of(tmp_path / "out")[1:]] == ["no time was left"] * 3


@pytest.mark.skipif(torch.cuda.is_available(), reason="there is a card")
def test_without_a_card_nothing_is_run(tmp_path):
    assert gpu_model.main(["--out", str(tmp_path / "out")]) == 2 and not (tmp_path / "out").exists()
