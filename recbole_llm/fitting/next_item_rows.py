r"""Prefixes of histories, their next items, and the constants of a next-item solve.

A row of Z is the prefix of a history at one of its items, at most ``MAX_PREFIX`` long. The item at rank r of the prefix has
weight max(exp(-r / tau), floor). The row of Y is the item that follows. :mod:`recbole_llm.fitting.next_item` has the formulas.
"""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import torch
from scipy import sparse
from torch import Tensor

from recbole_llm.scoring.rows import Rows

TRANSITIONS, CONTENT = "next_item", "next_item_content"  # names of the two blocks
RIDGE_EXPONENT = 0.25
MAX_PREFIX = 40
MAX_STEPS = 400_000  # prefixes; longer data are thinned evenly


@dataclass(frozen=True)
class NextItemSetting:
    """Constants of one solve, in the notation of the module docstring.

    Attributes:
        tau: by which the prefixes fade.
        floor: the least weight of an item of a prefix.
        ridge: lam.
        content: modality and t_m of every modality that enters.
    """

    tau: float
    ridge: float
    floor: float = 0.0
    content: tuple[tuple[str, float], ...] = ()

    def with_content(self, modality: str, weight: float) -> "NextItemSetting":
        """Return the same constants with another weight of a modality; 0 leaves it out."""
        others = [each for each in self.content if each[0] != modality]
        return replace(self, content=(*others, (modality, weight)) if weight else tuple(others))

    def weight_of(self, modality: str) -> float:
        """Return t_m; 0 for a modality that does not enter."""
        return dict(self.content).get(modality, 0.0)

    def constants(self) -> dict[str, float]:
        """Convert to the constants of a block."""
        numbers = {"tau": self.tau, "ridge": self.ridge, "floor": self.floor}
        return numbers | {f"content.{modality}": weight for modality, weight in self.content}

    @classmethod
    def from_constants(cls, constants: Mapping[str, float]) -> "NextItemSetting":
        """Invert :meth:`constants`; those of version 0.1 have neither a floor nor content."""
        content = tuple(
            (key.removeprefix("content."), weight) for key, weight in constants.items() if key.startswith("content.")
        )
        return cls(constants["tau"], constants["ridge"], constants.get("floor", 0.0), content)

    def __str__(self) -> str:
        text = [f"{modality} weight {weight:g}" for modality, weight in self.content] or ["no content"]
        return ", ".join([f"decay {self.tau:g}, floor {self.floor:g}, ridge {self.ridge:g}", *text])


@dataclass(frozen=True)
class Prefixes:
    """Every item of a history but the first, and the items before each.

    Attributes:
        targets: ``[S]`` int64, places of the items that follow among the entries of the histories.
        steps: ``[P]`` int64, the place in ``targets`` that each item of a prefix belongs to, ascending.
        sources: ``[P]`` int64, places of the items of the prefixes among the entries of the histories.
        back: ``[P]`` int64, 0 for the item just before the target.
    """

    targets: np.ndarray
    steps: np.ndarray
    sources: np.ndarray
    back: np.ndarray


def prefixes_of(ranked: Rows, longest: int, most: int | None = MAX_STEPS) -> Prefixes:
    """List the prefixes of all histories.

    Args:
        ranked: histories, with ranks.
        longest: items of a prefix that count, the newest ones.
        most: prefixes that are kept, evenly; ``None`` for all.
    """
    assert ranked.ranks is not None
    row = ranked.row_of_entry().cpu().numpy()
    order = np.lexsort((-ranked.ranks.cpu().numpy(), row))  # oldest first
    place = np.arange(len(order)) - ranked.offsets.cpu().numpy()[row[order]]
    at = np.nonzero(place)[0]  # every item but the first of its row is a target
    if most is not None and len(at) > most:
        at = at[np.linspace(0, len(at) - 1, most).astype(np.int64)]
    length = np.minimum(place[at], longest)
    step = np.repeat(np.arange(len(at)), length)
    back = np.arange(len(step)) - np.repeat(np.cumsum(length) - length, length)
    return Prefixes(order[at], step, order[at[step] - 1 - back], back)


def longest_of(tau: float, floor: float) -> int:
    """Choose how many items of a prefix count: without a floor, those whose weight is above some thousandths."""
    return MAX_PREFIX if floor else min(MAX_PREFIX, int(np.ceil(5 * tau)))


def weights_of(ranked: Rows, prefixes: Prefixes, tau: float, floor: float) -> tuple[np.ndarray, np.ndarray | None]:
    """Compute the entries of Z, ``[P]`` float32, and those of Y, ``[S]`` float32 or ``None`` for ones.

    Args:
        ranked: the histories of ``prefixes``; their weights are c^b and their confidence is c^a of
            :mod:`recbole_llm.fitting.next_item`.
        prefixes: S rows with P entries.
        tau: decay.
        floor: least weight without the factor c^b.
    """
    weight = np.maximum(np.exp(-prefixes.back / tau), floor).astype(np.float32)
    if ranked.weights is not None:
        weight *= ranked.weights.cpu().numpy()[prefixes.sources]
    if ranked.confidence is None:
        return weight, None
    root = np.sqrt(ranked.confidence.cpu().numpy()[prefixes.targets])  # in Z and in Y, so that products hold it once
    return weight * root[prefixes.steps], root


def matrices_of(
    ranked: Rows, n_items: int, prefixes: Prefixes, weight: np.ndarray, target_weight: np.ndarray | None = None
) -> tuple[Any, Any]:
    """Write Z and Y out as sparse matrices of SciPy, ``[S, n_items]`` float32 each.

    Args:
        ranked: the histories of ``prefixes``.
        n_items: size of the catalogue.
        prefixes: S rows.
        weight: ``[P]`` float32, entries of Z.
        target_weight: ``[S]`` float32, entries of Y; ``None`` for ones.
    """
    items, n_steps = ranked.ids.cpu().numpy(), len(prefixes.targets)
    shape = (n_steps, n_items)
    entries = np.ones(n_steps, np.float32) if target_weight is None else target_weight
    z = sparse.csr_matrix((weight, (prefixes.steps, items[prefixes.sources])), shape=shape)
    y = sparse.csr_matrix((entries, (np.arange(n_steps), items[prefixes.targets])), shape=shape)
    return z, y


def prefixes(
    ranked: Rows, n_items: int, tau: float, floor: float = 0.0, most: int | None = MAX_STEPS
) -> tuple[Any, Any]:
    """Collect Z and Y of the module docstring, ``[steps, n_items]`` float32 each, as sparse matrices of SciPy.

    Args:
        ranked: training histories, with ranks.
        n_items: size of the catalogue.
        tau: decay of the prefixes.
        floor: least weight of an item of a prefix.
        most: steps that are kept, evenly; ``None`` for all.
    """
    found = prefixes_of(ranked, longest_of(tau, floor), most)
    return matrices_of(ranked, n_items, found, *weights_of(ranked, found, tau, floor))


def ridge_of(diagonal: Tensor, setting: NextItemSetting) -> tuple[Tensor, float]:
    """Compute the diagonal of R, ``[n]``, and its unit lam g.

    Args:
        diagonal: of Z'Z, ``[n]``; 0 for items of no prefix, which get the unit.
        setting: the constants.
    """
    known = diagonal > 0
    scale = diagonal[known].mean()
    unit = setting.ridge * float(scale)
    return torch.where(known, unit * (diagonal / scale).clamp(min=1e-6) ** RIDGE_EXPONENT, unit), unit
