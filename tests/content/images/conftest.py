"""Vision models of a few thousand parameters, and pictures, made here."""

import json
import logging

import numpy as np
import pytest
import torch
from PIL import Image


def _models():
    import transformers as t

    small = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    seen = small | {"image_size": 32, "patch_size": 8, "initializer_range": 0.4}
    words = small | {"vocab_size": 40, "max_position_embeddings": 12}
    hidden = {"hidden_sizes": [8, 12], "depths": [1, 1]}
    square = {"size": {"height": 32, "width": 32}}
    middle = {"size": {"shortest_edge": 36}, "crop_size": {"height": 32, "width": 32}}
    clip = t.CLIPConfig(text_config=words, vision_config=seen, projection_dim=10)
    siglip = t.SiglipConfig(text_config=words, vision_config=seen)
    return {
        "clip": (t.CLIPModel, clip, "CLIP", middle, 10),
        "siglip": (t.SiglipModel, siglip, "Siglip", square, 16),
        "vit": (t.ViTModel, t.ViTConfig(**seen), "ViT", square, 16),
        "dinov2": (t.Dinov2Model, t.Dinov2Config(**seen), "Bit", middle, 16),
        "convnext": (
            t.ConvNextModel,
            t.ConvNextConfig(num_stages=2, initializer_range=0.4, layer_scale_init_value=0.5, **hidden),
            "ConvNext",
            {"size": {"shortest_edge": 32}, "crop_pct": 0.875},
            12,
        ),
        "resnet": (
            t.ResNetModel,
            t.ResNetConfig(embedding_size=8, layer_type="basic", **hidden),
            "ConvNext",
            {"size": {"shortest_edge": 32}, "crop_pct": 0.875},
            12,
        ),
        "mobilenet": (
            t.MobileNetV2Model,
            t.MobileNetV2Config(depth_multiplier=0.35, finegrained_output=True),
            "MobileNetV2",
            middle,
            None,
        ),
    }


@pytest.fixture(scope="session")
def vision(tmp_path_factory):
    """Name of a kind -> folder of a tiny model, its own model in transformers, its processor and the length of its vectors."""
    made = {}
    logging.getLogger("transformers").setLevel(logging.ERROR)  # that there is no torchvision

    def make(kind):
        import transformers

        if kind not in made:
            model_class, config, processor, settings, dim = _models()[kind]
            torch.manual_seed(0)
            model, folder = model_class(config).eval(), tmp_path_factory.mktemp(f"tiny-{kind}")
            model.save_pretrained(folder)
            processor = getattr(transformers, f"{processor}ImageProcessor")(**settings)
            processor.save_pretrained(folder)
            assert json.loads((folder / "preprocessor_config.json").read_text())
            made[kind] = folder, model, processor, dim
        return made[kind]

    return make


@pytest.fixture
def pictures():
    """RGB pictures of several shapes."""
    rng = np.random.default_rng(0)
    sizes = ((40, 50), (64, 30), (32, 32), (90, 41))
    return [Image.fromarray(rng.integers(0, 256, (h, w, 3), dtype=np.uint8)) for h, w in sizes]
