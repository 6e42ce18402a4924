r"""The next-item blocks of catalogues so large that no matrix of items x items is formed.

In the notation of :mod:`recbole_llm.fitting.next_item` and :mod:`recbole_llm.fitting.neighbourhood`, with A_s = Z'Z + R, K = Z'Y,
L the content directions times sqrt(t_m lam g), U = A_s^-1 L and S = (I + L'U)^-1,

    transitions   T = A^-1 K ~ M K - U S (K'U)'      M K sparse, its rows cut to the largest entries
    content       C = A^-1 L L' = U S L'

The product M K has thousands of entries a row before they are cut. It is made and cut a stretch of rows at a time.
"""

from collections.abc import Mapping
from dataclasses import replace
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from recbole_llm.fitting.factors import Incidence, Product
from recbole_llm.fitting.large_catalogue import NEIGHBOURS_OF_FIT, allowed_bytes, local_bytes
from recbole_llm.fitting.neighbourhood import (
    KEPT,
    direct_rows,
    gram_entries,
    largest_of_rows,
    local_inverse,
    solve_columns,
    woodbury_core,
)
from recbole_llm.fitting.next_item_rows import CONTENT, TRANSITIONS, NextItemSetting, prefixes, ridge_of
from recbole_llm.scoring.block import LinearBlock
from recbole_llm.scoring.rows import Rows

PRODUCTS_AT_ONCE = 2**24  # multiply-adds of M K whose entries are held before they are cut
MAX_STEPS = 8_000_000  # prefixes; longer data are thinned evenly


class LocalNextItem:
    """Solves for the blocks under one setting after another; what settings share is kept.

    Args:
        train: all training histories, with ranks.
        n_items: size of the catalogue.
        directions: content of the items by modality, ``[n_items, f]``.

    Attributes:
        refused: why nothing can be solved for, in words; empty where it can.
    """

    def __init__(self, train: Rows, n_items: int, directions: Mapping[str, Tensor]) -> None:
        self.train, self.n_items, self.directions = train, n_items, directions
        columns = sum(each.shape[1] for each in directions.values())
        needed = local_bytes(gram_entries(train, n_items), n_items, NEIGHBOURS_OF_FIT, columns)
        self.refused = ""
        if needed > (allowed := allowed_bytes(n_items)):
            self.refused = (
                f"{n_items} items are too many for a matrix of all their pairs, and neighbourhoods would hold "
                f"{needed / 2**30:.1f} GiB of at most {allowed / 2**30:.1f}"
            )
        self._rows_of: tuple[float, float] | None = None
        self._gram: Any = None
        self._follows: Any = None
        self._product: Product | None = None
        self._images_of: tuple[float, float, float] | None = None
        self._images: dict[str, Tensor] = {}

    def _prepare(self, setting: NextItemSetting) -> None:
        if self._rows_of == (setting.tau, setting.floor):
            return
        self._rows_of = setting.tau, setting.floor
        z, y = prefixes(self.train, self.n_items, setting.tau, setting.floor, MAX_STEPS)
        self._gram, self._follows = (z.T @ z).tocsr(), (z.T @ y).tocsr()
        self._gram.sort_indices()
        incidence = Incidence(direct_rows(z), self.n_items)
        self._product = lambda table: incidence.to_items(incidence.to_rows(table))

    def blocks(self, setting: NextItemSetting, neighbours: int = NEIGHBOURS_OF_FIT) -> tuple[LinearBlock, ...]:
        """Solve for the blocks, of scale 1: transitions, and content where the setting names some.

        Args:
            setting: the constants.
            neighbours: m.
        """
        self._prepare(setting)
        device = self.train.ids.device
        diagonal = torch.from_numpy(self._gram.diagonal())
        ridge, unit = ridge_of(diagonal, setting)
        inverse = local_inverse(self._gram, ridge.numpy(), neighbours)
        direct = direct_rows(_cut_product(inverse, self._follows, KEPT)).to(device)
        constants = setting.constants() | {"neighbours": float(neighbours), "kept": float(KEPT)}
        named = [(modality, weight) for modality, weight in setting.content if weight]
        if not named:
            zeros = torch.zeros(self.n_items, 1, device=device)
            first = LinearBlock(TRANSITIONS, zeros, zeros, decay=setting.tau, constants=constants, direct=direct)
            return (first,)
        roots = [(modality, (weight * unit) ** 0.5) for modality, weight in named]
        columns = torch.cat([root * self.directions[modality].cpu() for modality, root in roots], 1)
        images = torch.cat([root * self._image(modality, ridge, diagonal, setting) for modality, root in roots], 1)
        source = images @ woodbury_core(columns, images)
        back = torch.from_numpy(np.ascontiguousarray(self._follows.T @ images.numpy())).neg_()
        first = LinearBlock(
            TRANSITIONS, source.to(device), back.to(device), decay=setting.tau, constants=constants, direct=direct
        )
        content = LinearBlock(CONTENT, source.to(device), columns.to(device), decay=setting.tau, constants=constants)
        return first, content

    def _image(self, modality: str, ridge: Tensor, diagonal: Tensor, setting: NextItemSetting) -> Tensor:
        """A_s^-1 E of a modality."""
        key = setting.tau, setting.floor, setting.ridge
        if self._images_of != key:
            self._images_of, self._images = key, {}
        if modality not in self._images:
            product = self._product
            assert product is not None
            wanted = self.directions[modality].cpu().to(ridge.dtype)
            self._images[modality] = solve_columns(
                lambda table: product(table) + ridge[:, None] * table, diagonal + ridge, wanted
            )
        return self._images[modality]


def _cut_product(left: Any, right: Any, kept: int) -> Any:
    """The product of two sparse matrices with the ``kept`` largest entries of every row."""
    of_entry = np.diff(right.indptr)[left.indices]
    cost = np.append(0, np.cumsum(of_entry, dtype=np.int64))[left.indptr]
    parts, start, n = [], 0, left.shape[0]
    while start < n:
        stop = max(start + 1, int(np.searchsorted(cost, cost[start] + PRODUCTS_AT_ONCE, side="right")) - 1)
        parts.append(largest_of_rows(left[start:stop] @ right, kept))
        start = stop
    return sparse.vstack(parts, format="csr")


def finer(blocks: tuple[LinearBlock, ...], anew: tuple[LinearBlock, ...]) -> tuple[LinearBlock, ...]:
    """Give blocks that were solved for once more the scales and decays of the first ones."""
    return tuple(replace(new, scale=old.scale, decay=old.decay) for old, new in zip(blocks, anew, strict=True))
