r"""The algebra of the closed form: a generalised EASE whose Gram matrix includes the items' content.

    w_u = (n_u / mean n)^-beta                                 users count alike, whatever their mass n_u = sum_i X_ui^2
    G   = X' diag(w) X,   g = mean diag G                      X: users x items, training interactions only, their 1 or
                                                               the root of their confidence
    K_m = cosine of centred vectors of modality m; power 2: sign(K) K^2
    A   = G + lam g sum_m tau_m K_m + R,   R = lam g diag(diag G / g)^a
    B   = I - A^-1 diag(1 / diag A^-1), column i scaled by (G_ii / g)^-delta
    score(u, i) = sum_{j in H_u} B_ji

Content enters as further rows of X; the ridge grows with popularity. With beta = tau = a = delta = 0 this is EASE (Steck,
WWW 2019), the exact minimiser of ||X - XB||^2 + lam g ||B||^2 under a zero diagonal. Items of the history get no place in a
ranking, so diag B is never read.

For catalogues too large for an [n, n] matrix, ``Spectrum`` holds the leading eigenvectors V, S of
Z = R^-1/2 (G + lam g sum_m tau_m K_m) R^-1/2 (power 1 only) and what is left of its diagonal, t = diag Z - diag V S V'. With
Z ~ V S V' + diag t and D = 1 + t, Woodbury's identity gives

    A^-1 ~ R^-1/2 (1/D - 1/D V C V' 1/D) R^-1/2,   C = (1/S + V' 1/D V)^-1

so that B off its diagonal is a product of two [n, k] matrices, and diag A^-1 is exact within the model.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import torch
from scipy.linalg.lapack import spotrf, spotri
from torch import Tensor

from recbole_llm.fitting.factors import OVERSAMPLING, Product
from recbole_llm.scoring.rows import Rows

Content = Mapping[str, Tensor]
"""By modality, rows of :func:`content_directions`, ``[n, f]``; zero for items without that content."""


@dataclass(frozen=True)
class Kernel:
    """One modality's part of the Gram matrix.

    Attributes:
        modality: such as ``text``.
        weight: tau; 0 for none.
        power: 1 or 2.
    """

    modality: str
    weight: float
    power: int = 1

    def __str__(self) -> str:
        return f"{self.modality} weight {self.weight:g}, power {self.power}" if self.weight else f"no {self.modality}"


@dataclass(frozen=True)
class Setting:
    """Constants of one solve, in the notation of the module docstring.

    Attributes:
        ridge: lam, in units of the mean diagonal of G; positive.
        kernels: the modalities that enter, each once.
        user_exponent: beta.
        ridge_exponent: a.
        tilt: delta.
    """

    ridge: float = 8.0
    kernels: tuple[Kernel, ...] = (Kernel("text", 0.05),)
    user_exponent: float = 0.5
    ridge_exponent: float = 0.25
    tilt: float = 0.1

    @classmethod
    def of_ease(cls, ridge: float) -> "Setting":
        """Return plain EASE with a ridge of ``ridge`` mean diagonals of G."""
        return cls(ridge, (), user_exponent=0.0, ridge_exponent=0.0, tilt=0.0)

    def kernel(self, modality: str) -> Kernel:
        """Return the kernel of a modality; weight 0 if it does not enter."""
        return next((kernel for kernel in self.kernels if kernel.modality == modality), Kernel(modality, 0.0))

    def with_kernel(self, kernel: Kernel) -> "Setting":
        """Return the same constants with another kernel for its modality."""
        others = [each for each in self.kernels if each.modality != kernel.modality]
        at = next((i for i, each in enumerate(self.kernels) if each.modality == kernel.modality), len(others))
        return replace(self, kernels=(*others[:at], kernel, *others[at:]))

    @property
    def is_linear(self) -> bool:
        """Whether every kernel that counts has power 1, so that the SVD form exists."""
        return all(kernel.power == 1 for kernel in self.kernels if kernel.weight)

    def linear(self) -> "Setting":
        """Return the same constants with every kernel at power 1."""
        return replace(self, kernels=tuple(replace(kernel, power=1) for kernel in self.kernels))

    def to_state(self) -> dict[str, Any]:
        """Convert to plain values for a checkpoint."""
        return {**vars(self), "kernels": [vars(kernel) for kernel in self.kernels]}

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Setting":
        """Rebuild from what :meth:`to_state` gave, or from the flat form of checkpoints before there were several modalities."""
        values = dict(state)
        if "text_weight" in values:
            values["kernels"] = [vars(Kernel("text", values.pop("text_weight"), values.pop("text_power")))]
        return cls(**{**values, "kernels": tuple(Kernel(**kernel) for kernel in values["kernels"])})

    def __str__(self) -> str:
        if self == Setting.of_ease(self.ridge):
            return f"ridge {self.ridge:g}, plain EASE"
        return ", ".join([f"ridge {self.ridge:g}", *(map(str, self.kernels) if self.kernels else ["no content"])])


def user_weights(train: Rows, exponent: float) -> Tensor:
    """Compute w_u of the module docstring, ``[n_users]`` float32; 0 for users without an interaction.

    Args:
        train: X; its weights are the entries, ``None`` for ones.
        exponent: beta.
    """
    active, mass = train.sizes > 0, train.sizes.double()
    if train.weights is not None:
        mass = torch.zeros_like(mass).index_add_(0, train.row_of_entry(), train.weights.double().square())
    mean = mass[active].mean()
    return torch.where(active, (mass.clamp(min=torch.finfo(torch.float32).tiny) / mean) ** -exponent, 0.0).float()


def gram_diagonal(train: Rows, weights: Tensor, n_items: int) -> Tensor:
    """Compute diag G of :func:`weighted_gram`, ``[n_items]`` float32."""
    values = weights[train.row_of_entry()].double()
    if train.weights is not None:
        values = values * train.weights.double().square()
    return torch.zeros(n_items, dtype=torch.float64, device=values.device).index_add_(0, train.ids, values).float()


def weighted_gram(train: Rows, weights: Tensor, n_items: int, chunk_bytes: int = 2**28) -> Tensor:
    """Compute G = X' diag(w) X, ``[n_items, n_items]`` float32, from sparse rows times dense columns of X.

    Args:
        train: histories X, of n_users rows; their weights are the entries, ``None`` for ones.
        weights: w, ``[n_users]`` float32.
        n_items: columns of X.
        chunk_bytes: dense columns of X held at once.
    """
    n_users = len(train.offsets) - 1
    user = train.row_of_entry()
    entries = torch.ones(len(user), device=user.device) if train.weights is None else train.weights
    weighted = torch.sparse_coo_tensor(
        torch.stack([train.ids, user]), weights[user] * entries, (n_items, n_users), check_invariants=False
    ).coalesce()
    order = torch.argsort(train.ids, stable=True)
    items, users, entries = train.ids[order], user[order], entries[order]
    gram = torch.empty(n_items, n_items, device=train.ids.device)
    width = max(1, chunk_bytes // (4 * max(n_users, 1)))
    for start in range(0, n_items, width):
        stop = min(start + width, n_items)
        low, high = (int(x) for x in torch.searchsorted(items, torch.tensor([start, stop], device=items.device)))
        columns = torch.zeros(n_users, stop - start, device=gram.device)
        columns[users[low:high], items[low:high] - start] = entries[low:high]
        gram[:, start:stop] = torch.sparse.mm(weighted, columns)
    return gram


def content_centre(features: Tensor, present: Tensor) -> Tensor:
    """Average the rows present, ``[f]`` float32; zero if there is none."""
    return features[present].double().mean(0).nan_to_num().float()


def content_directions(features: Tensor, present: Tensor, centre: Tensor) -> Tensor:
    """Subtract the centre from content vectors and scale them to unit length.

    Args:
        features: ``[n_items, f]``.
        present: ``[n_items]`` bool, items that have this content.
        centre: ``[f]``, from ``content_centre``.

    Returns:
        ``[n_items, f]`` float32; zero for items without it or at the centre itself.
    """
    centred = (features.float() - centre).masked_fill_(~present[:, None], 0.0)
    norm = centred.norm(dim=1, keepdim=True)
    at_centre = norm <= 1e-5 * centre.norm()  # what float32 leaves of identical vectors
    return centred.div_(norm.clamp_(min=torch.finfo(torch.float32).tiny)).masked_fill_(at_centre, 0.0)


def _add_kernel(A: Tensor, directions: Tensor, weight: float, power: int) -> None:
    """A += weight * K in place, in row chunks."""
    for start in range(0, len(A), 1024):
        rows = A[start : start + 1024]
        if power == 1:
            rows.addmm_(directions[start : start + 1024], directions.T, alpha=weight)
        else:
            K = directions[start : start + 1024] @ directions.T
            rows.add_(K.mul_(K.abs()), alpha=weight)


def solve(gram: Tensor, content: Content, setting: Setting, scale: Tensor | None = None) -> Tensor:
    """Solve for B of the module docstring under one setting.

    Holds two ``[n, n]`` matrices on a CPU and three elsewhere, ``gram`` included. Float32: with a ridge of the order of the
    mean diagonal A is well conditioned. Where it is not positive definite in float32 (the signed square of a kernel need not
    be), the inverse is an LU inverse in float64.

    Args:
        gram: G, ``[n, n]`` float32 with a positive diagonal.
        content: of every modality that ``setting`` weighs.
        setting: the constants; ``user_exponent`` is already in ``gram``.
        scale: g, where ``gram`` is that of a part of the items and the constants are meant for all; ``None`` for the mean
            diagonal of ``gram``.

    Returns:
        ``[n, n]`` float32 with a zero diagonal.
    """
    popularity = gram.diagonal().clone()
    scale = popularity.mean() if scale is None else scale
    inverse = inverse_in_place(_system(gram, content, setting, scale))
    if inverse is None:
        inverse = torch.linalg.inv(_system(gram, content, setting, scale).double()).float()
    B = inverse.mul_(-((popularity / scale) ** -setting.tilt) / inverse.diagonal())
    B.fill_diagonal_(0.0)
    return B


def _system(gram: Tensor, content: Content, setting: Setting, scale: Tensor) -> Tensor:
    """A of the module docstring, in memory of its own."""
    popularity = gram.diagonal()
    A = gram.clone(memory_format=torch.contiguous_format)
    for kernel in setting.kernels:
        if kernel.weight:
            weight = kernel.weight * setting.ridge * float(scale)
            _add_kernel(A, content[kernel.modality], weight, kernel.power)
    A.diagonal().add_(setting.ridge * scale * (popularity / scale) ** setting.ridge_exponent)
    return A


def inverse_in_place(A: Tensor) -> Tensor | None:
    """The inverse of a symmetric matrix, whose memory may be used for it; ``None`` where Cholesky's algorithm fails.

    On a CPU by SciPy's LAPACK, which needs no second matrix; its OpenBLAS also takes 0.7 of the time of the MKL in PyTorch
    (AMD EPYC, one thread, 4,000 and 6,000 rows).
    """
    if A.device.type != "cpu" or A.dtype != torch.float32:
        L, failed = torch.linalg.cholesky_ex(A)
        return None if failed else torch.cholesky_inverse(L)
    columns = A.numpy().T  # as LAPACK orders them; its lower triangle is the upper one of A
    _, failed = spotrf(columns, lower=1, clean=0, overwrite_a=1)
    if failed:
        return None
    spotri(columns, lower=1, overwrite_c=1)
    for start in range(0, len(A), 512):
        stop = start + 512
        A[stop:, start:stop] = A[start:stop, stop:].T
        block = A[start:stop, start:stop]
        block.copy_(block.triu() + block.triu(1).T)
    return A


@dataclass(frozen=True)
class Spectrum:
    """Leading part of Z of the module docstring.

    Attributes:
        vectors: V, ``[n, k]``, strongest first.
        values: S, ``[k]``, positive and descending.
        diagonal: diag Z, ``[n]``.
        ridge: diag R, ``[n]``.
        tilt: (G_ii / g)^-delta, ``[n]``.
    """

    vectors: Tensor
    values: Tensor
    diagonal: Tensor
    ridge: Tensor
    tilt: Tensor

    def factors(self, dim: int) -> tuple[Tensor, Tensor]:
        """Compute source and target vectors, ``[n, dim]`` each, from the first ``dim`` directions."""
        V, S = self.vectors[:, :dim], self.values[:dim]
        D = 1 + (self.diagonal - V.square() @ S).clamp(min=0.0)
        scaled = V / D[:, None]
        C = torch.linalg.inv((torch.diag(1 / S) + V.T @ scaled).double()).to(V)
        source = scaled @ C
        inverse_diagonal = (1 / D - (source * scaled).sum(1)) / self.ridge
        scale = self.ridge.rsqrt()
        return source * scale[:, None], scaled * (scale * self.tilt / inverse_diagonal)[:, None]


def spectrum(
    metric: Product,
    popularity: Tensor,
    content: Content,
    setting: Setting,
    dim: int,
    start: Tensor | None = None,
    iterations: int = 4,
) -> Spectrum:
    """Find the leading ``dim`` directions of Z by subspace iteration, without an ``[n, n]`` matrix.

    Holds about four ``[n, dim]`` matrices.

    Args:
        metric: G.
        popularity: diag G, ``[n]``, positive.
        content: of every modality that ``setting`` weighs.
        setting: the constants, every kernel of power 1.
        dim: k; at most n is used.
        start: ``[n, k']`` to start from, such as another setting's vectors; ``None`` for random numbers of a fixed seed.
        iterations: multiplications with Z before the directions are read off.

    Raises:
        ValueError: if ``setting`` asks for another power of a kernel.
    """
    if not setting.is_linear:
        raise ValueError(f"kernels are {setting.kernels}; without an n x n matrix only power 1 can be had.")
    n, scale = len(popularity), popularity.mean()
    ridge = setting.ridge * scale * (popularity / scale) ** setting.ridge_exponent
    unit = setting.ridge * float(scale)
    kernels = [(kernel.weight * unit, content[kernel.modality]) for kernel in setting.kernels if kernel.weight]
    shrink = ridge.rsqrt()[:, None]

    def z(table: Tensor) -> Tensor:
        table = shrink * table
        image = metric(table)
        for weight, directions in kernels:
            image.addmm_(directions, directions.T @ table, alpha=weight)
        return image.mul_(shrink)

    dim = min(dim, n)
    generator = torch.Generator().manual_seed(0)
    V = torch.randn(n, min(dim + OVERSAMPLING, n), generator=generator).to(popularity)
    if start is not None:
        V[:, : start.shape[1]] = start[:, : V.shape[1]]
    for _ in range(iterations):
        V = torch.linalg.qr(z(V))[0]
    values, rotation = torch.linalg.eigh(V.T @ z(V))
    values = values.flip(0)[:dim].clamp(min=torch.finfo(values.dtype).eps * values.max())
    diagonal = popularity.clone()
    for weight, directions in kernels:
        diagonal += weight * directions.square().sum(1)
    diagonal /= ridge
    return Spectrum(V @ rotation.flip(1)[:, :dim], values, diagonal, ridge, (popularity / scale) ** -setting.tilt)
