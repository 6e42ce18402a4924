r"""The closed form of ``ease.py`` by one small system for every item, for sparse interactions and power 1 of the kernels.

With A = A_s + L L', A_s = G + R sparse and L = [sqrt(tau_m lam g) F_m] the content directions, K_m = F_m F_m':

    N(i)  i itself and the m - 1 items j that share most users with it: largest |G_ij| / sqrt(A_s,ii A_s,jj)
    M     A_s^-1 ~ M: column i is A_s[N(i), N(i)]^-1 e_i; entries that both i and j have are averaged
    U     A_s^-1 L, by conjugate gradients to a tolerance
    A^-1  ~ M - U S U',  S = (I + L' U)^-1                               Woodbury's identity

so that B off its diagonal is sparse plus a product of two ``[n, f]`` matrices. Where m covers all items that share a user
with i, and these share users with each other, M is exact. The content, which ties every item to every other, is exact for
any m. Only what items say of each other through users is cut: where most pairs of items share a user that loses more than a
truncated spectrum does, where few do it loses far less.
"""

from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from typing import Any, TypeAlias

import numpy as np
import torch
from numpy.typing import NDArray
from scipy import sparse
from torch import Tensor

from recbole_llm.fitting.ease import Content, Kernel, Setting
from recbole_llm.fitting.factors import Incidence, Product
from recbole_llm.scoring.block import LinearBlock, Scorer
from recbole_llm.scoring.rows import Rows

ENTRIES_PER_BATCH = 2**21  # of rows of G that are looked through at once; 50 MB
ITEMS_PER_ENTRY = 32  # of the table in which neighbours find their places; its cells are bytes and there is one table
COLUMNS_AT_ONCE = 64  # right-hand sides of U; conjugate gradients hold five times as many columns of n rows
KEPT = 150  # entries of a row of B that a model keeps; of amazon-office's validation 50 cost 1.5%, 100 .4%, 150 nothing
TOLERANCE = 1e-3  # of the residuals of U, in units of the right-hand sides; exact to four digits of NDCG@10
MAX_STEPS = 100
ROWS_AT_ONCE = 2**16  # of products that are summed in float64

Matrix: TypeAlias = Any  # scipy.sparse.csr_matrix, which has no types


@dataclass(frozen=True)
class SparseLowRank:
    """An item-item matrix B off its diagonal: a sparse part, plus source vectors times target vectors.

    Attributes:
        sparse: ``[n, n]``, source items in rows, without a diagonal.
        source: ``[n, f]``; its product with ``target`` has a diagonal, which no ranking reads.
        target: ``[n, f]``.
    """

    sparse: Matrix
    source: Tensor
    target: Tensor

    def block(self, kept: int | None = None) -> LinearBlock:
        """Return the matrix as a block, with the ``kept`` largest entries of every sparse row; ``None`` for all of them."""
        cut = self.sparse if kept is None else largest_of_rows(self.sparse, kept)
        direct = direct_rows(cut).to(self.source.device)
        source, target = self.source, self.target
        if not source.shape[1]:  # a block has one column at least
            source = target = source.new_zeros(len(source), 1)
        return LinearBlock("closed_form", source, target, direct=direct)

    def scorer(self, history: Rows) -> Scorer:
        """Return a function that scores chosen rows of ``history``, whose weights count."""
        return self.block().scorer(history)

    def dense(self) -> Tensor:
        """Write the matrix out, ``[n, n]`` with a zero diagonal."""
        full = self.source @ self.target.T
        full += torch.from_numpy(self.sparse.toarray()).to(full)
        return full.fill_diagonal_(0.0)


def largest_of_rows(matrix: Matrix, kept: int) -> Matrix:
    """Leave the ``kept`` entries of every row that are largest in size, without zeros and sorted by column."""
    matrix = matrix.tocsr()
    stretches = _stretches(np.diff(matrix.indptr), ENTRIES_PER_BATCH)
    parts = [_largest_of_few(matrix[rows], kept) for rows in stretches]
    return sparse.vstack(parts, format="csr") if parts else matrix


def _largest_of_few(matrix: Matrix, kept: int) -> Matrix:
    """The same of a copy of a few rows, which may be changed."""
    matrix.eliminate_zeros()
    matrix.sort_indices()
    starts, sizes, size = matrix.indptr[:-1], np.diff(matrix.indptr), np.abs(matrix.data)
    keep = np.repeat(sizes <= kept, sizes)
    for start, count in zip(starts[sizes > kept], sizes[sizes > kept], strict=True):
        keep[start + np.argpartition(-size[start : start + count], kept)[:kept]] = True
    offsets = np.append(0, np.cumsum(np.minimum(sizes, kept)))
    return sparse.csr_matrix((matrix.data[keep], matrix.indices[keep], offsets), shape=matrix.shape)


def direct_rows(matrix: Matrix) -> Rows:
    """Convert a matrix, its columns sorted, to the direct rows of a block."""
    offsets, ids = (torch.from_numpy(part.astype(np.int64)) for part in (matrix.indptr, matrix.indices))
    return Rows(offsets, ids, torch.from_numpy(matrix.data))


def gram_entries(train: Rows, n_items: int, sampled: int = 500) -> int:
    """Estimate how many entries of X'X are not 0 from the rows of ``sampled`` items, spread evenly over the ids."""
    X = _incidence(Rows(train.offsets, train.ids), n_items)
    some = np.unique(np.linspace(0, n_items - 1, min(sampled, n_items)).astype(np.int64))
    return round((X.tocsc()[:, some].T.tocsr() @ X).nnz / len(some) * n_items)


def sparse_gram(train: Rows, weights: Tensor, n_items: int) -> Matrix:
    """Compute G = X' diag(w) X in the dtype of ``weights``, its columns sorted.

    Args:
        train: histories X; their weights are the entries, ``None`` for ones.
        weights: w, ``[n_users]``.
        n_items: columns of X.
    """
    X = _incidence(train, n_items, weights.cpu().numpy().dtype)
    gram = X.T.tocsr() @ X.multiply(weights.cpu().numpy()[:, None]).tocsr()
    gram.sort_indices()
    return gram


def _incidence(rows: Rows, n_items: int, dtype: Any = np.float32) -> Matrix:
    ids, offsets = rows.ids.cpu().numpy(), rows.offsets.cpu().numpy()
    values = np.ones(len(ids), dtype) if rows.weights is None else rows.weights.cpu().numpy().astype(dtype)
    return sparse.csr_matrix((values, ids, offsets), shape=(len(offsets) - 1, n_items))


def neighbours(gram: Matrix, diagonal: NDArray[np.floating], count: int) -> NDArray[np.int32]:
    """Find for every item the items that share most users with it.

    Args:
        gram: G, ``[n, n]``.
        diagonal: of A_s, ``[n]``, positive.
        count: m, itself included.

    Returns:
        ``[n, m]``, the item itself first, then the strongest; of equals the lower ids. -1 where there are no more.
    """
    n = gram.shape[0]
    found = np.full((n, max(count, 1)), -1, np.int32)
    found[:, 0] = np.arange(n)
    for rows in _stretches(np.diff(gram.indptr), ENTRIES_PER_BATCH):
        entries = slice(gram.indptr[rows.start], gram.indptr[rows.stop])
        row = np.repeat(np.arange(rows.start, rows.stop), np.diff(gram.indptr[rows.start : rows.stop + 1]))
        column = gram.indices[entries]
        strength = np.abs(gram.data[entries]) / np.sqrt(diagonal[column])
        direct = np.flatnonzero((row != column) & (strength > 0))
        row, column = row[direct], column[direct]
        order = np.lexsort((column, -strength[direct], row))
        row, column = row[order], column[order]
        place = np.arange(len(row)) - np.searchsorted(row, row)
        kept = place < count - 1
        found[row[kept], place[kept] + 1] = column[kept]
    return found


def local_inverse(gram: Matrix, ridge: NDArray[np.floating], count: int) -> Matrix:
    """Compute M of the module docstring, ``[n, n]`` and symmetric, in the dtype of ``gram``.

    Holds n m entries four times, of which M has up to two.

    Args:
        gram: G.
        ridge: diagonal of R, ``[n]``, positive.
        count: m, at least 1.
    """
    n = gram.shape[0]
    members = neighbours(gram, gram.diagonal() + ridge, min(count, n))
    columns = np.zeros(members.shape, gram.dtype)
    half, counts = _half(gram), (members >= 0).sum(1)
    order = np.argsort(counts, kind="stable")  # systems of a batch are of one size, that of its largest
    batches = list(_batches(half, members[order]))
    # filled anew for every batch it would make the whole quadratic in the items
    most = max((items.stop - items.start for items in batches), default=0)
    places = np.full((most, n), -1, np.min_scalar_type(-members.shape[1]))
    for items in batches:
        own = order[items]
        size = counts[own[-1]]
        some = members[own, :size]
        system = torch.from_numpy(_systems(half, ridge, some, places))
        lower, failed = torch.linalg.cholesky_ex(system)
        if bool(failed.any()):  # float32 loses a small ridge beside a large G
            lower = torch.linalg.cholesky(torch.from_numpy(_systems(half, ridge, some, places, np.float64)))
        first = torch.zeros(len(some), size, 1, dtype=lower.dtype)
        first[:, 0] = 1.0
        columns[own, :size] = torch.cholesky_solve(first, lower)[..., 0].numpy()
    present = members >= 0
    offsets = np.append(0, np.cumsum(present.sum(1)))
    one_way = sparse.csr_matrix((columns[present], members[present], offsets), shape=(n, n))
    del columns, members, present, half, places, order
    return _averaged(one_way)


def _averaged(one_way: Matrix) -> Matrix:
    """The mean of a matrix and its transpose where both have an entry, the one that is there elsewhere; columns sorted."""
    n, other = one_way.shape[0], one_way.T.tocsr()
    parts = []
    for rows in _stretches(np.diff(one_way.indptr) + np.diff(other.indptr), 2 * ENTRIES_PER_BATCH):
        few = one_way[rows.start : rows.stop].tocoo(), other[rows.start : rows.stop].tocoo()
        at = tuple(np.concatenate([getattr(part, axis) for part in few]) for axis in ("row", "col"))
        values, shape = np.concatenate([part.data for part in few]), (rows.stop - rows.start, n)
        # sums of duplicates keep zeros, so that sum and count have the same entries
        total = sparse.coo_matrix((values, at), shape=shape).tocsr()
        times = sparse.coo_matrix((np.ones(len(values), values.dtype), at), shape=shape).tocsr()
        total.data /= times.data
        parts.append(total)
    found = sparse.vstack(parts, format="csr") if parts else one_way
    found.sort_indices()
    return found


def _stretches(cost: NDArray[np.integer], most: int) -> Iterator[slice]:
    """Stretches of rows whose costs come to about ``most`` together, a row at least."""
    total = np.cumsum(cost, dtype=np.int64)
    start = 0
    while start < len(total):
        spent = total[start - 1] if start else 0
        stop = max(start + 1, int(np.searchsorted(total, spent + most, side="right")))
        yield slice(start, stop)
        start = stop


def _half(gram: Matrix) -> Matrix:
    """Half of a symmetric matrix: of (i, j) and (j, i) the one whose row has fewer entries, so that no row is long."""
    sizes, parts = np.diff(gram.indptr), []
    for rows in _stretches(sizes, ENTRIES_PER_BATCH):
        few = gram[rows.start : rows.stop]
        row, count = np.repeat(np.arange(rows.start, rows.stop), sizes[rows]), rows.stop - rows.start
        own, other = sizes[row], sizes[few.indices]
        kept = (own < other) | ((own == other) & (row <= few.indices))
        offsets = np.append(0, np.cumsum(np.bincount(row[kept] - rows.start, minlength=count)))
        parts.append(sparse.csr_matrix((few.data[kept], few.indices[kept], offsets), shape=few.shape))
    return sparse.vstack(parts, format="csr") if parts else gram


def _batches(half: Matrix, members: NDArray[np.int32]) -> Iterator[slice]:
    """Stretches of items whose neighbours have about ``ENTRIES_PER_BATCH`` entries together, and their systems no more.

    The table of places of a stretch has ``ITEMS_PER_ENTRY`` times as many cells at most, or one row.
    """
    sizes = np.diff(half.indptr)
    entries = sum(np.where(column >= 0, sizes[column], 0).astype(np.int64) for column in members.T)
    least = np.maximum((members >= 0).sum(1) ** 2, half.shape[0] // ITEMS_PER_ENTRY)
    return _stretches(np.maximum(entries, least), ENTRIES_PER_BATCH)


def _systems(
    half: Matrix,
    ridge: NDArray[np.floating],
    members: NDArray[np.int32],
    places: NDArray[np.signedinteger],
    dtype: Any = None,
) -> NDArray[np.floating]:
    """Lower triangles of A_s[N(i), N(i)] of some items, ``[b, m, m]``; the identity where there are no more neighbours.

    Args:
        half: of G, :func:`_half`.
        ridge: diagonal of R, ``[n]``.
        members: N, ``[b, m]``, -1 where there are no more.
        places: ``[b or more, n]`` of -1, before and after.
        dtype: ``None`` for that of ``half``.
    """
    b, m = members.shape
    item, place = np.nonzero(members >= 0)
    ids = members[item, place]
    places[item, ids] = place
    rows = half[ids]
    sizes = np.diff(rows.indptr)
    cell = np.repeat(item * places.shape[1], sizes)
    cell += rows.indices
    column = places.ravel().take(cell)
    places[item, ids] = -1
    hit = np.flatnonzero(column >= 0)
    at = np.repeat(np.arange(len(ids), dtype=np.int32), sizes)[hit]
    first, second = place[at], column[hit].astype(np.int64)
    system = np.zeros((b, m, m), dtype or half.dtype)
    system[:, np.arange(m), np.arange(m)] = members < 0
    system[item, place, place] = ridge[ids]
    system[item[at], np.maximum(first, second), np.minimum(first, second)] += rows.data[hit]
    return system


def solve_columns(product: Product, diagonal: Tensor, wanted: Tensor, tolerance: float = TOLERANCE) -> Tensor:
    """Solve A_s U = wanted by conjugate gradients with a Jacobi preconditioner, every column a system of its own.

    Args:
        product: A_s.
        diagonal: of A_s, ``[n]``, positive.
        wanted: ``[n, k]``.
        tolerance: length of the largest residual that is left, in units of its column of ``wanted``.
    """
    if wanted.shape[1] > COLUMNS_AT_ONCE:
        found = torch.empty_like(wanted)
        for start in range(0, wanted.shape[1], COLUMNS_AT_ONCE):
            some = slice(start, start + COLUMNS_AT_ONCE)
            found[:, some] = solve_columns(product, diagonal, wanted[:, some].contiguous(), tolerance)
        return found
    inverse = 1 / diagonal[:, None]
    norm = wanted.norm(dim=0).clamp(min=torch.finfo(wanted.dtype).tiny)
    found = wanted * inverse
    residual = wanted - product(found)
    conditioned = residual * inverse
    direction, energy = conditioned.clone(), (residual * conditioned).sum(0)
    tiny = torch.finfo(wanted.dtype).tiny
    for _ in range(MAX_STEPS):
        if not residual.numel() or float((residual.norm(dim=0) / norm).max()) <= tolerance:
            break
        image = product(direction)
        length = energy / (direction * image).sum(0).clamp(min=tiny)
        found += length * direction
        residual -= length * image
        conditioned = residual * inverse
        previous, energy = energy, (residual * conditioned).sum(0)
        direction.mul_(energy / previous.clamp(min=tiny)).add_(conditioned)
    return found


def woodbury_core(columns: Tensor, images: Tensor, roots: Tensor | None = None) -> Tensor:
    """Compute D (I + D L' U D)^-1 D in float64, ``[f, f]`` in the dtype of U.

    Args:
        columns: L, ``[n, f]``.
        images: U, ``[n, f]``.
        roots: diagonal of D, ``[f]``; ``None`` for ones.
    """
    core = torch.zeros(columns.shape[1], columns.shape[1], dtype=torch.float64, device=columns.device)
    for some, own in zip(columns.split(ROWS_AT_ONCE), images.split(ROWS_AT_ONCE), strict=True):
        core += some.T.double() @ own.double()
    scale = torch.ones_like(core[0]) if roots is None else roots.to(core)
    inner = scale[:, None] * (core + core.T) / 2 * scale
    inner.diagonal().add_(1.0)
    return (scale[:, None] * torch.linalg.inv(inner) * scale).to(images)


class Neighbourhoods:
    """Solves the closed form for one setting after another; what settings share is kept.

    Args:
        train: histories X of n_users rows; their weights are the entries, ``None`` for ones.
        weights: w, ``[n_users]``; its dtype is that of the solutions.
        content: of every modality that a setting weighs, ``[n, f]``.
        n_items: n. Every item has an interaction.
        count: m.

    Attributes:
        gram: G.
        count: m; the next solution follows what it is set to, and keeps what does not depend on it.
    """

    def __init__(self, train: Rows, weights: Tensor, content: Content, n_items: int, count: int) -> None:
        self.gram = sparse_gram(train, weights, n_items)
        self.count = count
        self._incidence, self._weights, self._content = Incidence(train, n_items), weights, content
        self.popularity = torch.from_numpy(self.gram.diagonal()).to(weights)
        self._ridge_of: tuple[float, float] | None = None  # that of the inverse and the images kept
        self._count_of = count  # that of the inverse
        self._inverse: Matrix | None = None
        self._images: dict[str, Tensor] = {}

    def _product(self, table: Tensor) -> Tensor:
        return self._incidence.to_items(self._incidence.to_rows(table) * self._weights[:, None])

    def solve(self, setting: Setting, last: bool = False) -> SparseLowRank:
        """Solve under one setting, every kernel of power 1; ``user_exponent`` is already in the weights.

        Args:
            setting: the constants.
            last: whether nothing is solved for afterwards. What solutions share is then given up, and less is held.

        Raises:
            ValueError: if ``setting`` asks for another power of a kernel.
        """
        if not setting.is_linear:
            raise ValueError(f"kernels are {setting.kernels}; sparse neighbourhoods can have power 1 alone.")
        scale = self.popularity.mean()
        share = self.popularity / scale
        ridge = setting.ridge * scale * share**setting.ridge_exponent
        if self._ridge_of != (setting.ridge, setting.ridge_exponent):
            self._ridge_of = setting.ridge, setting.ridge_exponent
            self._inverse, self._images = None, {}
        if self._inverse is None or self._count_of != self.count:
            self._inverse = None  # before there is another
            self._inverse, self._count_of = local_inverse(self.gram, ridge.cpu().numpy(), self.count), self.count
        direct = self._inverse
        if last:
            self.gram = self._inverse = self._ridge_of = None
        inner = torch.from_numpy(direct.diagonal()).to(ridge)
        weighed = [kernel for kernel in setting.kernels if kernel.weight]
        images = source = ridge.new_zeros(len(ridge), 0)
        if weighed:
            images, columns, roots = self._images_of(weighed, setting.ridge * scale, ridge, last)
            source = images @ woodbury_core(columns, images, roots)
            largest = self.popularity + ridge
            for rows in torch.arange(len(ridge), device=ridge.device).split(ROWS_AT_ONCE):
                at = slice(int(rows[0]), int(rows[-1]) + 1)
                inner[at] -= (source[at] * images[at]).sum(1)
                largest[at] += columns[at].square() @ roots.square()
            inner = inner.maximum(1 / largest)  # 1 / A_ii is never above it
        scales = -(share**-setting.tilt) / inner
        direct = direct if last else direct.copy()
        direct.setdiag(0)
        direct.data *= scales.cpu().numpy()[direct.indices]
        direct.eliminate_zeros()
        return SparseLowRank(direct, source, images.mul_(-scales[:, None]) if last else images * -scales[:, None])

    def _images_of(
        self, kernels: Sequence[Kernel], unit: Tensor, ridge: Tensor, last: bool
    ) -> tuple[Tensor, Tensor, Tensor]:
        """A_s^-1 F, F and the root of each column's factor, of several kernels side by side."""
        images = [self._image(kernel.modality, ridge) for kernel in kernels]
        columns = [self._content[kernel.modality].to(ridge) for kernel in kernels]
        roots = [
            ridge.new_full((part.shape[1],), float(kernel.weight * unit) ** 0.5)
            for kernel, part in zip(kernels, columns, strict=True)
        ]
        if last:
            self._images = {}
        if len(kernels) == 1:  # a table of catalogues of a million items has gigabytes
            return images[0], columns[0], roots[0]
        return torch.cat(images, 1), torch.cat(columns, 1), torch.cat(roots)

    def _image(self, modality: str, ridge: Tensor) -> Tensor:
        """A_s^-1 F of a modality for the present ridge."""
        if modality not in self._images:
            self._images[modality] = solve_columns(
                lambda table: self._product(table) + ridge[:, None] * table,
                self.popularity + ridge,
                self._content[modality].to(ridge),
            )
        return self._images[modality]
