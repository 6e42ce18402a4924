"""The closed-form block: the generalised EASE of ``ease.py``, its constants and its rank chosen on validation.

Up to ``max_dense_items`` items the item-item matrix B is solved for exactly and then factored (``factors.py``); beyond, B is
never formed, and validation chooses between two forms (``large_catalogue.py``).
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from functools import partial
from logging import getLogger

import torch
from torch import Tensor

from recbole_llm.fitting.ease import Setting, solve, user_weights, weighted_gram
from recbole_llm.fitting.factors import FACTOR_FORMS, FactorForm, factorise, gram_product, sharpen
from recbole_llm.fitting.hyperparameters import (
    EXACT_ITEMS,
    Candidates,
    Search,
    is_sparse,
    kernel_candidates,
    search,
    search_ease,
)
from recbole_llm.fitting.large_catalogue import NEIGHBOURHOODS, SVD, fit_large
from recbole_llm.fitting.logs import quietly
from recbole_llm.fitting.solved_form import ClosedForm
from recbole_llm.fitting.validation import Validation
from recbole_llm.fitting.warm_items import ContentTables, WarmItems, warm_items
from recbole_llm.scoring.rows import Rows

AUTO_DIMS = (512, 1024, 2048)
RANK_TOLERANCE = 0.01  # of the full form's validation value, what a smaller rank may cost
SHARPEN_ABOVE = 0.002  # loss from which factors are sharpened
MAX_ITEMS_FOR_ALL_FORMS = 8192  # beyond, only the cheapest of the factor forms, then sharpened
MAX_DENSE_ITEMS = 20_000  # 6.4 GB while solving

__all__ = ["ClosedForm", "fit_closed_form"]

log = getLogger(__name__)


def fit_closed_form(
    train: Rows,
    n_items: int,
    content: ContentTables | None = None,
    validation: Validation | None = None,
    *,
    dim: int | str = "auto",
    setting: Setting | None = None,
    factors: FactorForm | None = None,
    max_dense_items: int = MAX_DENSE_ITEMS,
    max_table_bytes: int = 2**31,
    form: str | None = None,
) -> ClosedForm:
    """Fit the block on training interactions and choose its constants and rank on validation.

    Args:
        train: training interactions, one row per user. Their confidence is read, and not their weights.
        n_items: size of the catalogue; ids are below it. Items without an interaction (padding too) get zero vectors.
        content: vectors of the items by modality; ``None`` for none.
        validation: validation data; without it, or without a target in it, the constants of ``setting`` and the first of
            ``AUTO_DIMS`` apply; without ``setting``, those of :class:`Setting`, its kernel for the first modality.
        dim: rank; ``"full"`` for the item-item matrix itself; ``"auto"`` for the smallest of ``AUTO_DIMS`` within
            ``RANK_TOLERANCE`` of the full form's validation value and not below tuned EASE's, else the full form if
            ``max_table_bytes`` holds it. In the SVD form, the smallest of ``SPECTRAL_DIMS`` within ``SPECTRAL_TOLERANCE``
            of the best that it holds. A number beyond ``max_dense_items`` asks for the SVD form.
        setting: the constants; with ``validation``, where the search starts.
        factors: which factors of the exact solution are taken, without ``validation``; ``None`` for the first of
            ``FACTOR_FORMS``, sharpened.
        max_dense_items: trained items up to which B is solved for exactly, in four ``[n, n]`` float32 matrices at the peak;
            beyond, neighbourhoods or the SVD form.
        max_table_bytes: what source and target vectors may take together.
        form: ``"neighbourhoods"`` or ``"svd"``, whatever the number of items; ``None`` to choose.

    Returns:
        The block's vectors, with what was tried.

    Raises:
        ValueError: if there is no training interaction, or an argument does not fit the others.
    """
    content = content or {}
    _check_arguments(train, n_items, content, dim)
    if form not in (None, NEIGHBOURHOODS, SVD):
        raise ValueError(f"form is {form!r}; expected {NEIGHBOURHOODS!r}, {SVD!r} or None.")
    items = warm_items(train, content, n_items)
    base = _start(setting, [modality for modality, directions in items.content.items() if bool(directions.any())])
    subset = validation.subset(n_items) if validation is not None and len(validation.targets.ids) else None
    chooses = subset is not None and (setting is None or bool(setting.kernels))
    candidates = kernel_candidates(items.content) if chooses else {}
    n = len(items.items)
    if n <= max_dense_items and form is None:
        return _fit_dense(items, base, candidates, subset, dim, max_table_bytes, factors)
    if form is None:
        log.info(
            f"closed form: {n} items are more than {max_dense_items}, so that no matrix of {n} x {n} is formed; the exact "
            f"solution holds {4 * 4 * n**2 / 2**30:.1f} GiB"
        )
    return fit_large(items, base, candidates, subset, dim, max_table_bytes, form)


def _start(setting: Setting | None, modalities: Sequence[str]) -> Setting:
    """The constants to start from, with kernels of modalities that some item has."""
    if setting is not None:
        return replace(setting, kernels=tuple(kernel for kernel in setting.kernels if kernel.modality in modalities))
    (kernel,) = Setting().kernels
    return Setting(kernels=tuple(replace(kernel, modality=modality) for modality in modalities[:1]))


def _fit_dense(
    items: WarmItems,
    base: Setting,
    candidates: Candidates,
    subset: Validation | None,
    dim: int | str,
    max_table_bytes: int,
    factors: FactorForm | None = None,
) -> ClosedForm:
    """The exact solution, factored to the rank asked for."""
    weights = user_weights(items.train, base.user_exponent)
    gram = weighted_gram(items.train, weights, len(items.items))
    n_items = len(items.warm)
    value: Callable[[Tensor, Tensor | None], float] | None = None
    floor = 0.0
    if subset is None:
        log.info(f"closed form: no validation data, so the documented constants apply ({base})")
        full = ClosedForm(solve(gram, items.content, base), None, items.warm, base, "full", None)
    else:
        found = search(items, gram, subset, base, candidates)
        full = _full_form(found)
        value = partial(items.value, subset)
        with quietly():
            against = full.value if is_sparse(gram) else found.value
            rival, share = search_ease(items, subset, full.setting, against or 0.0)
        if rival is None:
            floor = share * (full.value or 0.0)
            log.info(
                f"closed form: plain EASE is {1 - share:.1%} below it where it was tried, too much to be solved for"
            )
        ease = full if rival is None else _full_form(rival)
        if rival is not None:
            floor = ease.value or 0.0
        if floor > (full.value or 0.0):
            log.info(
                f"closed form: {subset.metric} {full.value:.4f} is below that of plain EASE, {floor:.4f}, which is taken"
            )
            full = replace(ease, trials=(*full.trials, *ease.trials))
            weights = user_weights(items.train, 0.0)
            gram = weighted_gram(items.train, weights, len(items.items))
    ranks = _Ranks(full, items.train, weights, gram, value, floor, factors)
    result = _choose_rank(ranks, dim, max_table_bytes, n_items)
    if result.target is not None:
        if (result.value or 0.0) < floor:
            log.warning(
                f"closed form: rank {result.dim} has {result.value:.4f} on validation, below EASE's {floor:.4f}; "
                "raise closed_form_dim or set it to auto"
            )
        return replace(result, source=items.expand(result.source), target=items.expand(result.target))
    matrix = torch.zeros(n_items, n_items, device=gram.device)
    matrix[items.items[:, None], items.items] = result.source
    return replace(result, source=matrix)


def _full_form(found: Search) -> ClosedForm:
    exact, trials = found.finish()
    assert exact.matrix is not None and exact.setting is not None
    return ClosedForm(exact.matrix, None, exact.items.warm, exact.setting, "full", exact.value, trials)


def _check_arguments(train: Rows, n_items: int, content: ContentTables, dim: int | str) -> None:
    if not len(train.ids):
        raise ValueError("train holds no interaction; the closed form needs training data.")
    if int(train.ids.max()) >= n_items:
        raise ValueError(f"train holds item id {int(train.ids.max())}, but n_items is {n_items}; ids must be below it.")
    for modality, (vectors, present) in content.items():
        if len(vectors) != n_items:
            raise ValueError(
                f"content: {modality} has {len(vectors)} rows; expected one per item, n_items = {n_items}."
            )
        if present.shape != (n_items,):
            raise ValueError(
                f"content: present of {modality} has shape {tuple(present.shape)}; expected ({n_items},), one flag per item."
            )
    if not (dim in ("auto", "full") or (isinstance(dim, int) and not isinstance(dim, bool) and dim > 0)):
        raise ValueError(f"dim is {dim!r}; expected 'auto', 'full' or a positive number.")


@dataclass(frozen=True)
class _Ranks:
    """What a choice of rank reads: the full form over the n warm items, and the data it came from."""

    full: ClosedForm
    train: Rows
    weights: Tensor
    gram: Tensor
    value: Callable[[Tensor, Tensor | None], float] | None
    floor: float = 0.0  # tuned EASE's validation value
    given: FactorForm | None = None  # the form that was chosen

    def loss(self, value: float | None) -> float:
        """Share of the full form's validation value that is lost; 0 where there is nothing to compare."""
        return 1 - value / self.full.value if value is not None and self.full.value else 0.0

    def factored(self, dim: int) -> ClosedForm:
        """The best factors of one rank: the best of ``FACTOR_FORMS``, sharpened if that loses too much.

        Beyond ``EXACT_ITEMS`` items, where a form takes ten seconds and more, the first that loses little is taken.
        """
        metric = gram_product(self.train, self.weights, self.gram, len(self.gram))
        forms = (
            FACTOR_FORMS if self.value is not None and len(self.gram) <= MAX_ITEMS_FOR_ALL_FORMS else FACTOR_FORMS[:1]
        )
        if self.given is not None and self.value is None:
            forms = (self.given,)
        best: ClosedForm | None = None
        best_form = forms[0]
        for form in forms:
            source, target = factorise(
                self.full.source, dim, metric if form.metric == "data" else None, form.free_diagonal
            )
            better = self._better(best, source, target, form)
            best, best_form = better, form if better is not best else best_form
            if len(self.gram) > EXACT_ITEMS and self.value is not None and self.loss(best.value) <= SHARPEN_ABOVE:
                return best
        assert best is not None and best.target is not None
        if self.value is not None and self.loss(best.value) <= SHARPEN_ABOVE:
            return best
        if self.given is not None and self.value is None and not self.given.sharpened:
            return best
        source, target = sharpen(
            self.full.source, best.source, best.target, self.train, self.weights, metric, self.gram.diagonal()
        )
        return self._better(best, source, target, replace(best_form, sharpened=True))

    def _better(self, best: ClosedForm | None, source: Tensor, target: Tensor, form: FactorForm) -> ClosedForm:
        value = None if self.value is None else self.value(source, target)
        if best is not None and value is not None and best.value is not None and value <= best.value:
            return best
        return replace(self.full, source=source, target=target, form=str(form), value=value, factors=form)


def _choose_rank(ranks: _Ranks, dim: int | str, max_table_bytes: int, n_items: int) -> ClosedForm:
    """The full form, or its factors of the rank that ``dim`` asks for."""
    full, n = ranks.full, len(ranks.gram)
    if dim == "full" or (isinstance(dim, int) and dim >= n):
        return full
    if isinstance(dim, int):
        return _told(ranks, ranks.factored(dim))
    # beyond n / 2 two tables of rank d are larger than the matrix
    dims = [d for d in AUTO_DIMS if 2 * d <= n and 8 * n_items * d <= max_table_bytes]
    best: ClosedForm | None = None
    full_fits = 4 * n_items**2 <= max_table_bytes
    if full_fits and n > EXACT_ITEMS and ranks.value is not None and is_sparse(ranks.gram):
        dims = []  # the spectrum is flat: no rank comes near the full form, and each takes a minute
    for d in dims if ranks.value is not None else dims[:1]:
        factored = _told(ranks, ranks.factored(d))
        if ranks.loss(factored.value) <= RANK_TOLERANCE and (factored.value or 0.0) >= ranks.floor:
            return factored
        if best is None or (factored.value or 0.0) > (best.value or 0.0):
            best = factored
    if best is None or full_fits:
        log.info(f"closed form: the full item-item matrix is kept ({4 * n_items**2 / 2**20:.0f} MiB)")
        return full
    return best


def _told(ranks: _Ranks, factored: ClosedForm) -> ClosedForm:
    cost = (
        "" if factored.value is None else f" has {factored.value:.4f}, {ranks.loss(factored.value):.1%} below full rank"
    )
    log.info(f"closed form: rank {factored.dim} ({factored.form}){cost}")
    return factored
