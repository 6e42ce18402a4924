"""What the cases of ``kernel_cases.py`` are made of: ids, vectors, steps, errors, and public competitors."""

from collections.abc import Callable
from typing import Any, NamedTuple

import torch
from torch import Tensor

Shape = dict[str, Any]


class Case(NamedTuple):
    """One operator at one shape."""

    variants: dict[str, Callable[[], object]]  # "ours", the baselines, and competitors
    check: Callable[[], dict[str, float]]  # largest relative errors against the oracle
    bytes: float  # each distinct row once, each gradient once
    flops: float
    leaves: tuple[Tensor, ...]  # their gradients are the result; none: the result is small
    unavailable: dict[str, str]  # competitors that cannot run here, and why


def generator(seed: int = 0) -> torch.Generator:
    return torch.Generator().manual_seed(seed)


def ids(n: int, shape: tuple[int, ...], law: str, seed: int, device: str) -> Tensor:
    """Uniform ids, or Zipf ids: the r-th most popular is drawn in proportion to 1 / r."""
    if law == "zipf":
        flat = torch.multinomial(
            1 / torch.arange(1, n + 1.0), int(torch.tensor(shape).prod()), True, generator=generator(seed)
        )
        return torch.randperm(n, generator=generator(seed + 1))[flat].view(shape).to(device)
    return torch.randint(n, shape, generator=generator(seed)).to(device)


def leaf(n: int, D: int, scale: float, seed: int, device: str, dtype: torch.dtype) -> Tensor:
    return (torch.randn(n, D, generator=generator(seed)) * scale).to(device, dtype).requires_grad_()


class Training:
    """Forward and backward of a loss, with fresh gradients as after ``zero_grad(set_to_none=True)``.

    Args:
        loss: the forward.
        leaves: whose gradients are made.
    """

    def __init__(self, loss: Callable[[], Tensor], leaves: tuple[Tensor, ...]) -> None:
        self.forward, self.leaves = loss, leaves

    def __call__(self) -> None:
        """Run both."""
        for x in self.leaves:
            x.grad = None
        self.forward().backward()


def step(loss: Callable[[], Tensor], *leaves: Tensor) -> Training:
    """Forward and backward of ``loss``."""
    return Training(loss, leaves)


def compiled(loss: Callable[[], Tensor]) -> Callable[[], Tensor]:
    return torch.compile(loss, fullgraph=True)


def agreement(
    ours: Callable[[], object], leaves: tuple[Tensor, ...], oracle: Callable[..., Tensor]
) -> dict[str, float]:
    """Largest errors of the gradients, in units of the largest gradient."""
    ours()
    doubled = [x.detach().double().requires_grad_() for x in leaves]
    oracle(*doubled)
    return {
        f"gradient_{number}": float((x.grad.double() - d.grad).abs().max() / d.grad.abs().max())
        for number, (x, d) in enumerate(zip(leaves, doubled, strict=True))
    }


def relative(got: Tensor, want: Tensor) -> float:
    return float((got.detach().double() - want.detach()).abs() / want.detach().abs())


Loss = Callable[[Tensor, Tensor, Tensor], Tensor]


def competitors() -> dict[str, Callable[[], Loss]]:
    """Public fused cross-entropies of (query, item, target)."""

    def liger() -> Loss:
        from liger_kernel.transformers import LigerFusedLinearCrossEntropyLoss

        loss = LigerFusedLinearCrossEntropyLoss()
        return lambda query, item, target: loss(item, query, target)

    def cut(**options: Any) -> Loss:
        from cut_cross_entropy import linear_cross_entropy

        return lambda query, item, target: linear_cross_entropy(query, item, target, **options)

    return {
        "Liger-Kernel": liger,
        "cut-cross-entropy": cut,
        "cut-cross-entropy exact": lambda: cut(filter_eps=None),
        "cut-cross-entropy torch_compile": lambda: cut(impl="torch_compile"),
    }


def tried(competitor: Callable[[], Loss], device: str, dtype: torch.dtype) -> Loss | str:
    """The call, or why it cannot run here, found out on a tiny catalogue."""
    try:
        call = competitor()
        query, item = (leaf(n, 32, 0.1, n, device, dtype) for n in (8, 300))
        call(query, item, torch.arange(8, device=device)).backward()
    except ImportError as error:
        return f"not installed: {error}"
    except Exception as error:  # whatever a foreign package raises is the reason
        return f"does not run on {device}: {type(error).__name__}: {str(error).splitlines()[0][:200]}"
    return call
