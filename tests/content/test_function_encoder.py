"""encoder: module:function. What it gives, when its vectors are stale, and that no file names one."""

import sys

import numpy as np
import pytest
import torch

import recbole_llm  # noqa: F401
from recbole_llm.content.encoder_settings import is_function
from recbole_llm.content.encoders.function import FunctionEncoder
from recbole_llm.content.encoders.transformer import load_encoder
from recbole_llm.content.features import FeatureStore, encode_texts

SOURCE = """
import numpy as np
CALLS = []
def lengths(texts):
    CALLS.append(list(texts))
    return np.array([[len(text), text.count("a"), 1.0] for text in texts])
def ragged(texts):
    return [[1.0] * len(text) for text in texts]
def flat(texts):
    return np.ones(len(texts))
def words(texts):
    return "no numbers"
def tensor(texts):
    import torch
    return torch.tensor([[float(len(text))] for text in texts], dtype=torch.float64, requires_grad=True)
class Callable:
    def __call__(self, texts):
        return np.ones((len(texts), 2))
as_object = Callable()
NOT = 3
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """The name of a module in the working directory, which is not on the path."""
    (tmp_path / "own_encoders.py").write_text(SOURCE)
    monkeypatch.chdir(tmp_path)
    monkeypatch.setattr(sys, "path", [path for path in sys.path if path not in ("", str(tmp_path))])
    yield "own_encoders"
    sys.modules.pop("own_encoders", None)


@pytest.mark.parametrize("name", ["module:function", "a.b_2.c:encode"])
def test_names_of_functions(name):
    assert is_function(name)


@pytest.mark.parametrize(
    "name", [None, "", "user/model", "./folder", "C:\\models\\x", "a:b:c", "a.b", "a:", ":b", "a b:c"]
)
def test_other_names(name):
    assert not is_function(name)


def test_vectors_are_those_of_the_function(module, tmp_path):
    path = list(sys.path)
    encoder = load_encoder(f"{module}:lengths")
    assert sys.path == path
    assert encoder.dim == 3 and encoder.modality == "text"
    table = encode_texts(["banana", None, "", "aa", "banana"], encoder, FeatureStore(tmp_path / "store"))
    expected = torch.tensor([[6.0, 3, 1], [0, 0, 0], [0, 0, 1], [2, 2, 1], [6, 3, 1]])
    assert table.vectors.dtype == torch.float32 and torch.equal(table.vectors, expected)
    assert table.present.tolist() == [True, False, True, True, True]
    # each distinct text once, then none
    calls = sys.modules[module].CALLS
    assert sorted(text for call in calls[1:] for text in call) == ["", "aa", "banana"]
    before = len(calls)
    again = encode_texts(["aa", "banana"], encoder, FeatureStore(tmp_path / "store"))
    assert torch.equal(again.vectors, expected[[3, 0]]) and len(calls) == before


def test_a_changed_file_makes_vectors_stale(module, tmp_path):
    first = load_encoder(f"{module}:lengths").fingerprint
    assert load_encoder(f"{module}:lengths").fingerprint == first
    assert load_encoder(f"{module}:tensor").fingerprint != first
    (tmp_path / "own_encoders.py").write_text(SOURCE + "# changed\n")
    assert load_encoder(f"{module}:lengths").fingerprint != first


def test_tensors_and_objects(module):
    encoder = load_encoder(f"{module}:tensor")
    assert encoder.encode(encoder.prepare(["abc", ""])).tolist() == [[3.0], [0.0]]
    assert FunctionEncoder(f"{module}:as_object").dim == 2


@pytest.mark.parametrize(
    ("function", "message"),
    [
        ("flat", r"gave shape \(1,\) for 1 texts; expected \(1, d\)"),
        ("words", "gave no array of numbers"),
        ("absent", "has no function 'absent'"),
        ("NOT", "has no function 'NOT'"),
    ],
)
def test_what_is_no_encoder(module, function, message):
    with pytest.raises(ValueError, match=message):
        load_encoder(f"{module}:{function}")


def test_rows_of_another_length_are_an_error(module):
    encoder = load_encoder(f"{module}:ragged")
    with pytest.raises(ValueError, match="dimensions, and now of 2"):
        encoder.encode(encoder.prepare(["ab"]))


def test_a_module_that_is_not_there(module):
    with pytest.raises(ValueError, match="no module 'no_such_module_here', neither installed nor in"):
        load_encoder("no_such_module_here:encode")


@pytest.mark.parametrize(
    ("setting", "value"), [("dim", 3), ("prompt", "query: "), ("pooling", "cls"), ("revision", "v1")]
)
def test_settings_of_a_transformer_are_refused(module, setting, value):
    with pytest.raises(ValueError, match=f"encoder_{setting} .* has no meaning"):
        load_encoder(f"{module}:lengths", **{setting: value})


# ------------------------------------------------------------------ files

TRAP = """
from pathlib import Path
Path(__file__).with_name("ran").touch()
def encode(texts):
    return [[1.0, 2.0] for _ in texts]
"""


@pytest.fixture
def trap(tmp_path, monkeypatch):
    """A function whose module leaves a file when it is imported."""
    (tmp_path / "trap_encoder.py").write_text(TRAP)
    monkeypatch.chdir(tmp_path)
    yield tmp_path / "ran"
    sys.modules.pop("trap_encoder", None)


def config_of(run_config, tmp_path, **changes):
    pytest.importorskip("recbole")
    from recbole.config import Config

    given = {key: value for key, value in run_config.items() if key != "encoder"} | changes
    (tmp_path / "own.yaml").write_text("encoder: trap_encoder:encode\n")
    return Config("LLMTwoTower", "toy", config_file_list=[str(tmp_path / "own.yaml")], config_dict=given)


def test_a_configuration_file_names_no_function(run_config, tmp_path, trap):
    from recbole_llm.bridge.options import Options

    with pytest.raises(ValueError, match=r"a configuration file may not name.*--encoder=trap_encoder:encode"):
        Options.from_config(config_of(run_config, tmp_path))
    assert not trap.exists()
    # what the caller says himself counts
    assert (
        Options.from_config(config_of(run_config, tmp_path, encoder="trap_encoder:encode")).encoder
        == "trap_encoder:encode"
    )
    assert Options.from_config(config_of(run_config, tmp_path, encoder="")).encoder in (None, "")


def test_a_search_file_names_no_function(trap):
    pytest.importorskip("recbole")
    from recbole_llm.bridge.repairs.files import _values

    assert _values("['a/b', 'c']") == ["a/b", "c"]
    with pytest.raises(ValueError, match="params_file: 'trap_encoder:encode' is a function"):
        _values("['a/b', 'trap_encoder:encode']")


def test_a_checkpoint_names_no_function(trap):
    from recbole_llm.bridge.checkpoint_settings import take_settings

    settings = {"model": "LLMTwoTower", "dataset": "ml-100k", "given": {"encoder": "trap_encoder:encode"}}
    with pytest.raises(
        ValueError, match="--encoder=trap_encoder:encode. A path is not taken out of a file, and neither is a"
    ):
        take_settings(settings, "a.pth", {"feature_cache_dir"})
    taken = take_settings(settings, "a.pth", {"encoder", "feature_cache_dir"})
    assert taken.dataset == "ml-100k" and not trap.exists()


def test_an_export_names_no_function(tmp_path, trap):
    """Its manifest may hold any name: nothing is imported until the caller names the function too."""
    from recbole_llm.export.manifest import EncoderSpec
    from recbole_llm.serving.text import _find

    class OfManifest:
        encoder = EncoderSpec(
            name="trap_encoder:encode", revision=None, settings={}, feature_dim=2, fingerprint="x", bundled=False
        )

    with pytest.raises(ValueError, match="nothing is loaded because a file names it"):
        _find(tmp_path, OfManifest, ())
    with pytest.raises(ValueError, match="absent-folder"):
        _find(tmp_path, OfManifest, ("./absent-folder",))
    assert not trap.exists()
    with pytest.raises(ValueError, match="is another one than the model was trained with"):
        _find(tmp_path, OfManifest, ("trap_encoder:encode",))
    assert trap.exists()
    OfManifest.encoder = EncoderSpec(
        name="trap_encoder:encode", revision=None, settings={"pooling": "auto", "dtype": "float32"}, feature_dim=2,
        fingerprint=FunctionEncoder("trap_encoder:encode").fingerprint, bundled=False,
    )  # fmt: skip
    found = _find(tmp_path, OfManifest, ("trap_encoder:encode",))
    assert np.array_equal(found.encode(found.prepare(["x"])), [[1.0, 2.0]])
