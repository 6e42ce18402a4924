"""Tones of made items, and an ONNX file that hears them, for tests of whole runs."""

import json
from pathlib import Path

import numpy as np

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


def write_onnx_ear(path: Path):
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
    kept = [numpy_helper.from_array(bands(), "waves"), numpy_helper.from_array(pairs, "pairs")]
    graph = helper.make_graph(nodes, "ear", [given], [taken], kept)
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    path.with_suffix(".json").write_text(json.dumps({"sampling_rate": RATE, "seconds": SECONDS}))
    return f"onnx:{path}"
