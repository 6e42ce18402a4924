"""Vectors of items or users with a mask of who has one."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

TRANSFORMS = ("center", "none", "standardize", "whiten")

# share of the mean variance added to every variance before dividing by its root: directions in which the rows do not
# vary (rank deficiency, n < dim) then stay small instead of becoming noise of unit size
VARIANCE_FLOOR = 1e-3


@dataclass(frozen=True, eq=False)
class FeatureTable:
    """One row per item (or user); absent rows are zero and marked absent.

    Attributes:
        vectors: float32 ``[n, dim]`` on the CPU.
        present: bool ``[n]``; in a dataset's order row 0 is padding and absent.
        modality: ``text``, ``image``...
        fingerprint: of what made the vectors.
    """

    vectors: Tensor
    present: Tensor
    modality: str
    fingerprint: str

    def __post_init__(self) -> None:
        n = len(self.present)
        if self.vectors.dim() != 2 or len(self.vectors) != n or self.vectors.dtype != torch.float32:
            raise ValueError(
                f"vectors must be float32 [{n}, dim], got {self.vectors.dtype} {tuple(self.vectors.shape)}."
            )
        if self.present.dtype != torch.bool or self.present.dim() != 1:
            raise ValueError(f"present must be bool [n], got {self.present.dtype} {tuple(self.present.shape)}.")

    def __len__(self) -> int:
        return len(self.present)

    @property
    def dim(self) -> int:
        """Dimension of the vectors."""
        return self.vectors.shape[1]


def apply_transform(table: FeatureTable, kind: str) -> FeatureTable:
    """Centre, standardise or whiten the rows that are present; absent rows stay zero.

    With mean m, variances v and covariance C = U diag(l) U' of the n present rows (divided by n), and the floor f =
    :data:`VARIANCE_FLOOR` times the mean variance:

        center       x - m
        standardize  (x - m) / sqrt(v + f)
        whiten       (x - m) U diag(1 / sqrt(l + f)) U'           (ZCA: the nearest whitened vectors)

    The last two are then divided by one number, so that the mean squared norm is that of the centred rows: the towers
    see vectors of the size they are made for, whatever the dimension. Statistics are float64.

    Args:
        table: the vectors.
        kind: ``center``, ``none``, ``standardize`` or ``whiten``.

    Raises:
        ValueError: on an unknown kind.

    Example:
        >>> vectors, present = torch.tensor([[0.0], [1.0], [3.0]]), torch.tensor([False, True, True])
        >>> apply_transform(FeatureTable(vectors, present, "text", ""), "center").vectors.tolist()
        [[0.0], [-1.0], [1.0]]
    """
    if kind not in TRANSFORMS:
        raise ValueError(f"feature_transform must be one of {', '.join(TRANSFORMS)}, got {kind!r}.")
    if kind == "none" or not bool(table.present.any()):
        return table
    center, matrix = fit_transform(table, kind)
    result = table.vectors[table.present].double() - center
    if matrix is not None:
        result = result @ matrix
    vectors = torch.zeros_like(table.vectors)
    vectors[table.present] = result.float()
    return replace(table, vectors=vectors, fingerprint=f"{table.fingerprint}:{kind}")


def fit_transform(table: FeatureTable, kind: str) -> tuple[torch.Tensor, torch.Tensor | None]:
    """Fit the affine map z = (x - m) T of :func:`apply_transform`, which later vectors go through too.

    Args:
        table: the vectors it is fitted to.
        kind: as there.

    Returns:
        m ``[F]`` and T ``[F, F]`` (``None`` for the identity), float64.

    Raises:
        ValueError: on an unknown kind.
    """
    if kind not in TRANSFORMS:
        raise ValueError(f"feature_transform must be one of {', '.join(TRANSFORMS)}, got {kind!r}.")
    rows = table.vectors[table.present].double()
    if kind == "none" or not len(rows):
        return rows.new_zeros(table.dim), None
    center = rows.mean(0)
    if kind == "center":
        return center, None
    centred = rows - center
    if kind == "standardize":
        variance = centred.square().mean(0)
        matrix = torch.diag((variance + VARIANCE_FLOOR * variance.mean()).clamp_min(1e-30).rsqrt())
    else:
        variance, basis = torch.linalg.eigh(centred.T @ centred / len(centred))
        scale = (variance.clamp_min(0) + VARIANCE_FLOOR * variance.mean()).clamp_min(1e-30).rsqrt()
        matrix = (basis * scale) @ basis.T
    size = (centred @ matrix).square().sum().sqrt()
    if size > 0:
        matrix = matrix * (centred.square().sum().sqrt() / size)
    return center, matrix
