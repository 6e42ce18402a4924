"""Encoders that are trained: what of them, as which file, and merged with the base."""

import json

import pytest
import torch
from safetensors import safe_open

from recbole_llm.content.encoders.function import FunctionEncoder
from recbole_llm.content.encoders.resolve import file_digest, resolve_encoder
from recbole_llm.content.encoders.transformer import load_encoder
from recbole_llm.content.features import FeatureStore, encode_texts
from recbole_llm.content.tuning import merge
from recbole_llm.content.tuning.adapter_file import Adapters
from recbole_llm.content.tuning.trainable import TrainableEncoder, blocks_of, own_keys, refuse_untunable

TEXTS = ["a red house", "two", "the long way home, once more", "x"]


@pytest.fixture(params=["lora", "last_layers"])
def method(request):
    if request.param == "lora":
        pytest.importorskip("peft")
    return request.param


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path / "cache"))
    return tmp_path / "cache" / "recbole_llm"


def tuned(folder, method, seed=0, layers=None, **settings):
    """A trainable encoder whose trained weights are others than the base's."""
    trainable = TrainableEncoder(
        load_encoder(str(folder), **settings), method, layers or (1 if method != "lora" else None)
    )
    generator = torch.Generator().manual_seed(seed)
    with torch.no_grad():
        for parameter in trainable.parameters():
            parameter.add_(0.2 * torch.randn(parameter.shape, generator=generator))
    return trainable


def vectors_of(encoder):
    with torch.no_grad():
        return encoder.encode(encoder.prepare(TEXTS))


def test_a_fresh_trainable_encoder_gives_the_vectors_of_its_base(tiny_bert, method):
    trainable = TrainableEncoder(load_encoder(str(tiny_bert)), method, 1)
    base = vectors_of(load_encoder(str(tiny_bert)))
    torch.testing.assert_close(vectors_of(trainable.encoder), base, rtol=1e-5, atol=1e-6)


def test_only_the_last_blocks_are_trained(tiny_bert, method):
    trainable = TrainableEncoder(load_encoder(str(tiny_bert)), method, 1)
    encoder = trainable.encoder
    encoder.encode(encoder.prepare(TEXTS)).square().sum().backward()
    trained = {id(parameter) for parameter in trainable.parameters()}
    for name, parameter in trainable.module.named_parameters():
        assert (
            (id(parameter) in trained)
            == parameter.requires_grad
            == ("layer.1." in name and ("lora_" in name) == (method == "lora"))
        )
        assert parameter.requires_grad or parameter.grad is None
    moved = [parameter for parameter in trainable.parameters() if bool(parameter.grad.abs().max() > 0)]
    assert len(moved) >= len(trained) // 2  # the first factor of an adapter has none while the second is 0
    assert not trainable.module.training


def test_the_merged_encoder_is_the_tuned_one_and_another_than_its_base(tiny_bert, method):
    trainable = tuned(tiny_bert, method)
    data = trainable.adapters().to_bytes()
    merged = load_encoder(str(merge.merged_folder(resolve_encoder(str(tiny_bert)), data)))
    base = load_encoder(str(tiny_bert))
    torch.testing.assert_close(vectors_of(merged), vectors_of(trainable.encoder), rtol=1e-4, atol=1e-5)
    assert not torch.allclose(vectors_of(merged), vectors_of(base), atol=1e-2)
    assert merged.fingerprint != base.fingerprint


def test_the_layers_behind_the_transformer_come_along(sentence_folder, method):
    generator = torch.Generator().manual_seed(0)
    weights = {"linear.weight": torch.randn(8, 32, generator=generator), "linear.bias": torch.zeros(8)}
    dense = {
        "in_features": 32,
        "out_features": 8,
        "bias": True,
        "activation_function": "torch.nn.modules.linear.Identity",
    }
    pooling = {"word_embedding_dimension": 32, "pooling_mode_mean_tokens": True}
    folder = sentence_folder(("Pooling", pooling, None), ("Dense", dense, weights), ("Normalize", {}, None))
    (folder / "modeling.py").write_text("raise RuntimeError")
    (folder / "old.bin").write_bytes(b"pickle")
    trainable = tuned(folder, method)
    merged = merge.merged_folder(resolve_encoder(str(folder)), trainable.adapters().to_bytes())
    again = load_encoder(str(merged))
    assert again.dim == 8
    torch.testing.assert_close(vectors_of(again), vectors_of(trainable.encoder), rtol=1e-4, atol=1e-5)
    assert {path.suffix for path in merged.rglob("*") if path.is_file()} <= {".json", ".safetensors", ".txt"}


def test_the_file_holds_what_changed_and_the_sha256_of_the_base(tiny_bert, method):
    trainable = tuned(tiny_bert, method)
    adapters = trainable.adapters()
    again = Adapters.from_bytes(adapters.to_bytes())
    assert again.base == file_digest(tiny_bert / "model.safetensors")
    assert again.method == method and again.scale == adapters.scale == (2.0 if method == "lora" else 1.0)
    assert again.to_bytes() == adapters.to_bytes() == trainable.adapters().to_bytes()
    with safe_open(tiny_bert / "model.safetensors", "pt") as base:
        assert set(again.changed) <= set(base.keys())
    state = trainable.state()
    other = TrainableEncoder(load_encoder(str(tiny_bert)), method, 1 if method != "lora" else None)
    other.load(state)
    assert torch.equal(vectors_of(other.encoder), vectors_of(trainable.encoder))


def test_the_merged_weights_name_base_and_adapters(tiny_bert, method, cache):
    data = tuned(tiny_bert, method).adapters().to_bytes()
    files = resolve_encoder(str(tiny_bert))
    folder = merge.merged_folder(files, data)
    assert folder.parent == cache / "encoders"
    with safe_open(folder / "model.safetensors", "pt") as weights:
        assert weights.metadata()["base_sha256"] == file_digest(tiny_bert / "model.safetensors")
        assert len(weights.metadata()["adapters_sha256"]) == 64
    before = (folder / "model.safetensors").stat().st_mtime_ns
    assert merge.merged_folder(files, data) == folder
    assert (folder / "model.safetensors").stat().st_mtime_ns == before, "it was merged once more"
    weights = (folder / "model.safetensors").read_bytes()
    (folder / "model.safetensors").unlink()
    folder.rename(folder.with_name("elsewhere"))
    assert (merge.merged_folder(files, data) / "model.safetensors").read_bytes() == weights, (
        "another fingerprint each time"
    )
    assert merge.merged_folder(files, tuned(tiny_bert, method, seed=1).adapters().to_bytes()) != folder


def test_vectors_of_a_tuned_encoder_lie_beside_those_of_its_base(tiny_bert, method, tmp_path):
    store = FeatureStore(tmp_path / "features")
    base = encode_texts(TEXTS, load_encoder(str(tiny_bert)), store)
    data = tuned(tiny_bert, method).adapters().to_bytes()
    merged = str(merge.merged_folder(resolve_encoder(str(tiny_bert)), data))
    other = encode_texts(TEXTS, load_encoder(merged), store)
    assert len([each for each in (tmp_path / "features").iterdir() if each.is_dir()]) == 2
    assert not torch.allclose(base.vectors, other.vectors, atol=1e-2)
    assert torch.equal(encode_texts(TEXTS, load_encoder(str(tiny_bert)), store).vectors, base.vectors)


def test_adapters_of_another_base_are_refused(tiny_bert, tiny_decoder):
    data = tuned(tiny_bert, "last_layers").adapters().to_bytes()
    with pytest.raises(ValueError, match="was fine-tuned from .* give the encoder that it was trained with"):
        merge.merged_folder(resolve_encoder(str(tiny_decoder)), data)


@pytest.mark.parametrize("data", [b"", b"\x80\x04pickle", b"{}" * 40])
def test_bytes_that_are_no_adapters_are_refused(data):
    with pytest.raises(ValueError, match="no file of an encoder's adapters"):
        Adapters.from_bytes(data)


def test_a_safetensors_file_of_something_else_is_refused(tiny_bert):
    with pytest.raises(ValueError, match="no file of an encoder's adapters"):
        Adapters.from_bytes((tiny_bert / "model.safetensors").read_bytes())


def test_adapters_of_other_shapes_are_refused():
    lora = {"w.lora_A": torch.ones(2, 5), "w.lora_B": torch.ones(4, 2)}
    with pytest.raises(ValueError, match="w is changed by"):
        Adapters("text", "lora", 1.0, "0", lora).applied("w", torch.ones(5, 4))
    with pytest.raises(ValueError, match=r"w is \(3,\)"):
        Adapters("text", "last_layers", 1.0, "0", {"w": torch.ones(3)}).applied("w", torch.ones(4))


def test_the_product_of_an_adapter_is_that_of_matrices():
    generator = torch.Generator().manual_seed(0)
    down, up, weight = (torch.randn(shape, generator=generator) for shape in ((3, 7), (5, 3), (5, 7)))
    found = Adapters("text", "lora", 1.5, "0", {"w.lora_A": down, "w.lora_B": up}).applied("w", weight)
    expected = weight.double() + 1.5 * up.double() @ down.double()
    torch.testing.assert_close(found.double(), expected, rtol=1e-6, atol=1e-6)


def test_more_layers_than_there_are_are_refused(tiny_bert):
    with pytest.raises(ValueError, match=r"finetune.layers is 3, and encoder .* has 2 blocks"):
        TrainableEncoder(load_encoder(str(tiny_bert)), "last_layers", 3)


def test_encoders_without_layers_of_their_own_are_refused(tiny_bert, tmp_path, monkeypatch):
    (tmp_path / "mine_tuning.py").write_text(
        "import numpy as np\ndef encode(texts):\n    return np.ones((len(texts), 2))\n"
    )
    monkeypatch.syspath_prepend(str(tmp_path))
    with pytest.raises(ValueError, match="kind FunctionEncoder has no layers that can be trained"):
        refuse_untunable(FunctionEncoder("mine_tuning:encode", (None, "auto", None, None, "truncate", None, "float32")))
    with pytest.raises(ValueError, match="is bfloat16"):
        refuse_untunable(load_encoder(str(tiny_bert), dtype="bfloat16"))


def test_blocks_are_the_longest_list_of_like_modules():
    net = torch.nn.ModuleDict(
        {
            "heads": torch.nn.ModuleList([torch.nn.Linear(2, 2)]),
            "layers": torch.nn.ModuleList([torch.nn.Linear(4, 4), torch.nn.Linear(4, 4)]),
        }
    )
    assert [name for name, _ in blocks_of(net)] == ["layers.0", "layers.1"]
    with pytest.raises(ValueError, match="no list of blocks"):
        blocks_of(torch.nn.Linear(2, 2))


def test_names_in_files_may_have_the_models_name_before_them():
    weights = {"bert.layer.0.weight": torch.eye(2), "bert.layer.0.LayerNorm.gamma": torch.ones(2)}
    parameters = {"layer.0.weight": torch.eye(2), "layer.0.LayerNorm.weight": torch.ones(2)}
    expected = {"layer.0.weight": "bert.layer.0.weight", "layer.0.LayerNorm.weight": "bert.layer.0.LayerNorm.gamma"}
    assert own_keys(parameters, weights, "e") == expected
    with pytest.raises(ValueError, match="hold 0 tensors for layer.1.weight"):
        own_keys({"layer.1.weight": torch.zeros(2, 2)}, weights, "e")


def test_what_the_name_does_not_tell_the_values_tell():
    generator = torch.Generator().manual_seed(0)
    query, key = torch.randn(2, 3, 3, generator=generator)
    weights = {"attention.query.weight": query, "attention.key.weight": key.half()}
    weights |= {"attention.query.bias": torch.zeros(3), "attention.key.bias": torch.zeros(3)}
    weights |= {"layer.0.norm.weight": torch.ones(3), "layer.1.norm.weight": torch.ones(3)}
    parameters = {"q_proj.weight": query, "k_proj.weight": key.half().float(), "q_proj.bias": torch.zeros(3)}
    parameters |= {"k_proj.bias": torch.zeros(3), "layers.1.norm.weight": torch.ones(3)}
    found = own_keys(parameters, weights, "e")
    assert found["q_proj.weight"] == "attention.query.weight" and found["q_proj.bias"] == "attention.query.bias"
    assert found["k_proj.weight"] == "attention.key.weight" and found["k_proj.bias"] == "attention.key.bias"
    assert found["layers.1.norm.weight"] == "layer.1.norm.weight"
    with pytest.raises(ValueError, match="hold 2 tensors for x.weight"):
        own_keys({"x.weight": torch.ones(3)}, {"a.weight": torch.ones(3), "b.weight": torch.ones(3)}, "e")


def test_the_base_stays_as_it_is(tiny_bert, method):
    before = {path.name: path.read_bytes() for path in tiny_bert.iterdir() if path.is_file()}
    trainable = tuned(tiny_bert, method)
    merge.merged_folder(resolve_encoder(str(tiny_bert)), trainable.adapters().to_bytes())
    assert {path.name: path.read_bytes() for path in tiny_bert.iterdir() if path.is_file()} == before
    assert json.loads(before["config.json"])["hidden_size"] == 32
