r"""Tables of vectors in eight bits: a quarter of the bytes, and scores that rank nearly as before.

    y_b = H (s_b * x_b),   scale_b = max |y_b| / 127,   codes_b = round(y_b / scale_b)        of a row's columns in block b
    <q, x> = sum over b of scale_b <H (s_b * q_b), codes_b> + what rounding has cut off

s are random signs, H orthonormal Hadamard matrices over the longest stretches of 2^k columns that a block is made of. This
rotation spreads a row over its columns, so that no large one decides how coarse all the others are. Blocks differ in their
units, so each has a scale of its own. A query is rotated once, and no row is rotated back to be scored.

Where the vectors are known that rows will be multiplied by, codes are not the nearest ones of each column by itself: what
rounding cuts off a column is made up for in those after it, as far as these vectors tell no difference (the method of GPTQ,
Frantar et al., ICLR 2023). With C the mean of their squares, a row's code is sought that makes e C e^T small, e its error.
"""

from collections.abc import Iterable, Sequence
from itertools import pairwise
from typing import Any

import numpy as np

LARGEST = 127
ROWS_AT_ONCE = 16_384
ROOM = 1.02  # of a scale, for what a column takes over from those before it
UNKNOWN = 0.01  # of the mean square: what a vector that is not among the known ones may hold in any direction


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


def encoded(table: np.ndarray, dims: Sequence[int], beside: np.ndarray | None = None) -> CodedTable:
    """Encode a table ``[N, D]`` whose columns are blocks of ``dims``.

    Args:
        table: float32 rows.
        dims: columns of each block.
        beside: vectors ``[n, D]`` that rows will be multiplied by, whose products the codes keep; ``None``: not known.
    """
    N, D = table.shape
    signs, parts, edges = random_signs(D), stretches(dims), np.cumsum([0, *dims]).tolist()
    codes, scale = np.empty((N, D), np.int8), np.zeros((N, len(dims)), np.float32)
    shares = None if beside is None or not np.any(beside) else _shares(beside, signs, parts)
    for at in range(0, N, ROWS_AT_ONCE):
        rows = slice(at, at + ROWS_AT_ONCE)
        y = _hadamard(np.asarray(table[rows], np.float32) * signs, parts)
        for number, (begin, end) in enumerate(pairwise(edges)):
            scale[rows, number] = np.abs(y[:, begin:end]).max(1, initial=0) / LARGEST
        if shares is not None:
            scale[rows] *= np.float32(ROOM)
        divisor = np.repeat(np.maximum(scale[rows], np.finfo(np.float32).tiny), dims, axis=1)
        codes[rows] = np.rint(y / divisor) if shares is None else _rounded(y, divisor, shares)
    return CodedTable(codes, scale, signs, dims)


def _shares(beside: np.ndarray, signs: np.ndarray, parts: Sequence[slice]) -> np.ndarray:
    """How much of a column's error each later column takes over, ``[D, D]`` float32, upper triangular with ones.

    Of the Cholesky factor U of the inverse of C, rows divided by their diagonals.
    """
    rotated = _hadamard(np.asarray(beside, np.float32) * signs, parts).astype(np.float64)
    squares = rotated.T @ rotated / len(rotated)
    squares[np.diag_indices_from(squares)] += UNKNOWN * np.trace(squares) / len(squares)
    upper = np.linalg.cholesky(np.linalg.inv(squares)).T
    return (upper / np.diag(upper)[:, None]).astype(np.float32)


def _rounded(y: np.ndarray, divisor: np.ndarray, shares: np.ndarray, width: int = 64) -> np.ndarray:
    """Codes of rotated rows ``y`` ``[n, D]``, column by column; what is left of ``width`` columns goes on as one product."""
    n, D = y.shape
    codes = np.empty((n, D), np.int8)
    left = np.ascontiguousarray(y.T)  # [D, n]: what each column has to hold
    for first in range(0, D, width):
        last = min(first + width, D)
        errors = np.empty((last - first, n), np.float32)
        for column in range(first, last):
            code = np.clip(np.rint(left[column] / divisor[:, column]), -LARGEST, LARGEST)
            codes[:, column] = code
            errors[column - first] = left[column] - code * divisor[:, column]
            left[column + 1 : last] -= shares[column, column + 1 : last, None] * errors[column - first]
        left[last:] -= shares[first:last, last:].T @ errors
    return codes


def squared_lengths(table: np.ndarray) -> np.ndarray:
    """Squared lengths of the rows of an array or a coded table, ``[N]``."""
    return table.squares() if isinstance(table, CodedTable) else np.einsum("nd,nd->n", table, table)
