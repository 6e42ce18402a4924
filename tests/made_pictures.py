"""Pictures of made items, and an ONNX file that encodes them, for tests of whole runs."""

import json
from pathlib import Path

import numpy as np
from PIL import Image

SIZE = {"size": {"height": 4, "width": 4}, "resample": 2, "image_mean": [0.5] * 3, "image_std": [0.25] * 3}


def colour_of(at):
    """The colour of item ``at``: its topic, four of them, with a shade of its own."""
    base = [(200, 30, 30), (30, 200, 30), (30, 30, 200), (180, 180, 20)][at % 4]
    return tuple(int(min(255, value + 7 * (at // 4 % 5))) for value in base)


def write_picture(path, at):
    """Write the picture of item ``at``: its colour with noise of its own."""
    noise = np.random.default_rng(at).integers(-20, 20, (12, 9, 3))
    Image.fromarray(np.clip(np.array(colour_of(at)) + noise, 0, 255).astype(np.uint8)).save(path)


def write_onnx(path: Path, width=3 * 16):
    """Write an ONNX file whose vector is the scaled picture of 4 x 4 pixels, flat, and its preprocessing."""
    from onnx import TensorProto, helper, save

    given = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, ["n", 3, 4, 4])
    taken = helper.make_tensor_value_info("vector", TensorProto.FLOAT, ["n", width])
    graph = helper.make_graph([helper.make_node("Flatten", ["pixels"], ["vector"])], "flat", [given], [taken])
    save(helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9), path)
    path.with_suffix(".json").write_text(json.dumps(SIZE))
    return f"onnx:{path}"
