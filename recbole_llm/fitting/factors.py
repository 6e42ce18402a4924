r"""Low-rank factors of an item-item matrix whose diagonal does not matter, exact where rankings are read.

A score is x_u B with x_u the user's history, and the items of the history get no place. So the diagonal of B is free,
and ``factorise`` solves

    min over P, Q, t of  || M^(1/2) (B + diag(t) - P Q') ||_F^2

with M = I (every source item alike) or M = G, the Gram matrix of the histories (every user alike). For a given t the
best P Q' is T V V', T = B + diag(t), V the leading eigenvectors of T' M T (Eckart-Young); the two steps alternate.

That spends the rank on scores nobody sees. ``sharpen`` goes on from there and weighs the scores of the K items which B
ranks first for a user 1 + c times as much as the others, as implicit ALS weighs clicks (Hu et al., ICDM 2008):

    min over P, Q of  sum_r w_r ( || x_r (B - P Q') ||^2 + c sum_{i in top_K(r)} (x_r (B - P Q'))_i^2 )

over the users r and, with a smaller weight, every single item as a user of its own, so that P stays defined for new
users. Solved by conjugate gradients in Q and P in turn.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor
from torch.nn.functional import embedding_bag, pad

from recbole_llm.fitting.validation import hide_seen
from recbole_llm.scoring.rows import Rows

OVERSAMPLING = (
    32  # further directions carried along, so that the last wanted ones converge (Halko et al. 2011, section 4)
)
TOP_PLACES = 50
EMPHASIS = 30.0  # c; 100 is no better on any of three datasets, 300 is worse on all
SINGLE_ITEM_WEIGHT = 0.2  # of a single item as a user, in units of the mean diagonal of G
MAX_PAIRS = 1_000_000  # (row, top item) pairs: 4 bytes times the rank are read for each in every product

Product = Callable[[Tensor], Tensor]
"""A symmetric matrix by what it does: ``[n, d] -> [n, d]``."""


@dataclass(frozen=True)
class FactorForm:
    """How factors were found.

    Attributes:
        metric: ``"identity"`` (M = I) or ``"data"`` (M = G).
        free_diagonal: whether t was fitted; otherwise t = 0.
        sharpened: whether ``sharpen`` followed.
    """

    metric: str
    free_diagonal: bool
    sharpened: bool = False

    def constants(self) -> dict[str, float]:
        """As the numbers of a block's ``constants``."""
        return {
            "metric": float(self.metric == "data"),
            "free_diagonal": float(self.free_diagonal),
            "sharpened": float(self.sharpened),
        }

    @classmethod
    def from_constants(cls, values: Mapping[str, float]) -> "FactorForm | None":
        """The inverse of :meth:`constants`; ``None`` for the constants of something else."""
        if "metric" not in values:
            return None
        return cls("data" if values["metric"] else "identity", bool(values["free_diagonal"]), bool(values["sharpened"]))

    def __str__(self) -> str:
        diagonal = "free" if self.free_diagonal else "fixed"
        return f"{self.metric} metric, {diagonal} diagonal{', sharpened' if self.sharpened else ''}"


FACTOR_FORMS = (FactorForm("data", False), FactorForm("data", True), FactorForm("identity", True))
"""The forms tried; which is best differs between datasets. The first is the cheapest and the safest at a low rank."""


class Incidence:
    """Which items each row holds, summed over in both directions without a ``[rows, items]`` matrix.

    Args:
        rows: R rows of item ids; their weights are the entries, ``None`` for ones.
        n_items: number of items n.
    """

    def __init__(self, rows: Rows, n_items: int) -> None:
        self.rows = rows
        self._by_item = torch.argsort(rows.ids, stable=True)
        self._row_by_item = rows.row_of_entry()[self._by_item]
        self._item_offsets = pad(torch.bincount(rows.ids, minlength=n_items).cumsum(0), (1, 0))

    def to_rows(self, table: Tensor, values: Tensor | None = None) -> Tensor:
        """Sum over each row's items of value times ``table`` row: ``[n, d]``, ``[nnz]`` -> ``[R, d]``.

        Without ``values`` those are the entries.
        """
        return _bag(self.rows.ids, table, self.rows.offsets, self.rows.weights if values is None else values)

    def to_items(self, table: Tensor, values: Tensor | None = None) -> Tensor:
        """Sum over the rows that hold an item, as :meth:`to_rows`: ``[R, d]``, ``[nnz]`` -> ``[n, d]``."""
        values = self.rows.weights if values is None else values
        return _bag(self._row_by_item, table, self._item_offsets, None if values is None else values[self._by_item])


def _bag(ids: Tensor, table: Tensor, offsets: Tensor, values: Tensor | None) -> Tensor:
    values = None if values is None else values.to(table.dtype)
    return embedding_bag(ids, table, offsets, mode="sum", per_sample_weights=values, include_last_offset=True)


def gram_product(train: Rows, weights: Tensor, gram: Tensor | None, n_items: int) -> Product:
    """Compute G @ Y from the dense G, or from the histories if those are sparse enough to be faster.

    Args:
        train: the histories X.
        weights: w_u, ``[n_users]``.
        gram: G = X' diag(w) X, ``[n, n]``; ``None`` where it is not to be had.
        n_items: n.
    """
    if (
        gram is not None and 16 * len(train.ids) > gram.numel()
    ):  # a gathered multiply-add costs about 8 of a dense product's
        return gram.matmul
    incidence = Incidence(train, n_items)
    return lambda table: incidence.to_items(incidence.to_rows(table) * weights[:, None].to(table.dtype))


def factorise(
    matrix: Tensor, dim: int, metric: Product | None = None, free_diagonal: bool = True, steps: int = 6, seed: int = 0
) -> tuple[Tensor, Tensor]:
    """Find rank-``dim`` factors of ``matrix`` by subspace iteration.

    Holds a copy of ``matrix`` and a few ``[n, dim]`` matrices. A step is 2 n^2 dim multiply-adds and one ``metric``.

    Args:
        matrix: B, ``[n, n]`` floating point; source items in rows, target items in columns.
        dim: rank, at least 1; at most n is used.
        metric: M, positive semidefinite; ``None`` for the identity.
        free_diagonal: whether the diagonal of ``matrix`` may be anything.
        steps: alternations with a free diagonal, which follow two iterations without; a fixed one has four in all.
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
    T = matrix.clone()
    generator = torch.Generator().manual_seed(seed)
    Y = T @ torch.randn(n, min(dim + OVERSAMPLING, n), generator=generator).to(matrix)
    MY = Y if metric is None else metric(Y)
    iterations = steps + 2 if free_diagonal else 4
    V = Y
    for iteration in range(iterations):
        V = torch.linalg.qr(T.T @ MY)[0]
        Y = T @ V
        MY = Y if metric is None else metric(Y)
        if free_diagonal and 2 <= iteration < iterations - 1:
            source, target = _leading(Y, V, MY, dim)
            T.diagonal().copy_((source * target).sum(1))
    return _leading(Y, V, MY, dim)


def _leading(Y: Tensor, V: Tensor, MY: Tensor, dim: int) -> tuple[Tensor, Tensor]:
    """Y and V turned to the leading eigenvectors of Y' M Y."""
    rotation = torch.linalg.eigh(Y.T @ MY).eigenvectors.flip(1)[:, :dim]
    return Y @ rotation, V @ rotation


@dataclass(frozen=True)
class _Top:
    """The places that count most: for each of R rows its K highest-scored items outside its history.

    Attributes:
        ids: ``[R, K]`` int64.
        scores: ``[R, K]``, of the full matrix.
        weights: ``[R, K]``, c w_r; 0 for places that a short catalogue leaves empty.
        incidence: the same ids.
    """

    ids: Tensor
    scores: Tensor
    weights: Tensor
    incidence: Incidence

    def products(self, rows: Tensor, items: Tensor) -> Tensor:
        """Weighted products <rows_r, items_i> of every place, ``[R * K]``."""
        out = torch.empty_like(self.scores)
        chunk = max(1, 2**22 // (self.ids.shape[1] * items.shape[1]))
        for start in range(0, len(rows), chunk):
            part = slice(start, start + chunk)
            out[part] = torch.bmm(items[self.ids[part]], rows[part, :, None]).squeeze(2)
        return out.mul_(self.weights).flatten()


def _top_places(matrix: Tensor, rows: Rows, weights: Tensor, places: int) -> _Top:
    n, n_rows = len(matrix), len(rows.offsets) - 1
    places = min(places, n)
    ids = torch.empty(n_rows, places, dtype=torch.int64, device=matrix.device)
    scores = torch.empty(n_rows, places, device=matrix.device, dtype=matrix.dtype)
    for chunk in torch.arange(n_rows, device=matrix.device).split(max(1, 2**23 // n)):
        history = rows.select(chunk)
        full = _bag(history.ids, matrix, history.offsets, history.weights)
        hide_seen(full, history)
        scores[chunk], ids[chunk] = full.topk(places, dim=1)
    empty = scores.isinf()
    weights = torch.where(empty, 0.0, weights[:, None].to(scores.dtype))
    offsets = torch.arange(0, n_rows * places + 1, places, device=matrix.device)
    return _Top(ids, scores.masked_fill(empty, 0.0), weights, Incidence(Rows(offsets, ids.flatten()), n))


def sharpen(
    matrix: Tensor,
    source: Tensor,
    target: Tensor,
    train: Rows,
    weights: Tensor,
    metric: Product,
    popularity: Tensor,
    *,
    places: int = TOP_PLACES,
    emphasis: float = EMPHASIS,
    sweeps: int = 2,
    steps: int = 3,
) -> tuple[Tensor, Tensor]:
    """Improve factors of the same rank so that they keep the first places of the full matrix's rankings.

    Holds a few matrices of (users + n) rows and d columns beside its arguments. Users and single items together are
    thinned out evenly to ``MAX_PAIRS`` places.

    Args:
        matrix: B, ``[n, n]``.
        source: P to start from, ``[n, d]``.
        target: Q to start from, ``[n, d]``.
        train: the histories.
        weights: w_u, ``[n_users]``.
        metric: G.
        popularity: diagonal of G, ``[n]``.
        places: K.
        emphasis: c.
        sweeps: alternations, each Q then P, but the last Q alone.
        steps: conjugate gradient steps of each.

    Returns:
        Source and target, ``[n, d]`` each, in the form that ``factorise`` returns.
    """
    n = len(matrix)
    single = SINGLE_ITEM_WEIGHT * float(popularity.mean())
    users = torch.nonzero(train.sizes).squeeze(1)
    every_item = torch.arange(n, device=users.device)
    active = train.select(users)
    entries = None if active.weights is None else torch.cat([active.weights, active.weights.new_ones(n)])
    offsets = torch.cat([active.offsets, active.offsets[-1] + 1 + every_item])
    rows = Rows(offsets, torch.cat([active.ids, every_item]), entries)
    row_weights = torch.cat([weights[users], weights.new_full((n,), single)]).to(matrix.dtype)
    kept, shares = _thinned(len(users), n, max(2, MAX_PAIRS // places), users.device)
    rows, row_weights = rows.select(kept), row_weights[kept] * shares.to(row_weights)
    top = _top_places(matrix, rows, emphasis * row_weights, places)
    members = Incidence(rows, n)

    def regular(table: Tensor) -> Tensor:
        return metric(table) + single * table

    P, Q = source, target
    MP = regular(P)
    for sweep in range(sweeps):
        Y = members.to_rows(P)
        Q = _solve_targets(matrix, Q, P, MP, Y, top, steps)
        if sweep < sweeps - 1:
            P = _solve_sources(matrix, P, Q, regular, popularity + single, members, top, steps)
            MP = regular(P)
    orthonormal, triangle = torch.linalg.qr(Q)
    P = P @ triangle.T
    return _leading(P, orthonormal, regular(P), P.shape[1])


def _thinned(n_users: int, n: int, n_rows: int, device: torch.device) -> tuple[Tensor, Tensor]:
    """At most ``n_rows`` of n_users users and n single items after them, users first, and how many each stands for."""
    users = min(n_users, max(n_rows - n, n_rows // 2))
    items = min(n, n_rows - users)
    kept = torch.cat(
        [
            torch.linspace(0, n_users - 1, users, dtype=torch.float64).long(),
            n_users + torch.linspace(0, n - 1, items, dtype=torch.float64).long(),
        ]
    )
    shares = torch.cat([torch.full((users,), n_users / max(users, 1)), torch.full((items,), n / max(items, 1))])
    return kept.to(device), shares.to(device)


def _solve_targets(matrix: Tensor, Q: Tensor, P: Tensor, MP: Tensor, Y: Tensor, top: _Top, steps: int) -> Tensor:
    """Q for a given P: one system per item, all at once."""
    common = P.T @ MP
    inverse = _inverse(common)

    def product(V: Tensor) -> Tensor:
        return V @ common + top.incidence.to_items(Y, top.products(Y, V))

    wanted = matrix.T @ MP + top.incidence.to_items(Y, (top.weights * top.scores).flatten())
    return _conjugate_gradients(product, wanted, Q, lambda R: R @ inverse, steps, each_row=True)


def _solve_sources(
    matrix: Tensor, P: Tensor, Q: Tensor, regular: Product, diagonal: Tensor, members: Incidence, top: _Top, steps: int
) -> Tensor:
    """P for a given Q: one system."""
    common = Q.T @ Q
    inverse = _inverse(common)

    def product(D: Tensor) -> Tensor:
        values = top.products(members.to_rows(D), Q)
        return regular(D) @ common + members.to_items(top.incidence.to_rows(Q, values))

    values = (top.weights * top.scores).flatten()
    wanted = regular(matrix @ Q) + members.to_items(top.incidence.to_rows(Q, values))
    return _conjugate_gradients(product, wanted, P, lambda R: R @ inverse / diagonal[:, None], steps, each_row=False)


def _inverse(common: Tensor) -> Tensor:
    """Inverse of a Gram matrix of factors, with the ridge that float32 needs."""
    ridge = 1e-6 * common.diagonal().mean().clamp(min=torch.finfo(common.dtype).tiny)
    return torch.cholesky_inverse(torch.linalg.cholesky(common + ridge * torch.eye(len(common)).to(common)))


def _conjugate_gradients(
    product: Product, wanted: Tensor, start: Tensor, precondition: Product, steps: int, each_row: bool
) -> Tensor:
    """A few steps towards product(x) = wanted, for each row a system of its own or all rows one."""

    def inner(a: Tensor, b: Tensor) -> Tensor:
        return (a * b).sum(1, keepdim=True) if each_row else (a * b).sum()

    tiny = torch.finfo(wanted.dtype).tiny
    x = start
    residual = wanted - product(x)
    conditioned = precondition(residual)
    direction, energy = conditioned, inner(residual, conditioned)
    for _ in range(steps):
        image = product(direction)
        length = energy / inner(direction, image).clamp(min=tiny)
        x = x + length * direction
        residual = residual - length * image
        conditioned = precondition(residual)
        previous, energy = energy, inner(residual, conditioned)
        direction = conditioned + energy / previous.clamp(min=tiny) * direction
    return x
