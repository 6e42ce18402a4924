r"""Map the vector of a text or a picture to an item's vectors, so that an item is added without training.

    z = (f - center) T [ / |f - center| T | ]          text vector f as the model saw it
    phi(z) = z                                          kind "linear"
    phi(z)_s = exp(-gamma |z - z_s|^2)                  kind "rbf": support texts z_s (kernel ridge)
    w = phi C_vector + c_vector,  v = phi C_source + c_source,  b = phi c_bias + c

An item that has both gets the sum of the two products, and the offsets once: that is the masked kernel sum of
:mod:`recbole_llm.fitting.cold_start.kernel_ridge`, whose share of each modality lies in its map's coefficients. Plain NumPy.
"""

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

KINDS = ("linear", "rbf")


@dataclass(frozen=True, eq=False)
class TextMap:
    """A fitted map of one modality; F dimensions of its vectors, G after the transform, S support texts, P = G (linear) or S (rbf).

    Attributes:
        kind: ``linear`` or ``rbf``.
        center: ``[F]`` float32, subtracted from the raw text vector.
        transform: ``[F, G]`` float32; ``None`` for the identity.
        normalize: whether z has unit length.
        vector: ``[P, D]`` float32, coefficients of the target vector.
        source: ``[P, D]`` float32, of the source vector.
        bias: ``[P]`` float32, of the bias.
        vector_offset: ``[D]`` float32.
        source_offset: ``[D]`` float32.
        bias_offset: a number.
        support: ``[S, G]`` float32, z of the support texts; ``None`` for linear.
        gamma: of the kernel; ``None`` for linear.

    Raises:
        ValueError: on parts that do not fit each other.
    """

    kind: str
    center: np.ndarray
    vector: np.ndarray
    source: np.ndarray
    bias: np.ndarray
    vector_offset: np.ndarray
    source_offset: np.ndarray
    bias_offset: float = 0.0
    transform: np.ndarray | None = None
    normalize: bool = False
    support: np.ndarray | None = None
    gamma: float | None = None

    def __post_init__(self) -> None:
        if self.kind not in KINDS:
            raise ValueError(f"kind is {self.kind!r}; expected one of {', '.join(KINDS)}.")
        if (self.kind == "rbf") != (self.support is not None and self.gamma is not None):
            raise ValueError("support and gamma belong to kind 'rbf', and to it alone.")
        if self.gamma is not None and not self.gamma > 0:
            raise ValueError(f"gamma is {self.gamma}; expected a positive number.")
        width = self.width
        rows = width if self.support is None else len(self.support)
        D = self.vector.shape[1]
        expected = {
            "vector": (rows, D),
            "source": (rows, D),
            "bias": (rows,),
            "vector_offset": (D,),
            "source_offset": (D,),
        }
        if self.transform is not None:
            expected["transform"] = (len(self.center), width)
        if self.support is not None:
            expected["support"] = (rows, width)
        for name, shape in expected.items():
            array = getattr(self, name)
            if array.shape != shape or array.dtype != np.float32:
                raise ValueError(f"{name} is {array.dtype} {array.shape}, expected float32 {shape}.")

    @property
    def feature_dim(self) -> int:
        """Dimensions F of a vector."""
        return len(self.center)

    @property
    def width(self) -> int:
        """Dimensions G of a direction."""
        return len(self.center) if self.transform is None else self.transform.shape[1]

    def apply(self, features: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Map vectors ``[n, F]`` to target vectors ``[n, D]``, source vectors ``[n, D]`` and biases ``[n]``, float32.

        Raises:
            ValueError: if the vectors have another length.

        Example:
            >>> one = np.eye(2, dtype=np.float32)
            >>> text_map = TextMap("linear", np.ones(2, np.float32), one, one, one[0], one[0] * 0, one[0] * 0)
            >>> vector, source, bias = text_map.apply(np.array([[3.0, 1.0]], np.float32))
            >>> vector.tolist(), bias.tolist()
            ([[2.0, 0.0]], [2.0])
        """
        return placed([(self, self.directions(features))])

    def directions(self, features: np.ndarray) -> np.ndarray:
        """Compute z of the module docstring, ``[n, G]`` float32, of vectors ``[n, F]``.

        Raises:
            ValueError: if the vectors have another length.
        """
        if features.ndim != 2 or features.shape[1] != self.feature_dim:
            raise ValueError(
                f"features is {features.shape}, expected [n, {self.feature_dim}]: another encoder made them."
            )
        z = features.astype(np.float32) - self.center
        if self.transform is not None:
            z = z @ self.transform
        if self.normalize:
            z /= np.maximum(np.linalg.norm(z, axis=1, keepdims=True), np.float32(1e-12))
        return z

    def products(self, z: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
        """Map directions ``[n, G]`` as :meth:`apply` does, without the offsets."""
        if self.support is not None:
            squared = (z**2).sum(1)[:, None] - 2 * (z @ self.support.T) + (self.support**2).sum(1)
            z = np.exp(-np.float32(self.gamma) * np.maximum(squared, 0))
        return z @ self.vector, z @ self.source, z @ self.bias


def placed(parts: Sequence[tuple[TextMap, np.ndarray]]) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Map what items have of each modality to target vectors ``[n, D]``, source vectors ``[n, D]`` and biases ``[n]``, float32.

    Args:
        parts: a map and the directions ``[n, G]`` of the same n items, for each modality that they have; at least one. The maps
            are of one model and have the same offsets.
    """
    some = parts[0][0]
    products = [one.products(z) for one, z in parts]
    vector, source, bias = (np.sum(each, axis=0) for each in zip(*products, strict=True))
    return vector + some.vector_offset, source + some.source_offset, bias + np.float32(some.bias_offset)
