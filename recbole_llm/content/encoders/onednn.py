"""Linear layers of a float32 transformer on a CPU through oneDNN instead of MKL.

PyTorch sends float32 products to MKL, which leaves out AVX-512 on processors of other makers than its own. oneDNN, which
PyTorch carries as well, does not. One thread of an AMD EPYC with AVX-512, torch 2.13, [4096, 384] x [384, 1536]: MKL 115,
oneDNN 248 GFLOP/s; the other shapes of a MiniLM likewise, 109-116 against 248-259.
"""

import torch
from torch import Tensor, nn


class OneDnnLinear(nn.Linear):
    """``nn.Linear`` whose float32 forward without gradients runs in oneDNN; equal to rounding."""

    def forward(self, input: Tensor) -> Tensor:  # nn.Linear's name
        """Compute ``input @ weight.T + bias``."""
        if torch.is_grad_enabled() or input.dtype != torch.float32 or input.device.type != "cpu" or not input.numel():
            return super().forward(input)
        return torch.ops.mkldnn._linear_pointwise(input, self.weight, self.bias, "none", [], "")


def use_onednn(model: nn.Module) -> int:
    """Let the linear layers of a model run in oneDNN where this build of PyTorch has it.

    Parameters stay where they are; only the class of each plain ``nn.Linear`` changes. Subclasses are left alone.

    Returns:
        The number of layers changed.
    """
    if not torch.backends.mkldnn.is_available() or not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        return 0
    plain = [module for module in model.modules() if type(module) is nn.Linear and module.weight.dtype == torch.float32]
    for module in plain:
        module.__class__ = OneDnnLinear
    return len(plain)
