r"""The place of cold-start items among the others.

The scores of the kernel ridge map are shrunk towards zero; how much depends on the data. :func:`choose_cold_boost` finds factor
and offset of the cold items in the joint ranking:

    score(u, cold i) = kappa <x_u, f(e_i)> + offset sd_u

with sd_u the standard deviation of the user's scores, fitted as <x_u, r>, so that serving stays one dot product.
"""

import math
from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from recbole_llm.fitting.validation import CHUNK_ELEMENTS, TopKMetric, hide_seen
from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.score import Scorer

KAPPAS = (0.25, 0.5, 0.75, 1.0, 1.5, 2.0)
OFFSETS = (-2.0, -1.5, -1.0, -0.75, -0.5, -0.25, 0.0)
WARM_FLOOR = 0.995
UNTOLD_WARM_FLOOR = 0.998  # where nothing tells how often cold-start items are bought


def deviation_direction(pooled: Tensor, deviations: Tensor, ridge: float = 1e-3) -> Tensor:
    """Find the vector r whose products with user vectors come closest to the deviations of the users' scores.

    Args:
        pooled: user vectors x_u, ``[U, d]``.
        deviations: sd_u, ``[U]``.
        ridge: in units of the mean diagonal of the Gram matrix.

    Returns:
        r, ``[d]`` float32, by ridge regression in float64.
    """
    x, wanted = pooled.double(), deviations.double()
    ridge = ridge * float(x.square().sum()) / x.shape[1] + torch.finfo(torch.float64).tiny
    by_users = x.shape[0] < x.shape[1]  # the smaller of the two systems that have the same solution
    gram = x @ x.T if by_users else x.T @ x
    gram.diagonal().add_(ridge)
    found = x.T @ torch.linalg.solve(gram, wanted) if by_users else torch.linalg.solve(gram, x.T @ wanted)
    return found.float()


@dataclass(frozen=True)
class ColdBoost:
    """How cold items enter the joint ranking.

    Attributes:
        joint: whether they do; if not, they are ranked among themselves only.
        kappa: factor of the mapped target vector and bias.
        offset: in deviations of the user's scores.
        warm_share: warm metric with the cold items present, of the one without; ``nan`` if not measured.
        gain: joint metric's relative gain over leaving them out; ``nan`` if not measured.
    """

    joint: bool
    kappa: float = 1.0
    offset: float = 0.0
    warm_share: float = math.nan
    gain: float = math.nan

    def __str__(self) -> str:
        if not self.joint:
            return "cold items are left out of the joint ranking"
        text = f"cold items: factor {self.kappa:g}, offset {self.offset:g} user deviations"
        if math.isnan(self.gain):
            return text if math.isnan(self.warm_share) else f"{text}; warm {self.warm_share - 1:+.1%} on validation"
        return f"{text}; joint metric {self.gain:+.1%}, warm {self.warm_share - 1:+.1%} on validation"


@dataclass(frozen=True)
class _Candidates:
    """The first places of the warm and of the cold items of each row, from which any boost's ranking follows."""

    scores: Tensor  # [U, k] warm
    hits: Tensor  # [U, k]
    cold_scores: Tensor  # [U, k], factor 1 and offset 0
    cold_hits: Tensor
    deviations: Tensor  # [U] or [U, 1]
    n_warm_targets: Tensor  # [U]
    n_targets: Tensor

    def values(self, metric: TopKMetric, kappa: float | None, offset: float) -> tuple[float, float]:
        """Mean joint and mean warm metric; without the cold items for ``None``. There must be a warm target."""
        scores, hits = self.scores, self.hits
        if kappa is not None:
            scores = torch.cat([scores, self.cold_scores * kappa + offset * self.deviations], dim=1)
            hits = torch.cat([hits, self.cold_hits], dim=1)
        order = torch.argsort(scores, dim=1, descending=True, stable=True)[:, : metric.k]
        is_warm, has_warm = order < self.scores.shape[1], self.n_warm_targets > 0
        placed = hits.gather(1, order) & scores.gather(1, order).isfinite()
        joint = metric.of(placed, self.n_targets).mean()
        warm = metric.of((placed & is_warm)[has_warm], self.n_warm_targets[has_warm]).mean()
        return float(joint), float(warm)


def choose_cold_boost(
    scorer: Scorer,
    targets: Rows,
    seen: Rows,
    cold: Tensor,
    metric: TopKMetric,
    deviations: Tensor,
    excluded: Tensor | None = None,
    *,
    kappas: Sequence[float] = KAPPAS,
    offsets: Sequence[float] = OFFSETS,
    warm_floor: float = WARM_FLOOR,
) -> ColdBoost:
    """Choose the place of cold items that gains most in the joint ranking while the warm items keep their quality.

    Args:
        scorer: scores of the rows of ``targets``, cold columns mapped with factor 1 and offset 0.
        targets: what each user should get, warm items and items in ``cold``.
        seen: as many rows; items without a place, unless they are targets.
        cold: ``[n_items]`` bool, the items to place.
        metric: by which it is chosen.
        deviations: ``[U]``, sd_u of every row of ``targets``.
        excluded: ``[n_items]`` bool, items without a place (padding, untrained items without a text).
        kappas: factors tried.
        offsets: offsets tried.
        warm_floor: share of the warm metric without cold items that must remain.

    Returns:
        The best boost; ``joint=False`` if none keeps the floor and gains.
    """
    if not len(targets.ids):
        return ColdBoost(joint=False)
    found = _first_places(scorer, targets, seen, cold, metric.k, deviations, excluded)
    if not bool((found.n_warm_targets > 0).any()) or not bool(found.cold_hits.any()):
        return ColdBoost(joint=False)
    joint_without, warm_without = found.values(metric, None, 0.0)
    best = ColdBoost(joint=False)
    for kappa in kappas:
        for offset in offsets:
            joint, warm = found.values(metric, kappa, offset)
            gain = joint / joint_without - 1 if joint_without else joint
            share = warm / warm_without if warm_without else 1.0
            if share >= warm_floor and gain > (best.gain if best.joint else 0.0):
                best = ColdBoost(True, kappa, offset, share, gain)
    return best


def highest_place(
    scorer: Scorer,
    targets: Rows,
    seen: Rows,
    cold: Tensor,
    metric: TopKMetric,
    deviations: Tensor,
    excluded: Tensor | None = None,
    *,
    offsets: Sequence[float] = OFFSETS,
    warm_floor: float = UNTOLD_WARM_FLOOR,
) -> ColdBoost:
    """The largest offset at which the warm items keep their quality, with factor 1, where no cold item is a target.

    Args:
        scorer: as for :func:`choose_cold_boost`, like the rest.
        targets: warm items.
        seen: as many rows.
        cold: ``[n_items]`` bool.
        metric: of the warm items.
        deviations: ``[U]``.
        excluded: ``[n_items]`` bool.
        offsets: offsets tried.
        warm_floor: share of the warm metric without cold items that must remain.

    Returns:
        The boost; the smallest offset where none keeps the floor, or there is nothing to measure it by.
    """
    lowest = ColdBoost(True, 1.0, min(offsets))
    if not bool((targets.sizes > 0).any()):
        return lowest
    found = _first_places(scorer, targets, seen, cold, metric.k, deviations, excluded)
    if not bool((found.n_warm_targets > 0).any()):
        return lowest
    _, without = found.values(metric, None, 0.0)
    for offset in sorted(offsets, reverse=True):
        _, warm = found.values(metric, 1.0, offset)
        share = warm / without if without else 1.0
        if share >= warm_floor:
            return ColdBoost(True, 1.0, offset, share)
    return lowest


def _first_places(
    scorer: Scorer, targets: Rows, seen: Rows, cold: Tensor, k: int, deviations: Tensor, excluded: Tensor | None
) -> _Candidates:
    rows = torch.nonzero(targets.sizes).squeeze(1)
    warm_targets = targets.keep(~cold[targets.ids])
    parts: list[tuple[Tensor, Tensor, Tensor, Tensor]] = []
    for chunk in rows.split(max(1, CHUNK_ELEMENTS // len(cold))):
        scores = scorer(chunk)
        relevant = hide_seen(scores, seen.select(chunk), targets.select(chunk), excluded)
        assert relevant is not None
        halves: list[Tensor] = []
        for side in (~cold, cold):
            top, place = scores[:, side].topk(min(k, int(side.sum())), dim=1)
            halves += [top, relevant[:, side].gather(1, place)]
        parts.append((halves[0], halves[1], halves[2], halves[3]))
    scores, hits, cold_scores, cold_hits = (torch.cat(columns) for columns in zip(*parts, strict=True))
    return _Candidates(
        scores, hits, cold_scores, cold_hits, deviations[rows, None], warm_targets.sizes[rows], targets.sizes[rows]
    )
