r"""Items whose content and behaviour disagree: swapped texts, wrong pictures, misplaced categories.

    s_ij = G_ij / sqrt(G_ii G_jj),    G = X' diag(1 / |u|) X              behaviour: the same users have both
    c_ij = <e_i, e_j>                                                     content: cosine of centred directions
    a_i  = mean over the K items j nearest to i by s of the share of all items that are less like i than j by c

Where content says nothing of behaviour a_i is about 1/2. As a yardstick every item is measured with another item's content
too, drawn at random: whoever is below the median of those looks like an item with another's content.
"""

from collections.abc import Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from recbole_llm.fitting.ease import content_centre, content_directions
from recbole_llm.fitting.warm_items import ContentTables
from recbole_llm.scoring.rows import Rows

NEIGHBOURS = 30  # K
LEAST_USERS = 10  # of an item whose behaviour can be told
MAX_ITEMS = 50_000  # beyond, n^2 products of content take minutes
CHUNK_BYTES = 1 << 27


@dataclass(frozen=True, eq=False)
class Agreement:
    """How well one modality agrees with behaviour.

    Attributes:
        values: ``[n_items]`` float32, a_i; NaN for items without this content or with too few users.
        of_others: ``[n_items]`` float32, the same with another item's content.
    """

    values: Tensor
    of_others: Tensor

    @property
    def threshold(self) -> float:
        """The median of :attr:`of_others`; NaN where no item can be told."""
        return float(self.of_others.nanmedian()) if bool((~self.of_others.isnan()).any()) else float("nan")

    def suspects(self, most: int) -> list[int]:
        """List the items below the threshold, the least agreeing first.

        Args:
            most: how many at most.
        """
        known = torch.nonzero(self.values < self.threshold).squeeze(1)
        order = torch.argsort(self.values[known], stable=True)[:most]
        return [int(item) for item in known[order]]


def agreements(history: Rows, content: ContentTables, n_items: int, seed: int = 0) -> Mapping[str, Agreement]:
    """Measure each modality; empty for more than ``MAX_ITEMS`` items.

    Args:
        history: training interactions, one row per user; what they weigh is not read.
        content: of the items.
        n_items: size of the catalogue, padding included.
        seed: of the draw of other items' content.
    """
    users = torch.bincount(history.ids, minlength=n_items)
    told = users >= LEAST_USERS
    if int(told.sum()) > MAX_ITEMS:
        return {}
    return {
        modality: _agreement(history, vectors, present & told, n_items, seed)
        for modality, (vectors, present) in content.items()
    }


def _agreement(history: Rows, vectors: Tensor, known: Tensor, n_items: int, seed: int) -> Agreement:
    values = torch.full((n_items,), float("nan"), device=vectors.device)
    others = values.clone()
    items = torch.nonzero(known).squeeze(1)
    if len(items) <= NEIGHBOURS + 1:
        return Agreement(values, others)
    directions = content_directions(vectors, known, content_centre(vectors, known))[items]
    # each item's content is another's, never its own: a circle through the items in random order
    circle = torch.randperm(len(items), generator=torch.Generator().manual_seed(seed)).to(items.device)
    swapped = torch.empty_like(directions)
    swapped[circle] = directions[circle.roll(1)]
    for start, near in _behaviour(history, items, n_items):
        rows = torch.arange(start, start + len(near), device=items.device)
        values[items[rows]] = _places(directions[rows] @ directions.T, near, rows)
        others[items[rows]] = _places(swapped[rows] @ directions.T, near, rows)
    return Agreement(values, others)


def _behaviour(history: Rows, items: Tensor, n_items: int) -> list[tuple[int, Tensor]]:
    """Chunks of items, each from where and the places ``[c, K]`` of the nearest by behaviour."""
    place = torch.full((n_items,), -1, device=items.device)
    place[items] = torch.arange(len(items), device=items.device)
    kept = history.keep(place[history.ids] >= 0)
    owner, ids = kept.row_of_entry(), place[kept.ids]
    n_users = len(kept.offsets) - 1
    weights = (1.0 / kept.sizes.clamp(min=1))[owner].float()
    ones = torch.ones_like(weights)
    by_item = torch.sparse_coo_tensor(
        torch.stack([ids, owner]), weights, (len(items), n_users), check_invariants=False
    ).coalesce()
    diagonal = torch.zeros(len(items), device=items.device).index_add_(0, ids, weights)
    order = torch.argsort(ids, stable=True)
    ids, owner = ids[order], owner[order]
    width = max(1, CHUNK_BYTES // (4 * max(n_users, len(items), 1)))
    found = []
    for start in range(0, len(items), width):
        stop = min(start + width, len(items))
        low, high = (int(x) for x in torch.searchsorted(ids, torch.tensor([start, stop], device=ids.device)))
        columns = torch.zeros(n_users, stop - start, device=items.device)
        columns[owner[low:high], ids[low:high] - start] = ones[low:high]
        similar = torch.sparse.mm(by_item, columns).T / diagonal.sqrt()
        similar[torch.arange(stop - start), torch.arange(start, stop)] = -1.0
        found.append((start, similar.topk(NEIGHBOURS, dim=1).indices))
    return found


def _places(likeness: Tensor, near: Tensor, own: Tensor) -> Tensor:
    """Mean share of the other items that are less alike than each of the near ones, ``[c]``."""
    likeness[torch.arange(len(own)), own] = -2.0
    ranks = likeness.argsort(dim=1).argsort(dim=1).float()  # 0 is the item itself
    return (ranks.gather(1, near) - 1).mean(1) / (likeness.shape[1] - 2)
