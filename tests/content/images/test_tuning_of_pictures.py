"""Vision encoders that are trained: merged with their base, and refused where they share a space with texts."""

import numpy as np
import pytest
import torch
from PIL import Image

from recbole_llm.content.encoders.images import load_image_encoder
from recbole_llm.content.encoders.resolve import resolve_encoder
from recbole_llm.content.tuning.merge import merged_folder
from recbole_llm.content.tuning.trainable import TrainableEncoder


@pytest.mark.parametrize("kind", ["vit", "dinov2", "convnext", "resnet"])
def test_the_last_layers_of_a_vision_encoder_are_merged(vision, kind, tmp_path, monkeypatch):
    monkeypatch.setenv("XDG_CACHE_HOME", str(tmp_path))
    folder = str(vision(kind)[0])
    rng = np.random.default_rng(0)
    pictures = [Image.fromarray(rng.integers(0, 255, (40, 36, 3), dtype=np.uint8)) for _ in range(3)]
    trainable = TrainableEncoder(load_image_encoder(folder), "last_layers", 1)
    generator = torch.Generator().manual_seed(0)
    encoder = trainable.encoder
    encoder.encode(encoder.prepare(pictures)).sum().backward()
    assert any(parameter.grad is not None for parameter in trainable.parameters())
    with torch.no_grad():
        for parameter in trainable.parameters():
            parameter.add_(0.1 * torch.randn(parameter.shape, generator=generator))
        expected = encoder.encode(encoder.prepare(pictures))
        merged = load_image_encoder(str(merged_folder(resolve_encoder(folder), trainable.adapters().to_bytes())))
        base = load_image_encoder(folder)
        torch.testing.assert_close(merged.encode(merged.prepare(pictures)), expected, rtol=1e-4, atol=1e-4)
        assert not torch.allclose(base.encode(base.prepare(pictures)), expected, atol=1e-3)
    assert merged.fingerprint != base.fingerprint


def test_a_space_of_pictures_and_texts_is_not_taken_apart(vision):
    with pytest.raises(ValueError, match="in one space, which tuning one of its towers would take apart"):
        TrainableEncoder(load_image_encoder(str(vision("clip")[0])), "last_layers", 1)
