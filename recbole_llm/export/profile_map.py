"""Map the text of somebody's profile to what it adds to a query, so that a user who was not in the training data is answered.

    z = (f - center) T                            profile vector f by the export's encoder
    p = z W,    or with hidden units  p = gelu(z H + h) W

p takes the place of what a known user's own text adds, in the columns of one block. Plain NumPy.
"""

import math
from dataclasses import dataclass

import numpy as np

from recbole_llm.export.errors import ExportError
from recbole_llm.export.manifest import PROFILE_MAP, Manifest
from recbole_llm.export.tensor_file import parse_tensors, take


@dataclass(frozen=True, eq=False)
class ProfileMap:
    """A map of profiles; F text dimensions, G after the transform, H hidden units, d columns of the block.

    Attributes:
        first: the block's first column.
        center: ``[F]`` float32, subtracted from the raw text vector.
        weight: ``[G, d]`` float32, or ``[H, d]`` with hidden units.
        transform: ``[F, G]`` float32; ``None`` for the identity.
        hidden: ``[G, H]`` float32, or ``None``.
        hidden_bias: ``[H]`` float32; with ``hidden``.

    Raises:
        ValueError: on parts that do not fit each other.
    """

    first: int
    center: np.ndarray
    weight: np.ndarray
    transform: np.ndarray | None = None
    hidden: np.ndarray | None = None
    hidden_bias: np.ndarray | None = None

    def __post_init__(self) -> None:
        if (self.hidden is None) != (self.hidden_bias is None):
            raise ValueError("hidden and hidden_bias belong together.")
        if self.first < 0:
            raise ValueError(f"first is {self.first}; expected a column.")
        width = len(self.center)
        for name, matrix in (("transform", self.transform), ("hidden", self.hidden), ("weight", self.weight)):
            if matrix is None:
                continue
            if matrix.ndim != 2 or len(matrix) != width or matrix.dtype != np.float32:
                raise ValueError(f"{name} is {matrix.dtype} {matrix.shape}, expected float32 ({width}, any).")
            width = matrix.shape[1]
            if name == "hidden" and self.hidden_bias is not None and self.hidden_bias.shape != (width,):
                raise ValueError(f"hidden_bias is {self.hidden_bias.shape}, expected ({width},).")

    def apply(self, vector: np.ndarray, dim: int) -> np.ndarray:
        """Map one profile.

        Args:
            vector: ``[F]`` float32 of the export's encoder.
            dim: columns D of all blocks.

        Returns:
            What it adds to the query before scaling, ``[D]`` float32.

        Raises:
            ValueError: if the vector has another length.

        Example:
            >>> weight = np.array([[2.0], [1.0]], np.float32)
            >>> ProfileMap(1, np.ones(2, np.float32), weight).apply(np.array([3.0, 1.0], np.float32), 3).tolist()
            [0.0, 4.0, 0.0]
        """
        if vector.shape != self.center.shape:
            raise ValueError(
                f"profile_vector is {vector.shape}, expected {self.center.shape}: another encoder made it."
            )
        z = vector.astype(np.float32) - self.center
        if self.transform is not None:
            z = z @ self.transform
        if self.hidden is not None and self.hidden_bias is not None:
            z = z @ self.hidden + self.hidden_bias
            z *= np.array([0.5 * (1 + math.erf(value / math.sqrt(2))) for value in z.tolist()], np.float32)
        part = np.zeros(dim, np.float32)
        part[self.first : self.first + self.weight.shape[1]] = z @ self.weight
        return part

    def to_tensors(self) -> dict[str, np.ndarray]:
        """As the file holds them."""
        arrays = {
            "first": np.array(self.first, np.int64),
            "center": self.center,
            "weight": self.weight,
            "transform": self.transform,
            "hidden": self.hidden,
            "hidden_bias": self.hidden_bias,
        }
        return {name: np.asarray(array, order="C") for name, array in arrays.items() if array is not None}


def read_profile_map(content: memoryview, manifest: Manifest) -> ProfileMap:
    """Read ``profile_map.safetensors`` and check it.

    Raises:
        ExportError: if an array is missing, damaged, or of another model.
    """
    tensors = parse_tensors(content, PROFILE_MAP)
    shapes: dict[str, tuple[int | None, ...]] = {
        "center": (None,), "weight": (None, None), "transform": (None, None), "hidden": (None, None), "hidden_bias": (None,),
    }  # fmt: skip
    first = int(take(tensors, PROFILE_MAP, "first", np.int64, ()))
    found = {
        name: take(tensors, PROFILE_MAP, name, np.float32, shape)
        for name, shape in shapes.items()
        if name in tensors or name in ("center", "weight")
    }
    if tensors:
        raise ExportError(f"{PROFILE_MAP} holds tensors that do not belong there: {', '.join(sorted(tensors))[:200]}.")
    try:
        profile_map = ProfileMap(first, **found)
    except ValueError as error:
        raise ExportError(f"{PROFILE_MAP}: {error}") from None
    if first + profile_map.weight.shape[1] > manifest.dim:
        raise ExportError(f"{PROFILE_MAP}: its columns are not among the {manifest.dim} of the model.")
    if manifest.encoder is not None and manifest.encoder.feature_dim != len(profile_map.center):
        raise ExportError(
            f"{PROFILE_MAP} maps vectors of {len(profile_map.center)} dimensions, the encoder gives another number."
        )
    return profile_map
