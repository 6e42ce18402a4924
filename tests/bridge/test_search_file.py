"""Search spaces are read strictly: a name that nobody reads would search nothing, without a word."""

import pytest

pytest.importorskip("recbole")
import recbole_llm  # noqa: F401
from recbole_llm.bridge.experiments.search_file import read_space

SPACE = "learning_rate choice [0.01, 0.001]\nembedding_size choice [8,16]\nweight_decay loguniform -8,-4\n"


def space(folder, content, model="LLMTwoTower"):
    (folder / "a.hyper").write_bytes(content if isinstance(content, bytes) else content.encode())
    return read_space(str(folder / "a.hyper"), model)


@pytest.mark.parametrize("model", ["LLMTwoTower", "BPR"])
def test_marks_comments_blanks_and_tabs_are_no_names(tmp_path, model):
    assert space(tmp_path, SPACE, model) == SPACE
    odd = b"\xef\xbb\xbf" + b"# a comment of some words\r\n\r\n" + SPACE.replace(" choice ", "\t choice   ").encode()
    assert space(tmp_path, odd.replace(b"\n", b"\r\n"), model) == SPACE


@pytest.mark.parametrize(
    ("line", "message"),
    [
        (
            "embeding_size choice [8]",
            "line 1: LLMTwoTower does not read 'embeding_size'; is 'embedding_size' meant?: 'embeding_size choice",
        ),
        ("Learning_Rate choice [8]", "LLMTwoTower does not read 'Learning_Rate'; is 'learning_rate' meant?"),
        ("nothing_like_it choice [8]", "LLMTwoTower does not read 'nothing_like_it', and would search nothing:"),
        ("learning_rate choice", "a name, a kind and values are expected"),
        ("learning_rate [0.1]", "a name, a kind and values are expected"),
        ("learning_rate grid [0.1]", "'grid' is none of choice, uniform, quniform, loguniform"),
        ("learning_rate choice 0.1", "the values of a choice are a list in brackets"),
        ("learning_rate choice []", "the values of a choice are a list"),
        ("learning_rate choice [adam]", "strings in quotes"),
        ("learning_rate choice [__import__('os').getpid()]", "the values of a choice are a list"),
        ("learning_rate uniform 0.1", "uniform takes 2 numbers with a comma between them"),
        ("learning_rate uniform a,b", "uniform takes 2 numbers"),
        ("learning_rate quniform 0,1", "quniform takes 3 numbers"),
        ("learning_rate uniform 0,inf", "uniform takes 2 numbers"),
        ("learning_rate choice [1]\nlearning_rate choice [2]", "line 2: the name has been given before"),
        ("", "holds no parameter. A line of it reads"),
        ("# nothing\n", "holds no parameter"),
    ],
)
def test_mistakes_are_named_with_their_line(tmp_path, line, message):
    with pytest.raises(ValueError, match=message.replace("?", r"\?")):
        space(tmp_path, line)


@pytest.mark.parametrize(
    ("model", "key"),
    [("LLMTwoTower", "n_layers"), ("BPR", "mlp_hidden_size"), ("BPR", "encoder"), ("NeuMF", "n_heads")],
)
def test_keys_of_other_models_would_search_nothing(tmp_path, model, key):
    with pytest.raises(ValueError, match=f"line 2: {model} does not read '{key}', and would search nothing"):
        space(tmp_path, f"learning_rate choice [1]\n{key} choice [1]", model)


@pytest.mark.parametrize(
    ("model", "key"),
    [
        ("LLMTwoTower", "history_dropout"),
        ("NeuMF", "mf_embedding_size"),
        ("NeuMF", "mlp_hidden_size"),
        ("SASRec", "n_layers"),
        ("LightGCN", "require_pow"),
        ("LDiffRec", "w_max"),
        ("S3Rec", "pretrain_epochs"),
        ("BPR", "train_batch_size"),
        ("AutoInt", "has_residual"),
    ],
)
def test_keys_of_the_model_itself_are_searched(tmp_path, model, key):
    assert space(tmp_path, f"{key} choice [1]", model) == f"{key} choice [1]\n"


def test_of_a_model_of_ones_own_nobody_knows_the_keys(tmp_path, monkeypatch):
    from recbole_llm.bridge import register

    monkeypatch.setitem(register._registrations, "MyTower", None)
    assert space(tmp_path, "embeding_size choice [8]", "MyTower") == "embeding_size choice [8]\n"


def test_every_search_file_of_the_repository_is_read(tmp_path):
    from pathlib import Path

    files = sorted((Path(__file__).resolve().parents[2] / "configs").rglob("*.hyper"))
    assert len(files) > 10
    for file in files:
        assert read_space(str(file), file.stem)


def test_utf_16_is_named(tmp_path):
    with pytest.raises(ValueError, match="params_file '.*a.hyper' is UTF-16, and UTF-8 is expected"):
        space(tmp_path, SPACE.encode("utf-16"))
