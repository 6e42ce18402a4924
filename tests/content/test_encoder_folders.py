"""The folder of an encoder is data: nothing in it runs, and nothing that it names elsewhere is followed."""

import contextlib
import json
import os
import pickle
import shutil
from pathlib import Path

import pytest
import torch

from recbole_llm.content.encoders.transformer import load_encoder


@pytest.fixture
def folder(tiny_encoder, tmp_path):
    """The tiny encoder's files, to be written into."""
    return Path(shutil.copytree(tiny_encoder, tmp_path / "encoder"))


def edit(file, **changes):
    file.write_text(json.dumps(json.loads(file.read_text()) | changes))


def encoded(folder, **settings):
    encoder = load_encoder(str(folder), **settings)
    return encoder.encode(encoder.prepare(["a star of the moon"]))


MODULE = """
import os
os.mkdir({ran!r})
from transformers import BertConfig, BertModel, PreTrainedTokenizerFast
class Config(BertConfig):
    model_type = "mine"
class Model(BertModel):
    config_class = Config
class Tokenizer(PreTrainedTokenizerFast):
    pass
"""


@pytest.mark.parametrize("part", ["model", "tokenizer"])
def test_code_of_a_folder_runs_where_the_caller_trusts_it_and_nowhere_else(folder, tmp_path, monkeypatch, part):
    monkeypatch.setenv("HF_MODULES_CACHE", str(tmp_path / "modules"))
    monkeypatch.setattr("transformers.dynamic_module_utils.HF_MODULES_CACHE", str(tmp_path / "modules"))
    (folder / "mine.py").write_text(MODULE.format(ran=str(tmp_path / "ran")))
    if part == "model":
        edit(
            folder / "config.json", model_type="mine", auto_map={"AutoConfig": "mine.Config", "AutoModel": "mine.Model"}
        )
    else:
        file = folder / "tokenizer_config.json"
        edit(file, tokenizer_class="Tokenizer", auto_map={"AutoTokenizer": [None, "mine.Tokenizer"]})
    with contextlib.suppress(ValueError):  # a tokenizer of a class that is not known may be read by its files alone
        encoded(folder)
    assert not (tmp_path / "ran").exists()
    encoded(folder, trust_remote_code=True)
    assert (tmp_path / "ran").exists()


@pytest.mark.parametrize("where", ["weights", "dense layer"])
def test_pickles_of_a_folder_are_read_as_tensors(folder, tmp_path, where):
    class Harmful:
        def __reduce__(self):
            return os.mkdir, (str(tmp_path / "ran"),)

    if where == "weights":
        (folder / "model.safetensors").unlink()
        torch.save({"embeddings.word_embeddings.weight": Harmful()}, folder / "pytorch_model.bin")
    else:
        (folder / "2_Dense").mkdir()
        config = {"in_features": 32, "out_features": 4, "activation_function": "torch.nn.modules.activation.Tanh"}
        (folder / "2_Dense" / "config.json").write_text(json.dumps(config))
        torch.save({"linear.weight": Harmful()}, folder / "2_Dense" / "pytorch_model.bin")
        modules = [{"type": "m.Transformer", "path": ""}, {"type": "m.Dense", "path": "2_Dense"}]
        (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises((pickle.UnpicklingError, ValueError, OSError)):
        encoded(folder)
    assert not (tmp_path / "ran").exists()


@pytest.mark.parametrize(
    "changes",
    [
        {"attn_implementation": "somebody/kernel"},
        {"_attn_implementation": "somebody/kernel@main:forward"},
        {"attn_implementation": {"": "sdpa", "text_config": "somebody/kernel"}},
        {"text_config": {"experts_implementation": "somebody/kernel"}},
    ],
    ids=str,
)
def test_a_kernel_of_the_hub_is_not_fetched_because_a_folder_says_so(folder, changes):
    edit(folder / "config.json", **changes)
    with pytest.raises(ValueError, match="asks for somebody/kernel.*code of the hub"):
        load_encoder(str(folder))


def test_implementations_of_transformers_are_read(folder):
    expected = encoded(folder)
    edit(folder / "config.json", attn_implementation="eager")
    torch.testing.assert_close(encoded(folder), expected)


def test_an_adapter_beside_the_weights_is_refused(folder):
    (folder / "adapter_config.json").write_text(json.dumps({"base_model_name_or_path": "../another"}))
    with pytest.raises(ValueError, match=r"adapter_config\.json"):
        load_encoder(str(folder))


@pytest.mark.parametrize(
    "activation", ["Module", "ModuleList", "Sequential", "Transformer", "DataParallel", "Parameter"]
)
def test_a_dense_layer_names_an_activation_and_no_other_class(folder, activation):
    (folder / "2_Dense").mkdir()
    config = {"in_features": 32, "out_features": 4, "activation_function": f"torch.nn.{activation}"}
    (folder / "2_Dense" / "config.json").write_text(json.dumps(config))
    torch.save(
        {"linear.weight": torch.zeros(4, 32), "linear.bias": torch.zeros(4)}, folder / "2_Dense" / "pytorch_model.bin"
    )
    modules = [{"type": "m.Transformer", "path": ""}, {"type": "m.Dense", "path": "2_Dense"}]
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="is of a kind not known here"):
        load_encoder(str(folder))


@pytest.mark.parametrize("where", ["transformer", "module", "absolute", "shard"])
def test_no_file_of_a_folder_names_one_outside(folder, tmp_path, where):
    shutil.copytree(folder, tmp_path / "elsewhere")
    modules = [{"type": "m.Transformer", "path": ""}, {"type": "m.Pooling", "path": "1_Pooling"}]
    if where == "transformer":
        modules[0]["path"] = "../elsewhere"
    elif where in ("module", "absolute"):
        modules[1]["path"] = "../elsewhere" if where == "module" else str(tmp_path / "elsewhere")
    else:
        (folder / "model.safetensors").unlink()
        index = {"weight_map": {"embeddings.word_embeddings.weight": "../elsewhere/model.safetensors"}}
        (folder / "model.safetensors.index.json").write_text(json.dumps(index))
        modules = modules[:1]
    (folder / "modules.json").write_text(json.dumps(modules))
    with pytest.raises(ValueError, match="which is outside"):
        assert load_encoder(str(folder)).fingerprint
