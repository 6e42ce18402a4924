r"""Order in a history, where interactions are split by time: how fast items fade, and what comes next.

    closed form with decay    sum_{j in H_u} exp(-rank_uj / tau) B_ji                      rank 0: the newest item
    next-item ridge           A = Z'Z + lam g sum_m t_m K_m + R,   R = lam g diag(max(diag Z'Z / g, 1e-6))^a
                              transitions T = A^-1 Z'Y,   content C = A^-1 lam g sum_m t_m K_m
                              g = mean positive diag Z'Z,   K_m = E_m E_m', E_m the content directions of modality m

A row of Z is the prefix of a history at one of its items, at most ``MAX_PREFIX`` long. The item at rank r of the prefix has
weight max(exp(-r / tau), floor). The row of Y is the item that follows. Where the confidence c of interactions counts, with the
exponents a and b of :mod:`recbole_llm.fitting.signals`, an item j of a prefix of u has c_uj^b times that weight, as in the
histories that are scored. The row counts c^a of the interaction that follows, so that Z'WZ and Z'WY take the place of Z'Z and Z'Y.

Content enters both sides, as if every dimension of the content vectors were one more prefix that is followed by itself: A keeps
rare items near items like them, and C gives them transitions that nobody made.

The score is sum_j exp(-rank_uj / tau') T_ji + sum_j exp(-rank_uj / tau'') C_ji, two more blocks of the same dot product. The
second one has as many columns as the content vectors. tau, the floor, lam, t_m, tau', tau'' and all weights are chosen on
validation; no floor, no content and no such block are among the choices. Each is chosen before the blocks after it are there.
:mod:`recbole_llm.fitting.decay_search` chooses tau', tau'' and the weights once more where all are.
"""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from logging import getLogger

import numpy as np
import torch
from torch import Tensor

from recbole_llm.fitting.blend import choose_blend, remembered
from recbole_llm.fitting.ease import content_centre, content_directions, inverse_in_place
from recbole_llm.fitting.factors import factorise
from recbole_llm.fitting.hyperparameters import NEIGHBOURS
from recbole_llm.fitting.next_item_local import MAX_STEPS as LOCAL_STEPS
from recbole_llm.fitting.next_item_local import LocalNextItem, finer
from recbole_llm.fitting.next_item_rows import (
    CONTENT,
    MAX_PREFIX,
    MAX_STEPS,
    TRANSITIONS,
    NextItemSetting,
    Prefixes,
    longest_of,
    matrices_of,
    prefixes_of,
    ridge_of,
    weights_of,
)
from recbole_llm.fitting.warm_items import ContentTables
from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.score import LinearBlock, Scorer

DECAYS = (None, 1.0, 2.0, 4.0, 7.0, 10.0, 20.0, 50.0)
NEXT_DECAYS = (3.0, 8.0)  # fitted by
NEXT_RIDGES = (1.0, 4.0, 16.0)
NEXT_WEIGHTS = (0.0, 0.1, 0.2, 0.3, 0.5, 0.7)
FLOOR = 0.1
CONTENT_WEIGHTS = (0.05, 0.2)  # beside 0
FULL_SEARCH_ITEMS = (
    4_096  # beyond, a solve takes half a minute, and the search starts from constants that suit sparse data
)
MAX_ITEMS = 20_000  # a solve is of the order of the cube, in four [n, n] float32 matrices; beyond, neighbourhoods

__all__ = ["CONTENT", "MAX_PREFIX", "TRANSITIONS", "NextItemSetting", "Prefixes", "fit_next_item", "prefixes_of"]

log = getLogger(__name__)


SPARSE_START = NextItemSetting(tau=4.0, ridge=8.0, floor=FLOOR)


def choose_decay(block: LinearBlock, histories: Rows, value: Callable[[Scorer], float]) -> tuple[float | None, float]:
    """Choose the tau of ``DECAYS`` that is best on validation, the first of equals; returns it with its value.

    Args:
        block: the block whose histories fade.
        histories: of the rows that ``value`` asks for, with ranks.
        value: validation value of a scorer.
    """
    values = {tau: value(replace(block, decay=tau).scorer(histories)) for tau in DECAYS}
    best = max(values, key=lambda tau: values[tau])
    return best, values[best]


# ---------------------------------------------------------------- the solution


def gram_of_prefixes(
    ranked: Rows, n_items: int, prefixes: Prefixes, weight: np.ndarray, target_weight: np.ndarray | None = None
) -> tuple[Tensor, Tensor]:
    """Compute Z'Z and Z'Y of weighted prefixes, ``[n_items, n_items]`` float32 each, on the device of ``ranked``.

    Args:
        ranked: the histories of ``prefixes``.
        n_items: size of the catalogue.
        prefixes: S rows of Z and Y.
        weight: ``[P]`` float32, entries of Z.
        target_weight: ``[S]`` float32, entries of Y; ``None`` for ones.

    Returns:
        Z'Z as a dense tensor, and Z'Y as a sparse COO tensor.
    """
    z, y = matrices_of(ranked, n_items, prefixes, weight, target_weight)
    device = ranked.ids.device
    gram = torch.from_numpy((z.T @ z).toarray()).to(device)
    follows = (z.T @ y).tocoo()
    index = torch.from_numpy(np.stack([follows.row, follows.col]).astype(np.int64))
    sums = torch.sparse_coo_tensor(index, torch.from_numpy(follows.data), gram.shape, check_invariants=False)
    return gram, sums.coalesce().to(device)


def next_item_gram(ranked: Rows, n_items: int, tau: float, floor: float = 0.0) -> tuple[Tensor, Tensor]:
    """Compute Z'Z and Z'Y of the module docstring, ``[n_items, n_items]`` float32 each, on the device of ``ranked``.

    Args:
        ranked: training histories, with ranks; their weights are c^b of the module docstring and their confidence is c^a.
        n_items: size of the catalogue.
        tau: decay of the prefixes.
        floor: least weight of an item of a prefix.

    Returns:
        Z'Z as a dense tensor, and Z'Y as a sparse COO tensor.
    """
    prefixes = prefixes_of(ranked, longest_of(tau, floor), MAX_STEPS)
    return gram_of_prefixes(ranked, n_items, prefixes, *weights_of(ranked, prefixes, tau, floor))


def directions_of(content: ContentTables, trained: Tensor) -> dict[str, Tensor]:
    """Compute E_m of every modality, ``[n_items, f]``; zero for items without it and for those that nobody has touched."""
    return {
        modality: content_directions(vectors, present, content_centre(vectors, present)) * trained[:, None]
        for modality, (vectors, present) in content.items()
    }


def solve_next_item(
    gram: Tensor, follows: Tensor, setting: NextItemSetting, directions: Mapping[str, Tensor] | None = None
) -> tuple[Tensor, Tensor | None]:
    """Solve for T and C of the module docstring.

    Args:
        gram: Z'Z, ``[n, n]``.
        follows: Z'Y, ``[n, n]``, sparse.
        setting: the constants.
        directions: E_m of every modality that ``setting`` names.

    Returns:
        T, ``[n, n]``, zero in rows of items that no prefix and no content ties to others; and the vectors V ``[n, F]`` with
        C = V E', E the directions of the modalities side by side; ``None`` without content.

    Raises:
        ValueError: if A is not positive definite.
    """
    ridge, unit = ridge_of(gram.diagonal(), setting)
    A = gram.clone(memory_format=torch.contiguous_format)
    for modality, weight in setting.content:
        A.addmm_((directions or {})[modality], (directions or {})[modality].T, alpha=weight * unit)
    A.diagonal().add_(ridge)
    inverse = inverse_in_place(A)
    if inverse is None:
        raise ValueError(f"The next-item block has no solution with {setting}: its matrix is not positive definite.")
    side = [weight * unit * (directions or {})[modality] for modality, weight in setting.content]
    content = inverse @ torch.cat(side, 1) if side else None
    # (Z'Y)' A^-1 = T', as A is symmetric; Z'Y has few entries, and its product with a dense matrix costs little
    return torch.sparse.mm(follows.T.coalesce(), inverse).T.contiguous(), content


def next_item_blocks(
    train: Rows, n_items: int, setting: NextItemSetting, dim: int | None, directions: Mapping[str, Tensor]
) -> tuple[LinearBlock, ...]:
    """Fit the blocks of given constants, of scale 1: transitions, and content where the setting names some.

    Args:
        train: all training histories, with ranks.
        n_items: size of the catalogue.
        setting: the constants.
        dim: rank of the transitions; ``None`` for the full matrix.
        directions: from :func:`directions_of`.
    """
    return _blocks(next_item_gram(train, n_items, setting.tau, setting.floor), setting, dim, directions)


def local_blocks(
    train: Rows, n_items: int, setting: NextItemSetting, directions: Mapping[str, Tensor]
) -> tuple[LinearBlock, ...]:
    """Fit the same blocks by neighbourhoods; arguments as of :func:`next_item_blocks`."""
    return LocalNextItem(train, n_items, directions).blocks(setting)


def blocks_once_more(
    train: Rows, n_items: int, first: Mapping[str, float], dim: int | None, directions: Mapping[str, Tensor]
) -> tuple[LinearBlock, ...]:
    """Fit the blocks with the constants of transitions that were fitted before, in the same form.

    Args:
        train: all training histories, with ranks.
        n_items: size of the catalogue.
        first: constants of the transitions.
        dim: rank of the transitions; ``None`` for the full matrix. Neighbourhoods have none.
        directions: from :func:`directions_of`.
    """
    setting = NextItemSetting.from_constants(first)
    if "neighbours" in first:
        return local_blocks(train, n_items, setting, directions)
    return next_item_blocks(train, n_items, setting, dim, directions)


def _blocks(
    gram: tuple[Tensor, Tensor], setting: NextItemSetting, dim: int | None, directions: Mapping[str, Tensor]
) -> tuple[LinearBlock, ...]:
    source, content = solve_next_item(*gram, setting, directions)
    target = None
    if dim is not None:
        source, target = factorise(source, dim, gram[0].matmul, free_diagonal=False)
    first = LinearBlock(TRANSITIONS, source, target, decay=setting.tau, constants=setting.constants())
    if content is None:
        return (first,)
    own = torch.cat([directions[modality] for modality, _ in setting.content], 1)
    return first, LinearBlock(CONTENT, content, own, decay=setting.tau, constants=setting.constants())


def summed(scorers: Sequence[Scorer]) -> Scorer:
    """Return a scorer that adds up those of several blocks."""

    def scores(rows: Tensor) -> Tensor:
        total = scorers[0](rows)
        for scorer in scorers[1:]:
            total = total.add_(scorer(rows))
        return total

    return scores


# ---------------------------------------------------------------- the choice


class _Search:
    """Settings tried on validation, of which the best blocks are kept."""

    def __init__(
        self,
        fit: Callable[[NextItemSetting], tuple[LinearBlock, ...]],
        weigh: Callable[[tuple[LinearBlock, ...]], tuple[float, float]],
        value: float,
    ) -> None:
        self.fit, self.weigh = fit, weigh
        self.blocks: tuple[LinearBlock, ...] = ()
        self.setting: NextItemSetting | None = None
        self.without = self.value = value
        self.tried: dict[NextItemSetting, float] = {}

    def __call__(self, setting: NextItemSetting) -> float:
        """Return the value of the best blend with a setting's blocks; a setting is solved for once."""
        if setting in self.tried:
            return self.tried[setting]
        blocks = self.fit(setting)
        found, factor = self.weigh(blocks)
        self.tried[setting] = found
        log.info(f"next-item block, {setting}: {found:.4f}, {self.without:.4f} without it")
        if factor and found > self.value:
            self.value, self.setting = found, setting
            self.blocks = tuple(replace(block, scale=factor) for block in blocks)
        return found

    def keep_rising(self, settings: Sequence[NextItemSetting]) -> None:
        """Try settings in their order, until the value falls."""
        last = -1.0
        for setting in settings:
            found = self(setting)
            if found <= last:
                return
            last = found


def _search_all(search: _Search, modalities: Sequence[str]) -> None:
    """Search decay and ridge, then the other constants one by one, where a solve takes seconds."""
    for tau in NEXT_DECAYS:
        search.keep_rising([NextItemSetting(tau, ridge) for ridge in NEXT_RIDGES])
    if search.setting is None:
        return
    for modality in modalities:
        search.keep_rising([search.setting.with_content(modality, weight) for weight in CONTENT_WEIGHTS])
    search(replace(search.setting, floor=FLOOR))
    search.keep_rising([replace(search.setting, ridge=search.setting.ridge * factor) for factor in (2.0, 4.0)])


def _search_few(search: _Search, modalities: Sequence[str]) -> None:
    """Start from ``SPARSE_START`` and change one constant after the other, where a solve takes half a minute."""
    start = SPARSE_START
    for modality in modalities:
        start = start.with_content(modality, CONTENT_WEIGHTS[0])
    search(start)
    for modality in modalities:
        search((search.setting or start).with_content(modality, 0.0))
    search(replace(search.setting or start, floor=0.0))
    search(replace(search.setting or start, tau=2.0))


def fit_next_item(
    train: Rows,
    histories: Rows,
    n_items: int,
    closed: Scorer,
    value: Callable[[Scorer], float],
    dim: int | None,
    columns: Tensor,
    content: ContentTables | None = None,
) -> tuple[LinearBlock, ...]:
    """Fit the next-item blocks and weigh them against the closed form on validation.

    Args:
        train: all training histories, with ranks.
        histories: of the rows that ``value`` asks for, with ranks.
        n_items: size of the catalogue.
        closed: the closed form's scores of these rows.
        value: validation value of a scorer.
        dim: rank of the transitions; ``None`` for the full matrix.
        columns: ``[n_items]`` bool, the trained items, whose scores set the scale.
        content: vectors of the items by modality.

    Returns:
        Transitions and, where content is chosen, content, scaled beside a closed form of scale 1; nothing where they add
        nothing, where no history has two items, or where not even neighbourhoods fit the memory.
    """
    if not bool((train.sizes > 1).any()):
        log.info("next-item block: left out, no history has two items")
        return ()
    rows = torch.arange(len(histories.offsets) - 1, device=histories.ids.device)
    closed = remembered(closed, rows, n_items)
    directions = directions_of(content or {}, columns)
    local = LocalNextItem(train, n_items, directions) if n_items > MAX_ITEMS else None
    if local is not None and local.refused:
        log.info(f"next-item block: left out, {local.refused}")
        return ()
    most, steps = MAX_STEPS if local is None else LOCAL_STEPS, int((train.sizes - 1).clamp(min=0).sum())
    if steps > most:
        log.info(f"next-item block: of {steps} steps from an item to the next, {most} are read, evenly taken")
    grams: dict[tuple[float, float], tuple[Tensor, Tensor]] = {}

    def fit(setting: NextItemSetting) -> tuple[LinearBlock, ...]:
        if local is not None:
            return local.blocks(setting, NEIGHBOURS)
        key = setting.tau, setting.floor
        if key not in grams:
            grams.clear()  # one at a time: they are large
            grams[key] = next_item_gram(train, n_items, *key)
        return _blocks(grams[key], setting, dim, directions)

    def weigh(blocks: tuple[LinearBlock, ...]) -> tuple[float, float]:
        following = summed([block.scorer(histories) for block in blocks])
        blend = choose_blend(closed, following, rows, n_items, value, NEXT_WEIGHTS, columns)
        found = max((trial[1] for trial in blend.trials), default=0.0)
        return found, blend.scales[1] / blend.scales[0] if blend.weight and blend.scales[0] else 0.0

    search = _Search(fit, weigh, value(closed))
    modalities = [modality for modality, own in directions.items() if bool(own.any())]
    (_search_all if n_items <= FULL_SEARCH_ITEMS else _search_few)(search, modalities)
    if search.setting is None:
        log.info("next-item block: left out, it adds nothing on validation")
        return ()
    log.info(f"next-item block: {search.setting} is best of {len(search.tried)} settings, {search.value:.4f}")
    if local is not None:
        return finer(search.blocks, local.blocks(search.setting))
    return search.blocks
