r"""The closed-form block: a generalised EASE whose Gram matrix includes the item texts.

    w_u = (n_u / mean n)^-beta                                 users count alike, whatever their number n_u of items
    G   = X' diag(w) X,   g = mean diag G                      X: users x items, 0/1, training interactions only
    K   = cosine of centred text vectors; power 2: sign(K) K^2
    A   = G + tau lam g K + lam g diag(diag G / g)^a           text as further rows of X; ridge grows with popularity
    B   = I - A^-1 diag(1 / diag A^-1), column i scaled by (G_ii / g)^-delta
    score(u, i) = sum_{j in H_u} B_ji

With beta = tau = a = delta = 0 this is EASE (Steck, WWW 2019), the exact minimiser of ||X - XB||^2 + lam g ||B||^2
under a zero diagonal. Items of the history get no place in a ranking, so diag B is never read. Rank-d factors:
``factors.py``. Knows neither RecBole nor the kernels.
"""

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace

import torch
from torch import Tensor

from recbole_llm.factors import FACTOR_FORMS, FactorForm, factorise, gram_product, sharpen
from recbole_llm.selection import DEFAULT_METRIC, LinearScorer, Scorer, TopKMetric, user_metric
from recbole_llm.towers import Rows

AUTO_DIMS = (512, 1024, 2048)
RANK_TOLERANCE = 0.01  # of the full form's validation value, what a smaller rank may cost
SHARPEN_ABOVE = 0.002  # loss from which factors are sharpened
MAX_ITEMS_FOR_ALL_FORMS = 8192  # beyond, only the cheapest of the factor forms, then sharpened
RIDGE_RANGE = (0.25, 512.0)
HOPELESS = 0.95  # a kernel whose first value is below this share of the best so far gets no further ridge

Log = Callable[[str], None]


@dataclass(frozen=True)
class Setting:
    """Constants of one solve, in the notation of the module docstring.

    Attributes:
        ridge: lam, in units of the mean diagonal of G; positive.
        text_weight: tau; 0 for no text.
        text_power: 1 or 2.
        user_exponent: beta.
        ridge_exponent: a.
        tilt: delta.
    """

    ridge: float = 8.0
    text_weight: float = 0.05
    text_power: int = 1
    user_exponent: float = 0.5
    ridge_exponent: float = 0.25
    tilt: float = 0.1

    def __str__(self) -> str:
        text = f"text weight {self.text_weight:g}, power {self.text_power}" if self.text_weight else "no text"
        return f"ridge {self.ridge:g}, {text}"


TEXT_KERNELS = ((0.05, 1), (0.2, 2), (0.0, 1))


@dataclass(frozen=True)
class Trial:
    """One setting with its validation value and the seconds it took."""

    setting: Setting
    value: float
    seconds: float


@dataclass(frozen=True)
class ClosedForm:
    """Source and target vectors: score(u, i) = <sum_j a_uj source_j, target_i>.

    Attributes:
        source: ``[n_items, d]`` float32; zero for items without a training interaction.
        target: ``[n_items, d]`` float32, zero likewise; ``None`` for the full form, whose targets are the identity
            (d = n_items), so that the pooled source vectors are the scores.
        warm: ``[n_items]`` bool, items with a training interaction.
        setting: the constants chosen.
        form: how it was factored; ``None`` for the full form.
        value: validation value of these vectors; ``None`` without validation data.
        full_value: of the full form.
        trials: every setting tried.
    """

    source: Tensor
    target: Tensor | None
    warm: Tensor
    setting: Setting
    form: FactorForm | None
    value: float | None
    full_value: float | None
    trials: tuple[Trial, ...] = field(default=(), repr=False)

    @property
    def dim(self) -> int:
        """Length d of the vectors."""
        return self.source.shape[1]

    def scorer(self, history: Rows) -> LinearScorer:
        """The scores of these histories."""
        return LinearScorer(history, self.source, self.target)


def user_weights(train: Rows, exponent: float) -> Tensor:
    """w_u of the module docstring, ``[n_users]`` float32; 0 for users without an interaction."""
    sizes = train.sizes
    active = sizes > 0
    mean = sizes[active].double().mean()
    return torch.where(active, (sizes.clamp(min=1) / mean) ** -exponent, 0.0).float()


def weighted_gram(train: Rows, weights: Tensor, n_items: int, chunk_bytes: int = 2**28) -> Tensor:
    """G = X' diag(w) X, ``[n_items, n_items]`` float32, from sparse rows times dense columns of X.

    Args:
        train: histories X, of n_users rows; their weights are not read.
        weights: w, ``[n_users]`` float32.
        n_items: columns of X.
        chunk_bytes: dense columns of X held at once.
    """
    n_users = len(train.offsets) - 1
    user = train.row_of_entry()
    weighted = torch.sparse_coo_tensor(
        torch.stack([train.ids, user]), weights[user], (n_items, n_users), check_invariants=False
    ).coalesce()
    order = torch.argsort(train.ids, stable=True)
    items, users = train.ids[order], user[order]
    gram = torch.empty(n_items, n_items, device=train.ids.device)
    width = max(1, chunk_bytes // (4 * max(n_users, 1)))
    for start in range(0, n_items, width):
        stop = min(start + width, n_items)
        low, high = (int(x) for x in torch.searchsorted(items, torch.tensor([start, stop], device=items.device)))
        columns = torch.zeros(n_users, stop - start, device=gram.device)
        columns[users[low:high], items[low:high] - start] = 1.0
        gram[:, start:stop] = torch.sparse.mm(weighted, columns)
    return gram


def text_centre(features: Tensor, present: Tensor) -> Tensor:
    """Mean of the rows present, ``[f]`` float32; zero if there is none."""
    return features[present].double().mean(0).nan_to_num().float()


def text_directions(features: Tensor, present: Tensor, centre: Tensor) -> Tensor:
    """Text vectors seen from their centre, at unit length.

    Args:
        features: ``[n_items, f]``.
        present: ``[n_items]`` bool, items that have a text.
        centre: ``[f]``, from ``text_centre``.

    Returns:
        ``[n_items, f]`` float32; zero for items without a text or at the centre itself.
    """
    centred = torch.where(present[:, None], features.float() - centre, 0.0)
    norm = centred.norm(dim=1, keepdim=True)
    at_centre = norm <= 1e-5 * centre.norm()  # what float32 leaves of identical texts
    return torch.where(at_centre, 0.0, centred / norm.clamp(min=torch.finfo(torch.float32).tiny))


def _add_text_kernel(A: Tensor, text: Tensor, weight: float, power: int) -> None:
    """A += weight * K in place, in row chunks."""
    for start in range(0, len(A), 1024):
        rows = A[start : start + 1024]
        if power == 1:
            rows.addmm_(text[start : start + 1024], text.T, alpha=weight)
        else:
            K = text[start : start + 1024] @ text.T
            rows.add_(K.mul_(K.abs()), alpha=weight)


def solve(gram: Tensor, text: Tensor, setting: Setting) -> Tensor:
    """B of the module docstring for one setting.

    Holds three ``[n, n]`` matrices at its peak, ``gram`` included. Float32: with a ridge of the order of the mean
    diagonal A is well conditioned. Where it is not positive definite in float32 (the signed square of a kernel need not
    be), the inverse is an LU inverse in float64.

    Args:
        gram: G, ``[n, n]`` float32 with a positive diagonal.
        text: rows of ``text_directions``, ``[n, f]``.
        setting: the constants; ``user_exponent`` is already in ``gram``.

    Returns:
        ``[n, n]`` float32 with a zero diagonal.
    """
    popularity = gram.diagonal().clone()
    scale = popularity.mean()
    A = gram.clone()
    if setting.text_weight:
        _add_text_kernel(A, text, setting.text_weight * setting.ridge * float(scale), setting.text_power)
    A.diagonal().add_(setting.ridge * scale * (popularity / scale) ** setting.ridge_exponent)
    L, failed = torch.linalg.cholesky_ex(A)
    if failed:
        inverse = torch.linalg.inv(A.double()).float()
        del A, L
    else:
        del A
        inverse = torch.cholesky_inverse(L)
        del L
    B = inverse.mul_(-((popularity / scale) ** -setting.tilt) / inverse.diagonal())
    B.fill_diagonal_(0.0)
    return B


def search_setting(
    value: Callable[[Setting], float], base: Setting, kernels: Sequence[tuple[float, int]] = TEXT_KERNELS
) -> Setting:
    """Best ridge and text kernel by a line search over powers of two of the ridge, kernel after kernel.

    Each kernel starts at the best ridge so far and follows it up, then down, while the value rises.

    Args:
        value: validation value of a setting; larger is better.
        base: where the search starts; its other constants stay.
        kernels: (text weight, power) pairs in the order tried.

    Returns:
        The best setting evaluated, the first of equals.
    """
    best, best_value = base, -1.0
    for text_weight, power in kernels:
        first = replace(base, ridge=best.ridge, text_weight=text_weight, text_power=power)
        here, here_value = first, value(first)
        if here_value >= HOPELESS * best_value:
            for factor in (2.0, 0.5):
                while RIDGE_RANGE[0] <= (ridge := here.ridge * factor) <= RIDGE_RANGE[1]:
                    further = replace(first, ridge=ridge)
                    if (further_value := value(further)) <= here_value:
                        break
                    here, here_value = further, further_value
                if here != first:
                    break
        if here_value > best_value:
            best, best_value = here, here_value
    return best


@dataclass(frozen=True)
class _Catalogue:
    """The training data without the items that have no interaction; n items are left.

    Attributes:
        items: ``[n]`` int64, their ids.
        warm: ``[n_items]`` bool.
        train: the training interactions, in ids of 0 .. n - 1.
        text: ``[n, f]``, rows of ``text_directions``.
    """

    items: Tensor
    warm: Tensor
    train: Rows
    text: Tensor

    def expand(self, rows: Tensor) -> Tensor:
        """``[n, d]`` -> ``[n_items, d]``, zero for the other items."""
        full = torch.zeros(len(self.warm), rows.shape[1], device=rows.device)
        full[self.items] = rows
        return full


def _catalogue(train: Rows, features: Tensor | None, present: Tensor | None, n_items: int) -> _Catalogue:
    warm = torch.bincount(train.ids, minlength=n_items) > 0
    items = torch.nonzero(warm).squeeze(1)
    position = warm.cumsum(0) - 1
    if features is None:
        text = torch.zeros(n_items, 1, device=train.ids.device)
    else:
        present = torch.ones_like(warm) if present is None else present
        text = text_directions(features, present, text_centre(features, present))
    return _Catalogue(items, warm, Rows(train.offsets, position[train.ids]), text[items])


@dataclass(frozen=True)
class Selection:
    """What the choices are made by: validation targets, ranked without what the user has seen.

    Attributes:
        history: input of each user's scores, one row per user; its ``weights`` are a_uj, ``None`` for the plain sum.
        targets: validation items, as many rows.
        seen: items without a place in the ranking; normally the training interactions.
        metric: by which the best is chosen.
        max_users: with more users that have a target, this many of them, evenly spaced, are evaluated.
    """

    history: Rows
    targets: Rows
    seen: Rows
    metric: TopKMetric = DEFAULT_METRIC
    max_users: int = 20_000

    def subset(self) -> "Selection":
        """The users evaluated, as a selection of their own."""
        users = torch.nonzero(self.targets.sizes).squeeze(1)
        if len(users) > self.max_users:
            users = users[torch.linspace(0, len(users) - 1, self.max_users, dtype=torch.float64).long()]
        return Selection(
            self.history.select(users), self.targets.select(users), self.seen.select(users), self.metric, self.max_users
        )

    def value(self, scorer: Scorer, n_items: int, excluded: Tensor | None = None) -> float:
        """Mean of the metric over the users with a target, of scores of the rows of ``history``."""
        return float(user_metric(scorer, self.targets, self.seen, n_items, self.metric, excluded).mean())


def fit_closed_form(
    train: Rows,
    n_items: int,
    features: Tensor | None = None,
    present: Tensor | None = None,
    selection: Selection | None = None,
    *,
    dim: int | str = "auto",
    setting: Setting | None = None,
    max_table_bytes: int = 2**31,
    log: Log | None = None,
) -> ClosedForm:
    """Fit the block on training interactions and choose its constants and rank on validation.

    Args:
        train: training interactions, one row per user. Their weights are not read.
        n_items: size of the catalogue; ids are below it. Items without an interaction (padding too) get zero vectors.
        features: frozen text vectors, ``[n_items, f]``; ``None`` for none.
        present: ``[n_items]`` bool, items that have a text; ``None`` for all.
        selection: validation data; without it, or without a target in it, the constants of ``setting`` and the first of
            ``AUTO_DIMS`` apply.
        dim: rank; ``"full"`` for the item-item matrix itself; ``"auto"`` for the smallest of ``AUTO_DIMS`` within
            ``RANK_TOLERANCE`` of the full form's validation value, else the full form if ``max_table_bytes`` holds it.
        setting: the constants; with ``selection``, where the search starts.
        max_table_bytes: what source and target vectors may take together.
        log: called with one sentence per step.

    Returns:
        The block's vectors, with what was tried.

    Raises:
        ValueError: if there is no training interaction, or an argument does not fit the others.
    """
    say: Log = log or (lambda text: None)
    _check_arguments(train, n_items, features, present, dim)
    catalogue = _catalogue(train, features, present, n_items)
    base = setting or Setting()
    subset = selection.subset() if selection is not None else None
    if subset is not None and not len(subset.targets.ids):
        subset = None
    gram = weighted_gram(catalogue.train, user_weights(catalogue.train, base.user_exponent), len(catalogue.items))
    has_text = bool(catalogue.text.any())
    if not has_text:
        base = replace(base, text_weight=0.0, text_power=1)
    best_matrix: Tensor | None = None
    trials: list[Trial] = []

    def value_of(source: Tensor, target: Tensor | None) -> float:
        assert subset is not None
        return _value(subset, catalogue, source, target)

    def evaluate(candidate: Setting) -> float:
        nonlocal best_matrix
        started = time.perf_counter()
        matrix = solve(gram, catalogue.text, candidate)
        value = value_of(matrix, None)
        if value > max((trial.value for trial in trials), default=-1.0):
            best_matrix = matrix
        trials.append(Trial(candidate, value, time.perf_counter() - started))
        say(f"closed form, {candidate}: {subset.metric} {value:.4f}" if subset else "")
        return value

    if subset is None:
        chosen, full_value = base, None
        best_matrix = solve(gram, catalogue.text, base)
        say(f"closed form: no validation data, so the documented constants apply ({base})")
    else:
        chosen = search_setting(evaluate, base, TEXT_KERNELS if has_text else ((0.0, 1),))
        full_value = max(trial.value for trial in trials)
        say(f"closed form: {chosen} is best of {len(trials)} settings, {subset.metric} {full_value:.4f} at full rank")
    assert best_matrix is not None
    result = ClosedForm(best_matrix, None, catalogue.warm, chosen, None, full_value, full_value, tuple(trials))
    weights = user_weights(catalogue.train, base.user_exponent)
    ranks = _Ranks(result, catalogue.train, weights, gram, None if subset is None else value_of)
    result = _choose_rank(ranks, dim, max_table_bytes, n_items, say)
    if result.target is not None:
        return replace(result, source=catalogue.expand(result.source), target=catalogue.expand(result.target))
    full = torch.zeros(n_items, n_items, device=gram.device)
    full[catalogue.items[:, None], catalogue.items] = result.source
    return replace(result, source=full)


def _check_arguments(
    train: Rows, n_items: int, features: Tensor | None, present: Tensor | None, dim: int | str
) -> None:
    if not len(train.ids):
        raise ValueError("train holds no interaction; the closed form needs training data.")
    if int(train.ids.max()) >= n_items:
        raise ValueError(f"train holds item id {int(train.ids.max())}, but n_items is {n_items}; ids must be below it.")
    if features is not None and len(features) != n_items:
        raise ValueError(f"features has {len(features)} rows; expected one per item, n_items = {n_items}.")
    if present is not None and present.shape != (n_items,):
        raise ValueError(f"present has shape {tuple(present.shape)}; expected ({n_items},), one flag per item.")
    if not (dim in ("auto", "full") or (isinstance(dim, int) and not isinstance(dim, bool) and dim > 0)):
        raise ValueError(f"dim is {dim!r}; expected 'auto', 'full' or a positive number.")


def _value(subset: Selection, catalogue: _Catalogue, source: Tensor, target: Tensor | None) -> float:
    """Validation value of vectors of the n warm items; targets outside them count as missed."""
    position = catalogue.warm.cumsum(0) - 1
    n = len(catalogue.items)

    def compact(rows: Rows) -> Rows:
        kept = rows.keep(catalogue.warm[rows.ids])
        return Rows(kept.offsets, position[kept.ids], kept.weights)

    scorer = LinearScorer(compact(subset.history), source, target)
    total = user_metric(scorer, compact(subset.targets), compact(subset.seen), n, subset.metric).sum()
    return float(total) / max(1, int((subset.targets.sizes > 0).sum()))


@dataclass(frozen=True)
class _Ranks:
    """What a choice of rank reads: the full form over the n warm items, and the data it came from."""

    full: ClosedForm
    train: Rows
    weights: Tensor
    gram: Tensor
    value: Callable[[Tensor, Tensor | None], float] | None

    def loss(self, value: float | None) -> float:
        """Share of the full form's validation value that is lost; 0 where there is nothing to compare."""
        return 1 - value / self.full.value if value is not None and self.full.value else 0.0

    def factored(self, dim: int) -> ClosedForm:
        """The best factors of one rank: the best of ``FACTOR_FORMS``, sharpened if that loses too much."""
        metric = gram_product(self.train, self.weights, self.gram)
        forms = (
            FACTOR_FORMS if self.value is not None and len(self.gram) <= MAX_ITEMS_FOR_ALL_FORMS else FACTOR_FORMS[:1]
        )
        best: ClosedForm | None = None
        for form in forms:
            source, target = factorise(
                self.full.source, dim, metric if form.metric == "data" else None, form.free_diagonal
            )
            best = self._better(best, source, target, form)
        assert best is not None and best.target is not None and best.form is not None
        if self.value is not None and self.loss(best.value) <= SHARPEN_ABOVE:
            return best
        source, target = sharpen(
            self.full.source, best.source, best.target, self.train, self.weights, metric, self.gram.diagonal()
        )
        return self._better(best, source, target, replace(best.form, sharpened=True))

    def _better(self, best: ClosedForm | None, source: Tensor, target: Tensor, form: FactorForm) -> ClosedForm:
        value = None if self.value is None else self.value(source, target)
        if best is not None and value is not None and best.value is not None and value <= best.value:
            return best
        return replace(self.full, source=source, target=target, form=form, value=value)


def _choose_rank(ranks: _Ranks, dim: int | str, max_table_bytes: int, n_items: int, say: Log) -> ClosedForm:
    """The full form, or its factors of the rank that ``dim`` asks for."""
    full, n = ranks.full, len(ranks.gram)
    if dim == "full" or (isinstance(dim, int) and dim >= n):
        return full
    if isinstance(dim, int):
        return _told(ranks, ranks.factored(dim), say)
    # beyond n / 2 two tables of rank d are larger than the matrix
    dims = [d for d in AUTO_DIMS if 2 * d <= n and 8 * n_items * d <= max_table_bytes]
    best: ClosedForm | None = None
    for d in dims if ranks.value is not None else dims[:1]:
        factored = _told(ranks, ranks.factored(d), say)
        if ranks.loss(factored.value) <= RANK_TOLERANCE:
            return factored
        if best is None or (factored.value or 0.0) > (best.value or 0.0):
            best = factored
    if best is None or 4 * n_items**2 <= max_table_bytes:
        say(f"closed form: the full item-item matrix is kept ({4 * n_items**2 / 2**20:.0f} MiB)")
        return full
    return best


def _told(ranks: _Ranks, factored: ClosedForm, say: Log) -> ClosedForm:
    cost = (
        "" if factored.value is None else f" has {factored.value:.4f}, {ranks.loss(factored.value):.1%} below full rank"
    )
    say(f"closed form: rank {factored.dim} ({factored.form}){cost}")
    return factored
