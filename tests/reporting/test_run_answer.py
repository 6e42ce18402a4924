"""``recbole-llm run`` says what a model is worth, keeps the figures, and ``report`` shows them: on the made data."""

import json
import logging
import re
from pathlib import Path

import pytest

import recbole_llm  # noqa: F401

pytest.importorskip("recbole")
from recbole.utils import ModelType

from recbole_llm import cli
from recbole_llm.bridge.checkpoint import read_checkpoint
from recbole_llm.bridge.watched_run import most_epochs
from recbole_llm.checkpoints import newest_checkpoint
from recbole_llm.reporting.record import checked


@pytest.fixture
def quick(run_config, tmp_path):
    keys = ("data_path", "encoder", "feature_cache_dir", "checkpoint_dir", "gpu_id", "epochs", "embedding_size")
    return ["--dataset", "toy", *(f"--{key}={run_config[key]}" for key in keys)]


def run(*arguments):
    return cli.main([str(argument) for argument in arguments])


def given_again(run_config):
    return [f"--{key}={run_config[key]}" for key in ("data_path", "encoder", "feature_cache_dir")]


@pytest.mark.filterwarnings("ignore")
def test_the_answer_is_on_the_terminal_in_the_checkpoint_in_the_output_and_in_the_card(
    quick, run_config, tmp_path, capfd
):
    handlers = logging.getLogger().handlers[:]
    assert run("run", *quick, "--output", "result.json") == 0
    out, err = capfd.readouterr()
    assert logging.getLogger().handlers == handlers
    found = json.loads((tmp_path / "result.json").read_text())
    record = found["report"]
    assert checked(record) == record
    # the headline is made of the figures, and the figures are RecBole's own
    own = record["models"]["LLMTwoTower"]
    assert re.search(
        rf"^Of 100 held-out purchases {100 * own['found']['value']:.0f} are in the first ten; bestsellers reach ",
        out,
        re.M,
    )
    assert own["ndcg"] == pytest.approx(found["test_result"]["ndcg@10"], abs=5e-5)
    assert own["recall"] == pytest.approx(found["test_result"]["recall@10"], abs=5e-5)
    assert own["users_with_a_hit"] == pytest.approx(found["test_result"]["hit@10"], abs=5e-5)
    assert set(record["models"]) == {"LLMTwoTower", "bestsellers", "ItemKNN"}
    assert (
        record["measured"]["targets"] == record["data"]["test"] == sum(group["targets"] for group in own["by_activity"])
    )
    # 60 users of 14 interactions
    assert "that no interaction names, and that were not read: 4;" in out
    assert record["data"]["interactions"] == 840 and record["data"]["users"] == 60 and record["data"]["items"] == 44
    assert sum(part["targets"] for part in own["by_popularity"].values()) == record["data"]["test"]
    assert len(record["history"]["loss"]) == 3 and record["history"]["valid_metric"] == "NDCG@10"
    assert [each["stage"] for each in record["history"]["stages"]][:2] == ["data", "model and texts"]
    # a line a stage, nothing of the log on the terminal, all of it in the file that is named
    stages = [line for line in err.splitlines() if line.startswith("  ") and "█" in line]  # not the bar of the encoder
    assert len(stages) == len(record["history"]["stages"]) == 7
    # what the model reads of the items is said: the wrong column would be seen here
    assert re.search(r"^  Text of toy.item: columns .+; first text: ", err, re.M)
    assert not any(word in out + err for word in ("FLOPs", "OrderedDict", "train loss", "Hyper Parameters"))
    log = Path(re.search(r"^log: (.+)$", out, re.M)[1]).read_text()
    assert "epoch 0 training" in log and "train loss" in log
    # the same figures are in the checkpoint and in the card of an export
    checkpoint = newest_checkpoint(run_config["checkpoint_dir"])
    assert read_checkpoint(checkpoint)["report"] == record
    assert run("export", checkpoint, "--output", "ex", *given_again(run_config)) == 0
    card = next((tmp_path / "ex").glob("*.md")).read_text()
    assert "## Quality" in card and "Of 100 held-out purchases" in card and "| bestsellers |" in card
    # every command that is proposed runs
    capfd.readouterr()
    import shlex

    proposed = [shlex.split(line.partition(" && ")[0])[2:] for line in out.splitlines() if line.startswith("next: ")]
    assert [words[0] for words in proposed] == ["report", "recommend", "export"]
    pytest.importorskip("matplotlib")
    for words in proposed[:2]:
        assert run(*words) == 0, capfd.readouterr().err
    text = (tmp_path / "report.html").read_text()
    assert "Of 100 held-out purchases" in text and len(text) < 2_000_000
    assert text.count('class="customer"') == 10
    # neither ids of users nor paths are in it
    assert str(tmp_path) not in text and "embedding_size" in text
    assert not re.search(r"\bu\d+\b", re.sub(r"<svg.*?</svg>", "", text, flags=re.S))


@pytest.mark.filterwarnings("ignore")
def test_verbose_shows_the_log_and_a_stock_model_gets_words_too(quick, capfd):
    plain = [each for each in quick if not each.startswith(("--encoder", "--feature_cache_dir", "--embedding_size"))]
    assert run("run", "-m", "BPR", *plain, "--verbose", "--output", "bpr.json") == 0
    out, err = capfd.readouterr()
    history = json.loads(Path("bpr.json").read_text())["report"]["history"]
    assert history["most_epochs"] == 3 and history["valid_metric_bigger"] is True and len(history["valid"]) == 3
    solved = {"MODEL_TYPE": ModelType.TRADITIONAL, "epochs": 300}
    assert most_epochs(solved) == 0
    assert "train loss" in err and "Of 100 held-out purchases" in out and "next:" not in out


@pytest.mark.filterwarnings("ignore")
def test_without_baselines_and_without_a_full_ranking_the_metrics_stand_alone(quick, capfd):
    assert run("run", *quick, "--no-baselines", "--epochs=1") == 2  # given twice
    rest = [each for each in quick if not each.startswith("--epochs")]
    assert run("run", *rest, "--epochs=1", "--no-baselines") == 0
    out, _ = capfd.readouterr()
    assert "Of 100" not in out and "recall@10" in out
    sampled = "--eval_args={'split':{'RS':[0.8,0.1,0.1]},'order':'RO','group_by':'user','mode':'uni20'}"
    assert run("run", *rest, "--epochs=1", sampled) == 0
    out, err = capfd.readouterr()
    assert "Of 100" not in out and "recall@10" in out and "candidates are sampled" in err


@pytest.mark.slow
@pytest.mark.filterwarnings("ignore")
def test_by_time_a_line_says_what_the_order_is_worth_and_a_key_leaves_it_out(quick, run_config, tmp_path, capfd):
    """The made users draw items in no order."""
    split = {"split": {"LS": "valid_and_test"}, "order": "TO", "group_by": "user", "mode": "full"}
    columns = {"inter": ["user_id", "item_id", "timestamp"]}
    by_time = [*quick, f"--eval_args={split}", f"--load_col={columns}", "--blocks=closed_form"]
    assert run("run", *by_time, "--output", "result.json") == 0
    out = capfd.readouterr().out
    record = json.loads((tmp_path / "result.json").read_text())["report"]
    order = record["order"]
    assert checked(record) == record and order["users"] == record["measured"]["users"]
    assert order["lost"]["value"] == pytest.approx(1 - order["shuffled"] / order["ordered"])
    # nothing but solved blocks counts here, so what keeps its order is the model, whose weights were chosen once more
    assert order["ordered"] == pytest.approx(record["models"]["LLMTwoTower"]["ndcg"], abs=0.02)
    line = next(line for line in out.splitlines() if line.startswith("Order "))
    assert f"NDCG@10 {order['ordered']:.4f}, {order['shuffled']:.4f} with every history shuffled" in line
    checkpoint = newest_checkpoint(run_config["checkpoint_dir"])
    assert read_checkpoint(checkpoint)["report"]["order"] == order
    assert run("report", checkpoint, *given_again(run_config), "--output", "report.html") == 0
    assert "with every history shuffled" in (tmp_path / "report.html").read_text()
    capfd.readouterr()
    assert run("run", *by_time, "--order_test=False", "--output", "without.json") == 0
    assert "shuffled" not in capfd.readouterr().out
    assert "order" not in json.loads((tmp_path / "without.json").read_text())["report"]
