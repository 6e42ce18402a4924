"""Items by their pictures in a fine-tuning: several of one item, unreadable ones, and the gradient of plain autograd."""

import json

import pytest
import torch

pytest.importorskip("recbole")
pytest.importorskip("PIL")

from recbole_llm.bridge.training.item_encoder import PictureItems
from recbole_llm.content.encoders.images import load_image_encoder
from recbole_llm.content.tuning.trainable import TrainableEncoder
from recbole_llm.fitting.finetune import propagate
from tests.made_pictures import SIZE, write_picture


@pytest.fixture(scope="module")
def vit(tmp_path_factory):
    """Folder of a tiny ViT."""
    from transformers import ViTConfig, ViTModel

    folder = tmp_path_factory.mktemp("vit")
    shape = {"hidden_size": 16, "num_hidden_layers": 2, "num_attention_heads": 2, "intermediate_size": 24}
    with torch.random.fork_rng():
        torch.manual_seed(0)
        config = ViTConfig(image_size=16, patch_size=8, initializer_range=0.4, **shape)
        ViTModel(config).save_pretrained(folder)
    size = SIZE | {"size": {"height": 16, "width": 16}, "image_processor_type": "ViTImageProcessor"}
    (folder / "preprocessor_config.json").write_text(json.dumps(size))
    return folder


def test_all_pictures_at_once_give_the_gradient_of_plain_autograd(vit, tmp_path):
    for at in range(12):
        write_picture(tmp_path / f"{at}.png", at)
    (tmp_path / "bad.png").write_bytes(b"<html>")
    paths = [[], *([tmp_path / f"{at}.png"] for at in range(10)), [tmp_path / "10.png", tmp_path / "11.png"]]
    paths += [[tmp_path / "bad.png"], [tmp_path / "3.png", tmp_path / "bad.png"]]
    trainable = TrainableEncoder(load_image_encoder(str(vit)), "last_layers", 1)
    items = PictureItems(trainable, paths)
    whole = items.encode_all()
    present = whole.abs().sum(1) > 0
    assert present.tolist() == [False] + [True] * 11 + [False, True]
    rows = torch.nonzero(present).squeeze(1).flip(0)
    generator = torch.Generator().manual_seed(0)
    gradient = torch.randn(whole.shape, generator=generator)
    fresh = propagate(items, rows, gradient)
    torch.testing.assert_close(fresh, whole[rows], rtol=1e-5, atol=1e-5)
    found = [parameter.grad.clone() for parameter in trainable.parameters()]
    for parameter in trainable.parameters():
        parameter.grad = None
    encoder = trainable.encoder
    samples = {path: items._sample(path) for files in paths for path in files if path.name != "bad.png"}
    total = 0.0
    for row in rows.tolist():
        own = encoder.encode([samples[path] for path in paths[row] if path in samples]).mean(0)
        total = total + (own * gradient[row]).sum()
    total.backward()
    for one, parameter in zip(found, trainable.parameters(), strict=True):
        most = float(parameter.grad.abs().max())
        torch.testing.assert_close(one, parameter.grad, rtol=1e-4, atol=1e-5 * max(most, 1.0))
    state = trainable.state()
    with torch.no_grad():
        trainable.parameters()[0].add_(1.0)
    items.load(state)
    assert torch.equal(items.encode_all(), whole)
