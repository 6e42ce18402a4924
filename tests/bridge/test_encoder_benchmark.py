"""``encode --benchmark``: encoders of a data set by what they cost and how well they alone rank items without interactions."""

import pytest
import torch

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.config import Config

from recbole_llm import cli
from recbole_llm.bridge.dataset import LLMTwoTowerDataset
from recbole_llm.bridge.encoder_benchmark import compare_encoders
from recbole_llm.fitting.cold_start.hidden_draws import HiddenDraw, mean_and_error
from recbole_llm.fitting.validation import TopKMetric
from recbole_llm.scoring.rows import rows_from_pairs

pytestmark = pytest.mark.filterwarnings("ignore")
MODULE = """
import hashlib
import numpy as np

def topics(texts):
    kinds = sorted({text.split()[2] for text in texts if len(text.split()) > 3} | {"a"})
    seen = ["farm", "space", "ocean", "music", "sport", "city", "war", "love"]
    return np.array([[word in text for word in seen] + [1.0] for text in texts], dtype=np.float32)

def noise(texts):
    return np.array([np.frombuffer(hashlib.sha256(t.encode()).digest(), np.uint8) for t in texts], np.float32)
"""


@pytest.fixture
def mine(run_config, tmp_path):
    from tests.conftest import TOPICS

    seen = str([*TOPICS])
    (tmp_path / "mine.py").write_text(
        MODULE.replace('["farm", "space", "ocean", "music", "sport", "city", "war", "love"]', seen)
    )
    return run_config


def test_an_encoder_that_knows_the_topics_is_told_from_noise(mine):
    dataset = LLMTwoTowerDataset(Config("LLMTwoTower", "toy", config_dict=dict(mine)))
    noise, topics = compare_encoders(dataset, ["mine:noise", "mine:topics"])
    assert (noise.dim, topics.dim) == (32, 5) and noise.difference is None
    assert topics.difference > 3 * topics.error > 0
    assert topics.cold - noise.cold == pytest.approx(topics.difference)
    assert noise.texts_per_second > 0 and dataset.config["encoder"] == mine["encoder"]
    (alone,) = compare_encoders(dataset, ["mine:topics"])
    assert alone.cold == topics.cold, "the same draws"
    with pytest.raises(ValueError, match="names an encoder twice"):
        compare_encoders(dataset, ["mine:noise", "mine:noise"])


def test_the_command_prints_a_table(mine, capsys):
    given = [
        f"--data_path={mine['data_path']}",
        f"--feature_cache_dir={mine['feature_cache_dir']}",
        "--gpu_id=",
        "--show_progress=False",
    ]
    assert cli.main(["encode", "--dataset", "toy", "--benchmark", "mine:noise, mine:topics", *given]) == 0
    head, first, second, note = capsys.readouterr().out.splitlines()
    assert head.split()[:3] == ["encoder", "dims", "texts/s"] and first.split()[0] == "mine:noise"
    assert second.split()[:2] == ["mine:topics", "5"] and second.split()[4].startswith("+")
    assert "mean of 2 draws" in note
    assert cli.main(["encode", "--dataset", "toy", "--benchmark", ",", *given]) == 2
    assert "--benchmark names no encoder" in capsys.readouterr().err


def test_hidden_items_are_ranked_by_content_and_nothing_else():
    """Two groups of users and items: content that tells the groups puts every hidden item right."""
    users = torch.arange(40).repeat_interleave(18)
    items = torch.cat(
        [torch.randperm(20, generator=torch.Generator().manual_seed(u))[:18] * 2 + u % 2 for u in range(40)]
    )
    history = rows_from_pairs(users, items, 40)
    group = torch.stack([torch.arange(40) % 2 == side for side in range(2)], 1).float()
    everything = torch.ones(40, dtype=torch.bool)
    draw = HiddenDraw(history, 40, everything, 0)
    assert len(draw.ids) == 8 and not set(draw.hidden.left.ids.tolist()) & set(draw.ids.tolist())
    metric = TopKMetric("ndcg", 10)
    exact = draw.values({"text": (group, everything)}, metric)
    noise = draw.values({"text": (torch.randn(40, 6, generator=torch.Generator().manual_seed(1)), everything)}, metric)
    assert len(exact) == len(noise) and float(exact.mean()) > float(noise.mean()) + 0.1
    mean, error = mean_and_error([exact, noise])
    assert mean == pytest.approx((float(exact.double().mean()) + float(noise.double().mean())) / 2) and error > 0
