"""Vision models of transformers, ONNX files and functions as encoders of pictures, against what the libraries themselves give."""

import json
import shutil

import numpy as np
import pytest
import torch
from PIL import Image

from recbole_llm.content.encoders.images import load_image_encoder
from recbole_llm.content.encoders.resolve import EncoderNotFoundError
from recbole_llm.content.images.preprocessing import read_preprocessing

KINDS = ("clip", "siglip", "vit", "dinov2", "convnext", "resnet", "mobilenet")


def encoded(encoder, pictures):
    with torch.inference_mode():
        return encoder.encode(encoder.prepare(pictures))


@pytest.mark.parametrize("kind", KINDS)
def test_a_vision_model_gives_its_own_vectors_of_its_own_preprocessing(vision, pictures, kind):
    folder, model, processor, dim = vision(kind)
    encoder = load_image_encoder(str(folder))
    pixels = processor(images=pictures, return_tensors="pt")["pixel_values"]
    samples = encoder.prepare(pictures)
    assert np.abs(np.stack([sample.pixels for sample in samples]) - pixels.numpy()).max() < 1e-6
    with torch.inference_mode():
        if kind in ("clip", "siglip"):
            expected = model.get_image_features(pixel_values=pixels)
            expected = getattr(expected, "pooler_output", expected)
        elif kind in ("vit", "dinov2"):
            expected = model(pixel_values=pixels).last_hidden_state[:, 0]
        else:
            expected = model(pixel_values=pixels).pooler_output.flatten(1)
    found = encoded(encoder, pictures)
    assert found.shape == expected.shape == (4, encoder.dim) and found.dtype == torch.float32
    assert dim is None or encoder.dim == dim
    size = float(expected.abs().max())
    torch.testing.assert_close(found, expected, rtol=1e-4, atol=1e-5 * size)
    assert (found - found.mean(0)).abs().max() > 1e-3 * size, "pictures do not lie apart"
    assert (encoder.modality, len(encoder.fingerprint)) == ("image", 64)
    json.dumps(encoder.describe())


def test_the_fingerprint_follows_weights_and_preprocessing_and_no_path(vision, tmp_path):
    folder, *_ = vision("vit")
    same, other = tmp_path / "same", tmp_path / "other"
    shutil.copytree(folder, same)
    shutil.copytree(folder, other)
    config = json.loads((other / "preprocessor_config.json").read_text())
    (other / "preprocessor_config.json").write_text(json.dumps(config | {"image_mean": [0.4, 0.5, 0.5]}))
    first, second, third = (load_image_encoder(str(path)).fingerprint for path in (folder, same, other))
    assert first == second != third


def test_models_that_are_no_vision_models_or_not_whole_are_refused(vision, tiny_bert, tmp_path):
    with pytest.raises(ValueError, match="no vision model.*preprocessor_config.json"):
        load_image_encoder(str(tiny_bert))
    folder, *_ = vision("vit")
    shutil.copytree(folder, tmp_path / "cut")
    from safetensors.torch import load_file, save_file

    weights = load_file(folder / "model.safetensors")
    weights = {name: tensor for name, tensor in weights.items() if ".0." not in name}
    save_file(weights, tmp_path / "cut" / "model.safetensors", metadata={"format": "pt"})
    with pytest.raises(ValueError, match="would stay random"):
        encoded(load_image_encoder(str(tmp_path / "cut")), [Image.new("RGB", (32, 32))])
    with pytest.raises(EncoderNotFoundError):
        load_image_encoder("google/siglip2-base-patch16-224-that-is-nowhere")


@pytest.mark.parametrize(
    ("config", "words"),
    [
        ({"image_processor_type": "Siglip2ImageProcessor"}, "Siglip2ImageProcessor, which is not understood"),
        ({"size": 0}, "size of its image processor is '0'"),
        ({"size": {"height": 10**9, "width": 1}}, "1 to 2048"),
        ({"size": {"longest_edge": 224}}, "size of its image processor"),
        ({"size": 10, "do_center_crop": True, "crop_size": "x"}, "size"),
        ({"image_std": [1, 1, 0]}, "image_std of its image processor"),
        ({"image_mean": [1, 1]}, "image_mean of its image processor"),
        ({"rescale_factor": "a"}, "rescale_factor"),
        ({"resample": 99}, "resample"),
        ({"do_resize": False}, "do_resize"),
        ({"crop_pct": 0}, "crop_pct"),
    ],
)
def test_preprocessing_that_is_not_understood_is_refused(config, words):
    with pytest.raises(ValueError, match=words):
        read_preprocessing(config, "m")


def test_a_size_of_one_number_is_a_square_or_with_a_crop_the_shorter_side():
    assert read_preprocessing({"size": 32}, "m").identity()["height"] == 32
    cropped = read_preprocessing({"size": 32, "do_center_crop": True, "crop_size": 28}, "m")
    assert (cropped.height, cropped.shortest, cropped.crop, cropped.side) == (0, 32, (28, 28), 32)
    assert cropped(Image.new("RGB", (50, 40))).shape == (3, 28, 28)
    assert read_preprocessing({"size": {"shortest_edge": 32}}, "m")(Image.new("RGB", (50, 40))).shape == (3, 32, 32)


# ---------------------------------------------------------------- ONNX

JSON = {"size": {"height": 8, "width": 6}, "image_mean": [0.1, 0.2, 0.3], "image_std": [0.5, 0.6, 0.7], "resample": 2}


@pytest.fixture
def onnx_file(tmp_path):
    """A file whose vector is a product of the channels' means, or with ``places`` the channels themselves."""
    onnx = pytest.importorskip("onnx")
    pytest.importorskip("onnxruntime")
    from onnx import TensorProto, helper, numpy_helper

    weights = np.arange(12, dtype=np.float32).reshape(3, 4) / 10

    def make(batch="n", places=False, name="m"):
        given = helper.make_tensor_value_info("pixels", TensorProto.FLOAT, [batch, 3, 8, 6])
        nodes = [helper.make_node("Identity", ["pixels"], ["out"])]
        shape = [batch, 3, 8, 6]
        if not places:
            nodes = [
                helper.make_node("GlobalAveragePool", ["pixels"], ["mean"]),
                helper.make_node("Flatten", ["mean"], ["flat"]),
                helper.make_node("MatMul", ["flat", "w"], ["out"]),
            ]
            shape = [batch, 4]
        taken = helper.make_tensor_value_info("out", TensorProto.FLOAT, shape)
        graph = helper.make_graph(nodes, "g", [given], [taken], [numpy_helper.from_array(weights, "w")])
        model = helper.make_model(graph, opset_imports=[helper.make_opsetid("", 17)], ir_version=9)
        onnx.save(model, tmp_path / f"{name}.onnx")
        (tmp_path / f"{name}.json").write_text(json.dumps(JSON))
        return tmp_path / f"{name}.onnx"

    return make


def means(pictures):
    """Means over the places of the scaled pictures, ``[n, 3]`` float64."""
    found = []
    for picture in pictures:
        values = np.asarray(picture.resize((6, 8), 2), np.float64) / 255
        found.append(((values - JSON["image_mean"]) / JSON["image_std"]).mean((0, 1)))
    return np.stack(found)


@pytest.mark.parametrize("batch", ["n", 1, 3])
def test_an_onnx_file_with_its_preprocessing_beside_it(onnx_file, pictures, batch):
    encoder = load_image_encoder(f"onnx:{onnx_file(batch)}")
    assert (encoder.dim, encoder.side, encoder.modality) == (4, 8, "image")
    weights = np.arange(12).reshape(3, 4) / 10
    np.testing.assert_allclose(encoded(encoder, pictures), means(pictures) @ weights, rtol=1e-4, atol=1e-5)


def test_of_a_map_of_places_the_mean_is_taken(onnx_file, pictures):
    encoder = load_image_encoder(f"onnx:{onnx_file(places=True)}")
    np.testing.assert_allclose(encoded(encoder, pictures), means(pictures), rtol=1e-4, atol=1e-5)


def test_onnx_files_that_are_not_there_or_not_understood(onnx_file, tmp_path):
    file = onnx_file()
    first = load_image_encoder(f"onnx:{file}").fingerprint
    file.with_suffix(".json").write_text(json.dumps(JSON | {"resample": 3}))
    assert load_image_encoder(f"onnx:{file}").fingerprint != first
    for content, words in (("{", "not JSON"), ("[]", "expected an object"), ('{"size": -1}', "size")):
        file.with_suffix(".json").write_text(content)
        with pytest.raises(ValueError, match=words):
            load_image_encoder(f"onnx:{file}")
    file.with_suffix(".json").unlink()
    with pytest.raises(ValueError, match="preprocessing beside it"):
        load_image_encoder(f"onnx:{file}")
    file.with_suffix(".json").write_text(json.dumps(JSON))
    file.write_bytes(b"no model")
    with pytest.raises(ValueError, match="onnxruntime cannot read"):
        load_image_encoder(f"onnx:{file}")


# ---------------------------------------------------------------- functions


def test_a_function_of_the_user(tmp_path, monkeypatch, pictures):
    module = tmp_path / "own_pictures.py"
    module.write_text(
        "import numpy as np\n"
        "def encode(pictures):\n"
        "    return np.array([[p.width, p.height, p.getpixel((0, 0))[0]] for p in pictures], 'f8')\n"
        "def ragged(pictures):\n"
        "    return np.zeros((len(pictures) + 1, 2))\n"
    )
    monkeypatch.chdir(tmp_path)
    encoder = load_image_encoder("own_pictures:encode")
    assert encoder.dim == 3 and encoder.describe()["kind"] == "function"
    found = encoded(encoder, pictures)
    assert found[:, :2].tolist() == [list(map(float, picture.size)) for picture in pictures]
    with pytest.raises(ValueError, match="gave shape"):
        load_image_encoder("own_pictures:ragged")
    with pytest.raises(ValueError, match="has no function"):
        load_image_encoder("own_pictures:absent")
