r"""Low-rank factors of an item-item matrix whose diagonal does not matter.

A score is x_u B with x_u the user's history, and the items of the history get no place. So the diagonal of B is free,
and the error of a factorisation counts where users look:

    min over P, Q, t of  || M^(1/2) (B + diag(t) - P Q') ||_F^2

with M = I (every source item alike) or M = G, the Gram matrix of the histories (every user alike). For a given t the
best P Q' is T V V', T = B + diag(t), V the leading eigenvectors of T' M T (Eckart-Young); the two steps alternate.
"""

from dataclasses import dataclass

import torch
from torch import Tensor

OVERSAMPLING = (
    32  # further directions carried along, so that the last wanted ones converge (Halko et al. 2011, section 4)
)


@dataclass(frozen=True)
class FactorForm:
    """How the factors are found.

    Attributes:
        metric: ``"identity"`` (M = I) or ``"data"`` (M = the Gram matrix).
        free_diagonal: whether t is fitted; otherwise t = 0.
    """

    metric: str
    free_diagonal: bool

    def __str__(self) -> str:
        return f"{self.metric} metric, {'free' if self.free_diagonal else 'fixed'} diagonal"


FACTOR_FORMS = (FactorForm("data", True), FactorForm("data", False), FactorForm("identity", True))
"""The forms tried, the first where only one can be. RECIPE: which is best differs between datasets."""


def _orthonormal(matrix: Tensor) -> Tensor:
    return torch.linalg.qr(matrix)[0]


def factorise(
    matrix: Tensor, dim: int, gram: Tensor | None = None, free_diagonal: bool = True, steps: int = 6, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Rank-``dim`` factors of ``matrix`` by subspace iteration.

    Holds a copy of ``matrix`` and a few ``[n, dim]`` matrices. A step is 3 n^2 dim multiply-adds, 5 with ``gram``.

    Args:
        matrix: B, ``[n, n]`` floating point; source items in rows, target items in columns.
        dim: rank, at least 1; at most n is used.
        gram: M, ``[n, n]``, symmetric positive semidefinite; ``None`` for the identity.
        free_diagonal: whether the diagonal of ``matrix`` may be anything.
        steps: alternations.
        seed: of the random start. The result is the same for the same seed, device and thread count.

    Returns:
        Source ``[n, dim]`` and target ``[n, dim]`` with orthonormal columns, strongest direction first, so that their
        first columns are factors of lower rank.

    Raises:
        ValueError: if ``dim`` is below 1.
    """
    n = len(matrix)
    if dim < 1:
        raise ValueError(f"dim is {dim}; a factorisation needs at least 1 dimension.")
    dim = min(dim, n)
    width = min(dim + OVERSAMPLING, n)
    T = matrix.clone()
    generator = torch.Generator().manual_seed(seed)
    V = torch.randn(n, width, generator=generator).to(matrix)
    for step in range(-2, steps + 1):  # two steps find the subspace before the diagonal follows it
        Y = T @ V
        V = _orthonormal(T.T @ (Y if gram is None else gram @ Y))
        Y = T @ V
        rotation = torch.linalg.eigh(Y.T @ (Y if gram is None else gram @ Y)).eigenvectors
        rotation = rotation.flip(1)[:, :dim]
        if step == steps or (not free_diagonal and step >= 2):
            return Y @ rotation, V @ rotation
        if free_diagonal and step >= 0:
            T.diagonal().copy_(((Y @ rotation) * (V @ rotation)).sum(1))
    raise AssertionError("unreachable")
