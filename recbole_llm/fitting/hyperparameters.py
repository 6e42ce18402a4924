"""Choose the constants of the closed form on validation, at a fraction of the cost of solving for each of them in full.

Up to ``EXACT_ITEMS`` items every setting is solved for in full. Beyond, where an exact solve takes a minute, ridge and content
weights are searched in a cheaper form, which leaves no item out (:func:`search_form`): by neighbourhoods of ``NEIGHBOURS`` items
where few pairs of items share a user, in the SVD form of a small rank where most do. Neither can evaluate the squared kernel. It
and plain EASE are compared with the current best by exact solves on the most popular items, with the ridge scaled as for the full
catalogue. Exact solves of the full catalogue are left for the few candidates of that race.

Where few pairs of items have a common user, the spectrum is flat: a small rank keeps little of it and prefers other constants than
the exact solution does. There neighbourhoods are taken unseen, and larger content weights are tried, which cost a ranking each.
"""

import time
from collections.abc import Callable, Collection, Mapping, Sequence
from dataclasses import dataclass, replace
from logging import getLogger

import torch
from torch import Tensor

from recbole_llm.fitting.ease import Content, Kernel, Setting, Spectrum, solve, spectrum, user_weights, weighted_gram
from recbole_llm.fitting.factors import Product, gram_product
from recbole_llm.fitting.neighbourhood import Neighbourhoods
from recbole_llm.fitting.validation import Validation
from recbole_llm.fitting.warm_items import WarmItems

KERNELS = ((0.05, 1), (0.2, 2), (0.0, 1))  # (weight, power) of a modality; weight 0 leaves it out
LIGHT_KERNEL = (0.02, 1)  # for catalogues with gaps in their content
GAPS = 0.1  # share of the items without a content from which that is tried
RIDGE_RANGE = (0.25, 512.0)
WEIGHT_RANGE = (0.002, 16.0)  # of a content weight that is followed
EXACT_ITEMS = 4096
POPULAR_SHARE = 0.4  # of the items, at least EXACT_ITEMS; 0.8 of the interactions on the datasets above
DIM = 512  # of the SVD form
NEIGHBOURS = 32  # of an item in its neighbourhood: enough to rank settings by
DENSE_FROM = 0.5  # share of the pairs of items with a common user, from which the SVD form is taken unseen
WEIGHTS_OF_SPARSE = (0.2, 0.8, 3.2)  # content weights tried there too: sparse interactions leave more to the content
WEIGHT_STEP = 4.0  # by which they are followed further; another weight costs a ranking and no solve
CLOSE_EASE = 0.02  # of the value of the popular items: if EASE loses no more there, it is solved for in full
SPARSE_GRAM = 0.1  # the same share, below which the SVD form misjudges settings and neighbourhoods are taken unseen
FAR_EASE = (
    0.05  # of the value: if plain EASE loses more at the ridge of the rival, no other ridge is tried on sparse data
)

log = getLogger(__name__)

Candidates = Mapping[str, Sequence[Kernel]]
"""By modality, the kernels to try."""


@dataclass(frozen=True)
class TriedSetting:
    """One setting with its validation value and the seconds it took.

    Attributes:
        setting: the constants.
        value: validation value.
        seconds: wall time.
        way: how it was solved, such as ``"all items"``.
    """

    setting: Setting
    value: float
    seconds: float
    way: str


def kernel_candidates(content: Content) -> dict[str, tuple[Kernel, ...]]:
    """List the kernels to try for each modality, by how many of the items have it.

    Where many items lack a modality, the usual weights lose to leaving it out, and a lighter one does not. Missing content is never
    imputed: it has weight 0 (a mask), not a made-up vector.

    Args:
        content: directions of the items, zero where they have none.
    """
    found = {}
    for modality, directions in content.items():
        without = int((directions == 0).all(1).sum())
        if without == len(directions):
            continue
        pairs: Sequence[tuple[float, int]] = KERNELS
        if without >= GAPS * len(directions):
            log.info(
                f"closed form: {without} of {len(directions)} items have no {modality}, so that a lighter {modality} kernel "
                "is tried too"
            )
            pairs = (KERNELS[0], LIGHT_KERNEL, *KERNELS[1:])
        found[modality] = tuple(Kernel(modality, weight, power) for weight, power in pairs)
    return found


def search_setting(value: Callable[[Setting], float], base: Setting, candidates: Candidates) -> Setting:
    """Search the kernel of the first modality, then the ridge along its powers of two, then further modalities.

    All kernels of the first modality are tried at the ridge of ``base``. The best one's ridge is followed up, else down, while
    the value rises. At the ridge found the second-best kernel gets one more chance. Each further modality then does the same
    beside the kernels chosen, and is tried at the ridge chosen as well. It enters only where the value rises. Last, modalities
    whose absence costs nothing are left out.

    Args:
        value: validation value of a setting; larger is better.
        base: where the search starts; its other constants stay.
        candidates: kernels by modality, in the order tried.

    Returns:
        The best setting evaluated; of equals one with fewer modalities, else the first.
    """
    known: dict[Setting, float] = {}

    def once(setting: Setting) -> float:
        if setting not in known:
            known[setting] = value(setting)
        return known[setting]

    first, *others = candidates.items() or ((None, ()),)
    best_value, best = _search_from([base.with_kernel(kernel) for kernel in first[1]] or [base], once)
    for modality, kernels in others:
        # the kernel that it has counts already
        beside = [best.with_kernel(kernel) for kernel in kernels if kernel != best.kernel(modality)]
        if not beside:
            continue
        # the ridge that is best without a modality need not be where it helps
        found_value, found = _search_from([replace(setting, ridge=base.ridge) for setting in beside], once)
        for setting in beside:
            if (its_value := once(setting)) > found_value:
                found_value, found = its_value, setting
        if found_value > best_value:
            best_value, best = found_value, found
    weighed = [kernel.modality for kernel in best.kernels if kernel.weight and kernel.modality in candidates]
    for modality in weighed if len(weighed) > 1 else ():  # one that others have made needless goes
        without = best.with_kernel(Kernel(modality, 0.0))
        if (its_value := once(without)) >= best_value:
            best_value, best = its_value, without
    return best


def _search_from(starts: Sequence[Setting], value: Callable[[Setting], float]) -> tuple[float, Setting]:
    """The best of settings that have one ridge, with the ridge that is best for it, and its value."""
    ranked = sorted(((value(start), start) for start in starts), key=lambda pair: -pair[0])
    best_value, best = ranked[0]
    start = best.ridge
    for factor in (2.0, 0.5):
        while RIDGE_RANGE[0] <= (ridge := best.ridge * factor) <= RIDGE_RANGE[1]:
            further = replace(best, ridge=ridge)
            if (further_value := value(further)) <= best_value:
                break
            best_value, best = further_value, further
        if best.ridge != start:
            break
    if len(ranked) > 1 and best.ridge != start:
        other = replace(ranked[1][1], ridge=best.ridge)
        if (other_value := value(other)) > best_value:
            best_value, best = other_value, other
    return best_value, best


def follow_weights(value: Callable[[Setting], float], start: Setting, modalities: Collection[str]) -> Setting:
    """Follow the weights of the content up, else down, while the value rises; then the ridge once more if one has changed.

    Args:
        value: validation value of a setting; larger is better.
        start: where to start.
        modalities: those that may be followed, of which the ones that count are.

    Returns:
        The best setting evaluated; ``start`` where none is better.
    """
    known = {start: value(start)}

    def once(setting: Setting) -> float:
        if setting not in known:
            known[setting] = value(setting)
        return known[setting]

    best = start
    for modality in modalities:
        first = best.kernel(modality)
        for factor in (WEIGHT_STEP, 1 / WEIGHT_STEP) if first.weight else ():
            while WEIGHT_RANGE[0] <= (weight := best.kernel(modality).weight * factor) <= WEIGHT_RANGE[1]:
                further = best.with_kernel(replace(best.kernel(modality), weight=weight))
                if once(further) <= once(best):
                    break
                best = further
            if best.kernel(modality) != first:
                break
    return best if best == start else _search_from([best], once)[1]


def choose_setting(
    value: Callable[[Setting], float],
    base: Setting,
    candidates: Candidates,
    metric: str,
    way: str,
    follows: bool = False,
) -> tuple[Setting, tuple[TriedSetting, ...]]:
    """Search from ``base``; the best setting, and all that were tried in this ``way``. ``follows``: :func:`follow_weights`."""
    trials: list[TriedSetting] = []

    def evaluate(candidate: Setting) -> float:
        trials.append(_timed(value, candidate, way))
        found = {"setting": str(candidate), "metric": metric, "value": trials[-1].value}
        log.info(f"closed form, {candidate}: {metric} {trials[-1].value:.4f}", extra={"trial": found})
        return trials[-1].value

    chosen = search_setting(evaluate, base, candidates)
    if follows:
        values = {trial.setting: trial.value for trial in trials}
        chosen = follow_weights(lambda tried: values[tried] if tried in values else evaluate(tried), chosen, candidates)
    best = max(trial.value for trial in trials)
    log.info(f"closed form: {chosen} is best of {len(trials)} settings, {metric} {best:.4f}")
    return chosen, tuple(trials)


class Exact:
    """Exact solutions, of which the best is kept.

    Args:
        items: the items.
        gram: their G.
        subset: validation data.
        scale: g of ``ease.py`` where ``items`` is a part of the items; ``None`` for that of ``gram``.

    Attributes:
        matrix: the best one's B, ``[n, n]``; ``None`` before the first.
        setting: the best one's.
        value: its validation value.
    """

    def __init__(self, items: WarmItems, gram: Tensor, subset: Validation, scale: Tensor | None = None) -> None:
        self.items, self.gram, self.subset, self.scale = items, gram, subset, scale
        self.matrix: Tensor | None = None
        self.setting: Setting | None = None
        self.value = -1.0

    def __call__(self, setting: Setting) -> float:
        """Validation value of a setting."""
        matrix = solve(self.gram, self.items.content, setting, self.scale)
        value = self.items.value(self.subset, matrix, None)
        if value > self.value:
            self.matrix, self.setting, self.value = matrix, setting, value
        return value


class Spectral:
    """Solutions in the SVD form, of which the best is kept; each starts from the best one's directions.

    Args:
        items: the items.
        metric: their G.
        popularity: diag G, ``[n]``.
        subset: validation data; ``None`` for values of 0.
        dim: rank.

    Attributes:
        spectrum: the best one; ``None`` before the first.
        value: its validation value.
    """

    def __init__(
        self, items: WarmItems, metric: Product, popularity: Tensor, subset: Validation | None, dim: int
    ) -> None:
        self.items, self.metric, self.popularity = items, metric, popularity
        self.subset, self.dim = subset, dim
        self.spectrum: Spectrum | None = None
        self.value = -1.0

    def __call__(self, setting: Setting) -> float:
        """Validation value of a setting."""
        start, iterations = (None, 4) if self.spectrum is None else (self.spectrum.vectors, 2)
        found = spectrum(self.metric, self.popularity, self.items.content, setting, self.dim, start, iterations)
        value = 0.0 if self.subset is None else self.items.value(self.subset, *found.factors(self.dim))
        if value > self.value:
            self.spectrum, self.value = found, value
        return value


class Local:
    """Solutions by neighbourhoods, which only rank settings.

    Args:
        items: the items.
        weights: w of ``ease.py``.
        subset: validation data.
    """

    def __init__(self, items: WarmItems, weights: Tensor, subset: Validation) -> None:
        self.items, self.subset = items, subset
        self.solutions = Neighbourhoods(items.train, weights, items.content, len(items.items), NEIGHBOURS)

    def __call__(self, setting: Setting) -> float:
        """Validation value of a setting."""
        return self.items.value_of(self.subset, self.solutions.solve(setting).scorer)


def filled_share(gram: Tensor) -> float:
    """Compute the share of the entries of a Gram matrix that are not 0: pairs of items with a common user."""
    return int(torch.count_nonzero(gram)) / gram.numel()


def is_sparse(gram: Tensor) -> bool:
    """Whether so few pairs of items have a common user that the SVD form would misjudge settings."""
    return filled_share(gram) < SPARSE_GRAM


def search_form(
    items: WarmItems, gram: Tensor, subset: Validation, base: Setting
) -> tuple[Callable[[Setting], float], str]:
    """Choose the form in which settings of many items are compared, and say it in words.

    Neighbourhoods cut what the SVD form keeps, and the other way round. Which of both is nearer to the exact solution depends
    on how many pairs of items share a user. Between ``SPARSE_GRAM`` and ``DENSE_FROM`` validation decides, at ``base``.

    Args:
        items: the items.
        gram: G, ``[n, n]``.
        subset: validation data.
        base: the setting at which the forms are compared.
    """
    n = len(gram)
    filled, sparse = filled_share(gram), is_sparse(gram)
    weights = user_weights(items.train, base.user_exponent)
    log.info(f"closed form: {filled:.1%} of the pairs of {n} items share a user")
    forms: list[tuple[Callable[[Setting], float], str]] = []
    if sparse or filled < DENSE_FROM:
        forms.append((Local(items, weights, subset), f"neighbourhoods of {NEIGHBOURS}"))
    if not sparse:
        metric = gram_product(items.train, weights, gram, n)
        forms.append((Spectral(items, metric, gram.diagonal(), subset, DIM), f"SVD form of rank {DIM}"))
    if len(forms) == 1:
        return forms[0]
    return max(reversed(forms), key=lambda form: form[0](base.linear()))


@dataclass(frozen=True)
class Search:
    """What a search of the constants has found.

    Attributes:
        exact: solves for all items. Where the search was made so, it holds the best already.
        candidates: settings still to be solved for.
        value: the best one's validation value where candidates were compared, on all items or the popular ones.
        trials: every setting tried.
    """

    exact: Exact
    candidates: tuple[Setting, ...]
    value: float
    trials: tuple[TriedSetting, ...]

    def finish(self) -> tuple[Exact, tuple[TriedSetting, ...]]:
        """Solve for the candidates; returns the best, and every setting tried, these included."""
        trials = list(self.trials)
        for setting in self.candidates:
            trials.append(_timed(self.exact, setting, "all items"))
            log.info(f"closed form, {setting}, all items: {self.exact.subset.metric} {trials[-1].value:.4f}")
        return self.exact, tuple(trials)


def _timed(value: Callable[[Setting], float], setting: Setting, way: str) -> TriedSetting:
    started = time.perf_counter()
    found = value(setting)
    return TriedSetting(setting, found, time.perf_counter() - started, way)


def search(
    items: WarmItems,
    gram: Tensor,
    subset: Validation,
    base: Setting,
    candidates: Candidates,
) -> Search:
    """Choose the constants on validation, or the few settings among which exact solutions must choose.

    Args:
        items: the items.
        gram: G, ``[n, n]``, weighted as ``base`` asks.
        subset: validation data.
        base: where the search starts.
        candidates: kernels by modality.
    """
    exact, metric = Exact(items, gram, subset), str(subset.metric)
    n = len(items.items)
    if n <= EXACT_ITEMS:
        _, trials = choose_setting(exact, base, candidates, metric, "all items")
        return Search(exact, (), exact.value, trials)
    form, words = search_form(items, gram, subset, base)
    log.info(f"closed form: constants of {n} items are searched by {words}")
    linear = {name: [kernel for kernel in kernels if kernel.power == 1] for name, kernels in candidates.items()}
    sparse = isinstance(form, Local)
    if sparse:
        for name, kernels in linear.items():
            kernels += (Kernel(name, weight) for weight in WEIGHTS_OF_SPARSE)
    best, trials = choose_setting(form, base.linear(), linear, metric, words, follows=sparse)
    del form
    squared = [kernel for kernels in candidates.values() for kernel in kernels if kernel.power != 1]
    if sparse and not squared:
        return Search(exact, (best,), max(trial.value for trial in trials), trials)

    part, places = items.popular(max(EXACT_ITEMS, int(POPULAR_SHARE * n)))
    popular = Exact(part, gram[places][:, places], subset, gram.diagonal().mean())
    way = f"{len(places)} popular items"
    reference = _timed(popular, best, way)
    found = [*trials, reference]
    settings = [best]
    for kernel in squared:
        tries = [_timed(popular, best.with_kernel(kernel), way)]
        while len(tries) < 2 or tries[-1].value > tries[-2].value:  # its best ridge is the same or smaller
            if (ridge := tries[-1].setting.ridge / 2) < RIDGE_RANGE[0]:
                break
            tries.append(_timed(popular, replace(tries[-1].setting, ridge=ridge), way))
        top = max(tries, key=lambda trial: trial.value)
        log.info(
            f"closed form, {top.setting}, {way}: {metric} {top.value:.4f} against {reference.value:.4f} with "
            f"{reference.setting}"
        )
        found += tries
        if top.value > reference.value:
            settings.append(top.setting)
    return Search(exact, tuple(settings), popular.value, tuple(found))


def search_ease(
    items: WarmItems, subset: Validation, rival: Setting, rival_value: float
) -> tuple[Search | None, float]:
    """Search the ridge of plain EASE by a line search that starts at ``rival``'s: what a fit must not fall below.

    Args:
        items: the items.
        subset: validation data.
        rival: the setting to compare with.
        rival_value: its value as :class:`Search` tells it; on sparse data that of the exact solution.

    Returns:
        The search, or ``None`` where the popular items, or one ridge, sufficed to tell that EASE is worse; and its value there as
        a share of the rival's.
    """
    gram = weighted_gram(items.train, user_weights(items.train, 0.0), len(items.items))
    if len(items.items) > EXACT_ITEMS and is_sparse(gram) and rival_value:
        ease = Setting.of_ease(rival.ridge)
        share = Local(items, user_weights(items.train, 0.0), subset)(ease) / rival_value
        return (None if share < 1 - FAR_EASE else search(items, gram, subset, ease, {})), share
    found = search(items, gram, subset, Setting.of_ease(rival.ridge), {})
    share = found.value / rival_value if rival_value else 1.0
    return (None if found.candidates and share < 1 - CLOSE_EASE else found), share
