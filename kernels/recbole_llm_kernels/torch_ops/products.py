"""Matrix products of a tile: oneDNN's where PyTorch has it and they are float32 and large, otherwise PyTorch's own.

``torch.mm`` calls MKL, which leaves half of an AMD processor's vector width unused. PyTorch also carries oneDNN, which
does not, and calls it for compiled linear layers through the operator used here. Measured on an AMD EPYC (AVX-512,
float32, one thread, D = 64, tile 512 x 512), in nanoseconds per element of the tile: a b^T 0.57 against 1.23, p b 0.56
against 1.25, a^T p 0.63 against 1.26; capped to AVX2 the two are equal. Both follow
``torch.get_float32_matmul_precision()``.
"""

import platform

import torch
from torch import Tensor

SHORTEST = 32  # a side below this, and oneDNN takes up to five times as long as MKL
SMALLEST = 1 << 22  # multiplications below which the cost of the call decides


def _find_linear() -> object | None:
    if platform.machine() not in ("x86_64", "AMD64") or not torch.backends.mkldnn.is_available():
        return None
    return getattr(torch.ops.mkldnn, "_linear_pointwise", None)


_linear = _find_linear()


def _onednn(x: Tensor, w: Tensor) -> Tensor | None:
    """``x @ w.T`` or None. x must be contiguous and w or its transpose too: other strides end in a reference loop."""
    if _linear is None or x.dtype != torch.float32 or x.device.type != "cpu":
        return None
    m, k, n = x.shape[0], x.shape[1], w.shape[0]
    if min(m, k, n) < SHORTEST or m * k * n < SMALLEST:
        return None
    return _linear(x, w, None, "none", [], "")  # type: ignore[operator]


def rows_by_rows(a: Tensor, b: Tensor, out: Tensor) -> Tensor:
    """``a @ b.T``, [m, n] from contiguous [m, D] and [n, D]; in ``out`` or in a tensor of its own."""
    product = _onednn(a, b)
    return torch.mm(a, b.T, out=out) if product is None else product


def add_product(total: Tensor, p: Tensor, b: Tensor) -> None:
    """``total += p @ b``, [m, D] from contiguous [m, n] and [n, D]."""
    product = _onednn(p, b.T)
    total.addmm_(p, b) if product is None else total.add_(product)


def add_transposed_product(total: Tensor, a: Tensor, p: Tensor) -> None:
    """``total += a @ p``, [D, n] from [D, m] and contiguous [m, n]; as matrix products go, a quarter faster than p^T a^T."""
    product = _onednn(a.contiguous(), p.T)
    total.addmm_(a, p) if product is None else total.add_(product)
