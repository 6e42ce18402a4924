r"""Vectors of items that nobody has touched, from their content.

A kernel ridge map takes content directions e_m (:func:`recbole_llm.fitting.ease.content_directions`) of the modalities m that an
item has to what the model learned for trained items,

    f(e) = k(e) (K + mu I)^-1 V,    k(e, e_i) = sum_{m that both have} s_m exp(-||e_m - e_im||^2 / h),

V the target vectors, biases and source vectors of the trained items with content, s_m the share of a modality, 1/M of M modalities
where nothing else was chosen. The map is linear in V: mapping vectors is the same as mapping columns of scores. An item unlike all
others gets the zero vector. A modality that an item lacks is left out of the sum; the sum stays a kernel, which a mean over the
shared modalities is not. A modality of share 0 takes no part: items that have nothing else have no content.
"""

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import torch
from torch import Tensor

from recbole_llm.fitting.ease import content_centre, content_directions
from recbole_llm.fitting.warm_items import ContentTables

BANDWIDTH = 0.8  # h
MU = 1.0  # without validation data; placement.py chooses
MAX_ANCHORS = 20_000  # 1.6 GB for K in float32

Shares = Mapping[str, float]
"""By modality, its part of the kernel; they add up to 1. Empty: equal parts of all modalities."""


@dataclass(frozen=True, eq=False)
class Anchors:
    """Content of some items, as the kernel reads it. Mappings go by modality.

    Attributes:
        directions: ``[m, f]``, zero where an item lacks the modality.
        present: ``[m]`` bool.
        shares: of the modalities in the kernel.
    """

    directions: Mapping[str, Tensor]
    present: Mapping[str, Tensor]
    shares: Shares = field(default_factory=dict)

    def at(self, rows: Tensor) -> "Anchors":
        """Select some rows."""
        return Anchors(
            {modality: table[rows] for modality, table in self.directions.items()},
            {modality: mask[rows] for modality, mask in self.present.items()},
            self.shares,
        )

    def kernel(self, other: "Anchors", bandwidth: float) -> Tensor:
        """Compute the kernel, ``[len(self), len(other)]``, the masked sum of the module docstring."""
        total: Tensor | None = None
        for modality, directions in self.directions.items():
            part = _rbf(directions, other.directions[modality], bandwidth)
            mine, theirs = self.present[modality], other.present[modality]
            if not bool(mine.all()) or not bool(theirs.all()):
                part.mul_(mine[:, None]).mul_(theirs)
            if self.shares:
                part.mul_(self.shares[modality])
            total = part if total is None else total.add_(part)
        assert total is not None
        return total if self.shares or len(self.directions) == 1 else total.div_(len(self.directions))


@dataclass(frozen=True, eq=False)
class ColdMap:
    """The fitted map; also how an item is added later without training.

    Attributes:
        centres: by modality ``[f]``, mean vector of the catalogue it was fitted on.
        anchors: content of the m trained items.
        coefficients: ``[m, v]``, (K + mu I)^-1 V.
        bandwidth: h.
    """

    centres: Mapping[str, Tensor]
    anchors: Anchors
    coefficients: Tensor
    bandwidth: float = BANDWIDTH

    def __call__(self, features: Mapping[str, Tensor]) -> Tensor:
        """Vectors of items by modality, ``[B, f]`` each -> values ``[B, v]``. A modality that is not given is absent."""
        directions, present = {}, {}
        some = next(iter(features.values()))
        for modality, centre in self.centres.items():
            given = features.get(modality)
            present[modality] = torch.full((len(some),), given is not None, device=some.device)
            vectors = some.new_zeros(len(some), len(centre)) if given is None else given
            directions[modality] = content_directions(vectors, present[modality], centre)
        return (
            Anchors(directions, present, self.anchors.shares).kernel(self.anchors, self.bandwidth) @ self.coefficients
        )

    def of_modality(self, modality: str) -> tuple[Tensor, Tensor, Tensor]:
        """Return the map of items that have this modality alone: centre ``[f]``, anchors ``[m', f]``, coefficients ``[m', v]``."""
        has = self.anchors.present[modality]
        share = self.anchors.shares.get(modality, 1 / len(self.centres))
        return self.centres[modality], self.anchors.directions[modality][has], self.coefficients[has] * share


def _rbf(a: Tensor, b: Tensor, bandwidth: float) -> Tensor:
    """RBF kernel of directions, ``[len(a), len(b)]``."""
    squared = a.square().sum(1)[:, None] + b.square().sum(1) - 2 * a @ b.T
    return squared.clamp_(min=0.0).div_(-bandwidth).exp_()


def any_present(content: ContentTables) -> Tensor:
    """Mark the items that have some content, ``[n_items]`` bool."""
    return torch.stack([present for _, present in content.values()]).any(0)


def weighed(content: ContentTables, shares: Shares | None) -> ContentTables:
    """Leave out the modalities that have no share."""
    return {modality: table for modality, table in content.items() if shares.get(modality)} if shares else content


def share_candidates(modalities: Sequence[str]) -> list[Shares]:
    """List the shares to choose among: equal ones, each modality three times the others, each left out.

    Example:
        >>> share_candidates(["text", "image"])[1]
        {'text': 0.75, 'image': 0.25}
    """
    M = len(modalities)
    if M < 2:
        return [{}]
    more = [{each: (3.0 if each == one else 1.0) / (M + 2) for each in modalities} for one in modalities]
    without = [{each: 0.0 if each == one else 1 / (M - 1) for each in modalities} for one in reversed(modalities)]
    return [{}, *more, *without]


def fit_cold_map(
    content: ContentTables,
    warm: Tensor,
    values: Tensor,
    popularity: Tensor | None = None,
    *,
    mu: float = MU,
    bandwidth: float = BANDWIDTH,
    max_anchors: int = MAX_ANCHORS,
    shares: Shares | None = None,
) -> ColdMap:
    """Fit the map on the warm items that have content.

    Args:
        content: of the items.
        warm: ``[n_items]`` bool, trained items.
        values: ``[n_items, v]`` float32, what to map to: target vectors, bias, source vectors side by side. Rows outside
            ``warm`` are not read.
        popularity: ``[n_items]``; with more than ``max_anchors`` items, the most popular are used. ``None`` for the first.
        mu: ridge, in units of the kernel's diagonal, 1 for an item that has every modality.
        bandwidth: h.
        max_anchors: items the map is fitted on at most; it holds a matrix of their number squared.
        shares: of the modalities; ``None`` for equal ones.

    Raises:
        ValueError: if no warm item has content.
    """
    known, items, centres = _anchor_items(content, warm, popularity, max_anchors, shares)
    anchors = items.at(known)
    coefficients = torch.cholesky_solve(values[known].float(), _factor(anchors, mu, bandwidth))
    return ColdMap(centres, anchors, coefficients, bandwidth)


def map_weights(
    content: ContentTables,
    warm: Tensor,
    ids: Tensor,
    popularity: Tensor | None = None,
    *,
    mu: float = MU,
    bandwidth: float = BANDWIDTH,
    max_anchors: int = MAX_ANCHORS,
    shares: Shares | None = None,
) -> tuple[Tensor, Tensor]:
    """Express the map of some items as weights of the items it is fitted on.

    That is cheaper than the map if values are many.

    Args:
        content: as in :func:`fit_cold_map`, and all arguments but ``ids``.
        warm: as there.
        ids: ``[C]``, items that have content.
        popularity: as there.
        mu: as there.
        bandwidth: as there.
        max_anchors: as there.
        shares: as there.

    Returns:
        The m items fitted on, ``[m]`` int64, and ``[C, m]`` float32: its product with their values is the map of ``ids``.

    Raises:
        ValueError: if no warm item has content.
    """
    known, items, _ = _anchor_items(content, warm, popularity, max_anchors, shares)
    anchors = items.at(known)
    L = _factor(anchors, mu, bandwidth)
    return known, torch.cholesky_solve(anchors.kernel(items.at(ids), bandwidth), L).T


def _anchor_items(
    content: ContentTables, warm: Tensor, popularity: Tensor | None, max_anchors: int, shares: Shares | None
) -> tuple[Tensor, Anchors, dict[str, Tensor]]:
    """Ids of the items fitted on, the content of all items, and its centres."""
    content = weighed(content, shares)
    known = torch.nonzero(warm & any_present(content)).squeeze(1)
    if not len(known):
        raise ValueError(
            "no trained item has content (text, image...); the cold map needs some. Set cold_map to none or load item texts."
        )
    if len(known) > max_anchors:
        if popularity is not None:
            known = known[torch.argsort(popularity[known], descending=True, stable=True)]
        known = known[:max_anchors].sort().values
    centres = {modality: content_centre(vectors, present) for modality, (vectors, present) in content.items()}
    directions = {
        modality: content_directions(vectors, present, centres[modality])
        for modality, (vectors, present) in content.items()
    }
    masks = {modality: present for modality, (_, present) in content.items()}
    return known, Anchors(directions, masks, shares or {}), centres


def _factor(anchors: Anchors, mu: float, bandwidth: float) -> Tensor:
    """Cholesky factor of K + mu I."""
    K = anchors.kernel(anchors, bandwidth)
    K.diagonal().add_(mu)
    return torch.linalg.cholesky(K)
