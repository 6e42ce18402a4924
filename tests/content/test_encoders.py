"""Encoders: the vector of a text depends on the text and the settings, never on its batch, its padding or a path."""

import json
import shutil

import numpy as np
import pytest
import torch
import torch.nn.functional as F
from safetensors.torch import load_file, save_file

from recbole_llm.content.encoders.transformer import load_encoder

TEXTS = [
    "pen",
    "a very long description of an office chair with (many) details",
    "toy story",
    "x",
    "four rooms; 1995",
    "and one more",
]


def encode(encoder, texts):
    with torch.no_grad():
        return encoder.encode(encoder.prepare(texts))


def hidden_states(folder, text, limit=64):
    """What transformers gives for one text alone, without padding."""
    from transformers import AutoModel, AutoTokenizer

    tokens = AutoTokenizer.from_pretrained(folder)(text, return_tensors="pt", truncation=True, max_length=limit)
    with torch.no_grad():
        return AutoModel.from_pretrained(folder).eval()(input_ids=tokens["input_ids"]).last_hidden_state[0]


POOLED = {
    "mean": lambda h: h.mean(0),
    "cls": lambda h: h[0],
    "last": lambda h: h[-1],
    "max": lambda h: h.amax(0),
}


@pytest.fixture(params=["bert", "decoder"])
def folder(request, tiny_bert, tiny_decoder):
    return str({"bert": tiny_bert, "decoder": tiny_decoder}[request.param])


class TestVectors:
    @pytest.mark.parametrize("pooling", POOLED)
    def test_batch_equals_transformers_one_by_one(self, folder, pooling):
        vectors = encode(load_encoder(folder, pooling=pooling), TEXTS)
        alone = torch.stack([POOLED[pooling](hidden_states(folder, text)) for text in TEXTS])
        assert vectors.dtype == torch.float32
        # float32 sums of 2 layers in another order; vectors have entries of size one
        torch.testing.assert_close(vectors, alone, rtol=1e-5, atol=1e-5)
        assert (vectors - vectors.roll(1, 0)).abs().amax(1).min() > 0.05  # the texts lie apart: the test can fail

    @pytest.mark.parametrize("overflow", ["truncate", "head_tail", "chunk_mean"])
    def test_order_and_company_change_nothing(self, folder, overflow):
        encoder = load_encoder(folder, max_tokens=16, overflow=overflow)
        together = encode(encoder, TEXTS)
        torch.testing.assert_close(encode(encoder, TEXTS[::-1]).flip(0), together, rtol=1e-5, atol=1e-5)
        alone = torch.cat([encode(encoder, [text]) for text in TEXTS])
        torch.testing.assert_close(alone, together, rtol=1e-5, atol=1e-5)

    def test_padding_side_of_the_tokenizer_is_nothing(self, tiny_decoder, tmp_path):
        shutil.copytree(tiny_decoder, tmp_path / "right")
        config = tmp_path / "right" / "tokenizer_config.json"
        config.write_text(json.dumps({**json.loads(config.read_text()), "padding_side": "right"}))
        left, right = load_encoder(str(tiny_decoder)), load_encoder(str(tmp_path / "right"))
        assert torch.equal(encode(left, TEXTS), encode(right, TEXTS))
        assert left.fingerprint == right.fingerprint

    def test_auto_pooling_goes_by_architecture(self, tiny_bert, tiny_decoder):
        assert load_encoder(str(tiny_bert)).head.pooling == ("mean",)
        assert load_encoder(str(tiny_decoder)).head.pooling == ("last",)

    def test_dimension_is_known_before_the_weights(self, folder):
        encoder = load_encoder(folder)
        assert encoder.dim == 32
        assert len(encoder.fingerprint) == 64
        assert "_model" not in vars(encoder)

    def test_matryoshka_keeps_the_first_dimensions(self, sentence_folder):
        folder = str(sentence_folder(("Pooling", {"pooling_mode_mean_tokens": True}, None), ("Normalize", None, None)))
        whole, part = encode(load_encoder(folder), TEXTS), encode(load_encoder(folder, dim=8), TEXTS)
        assert part.shape == (len(TEXTS), 8)
        torch.testing.assert_close(part, F.normalize(whole[:, :8], dim=1))
        plain = encode(load_encoder(folder, pooling="mean", dim=8), TEXTS)
        torch.testing.assert_close(plain, part)

    def test_empty_batch(self, tiny_bert):
        assert encode(load_encoder(str(tiny_bert)), []).shape == (0, 32)

    def test_gradients_reach_the_transformer(self, tiny_bert):
        encoder = load_encoder(str(tiny_bert))
        encoder.encode(encoder.prepare(TEXTS)).square().sum().backward()
        gradient = encoder._model.embeddings.word_embeddings.weight.grad
        assert gradient is not None
        assert gradient.abs().sum() > 0

    @pytest.mark.parametrize("dtype", ["bfloat16", "float16"])
    def test_half_precision_stays_near(self, tiny_bert, dtype):
        exact, half = (
            encode(load_encoder(str(tiny_bert)), TEXTS),
            encode(load_encoder(str(tiny_bert), dtype=dtype), TEXTS),
        )
        assert half.dtype == torch.float32
        # bfloat16 keeps 8 bits; entries are of size one
        assert F.cosine_similarity(exact, half).min() > 0.999
        assert not torch.equal(exact, half)


class TestLongTexts:
    text = "abcdefghij" * 5  # 50 tokens of the tiny tokenizers

    def ids(self, encoder, text):
        return encoder._tokenizer(text, add_special_tokens=False)["input_ids"]

    @pytest.mark.parametrize("limit", [64, 16])
    def test_truncation_is_that_of_transformers(self, folder, limit):
        encoder = load_encoder(folder, max_tokens=limit)
        text = " ".join([self.text] * 3)
        expected = encoder._tokenizer(text, truncation=True, max_length=limit)["input_ids"]
        (sample,) = encoder.prepare([text])
        assert sample.windows[0].tolist() == expected
        specials = len(encoder._tokenizer("")["input_ids"])
        assert sample.cut == len(self.ids(encoder, text)) - (limit - specials) > 80

    def test_short_texts_lose_nothing(self, folder):
        assert [sample.cut for sample in load_encoder(folder).prepare(["a", self.text])] == [0, 0]

    def test_head_and_tail(self, folder):
        encoder = load_encoder(folder, max_tokens=16, overflow="head_tail")
        before, after, _ = encoder._frame
        (sample,) = encoder.prepare([self.text])
        room = 16 - len(before) - len(after)
        ids = self.ids(encoder, self.text)
        kept = sample.windows[0].tolist()[len(before) : 16 - len(after)]
        assert kept == ids[: room - room // 2] + ids[-(room // 2) :]
        assert sample.cut == 50 - room

    def test_windows_hold_every_token_once(self, folder):
        encoder = load_encoder(folder, max_tokens=16, overflow="chunk_mean")
        before, after, _ = encoder._frame
        (sample,) = encoder.prepare([self.text])
        assert sample.cut == 0
        contents = [window.tolist()[len(before) : len(window) - len(after)] for window in sample.windows]
        assert [token for content in contents for token in content] == self.ids(encoder, self.text)
        assert all(len(window) <= 16 for window in sample.windows)

    def test_mean_of_windows_is_weighted_by_tokens(self, folder):
        encoder = load_encoder(folder, max_tokens=16, overflow="chunk_mean")
        (sample,) = encoder.prepare([self.text])
        single = [type(sample)((window,), 0) for window in sample.windows]
        with torch.no_grad():
            parts = encoder.encode(single)
            joined = encoder.encode([sample])[0]
        weights = torch.tensor([float(len(window)) for window in sample.windows])
        torch.testing.assert_close(joined, (parts * weights[:, None]).sum(0) / weights.sum(), rtol=1e-5, atol=1e-5)

    def test_the_prompt_leads_every_window(self, folder):
        encoder = load_encoder(folder, prompt="pq", max_tokens=16, overflow="chunk_mean")
        before, after, prompt = encoder._frame
        assert len(prompt) == 2
        (sample,) = encoder.prepare([self.text])
        assert len(sample.windows) > 2
        for window in sample.windows[1:]:
            assert window.tolist()[len(before) : len(before) + 2] == prompt
        contents = [w.tolist()[len(before) + 2 : len(w) - len(after)] for w in sample.windows]
        assert sum(map(len, contents)) == 50


class TestSentenceTransformers:
    def test_pooling_normalisation_length_and_default_prompt(self, sentence_folder):
        folder = sentence_folder(
            ("Pooling", {"word_embedding_dimension": 32, "pooling_mode_cls_token": True}, None),
            ("Normalize", None, None),
            prompts={"query": "q: ", "document": "d: "},
            max_seq_length=16,
        )
        encoder = load_encoder(str(folder))
        assert encoder.describe()["pooling"] == "cls"
        assert encoder.prompt == "d: "
        assert encoder.max_tokens == 16
        expected = torch.stack([hidden_states(folder, "d: " + text, 16)[0] for text in TEXTS])
        torch.testing.assert_close(encode(encoder, TEXTS), F.normalize(expected, dim=1), rtol=1e-5, atol=1e-5)

    def test_prompt_by_name_text_or_default(self, sentence_folder):
        pooling = ("Pooling", {"pooling_mode_mean_tokens": True}, None)
        folder = str(sentence_folder(pooling, prompts={"query": "q: ", "passage": "p: "}, default_prompt_name="query"))
        assert load_encoder(folder).prompt == "q: "
        assert load_encoder(folder, prompt="passage").prompt == "p: "
        assert load_encoder(folder, prompt="as it stands: ").prompt == "as it stands: "

    def test_prompt_outside_the_pooling(self, sentence_folder):
        folder = sentence_folder(("Pooling", {"pooling_mode_mean_tokens": True, "include_prompt": False}, None))
        encoder = load_encoder(str(folder), prompt="q: ")
        expected = torch.stack([hidden_states(folder, "q: " + text)[3:].mean(0) for text in TEXTS])  # [CLS] q :
        torch.testing.assert_close(encode(encoder, TEXTS), expected, rtol=1e-5, atol=1e-5)

    @pytest.mark.parametrize("prompt", [None, "q: "])
    def test_equal_to_the_library(self, sentence_folder, prompt):
        """All that a folder can hold at once: two poolings, two dense layers, layer norm, normalisation, cut texts."""
        library = pytest.importorskip("sentence_transformers")
        generator = torch.Generator().manual_seed(0)
        random = lambda *shape: torch.randn(*shape, generator=generator) / 4  # noqa: E731
        dense = {
            "in_features": 64,
            "out_features": 24,
            "bias": True,
            "activation_function": "torch.nn.modules.activation.Tanh",
        }
        plain = {**dense, "in_features": 24, "bias": False, "activation_function": "torch.nn.modules.linear.Identity"}
        folder = sentence_folder(
            (
                "Pooling",
                {
                    "word_embedding_dimension": 32,
                    "pooling_mode_max_tokens": True,
                    "pooling_mode_weightedmean_tokens": True,
                },
                None,
            ),
            ("Dense", dense, {"linear.weight": random(24, 64), "linear.bias": random(24)}),
            ("LayerNorm", {"dimension": 24}, {"norm.weight": random(24), "norm.bias": random(24)}),
            ("Dense", plain, {"linear.weight": random(24, 24)}),
            ("Dropout", {"dropout": 0.5}, None),
            ("Normalize", None, None),
            max_seq_length=32,
        )
        encoder = load_encoder(str(folder), prompt=prompt)
        assert encoder.dim == 24
        theirs = library.SentenceTransformer(str(folder), device="cpu").encode(TEXTS, prompt=prompt)
        np.testing.assert_allclose(encode(encoder, TEXTS).numpy(), theirs, rtol=1e-4, atol=1e-5)

    def test_pooling_of_our_own_keeps_the_rest(self, sentence_folder):
        folder = sentence_folder(("Pooling", {"pooling_mode": "mean"}, None), ("Normalize", None, None))
        encoder = load_encoder(str(folder), pooling="cls")
        assert encoder.head.pooling == ("cls",)
        torch.testing.assert_close(encode(encoder, TEXTS).norm(dim=1), torch.ones(len(TEXTS)))

    def test_lower_case_where_the_model_asks_for_it(self, sentence_folder):
        pooling = ("Pooling", {"pooling_mode": "mean"}, None)
        folders = [sentence_folder(pooling, do_lower_case=lower) for lower in (False, True)]
        for folder in folders:
            path = folder / "tokenizer.json"
            path.write_text(path.read_text().replace('"lowercase": true', '"lowercase": false'))
        as_is, lowered = (load_encoder(str(folder)) for folder in folders)
        assert torch.equal(encode(lowered, ["A PEN"]), encode(as_is, ["a pen"]))
        assert not torch.equal(encode(as_is, ["A PEN"]), encode(as_is, ["a pen"]))
        assert as_is.fingerprint != lowered.fingerprint

    def test_transformer_in_a_folder_of_its_own(self, tiny_bert, tmp_path):
        shutil.copytree(tiny_bert, tmp_path / "0_Transformer")
        modules = [{"idx": 0, "name": "0", "path": "0_Transformer", "type": "sentence_transformers.models.Transformer"}]
        (tmp_path / "modules.json").write_text(json.dumps(modules))
        inner = encode(load_encoder(str(tiny_bert)), TEXTS)
        assert torch.equal(encode(load_encoder(str(tmp_path)), TEXTS), inner)

    @pytest.mark.parametrize(
        ("module", "message"),
        [
            (("CNN", {}, None), "module sentence_transformers.models.CNN is not known"),
            (("Pooling", {"pooling_mode": "attention"}, None), "pooling configuration .* is not known"),
            (("Dense", {"in_features": 32, "out_features": 8}, None), "the module 1_Dense has no weights"),
            (("Dense", {"in_features": 32, "out_features": 8, "use_residual": True}, None), "of a kind not known"),
            (
                ("Dense", {"in_features": 32, "out_features": 8, "activation_function": "os.system"}, None),
                "of a kind not known",
            ),
        ],
    )
    def test_what_is_not_understood_is_an_error(self, sentence_folder, module, message):
        with pytest.raises(ValueError, match=message):
            load_encoder(str(sentence_folder(module)))


class TestFingerprint:
    def test_is_of_the_content_and_not_of_the_path(self, tiny_bert, tmp_path):
        copy = tmp_path / "elsewhere"
        shutil.copytree(tiny_bert, copy)
        config = json.loads((copy / "config.json").read_text())
        (copy / "config.json").write_text(json.dumps({**config, "_name_or_path": "x", "transformers_version": "0"}))
        assert load_encoder(str(copy)).fingerprint == load_encoder(str(tiny_bert)).fingerprint

    @pytest.mark.parametrize(
        "setting",
        [
            {"pooling": "cls"},
            {"prompt": "q: "},
            {"max_tokens": 32},
            {"overflow": "head_tail"},
            {"dim": 8},
            {"dtype": "bfloat16"},
        ],
        ids=str,
    )
    def test_every_setting_counts(self, tiny_bert, setting):
        assert load_encoder(str(tiny_bert), **setting).fingerprint != load_encoder(str(tiny_bert)).fingerprint

    @pytest.mark.parametrize("name", ["model.safetensors", "tokenizer.json", "config.json"])
    def test_every_file_counts(self, tiny_bert, tmp_path, name):
        shutil.copytree(tiny_bert, tmp_path / "changed")
        path = tmp_path / "changed" / name
        if name == "model.safetensors":
            tensors = load_file(path)
            tensors["embeddings.word_embeddings.weight"][5, 5] += 1
            save_file(tensors, path, metadata={"format": "pt"})
        elif name == "config.json":
            path.write_text(json.dumps({**json.loads(path.read_text()), "hidden_act": "relu"}))
        else:
            path.write_text(path.read_text().replace('"lowercase": true', '"lowercase": false'))
        assert load_encoder(str(tmp_path / "changed")).fingerprint != load_encoder(str(tiny_bert)).fingerprint

    def test_dense_weights_count(self, sentence_folder):
        config = {"in_features": 32, "out_features": 2, "bias": False}
        one, two = (
            sentence_folder(("Pooling", {"pooling_mode": "mean"}, None), ("Dense", config, {"linear.weight": value}))
            for value in (torch.zeros(2, 32), torch.ones(2, 32))
        )
        assert load_encoder(str(one)).fingerprint != load_encoder(str(two)).fingerprint


class TestMistakes:
    @pytest.mark.parametrize(
        ("setting", "message"),
        [
            ({"pooling": "median"}, "encoder_pooling must be one of auto, mean, cls, last, max, got 'median'"),
            ({"overflow": "drop"}, "encoder_overflow must be one of truncate"),
            ({"dtype": "float8"}, "encoder_dtype must be one of float32"),
            ({"dim": 33}, "encoder_dim must be between 1 and 32, the model's dimension, got 33"),
            ({"dim": 0}, "encoder_dim must be between 1 and 32"),
            ({"max_tokens": 65}, "encoder_max_tokens must be between 4 and 64, got 65"),
            ({"max_tokens": 3}, "encoder_max_tokens must be between 4 and 64"),
        ],
    )
    def test_settings(self, tiny_bert, setting, message):
        with pytest.raises(ValueError, match=message):
            load_encoder(str(tiny_bert), **setting)

    def test_no_room_beside_the_prompt(self, tiny_bert):
        with pytest.raises(ValueError, match="encoder_max_tokens 8 leaves no room .* shorten encoder_prompt"):
            load_encoder(str(tiny_bert), prompt="a long prompt: ", max_tokens=8).prepare(["x"])

    def test_weights_that_would_stay_random(self, tiny_bert, tmp_path):
        shutil.copytree(tiny_bert, tmp_path / "partial")
        tensors = load_file(tmp_path / "partial" / "model.safetensors")
        del tensors["encoder.layer.1.output.dense.weight"]
        save_file(tensors, tmp_path / "partial" / "model.safetensors", metadata={"format": "pt"})
        with pytest.raises(ValueError, match=r"its weights lack 1 tensors .*encoder.layer.1.output.dense.weight"):
            encode(load_encoder(str(tmp_path / "partial")), ["x"])

    def test_a_pooler_that_is_not_there_is_no_loss(self, tiny_bert, tmp_path):
        shutil.copytree(tiny_bert, tmp_path / "bare")
        tensors = {k: v for k, v in load_file(tmp_path / "bare" / "model.safetensors").items() if "pooler" not in k}
        save_file(tensors, tmp_path / "bare" / "model.safetensors", metadata={"format": "pt"})
        assert torch.equal(
            encode(load_encoder(str(tmp_path / "bare")), ["x"]), encode(load_encoder(str(tiny_bert)), ["x"])
        )
