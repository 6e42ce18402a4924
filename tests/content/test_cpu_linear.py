"""Linear layers through oneDNN: the same product, and PyTorch's own path wherever oneDNN's does not apply."""

import pytest
import torch
from torch import nn

from recbole_llm.content.encoders.onednn import OneDnnLinear, use_onednn
from recbole_llm.content.encoders.transformer import load_encoder

pytestmark = pytest.mark.skipif(not torch.backends.mkldnn.is_available(), reason="this PyTorch has no oneDNN")


# (rows, in, out): a MiniLM's layers, ragged everywhere, a single row, a third dimension, nothing
@pytest.mark.parametrize("shape", [(512, 384, 1536), (7, 33, 5), (1, 1, 1), ((3, 5), 33, 17), (0, 8, 4)], ids=str)
@pytest.mark.parametrize("bias", [True, False])
def test_no_worse_than_pytorch(shape, bias):
    rows, n_in, n_out = shape
    torch.manual_seed(0)
    layer = nn.Linear(n_in, n_out, bias=bias)
    x = torch.randn(*(rows if isinstance(rows, tuple) else (rows,)), n_in)
    model = nn.Sequential(layer)
    with torch.inference_mode():
        truth, eager = layer.double()(x.double()), layer.float()(x)
        assert use_onednn(model) == 1
        ours = model(x)
        # a float32 dot is good to a few eps of the sum of its absolute terms, whatever the order
        bound = 4 * 2**-23 * (x.abs().double() @ layer.weight.abs().double().T + 1)
    assert ours.shape == eager.shape
    assert ((ours - truth).abs() <= (eager - truth).abs() + bound).all()


def test_gradients_take_pytorchs_path():
    torch.manual_seed(0)
    model = nn.Sequential(nn.Linear(8, 4))
    x = torch.randn(3, 8, requires_grad=True)
    expected = torch.autograd.grad(model(x).sum(), [x, *model.parameters()])
    use_onednn(model)
    for ours, theirs in zip(torch.autograd.grad(model(x).sum(), [x, *model.parameters()]), expected, strict=True):
        assert torch.equal(ours, theirs)


def test_only_plain_float32_layers_change():
    class Own(nn.Linear):
        pass

    model = nn.ModuleList([nn.Linear(2, 2), Own(2, 2), nn.Linear(2, 2).bfloat16(), nn.LayerNorm(2)])
    keys = list(model.state_dict())
    assert use_onednn(model) == 1
    assert [type(module) for module in model] == [OneDnnLinear, Own, nn.Linear, nn.LayerNorm]
    assert list(model.state_dict()) == keys


def test_a_layer_that_is_moved_to_another_type_still_works():
    model = nn.Sequential(nn.Linear(4, 4))
    use_onednn(model)
    with torch.no_grad():
        assert model.bfloat16()(torch.ones(2, 4, dtype=torch.bfloat16)).dtype == torch.bfloat16


def test_the_encoder_uses_it(tiny_bert, monkeypatch):
    texts = ["pen", "an office chair"]
    encoder = load_encoder(str(tiny_bert))
    with torch.inference_mode():
        ours = encoder.encode(encoder.prepare(texts))
    assert any(isinstance(module, OneDnnLinear) for module in encoder._model.modules())
    monkeypatch.setattr("recbole_llm.content.encoders.transformer.use_onednn", lambda model: 0)
    plain = load_encoder(str(tiny_bert))
    with torch.inference_mode():
        theirs = plain.encode(plain.prepare(texts))
    assert not any(isinstance(module, OneDnnLinear) for module in plain._model.modules())
    torch.testing.assert_close(ours, theirs, rtol=1e-5, atol=1e-5)
