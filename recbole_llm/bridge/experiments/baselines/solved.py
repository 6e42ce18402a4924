"""What a baseline gives back, and what all of them share: searches along one constant, matrices without the padding item."""

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import TypeVar

import numpy as np
import torch
import torch.nn.functional as F
from scipy import sparse
from torch import Tensor

from recbole_llm.bridge.experiments.leave_one_out import LeaveOneOut
from recbole_llm.fitting.next_item_rows import MAX_STEPS
from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.score import Scorer

MAX_ITEMS = 20_000  # of rows that hold a matrix of all pairs of items
DECAYS = (1.0, 2.0, 4.0, 8.0)  # tau of exp(-rank / tau), by which a history fades where it is read

T = TypeVar("T")


class RefusedRowError(ValueError):
    """Raised by a row that this data set cannot have; it says why."""


@dataclass(frozen=True)
class Solved:
    """A fitted baseline.

    Attributes:
        setting: what validation chose, in words.
        valid: its NDCG@10 on validation.
        scorer: scores of known users at test.
    """

    setting: str
    valid: float
    scorer: Scorer


def refuse_many(name: str, n_items: int, why: str = "holds an item-item matrix") -> None:
    """Refuse a catalogue whose pairs of items take too much memory or time.

    Raises:
        RefusedRowError: if there are more than ``MAX_ITEMS`` items.
    """
    if n_items > MAX_ITEMS:
        raise RefusedRowError(f"{name} {why}, and {n_items} items are more than {MAX_ITEMS}; leave it out of --rows.")


def content_of(name: str, rows: LeaveOneOut) -> Tensor:
    """Put the content vectors of all modalities side by side, each of unit length, ``[N, f]`` float32.

    Items without a modality have zeros there.

    Raises:
        RefusedRowError: if the items have no content.
    """
    parts = [F.normalize(vectors.float(), dim=1) * present[:, None] for vectors, present in rows.data.content.values()]
    if not parts:
        raise RefusedRowError(
            f"{name} reads the items' content, and the data set has none; name an encoder and the columns of the text, or leave "
            f"{name} out of --rows."
        )
    return torch.cat(parts, 1)


def steps_read(history: Rows) -> str:
    """Say how many steps from an item to the next a row reads, where that is not all of them; else an empty string."""
    steps = int((history.sizes - 1).clamp(min=0).sum())
    return f", {MAX_STEPS:,} of {steps:,} steps to a next item read" if steps > MAX_STEPS else ""


def keep_rising(values: Sequence[T], value: Callable[[T], float]) -> T:
    """Try values in their order until a result falls; return the best tried, the first of equals."""
    best, most = values[0], value(values[0])
    for each in values[1:]:
        found = value(each)
        if found <= most:
            break
        best, most = each, found
    return best


def weighted_histories(histories: Rows, n_items: int, decay: float | None) -> sparse.csr_matrix:
    """Write histories as a sparse matrix ``[U, n_items]`` float32: exp(-rank / decay), ones without a decay."""
    weights = None if decay is None else histories.decayed(decay).weights
    entries = np.ones(len(histories.ids), np.float32) if weights is None else weights.numpy()
    shape = (len(histories.sizes), n_items)
    return sparse.csr_matrix((entries, histories.ids.numpy(), histories.offsets.numpy()), shape=shape)


def sparse_scorer(histories: sparse.csr_matrix, weights: sparse.csr_matrix) -> Scorer:
    """Return a scorer of ``histories @ weights``, ``[U, N]`` and ``[N, N]``."""

    def scorer(users: Tensor) -> Tensor:
        return torch.from_numpy((histories[users.numpy()] @ weights).toarray())

    return scorer
