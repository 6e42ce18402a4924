r"""Tables of vectors in eight bits: a quarter of the bytes, and scores that rank nearly as before.

    y_b = H (s_b * x_b),   scale_b = max |y_b| / 127,   codes_b = round(y_b / scale_b)        of a row's columns in block b
    <q, x> = sum over b of scale_b <H (s_b * q_b), codes_b> + what rounding has cut off

s are random signs, H orthonormal Hadamard matrices over the longest stretches of 2^k columns that a block is made of. This
rotation spreads a row over its columns, so that no large one decides how coarse all the others are. Blocks differ in their
units, so each has a scale of its own. A query is rotated once, and no row is rotated back to be scored.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

LARGEST = 127
ROWS_AT_ONCE = 16_384


def stretches(dims: Sequence[int]) -> list[slice]:
    """The stretches of 2^k columns, longest first within a block, that blocks of ``dims`` columns are cut into.

    Example:
        >>> [(part.start, part.stop) for part in stretches([6, 1])]
        [(0, 4), (4, 6), (6, 7)]
    """
    found, start = [], 0
    for dim in dims:
        for bit in reversed(range(dim.bit_length())):
            if dim >> bit & 1:
                found.append(slice(start, start + (1 << bit)))
                start += 1 << bit
    return found


def random_signs(dim: int) -> np.ndarray:
    """Signs of the rotation, ``[dim]`` int8 of -1 and 1; the same for every export of as many columns."""
    return (2 * np.random.default_rng(dim).integers(0, 2, dim) - 1).astype(np.int8)


def _hadamard(x: np.ndarray, parts: Iterable[slice]) -> np.ndarray:
    """Multiply each stretch of the columns of ``x`` ``[n, D]`` by its Hadamard matrix, its own inverse, in place."""
    for part in parts:
        width = part.stop - part.start
        y, half = x[:, part], 1
        while half < width:
            pairs = y.reshape(len(x), width // (2 * half), 2, half)
            y = np.stack([pairs[:, :, 0] + pairs[:, :, 1], pairs[:, :, 0] - pairs[:, :, 1]], 2).reshape(len(x), width)
            half *= 2
        x[:, part] = y * np.float32(width**-0.5)
    return x


class CodedTable:
    """Vectors in eight bits, which are read like a float32 array ``[N, D]``.

    Args:
        codes: ``[N, D]`` int8.
        scale: of each row in each block, ``[N, blocks]`` float32.
        signs: of the rotation, ``[D]`` int8 of -1 and 1.
        dims: columns of each block.
        exact: the vectors themselves, ``[N, D]`` float32, a mapped file; rows that are read come from there.

    Example:
        >>> table = encoded(np.array([[3.0, -4.0], [0.5, 0.0]], np.float32), [2])
        >>> bool(np.abs(table[np.array([0, 1])] - [[3.0, -4.0], [0.5, 0.0]]).max() < 0.03)
        True
    """

    dtype = np.dtype(np.float32)
    ndim = 2

    def __init__(
        self,
        codes: np.ndarray,
        scale: np.ndarray,
        signs: np.ndarray,
        dims: Sequence[int],
        exact: np.ndarray | None = None,
    ) -> None:
        self.codes, self.scale, self.signs, self.exact = codes, scale, signs, exact
        self.dims, self.shape = tuple(dims), codes.shape
        self._parts = stretches(dims)
        edges = np.cumsum([0, *dims])
        self._blocks = [slice(a, b) for a, b in zip(edges[:-1].tolist(), edges[1:].tolist(), strict=True)]

    def __len__(self) -> int:
        """N."""
        return len(self.codes)

    def __getitem__(self, key: Any) -> np.ndarray:
        """Float32 rows, and of them columns, as of an array: one row, a slice, an array of numbers or a mask."""
        if self.exact is not None:
            return np.array(self.exact[key])
        rows, columns = key if isinstance(key, tuple) else (key, slice(None))
        codes, scale = self.codes[rows], self.scale[rows]
        return self._decoded(np.atleast_2d(codes), np.atleast_2d(scale)).reshape(codes.shape)[..., columns]

    def __array__(self, dtype: Any = None, copy: bool | None = None) -> np.ndarray:
        """All rows in float32, or another dtype."""
        return self[:].astype(np.float32 if dtype is None else dtype, copy=False)

    def __matmul__(self, vectors: np.ndarray) -> np.ndarray:
        """Products with vectors ``[D]`` or ``[D, m]``: ``[N]`` or ``[N, m]`` float32."""
        found = self.dots(np.atleast_2d(vectors.T)).T
        return found[:, 0] if vectors.ndim == 1 else found

    def dots(self, query: np.ndarray, first: int = 0, stop: int | None = None) -> np.ndarray:
        """Dot products of queries ``[B, D]`` with the rows from ``first`` to ``stop``, ``[B, n]`` float32."""
        stop = len(self) if stop is None else stop
        rotated = _hadamard(query.astype(np.float32) * self.signs, self._parts)
        found = np.zeros((len(query), stop - first), np.float32)
        for at in range(first, stop, ROWS_AT_ONCE):
            rows = slice(at, min(at + ROWS_AT_ONCE, stop))
            codes = self.codes[rows].astype(np.float32)
            for number, block in enumerate(self._blocks):
                products = rotated[:, block] @ codes[:, block].T
                found[:, rows.start - first : rows.stop - first] += products * self.scale[rows, number]
        return found

    def squares(self) -> np.ndarray:
        """Squared lengths of all rows, ``[N]`` float32: a rotation keeps them."""
        found = np.zeros(len(self), np.float32)
        for at in range(0, len(self), ROWS_AT_ONCE):
            rows = slice(at, at + ROWS_AT_ONCE)
            codes = self.codes[rows].astype(np.float32)
            for number, block in enumerate(self._blocks):
                found[rows] += np.square(codes[:, block]).sum(1) * np.square(self.scale[rows, number])
        return found

    def _decoded(self, codes: np.ndarray, scale: np.ndarray) -> np.ndarray:
        found = np.empty(codes.shape, np.float32)
        for at in range(0, len(codes), ROWS_AT_ONCE):
            rows = slice(at, at + ROWS_AT_ONCE)
            part = codes[rows].astype(np.float32)
            for number, block in enumerate(self._blocks):
                part[:, block] *= scale[rows, number, None]
            found[rows] = _hadamard(part, self._parts) * self.signs
        return found


def encoded(table: np.ndarray, dims: Sequence[int]) -> CodedTable:
    """Encode a table ``[N, D]`` whose columns are blocks of ``dims``."""
    N, D = table.shape
    signs, parts, edges = random_signs(D), stretches(dims), np.cumsum([0, *dims]).tolist()
    codes, scale = np.empty((N, D), np.int8), np.zeros((N, len(dims)), np.float32)
    for at in range(0, N, ROWS_AT_ONCE):
        rows = slice(at, at + ROWS_AT_ONCE)
        y = _hadamard(np.asarray(table[rows], np.float32) * signs, parts)
        for number, (begin, end) in enumerate(pairwise(edges)):
            scale[rows, number] = np.abs(y[:, begin:end]).max(1, initial=0) / LARGEST
            divisor = np.maximum(scale[rows, number, None], np.finfo(np.float32).tiny)
            codes[rows, begin:end] = np.rint(y[:, begin:end] / divisor)
    return CodedTable(codes, scale, signs, dims)


def squared_lengths(table: np.ndarray) -> np.ndarray:
    """Squared lengths of the rows of an array or a coded table, ``[N]``."""
    return table.squares() if isinstance(table, CodedTable) else np.einsum("nd,nd->n", table, table)
