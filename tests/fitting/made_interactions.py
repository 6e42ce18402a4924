"""Made interactions in groups of items, as training rows and validation, for the tests beside this file."""

import torch

from recbole_llm.fitting.ease import Kernel, Setting
from recbole_llm.fitting.validation import TopKMetric, Validation
from recbole_llm.scoring.rows import rows_from_pairs


def interactions(n_users=60, n_items=25, seed=0, groups=5):
    """Users who mostly stay within one of a few groups of items; item 0 and the last item have no interaction."""
    generator = torch.Generator().manual_seed(seed)
    group = torch.randint(groups, (n_users,), generator=generator)
    chance = torch.where(group[:, None] == torch.arange(n_items) % groups, 0.6, 0.06)
    X = torch.rand(n_users, n_items, generator=generator) < chance
    X[:, [0, n_items - 1]] = False
    held_out = X & (torch.rand(X.shape, generator=generator) < 0.2)
    return rows_of(X & ~held_out), rows_of(held_out), X & ~held_out


def rows_of(mask):
    row, item = mask.nonzero(as_tuple=True)
    return rows_from_pairs(row, item, len(mask))


def selection_of(train, valid, metric="ndcg@5"):
    return Validation(train, valid, train, TopKMetric.parse(metric))


def texts(vectors, present=None):
    """Content of one modality; every item has it unless ``present`` says otherwise."""
    return {"text": (vectors, torch.ones(len(vectors), dtype=torch.bool) if present is None else present)}


def of_text(weight, power=1, **constants):
    return Setting(kernels=(Kernel("text", weight, power),), **constants)
