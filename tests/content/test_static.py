"""Static models: through model2vec where it is installed, and a clear word where it is not."""

import sys

import numpy as np
import pytest
import torch
from tokenizers import Tokenizer, models, pre_tokenizers

from recbole_llm.content.encoders.transformer import load_encoder
from recbole_llm.content.features import FeatureStore, encode_texts

WORDS = ["[UNK]", "a", "blue", "pen", "office", "chair", "toy", "story"]
TEXTS = ["a blue pen", "toy story", "a blue office chair"]


@pytest.fixture
def folder(tmp_path):
    model2vec = pytest.importorskip("model2vec")
    tokenizer = Tokenizer(models.WordLevel({word: index for index, word in enumerate(WORDS)}, unk_token="[UNK]"))
    tokenizer.pre_tokenizer = pre_tokenizers.Whitespace()
    table = np.random.default_rng(0).normal(size=(len(WORDS), 8)).astype(np.float32)
    model2vec.StaticModel(table, tokenizer, normalize=True).save_pretrained(tmp_path / "static")
    return tmp_path / "static"


def encode(encoder, texts):
    return encoder.encode(encoder.prepare(texts))


def test_equal_to_the_library_and_to_the_mean_by_hand(folder):
    from model2vec import StaticModel

    model = StaticModel.from_pretrained(folder)
    encoder = load_encoder(str(folder))
    vectors = encode(encoder, TEXTS)
    assert vectors.dtype == torch.float32
    assert encoder.dim == 8
    np.testing.assert_allclose(vectors.numpy(), model.encode(TEXTS), rtol=1e-6)
    mean = model.embedding[[1, 2, 3]].mean(0)
    np.testing.assert_allclose(vectors[0].numpy(), mean / np.linalg.norm(mean), rtol=1e-5)


def test_cut_tokens_are_counted_and_not_read(folder):
    encoder = load_encoder(str(folder), max_tokens=2)
    samples = encoder.prepare(TEXTS)
    assert [(sample.size, sample.cut) for sample in samples] == [(2, 1), (2, 0), (2, 2)]
    torch.testing.assert_close(encode(encoder, TEXTS)[0], encode(load_encoder(str(folder)), ["a blue"])[0])
    everything = load_encoder(str(folder), max_tokens=2, overflow="chunk_mean")
    torch.testing.assert_close(encode(everything, TEXTS), encode(load_encoder(str(folder)), TEXTS))


def test_prompt_and_dimension(folder):
    torch.testing.assert_close(
        encode(load_encoder(str(folder), prompt="toy "), ["story"]), encode(load_encoder(str(folder)), ["toy story"])
    )
    part = encode(load_encoder(str(folder), dim=3), TEXTS)
    whole = encode(load_encoder(str(folder)), TEXTS)[:, :3]
    torch.testing.assert_close(part, whole / whole.norm(dim=1, keepdim=True))


def test_fingerprint_counts_settings(folder):
    settings = [{}, {"prompt": "a "}, {"max_tokens": 2}, {"overflow": "chunk_mean"}, {"dim": 3}]
    assert len({load_encoder(str(folder), **setting).fingerprint for setting in settings}) == len(settings)


def test_through_the_store(folder, tmp_path):
    store = FeatureStore(tmp_path / "store")
    first = encode_texts([None, *TEXTS], load_encoder(str(folder)), store)
    again = encode_texts([None, *TEXTS], load_encoder(str(folder)), store)
    assert torch.equal(first.vectors, again.vectors)
    assert first.present.tolist() == [False, True, True, True]


@pytest.mark.parametrize(
    ("setting", "message"),
    [
        ({"overflow": "head_tail"}, "has no meaning for the static model"),
        ({"max_tokens": 0}, "encoder_max_tokens must be at least 1"),
        ({"dim": 9}, "encoder_dim must be between 1 and 8"),
        ({"pooling": "cls"}, "encoder_pooling 'cls' and encoder_dtype 'float32' have no meaning"),
        ({"dtype": "bfloat16"}, "have no meaning"),
    ],
)
def test_mistakes(folder, setting, message):
    with pytest.raises(ValueError, match=message):
        load_encoder(str(folder), **setting)


def test_without_the_package(tmp_path, monkeypatch):
    (tmp_path / "config.json").write_text('{"model_type": "model2vec"}')
    monkeypatch.setitem(sys.modules, "model2vec", None)
    with pytest.raises(ValueError, match="needs the package model2vec. pip install model2vec"):
        _ = load_encoder(str(tmp_path)).dim
