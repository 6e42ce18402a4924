"""Tones of made items, and an ONNX file that hears them, for tests of whole runs."""

import json
from pathlib import Path

import numpy as np

from tests.toy_data import TOPICS

RATE, SECONDS, BANDS = 4000, 0.5, 24


def tone(hz, seconds=1.0, rate=8000, seed=0):
    """A sine with a little noise of its own, ``[n]`` float32."""
    at = np.arange(round(seconds * rate)) / rate
    noise = np.random.default_rng(seed).standard_normal(len(at))
    return (0.4 * np.sin(2 * np.pi * hz * at) + 0.01 * noise).astype(np.float32)


def pitch_of(at):
    """The pitch of item ``at``: its topic, four of them an octave apart, with a shade of its own."""
    return (150, 300, 600, 1200)[at % 4] * (1 + 0.02 * (at // 4 % 5))


def write_tone(path, at):
    """Write the tone of item ``at``."""
    import soundfile

    soundfile.write(path, tone(pitch_of(at), seed=at), 8000)


def bands():
    """The waves of the ONNX file, ``[samples, 2 BANDS]``: cosines and sines of pitches in equal steps of an octave."""
    at = np.arange(round(RATE * SECONDS)) / RATE
    pitches = 100 * 2 ** np.linspace(0, 4, BANDS)
    phase = 2 * np.pi * at[:, None] * pitches * 1.0
    window = np.hanning(len(at))[:, None]
    return np.concatenate([np.cos(phase) * window, np.sin(phase) * window], 1).astype(np.float32)


def write_onnx_ear(path: Path, gain: float = 1.0):
    """Write an ONNX file from samples ``[n, 2000]`` to the loudness of 24 pitches, and its settings."""
    from onnx import TensorProto, helper, numpy_helper, save

    given = helper.make_tensor_value_info("samples", TensorProto.FLOAT, ["n", round(RATE * SECONDS)])
    taken = helper.make_tensor_value_info("vector", TensorProto.FLOAT, ["n", BANDS])
    nodes = [
        helper.make_node("MatMul", ["samples", "waves"], ["parts"]),
        helper.make_node("Mul", ["parts", "parts"], ["squares"]),
        helper.make_node("MatMul", ["squares", "pairs"], ["power"]),
        helper.make_node("Sqrt", ["power"], ["vector"]),
    ]
    pairs = np.concatenate([np.eye(BANDS), np.eye(BANDS)]).astype(np.float32)
    kept = [numpy_helper.from_array(np.float32(gain) * bands(), "waves"), numpy_helper.from_array(pairs, "pairs")]
    graph = helper.make_graph(nodes, "ear", [given], [taken], kept)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    path.with_suffix(".json").write_text(json.dumps({"sampling_rate": RATE, "seconds": SECONDS}))
    return f"onnx:{path}"


def write_clap(folder: Path):
    """Write a tiny CLAP that hears two seconds and reads words of the toy data; returns its folder."""
    import torch
    import transformers as t
    from tokenizers import Tokenizer, models, normalizers, pre_tokenizers, processors

    names = ["[BOS]", "[PAD]", "[EOS]", "[UNK]", *TOPICS, *(word for some in TOPICS.values() for word in some)]
    words = Tokenizer(models.WordLevel({word: at for at, word in enumerate(dict.fromkeys(names))}, "[UNK]"))
    words.normalizer = normalizers.Lowercase()
    words.pre_tokenizer = pre_tokenizers.Whitespace()
    words.post_processor = processors.TemplateProcessing(
        single="[BOS] $A [EOS]", special_tokens=[("[BOS]", 0), ("[EOS]", 2)]
    )
    tokenizer = t.PreTrainedTokenizerFast(
        tokenizer_object=words, pad_token="[PAD]", bos_token="[BOS]", eos_token="[EOS]", unk_token="[UNK]"
    )
    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    text = small | {"vocab_size": len(names), "max_position_embeddings": 20, "pad_token_id": 1, "projection_dim": 10}
    text |= {"initializer_range": 0.5}
    audio = {
        "hidden_size": 16, "patch_embeds_hidden_size": 8, "depths": [1, 1], "num_attention_heads": [2, 2],
        "num_hidden_layers": 2, "spec_size": 64, "num_mel_bins": 16, "window_size": 4, "patch_size": 4,
        "patch_stride": [4, 4], "projection_dim": 10,
    }  # fmt: skip
    torch.manual_seed(0)
    model = t.ClapModel(t.ClapConfig(text_config=text, audio_config=audio, projection_dim=10)).eval()
    mel = {"feature_size": 16, "sampling_rate": 8000, "hop_length": 80, "fft_window_size": 256}
    for each in (model, tokenizer, t.ClapFeatureExtractor(max_length_s=2, truncation="rand_trunc", **mel)):
        each.save_pretrained(folder)
    return folder
