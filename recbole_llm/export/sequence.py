r"""The sequence block of an export: its query, read off the order of a history by one attention layer, in NumPy.

    sequence.safetensors   distance f32[heads,L]  qkv.weight f32[3d,d]  out.weight f32[d,d]
                           before_attention, before_mlp and last: .weight f32[d] and .bias f32[d]
                           mlp.0.weight f32[m,d]  mlp.0.bias f32[m]  mlp.3.weight f32[d,m]  mlp.3.bias f32[d]

With the source vectors v_1 .. v_T of the L newest items of a history, oldest first, LN the layer norm and x_t = sqrt(d) v_t,

    a_ht = softmax_t(<Q_h LN(x_T), K_h LN(x_t)> / sqrt(d / heads) + distance_h[T - t]),   y = x_T + O [sum_t a_ht V_h LN(x_t)]_h
    h    = norm(LN(y + M_2 gelu(M_1 LN(y))))          gelu by tanh

The query of the block is its scale times h; 0 for an empty history. It is :class:`recbole_llm.scoring.sequence.SequenceLayer`
after the last place. Weights of a history and a user's own part have no place in it. Sums are made in float64, so that no
weight within ``LARGEST`` can overflow them.
"""

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from functools import cached_property
from typing import Any

import numpy as np

from recbole_llm.export.errors import ExportError
from recbole_llm.export.tensor_file import parse_tensors, take

SEQUENCE_FILE = "sequence.safetensors"
SCORING = "sequence"  # of such a block in the manifest
NORMS = ("before_attention", "before_mlp", "last")
EPSILON = 1e-5  # of the layer norms
TINY = 1e-12
LARGEST = 1e6  # magnitude of a weight
MAX_LENGTH = 1024  # items of a history that a layer may read
CHUNK = 1024  # histories read at once


@dataclass(frozen=True, eq=False)
class SequenceWeights:
    """The layer's weights; shapes in the module docstring.

    Attributes:
        arrays: by name, float32.

    Raises:
        ValueError: if shapes do not fit each other, or a weight is beyond ``LARGEST``.
    """

    arrays: Mapping[str, np.ndarray]

    def __post_init__(self) -> None:
        expected = shapes(self.dim, self.heads, self.length, len(self.arrays["mlp.0.bias"]))
        found = {name: array.shape for name, array in self.arrays.items()}
        if found != expected:
            raise ValueError(f"the shapes of the weights are {found}, expected {expected}.")
        if not 1 <= self.length <= MAX_LENGTH or not self.heads or self.dim % self.heads:
            raise ValueError(
                f"distance is {self.arrays['distance'].shape}, expected a number of heads that divides {self.dim}, and at most "
                f"{MAX_LENGTH} places."
            )
        if any(not (np.abs(array) <= LARGEST).all() for array in self.arrays.values()):
            raise ValueError(f"a weight is beyond {LARGEST:g}.")

    @property
    def dim(self) -> int:
        """Columns d."""
        return len(self.arrays["last.weight"])

    @property
    def heads(self) -> int:
        """Heads of the attention."""
        return len(self.arrays["distance"])

    @property
    def length(self) -> int:
        """Items of a history that are read, the newest ones."""
        return int(self.arrays["distance"].shape[1])

    @cached_property
    def _wide(self) -> dict[str, np.ndarray]:
        return {name: array.astype(np.float64) for name, array in self.arrays.items()}

    def states(self, vectors: np.ndarray) -> np.ndarray:
        """Compute the states after the last place, ``[B, T, d]`` source vectors, oldest first -> ``[B, d]`` float32 of length 1.

        Args:
            vectors: of at most ``length`` places, at least one.
        """
        w = self._wide
        B, T, d = vectors.shape
        heads, width = self.heads, d // self.heads
        x = vectors.astype(np.float64) * d**0.5
        read = self._norm("before_attention", x)
        keys, values = np.split(read @ w["qkv.weight"][d:].T, 2, axis=-1)
        query = (read[:, -1] @ w["qkv.weight"][:d].T).reshape(B, heads, width)
        logits = np.einsum("bhw,bthw->bht", query, keys.reshape(B, T, heads, width)) * width**-0.5
        logits += w["distance"][:, T - 1 :: -1]
        share = np.exp(logits - logits.max(-1, keepdims=True))
        share /= share.sum(-1, keepdims=True)
        attended = np.einsum("bht,bthw->bhw", share, values.reshape(B, T, heads, width)).reshape(B, d)
        y = x[:, -1] + attended @ w["out.weight"].T
        inner = self._norm("before_mlp", y) @ w["mlp.0.weight"].T + w["mlp.0.bias"]
        y = y + _gelu(inner) @ w["mlp.3.weight"].T + w["mlp.3.bias"]
        state = self._norm("last", y)
        return (state / np.maximum(np.linalg.norm(state, axis=-1, keepdims=True), TINY)).astype(np.float32)

    def _norm(self, name: str, x: np.ndarray) -> np.ndarray:
        centred = x - x.mean(-1, keepdims=True)
        deviation = np.sqrt(np.square(centred).mean(-1, keepdims=True) + EPSILON)
        found: np.ndarray = centred / deviation * self._wide[f"{name}.weight"] + self._wide[f"{name}.bias"]
        return found

    def state(self, vectors: np.ndarray, ranks: np.ndarray | None) -> np.ndarray:
        """Compute the state after one history, ``[d]`` float32; 0 for an empty one.

        Args:
            vectors: ``[h, d]`` source vectors of its items.
            ranks: ``[h]``, 0 for the newest; ``None`` where the last vector is that of the newest.
        """
        if not len(vectors):
            return np.zeros(self.dim, np.float32)
        newest_first = np.arange(len(vectors))[::-1] if ranks is None else np.argsort(ranks, kind="stable")
        found: np.ndarray = self.states(vectors[newest_first[: self.length][::-1]][None])[0]
        return found

    def of_histories(
        self, source: Any, columns: slice, offsets: np.ndarray, items: np.ndarray, ranks: np.ndarray
    ) -> Iterator[tuple[np.ndarray, np.ndarray]]:
        """Yield histories and the states after them, those of one length together; empty ones are left out.

        Args:
            source: ``[N, D]`` source vectors, read by rows and columns.
            columns: of the block.
            offsets: ``[U + 1]``, where each history's items begin, from 0.
            items: ``[nnz]`` rows.
            ranks: ``[nnz]``, 0 for the newest of a history.

        Yields:
            Histories ``[n]`` int64 and states ``[n, d]`` float32.
        """
        sizes = np.diff(offsets)
        order = np.lexsort((ranks, np.repeat(np.arange(len(sizes)), sizes)))
        newest_first, read = items[order], np.minimum(sizes, self.length)
        for size in np.unique(read[read > 0]).tolist():
            rows = np.flatnonzero(read == size)
            for few in np.array_split(rows, -(-len(rows) // CHUNK)):
                at = offsets[few][:, None] + np.arange(size - 1, -1, -1)
                vectors = source[newest_first[at].ravel(), columns]
                yield few, self.states(np.asarray(vectors).reshape(len(few), size, self.dim))


def _gelu(x: np.ndarray) -> np.ndarray:
    found: np.ndarray = 0.5 * x * (1 + np.tanh((2 / np.pi) ** 0.5 * (x + 0.044715 * x**3)))
    return found


def shapes(d: int, heads: int, length: int, inner: int) -> dict[str, tuple[int, ...]]:
    """Return the shape of every weight by name.

    Args:
        d: columns.
        heads: of the attention.
        length: items of a history that are read.
        inner: columns of the layer after the attention.
    """
    norms = {f"{norm}.{part}": (d,) for norm in NORMS for part in ("weight", "bias")}
    inner_shapes = {"mlp.0.weight": (inner, d), "mlp.0.bias": (inner,), "mlp.3.weight": (d, inner), "mlp.3.bias": (d,)}
    return {"distance": (heads, length), "qkv.weight": (3 * d, d), "out.weight": (d, d), **norms, **inner_shapes}


def read_sequence(content: memoryview, dim: int) -> SequenceWeights:
    """Read ``sequence.safetensors`` and check it.

    Args:
        content: of the file.
        dim: columns of the block.

    Raises:
        ExportError: if an array is missing, damaged, of another block or beyond its bounds.
    """
    tensors = parse_tensors(content, SEQUENCE_FILE)
    arrays = {}
    for name, shape in shapes(dim, 0, 0, 0).items():
        free = tuple(size or None for size in shape)  # those of heads, places and inner columns, which must agree
        arrays[name] = take(tensors, SEQUENCE_FILE, name, np.float32, free)
    if tensors:
        names = ", ".join(sorted(tensors))[:200]
        raise ExportError(f"{SEQUENCE_FILE} holds tensors that do not belong there: {names}.")
    try:
        return SequenceWeights(arrays)
    except ValueError as error:
        raise ExportError(f"{SEQUENCE_FILE}: {error}") from None
