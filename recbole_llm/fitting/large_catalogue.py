r"""The closed form of catalogues so large that no matrix of items x items is formed.

Two forms of B of ``ease.py``, each a :class:`recbole_llm.fitting.solved_form.ClosedForm`:

    neighbourhoods   sparse rows plus a product of the content's rank (``neighbourhood.py``)
    SVD              a product of a chosen rank (``ease.Spectrum``)

The first cuts what items say of each other through users, and keeps the content; the second cuts a spectrum that is flat where
interactions are sparse. :func:`fit_large` fits both within :func:`allowed_bytes`, and validation decides. Constants are searched in
both where they are close at the constants that the search starts from, otherwise in the better one alone.
"""

from dataclasses import replace
from logging import getLogger

from recbole_llm.fitting.ease import Kernel, Setting, gram_diagonal, spectrum, user_weights
from recbole_llm.fitting.factors import gram_product
from recbole_llm.fitting.hyperparameters import (
    NEIGHBOURS,
    SPARSE_GRAM,
    WEIGHTS_OF_SPARSE,
    Candidates,
    Local,
    Spectral,
    TriedSetting,
    choose_setting,
)
from recbole_llm.fitting.neighbourhood import KEPT, Neighbourhoods, gram_entries
from recbole_llm.fitting.solved_form import ClosedForm
from recbole_llm.fitting.validation import Validation
from recbole_llm.fitting.warm_items import WarmItems

NEIGHBOURHOODS, SVD = "neighbourhoods", "svd"
SPECTRAL_DIMS = (512, 1024, 1536, 2048)
SPECTRAL_TOLERANCE = 0.002  # smaller than RANK_TOLERANCE, as the largest rank is itself below the exact solution
SEARCH_DIM = 1024  # at which the SVD form's constants are searched; the rank grows afterwards
SEARCH_DIM_OF_MANY = 256  # the same beyond MANY_ITEMS, where a setting takes minutes
MANY_ITEMS = 50_000
NEIGHBOURS_OF_FIT = 128  # of the form that is kept: 4 times those that settings are ranked by
MAX_BYTES = 6_400_000_000  # of a form while it is solved for: what the exact solution of 20,000 items holds
BYTES_PER_ITEM = (
    16_000  # the same of more than 400,000 items, whose vectors and content have a third of it by themselves
)
CLOSE_FORM = 0.1  # of the validation value: a form that is further below the other is not searched

log = getLogger(__name__)


def local_bytes(entries: int, n: int, neighbours: int, columns: int) -> int:
    """Estimate what neighbourhood solves hold at their peak.

    Args:
        entries: of the Gram matrix that are not 0.
        n: items.
        neighbours: m.
        columns: of the content.
    """
    width = min(neighbours, max(entries // max(n, 1), 1))
    return 2 * 8 * entries + n * (8 * neighbours + 4 * 8 * width) + 4 * 4 * n * columns


def allowed_bytes(n: int) -> int:
    """How much a form of n items may hold while it is solved for."""
    return max(MAX_BYTES, BYTES_PER_ITEM * n)


def fit_large(
    items: WarmItems,
    base: Setting,
    candidates: Candidates,
    subset: Validation | None,
    dim: int | str,
    max_table_bytes: int,
    form: str | None = None,
) -> ClosedForm:
    """Fit the form that suits, or the one that ``form`` names.

    Args:
        items: the items.
        base: the constants, where the search starts.
        candidates: kernels by modality.
        subset: validation data. Without it neighbourhoods are taken where fewer than ``SPARSE_GRAM`` of the pairs of items have a
            common user.
        dim: rank; a number asks for the SVD form.
        max_table_bytes: what vectors of the SVD form may take together.
        form: ``NEIGHBOURHOODS``, ``SVD`` or ``None``.
    """
    n, base = len(items.items), base.linear()
    if form == SVD or (form is None and isinstance(dim, int)):
        return fit_spectral(items, base, candidates, subset, dim, max_table_bytes)
    entries = gram_entries(items.train, n)
    columns = sum(directions.shape[1] for directions in items.content.values())
    needed = local_bytes(entries, n, NEIGHBOURS_OF_FIT, columns)
    filled = entries / n**2
    log.info(f"closed form: about {filled:.2%} of the pairs of {n} items share a user")
    if form is None and needed > allowed_bytes(n):
        log.info(
            f"closed form: neighbourhoods would hold {needed / 2**30:.1f} GiB of at most {allowed_bytes(n) / 2**30:.1f}, so the "
            "SVD form is taken"
        )
        return fit_spectral(items, base, candidates, subset, dim, max_table_bytes)
    if form == NEIGHBOURHOODS or subset is None:
        if form is None and filled >= SPARSE_GRAM:
            return fit_spectral(items, base, candidates, subset, dim, max_table_bytes)
        return fit_local(items, base, candidates, subset, filled)
    return _better_form(items, base, candidates, subset, dim, max_table_bytes, filled)


def _better_form(
    items: WarmItems,
    base: Setting,
    candidates: Candidates,
    subset: Validation,
    dim: int | str,
    max_table_bytes: int,
    filled: float,
) -> ClosedForm:
    """The better of both forms by validation."""
    weights = user_weights(items.train, base.user_exponent)
    solver = Local(items, weights, subset)
    local = solver(base)
    metric = gram_product(items.train, weights, None, len(items.items))
    popularity = gram_diagonal(items.train, weights, len(items.items))
    svd = Spectral(items, metric, popularity, subset, SEARCH_DIM_OF_MANY)(base)
    del metric
    log.info(
        f"closed form, {base}: {subset.metric} {local:.4f} by neighbourhoods of {NEIGHBOURS}, {svd:.4f} in the SVD form of rank "
        f"{SEARCH_DIM_OF_MANY}"
    )
    close = local >= (1 - CLOSE_FORM) * svd
    found = [fit_local(items, base, candidates, subset, filled, close, solver)]
    del solver
    if svd >= (1 - CLOSE_FORM) * local:
        found.append(fit_spectral(items, base, candidates, subset, dim, max_table_bytes))
    else:
        rank = min(SPECTRAL_DIMS[0], max(1, max_table_bytes // (8 * len(items.warm))))
        found.append(fit_spectral(items, found[0].setting, {}, subset, rank, max_table_bytes, searches=False))
    chosen = max(found, key=lambda each: each.value or 0.0)
    told = ", ".join(f"{each.form} {each.value:.4f}" for each in found)
    log.info(f"closed form: {subset.metric} on validation: {told}; the {chosen.form} is taken")
    return replace(chosen, trials=tuple(trial for each in found for trial in each.trials))


def fit_local(
    items: WarmItems,
    base: Setting,
    candidates: Candidates,
    subset: Validation | None,
    filled: float = 0.0,
    searches: bool = True,
    solver: Local | None = None,
) -> ClosedForm:
    """Fit sparse rows plus a product of the content's rank.

    Settings are ranked with neighbourhoods of ``NEIGHBOURS`` items; the one that is best is solved for with
    ``NEIGHBOURS_OF_FIT``, and ``KEPT`` entries of every row stay.

    Args:
        items: the items.
        base: the constants, every kernel of power 1; where the search starts.
        candidates: kernels by modality.
        subset: validation data; ``None`` for the constants of ``base``.
        filled: share of the pairs of items with a common user.
        searches: whether constants are searched where there is validation data.
        solver: for these items, ``base`` and ``subset``, whose solutions are taken over; ``None`` for a new one.
    """
    base = base.linear()
    weights, n = user_weights(items.train, base.user_exponent), len(items.items)
    trials: tuple[TriedSetting, ...] = ()
    chosen = base
    if subset is None:
        log.info(f"closed form: no validation data, so the constants given apply ({base})")
        solutions = Neighbourhoods(items.train, weights, items.content, n, NEIGHBOURS_OF_FIT)
    else:
        solver = Local(items, weights, subset) if solver is None else solver
        solutions = solver.solutions
        if searches:
            linear = {name: [kernel for kernel in kernels if kernel.power == 1] for name, kernels in candidates.items()}
            if filled < SPARSE_GRAM:
                for name, kernels in linear.items():
                    kernels += (Kernel(name, weight) for weight in WEIGHTS_OF_SPARSE)
            words = f"neighbourhoods of {NEIGHBOURS}"
            chosen, trials = choose_setting(
                solver, base, linear, str(subset.metric), words, follows=filled < SPARSE_GRAM
            )
        solutions.count = NEIGHBOURS_OF_FIT
    block = solutions.solve(chosen, last=True).block(KEPT)
    value = None if subset is None else items.value_of(subset, block.scorer)
    assert block.direct is not None and block.source is not None and block.target is not None
    entries = len(block.direct.ids)
    told = "" if value is None else f", validation value {value:.4f}"
    log.info(f"closed form: neighbourhoods of {NEIGHBOURS_OF_FIT}, {entries / n:.1f} entries a row{told}")
    form = f"neighbourhoods of {NEIGHBOURS_OF_FIT}"
    constants = {"neighbours": float(NEIGHBOURS_OF_FIT), "kept": float(KEPT)}
    direct, source, target = items.expand_rows(block.direct), block.source, block.target
    del block, solutions, solver  # of a million items a table has gigabytes
    source = items.expand(source)
    target = items.expand(target)
    return ClosedForm(source, target, items.warm, chosen, form, value, trials, direct=direct, constants=constants)


def fit_spectral(
    items: WarmItems,
    base: Setting,
    candidates: Candidates,
    subset: Validation | None,
    dim: int | str,
    max_table_bytes: int,
    searches: bool = True,
) -> ClosedForm:
    """Fit the SVD form at the largest rank allowed, cut to the smallest that loses little.

    Args:
        items: the items.
        base: the constants, where the search starts.
        candidates: kernels by modality.
        subset: validation data.
        dim: rank, or ``auto`` or ``full`` for the largest allowed.
        max_table_bytes: what source and target vectors may take together.
        searches: whether constants are searched where there is validation data; otherwise ``base`` is what counts.
    """
    weights = user_weights(items.train, base.user_exponent)
    popularity = gram_diagonal(items.train, weights, len(items.items))
    metric = gram_product(items.train, weights, None, len(items.items))
    affordable = max(1, max_table_bytes // (8 * len(items.warm)))
    dims = (dim,) if isinstance(dim, int) else tuple(d for d in SPECTRAL_DIMS if d <= affordable) or (affordable,)
    if subset is None:  # nothing to choose a rank by
        dims = tuple(d for d in dims if d <= SEARCH_DIM)[-1:] or dims
    search_dim = SEARCH_DIM if len(items.items) <= MANY_ITEMS else SEARCH_DIM_OF_MANY
    searched = dims[-1] if subset is None else min(dims[-1], search_dim)
    base = base.linear()
    form = Spectral(items, metric, popularity, subset, searched)
    trials: tuple[TriedSetting, ...] = ()
    chosen = base
    if subset is None:
        log.info(f"closed form: no validation data, so the documented constants apply ({base})")
        form(base)
    elif not searches:
        trials = (TriedSetting(base, form(base), 0.0, f"SVD form of rank {searched}"),)
    else:
        linear = {name: [kernel for kernel in kernels if kernel.power == 1] for name, kernels in candidates.items()}
        chosen, trials = choose_setting(form, base, linear, str(subset.metric), f"SVD form of rank {searched}")
    assert form.spectrum is not None
    best, best_value = form.spectrum, form.value
    if subset is not None and dims[-1] > searched:
        best = spectrum(metric, popularity, items.content, chosen, dims[-1], best.vectors, 3)
        best_value = items.value(subset, *best.factors(dims[-1]))
        log.info(f"closed form: rank {dims[-1]} (SVD form) has {best_value:.4f}")
    if subset is None:
        source, target = (items.expand(vectors) for vectors in best.factors(dims[-1]))
        return ClosedForm(source, target, items.warm, chosen, "SVD form", None, trials)
    values = {d: items.value(subset, *best.factors(d)) for d in dims[:-1]} | {dims[-1]: best_value}
    reached = max(values.values())  # the largest rank's need not be it
    for d, value in values.items():
        loss = 1 - value / reached if reached else 0.0
        log.info(f"closed form: rank {d} (SVD form) has {value:.4f}, {loss:.1%} below the best rank")
    rank = next(d for d, value in values.items() if value >= (1 - SPECTRAL_TOLERANCE) * reached)
    source, target = (items.expand(vectors) for vectors in best.factors(rank))
    return ClosedForm(source, target, items.warm, chosen, "SVD form", values[rank], trials)
