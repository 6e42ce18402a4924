"""Scoring and losses for recommenders: fused from id lookup to loss, in Triton on a GPU and in PyTorch anywhere.

A row of ``user``, ``query`` or ``item`` is a vector; a matrix is an embedding table or the output of a tower. Shapes:

    P  (user, item) pairs        B  rows of a batch: users, or interactions
    N  items                     K  negatives of a row; M negatives shared by the batch
    D  dimensions of a vector    T  targets of all rows together

Needs PyTorch alone; Triton is loaded when an operator first runs on it.
"""

from recbole_llm_kernels.backends import default_backend
from recbole_llm_kernels.functional import (
    TopK,
    catalog_bce,
    catalog_ce,
    pair_bce,
    pair_dot,
    pair_sigmoid,
    sampled_bce,
    score_topk,
)
from recbole_llm_kernels.tower_ops import (
    fuses_scaled_bce,
    pool_rows,
    pool_rows_without_own,
    scaled_rows,
    scaled_sampled_bce,
)

__version__ = "0.1.0"

__all__ = [
    "TopK",
    "catalog_bce",
    "catalog_ce",
    "default_backend",
    "fuses_scaled_bce",
    "pair_bce",
    "pair_dot",
    "pair_sigmoid",
    "pool_rows",
    "pool_rows_without_own",
    "sampled_bce",
    "scaled_rows",
    "scaled_sampled_bce",
    "score_topk",
]
