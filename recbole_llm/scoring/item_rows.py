"""Which rows of the items this process holds: all of them, or a part where several processes share a catalogue.

Towers, losses and :class:`recbole_llm.scoring.score.Score` ask this object for whatever depends on that. N items in all, n of
them here, B users, D columns.
"""

from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recbole_llm.scoring.rows import Rows, pool
from recbole_llm_kernels import catalog_bce, catalog_ce, pair_bce, pair_dot, pool_rows, score_topk
from recbole_llm_kernels import sharded as over_ranks


class AllRows:
    """Every item is in this process.

    Args:
        n_items: N, padding row 0 included.

    Attributes:
        own: the items whose rows are here.
        sharded: whether the rows are spread over processes.
    """

    sharded = False

    def __init__(self, n_items: int) -> None:
        self.n_items = n_items
        self.own = slice(0, n_items)

    @property
    def padding_rows(self) -> int:
        """How many of the first rows here are padding, 0 or 1."""
        return int(self.own.start == 0)

    @property
    def n_own(self) -> int:
        """Rows here, n."""
        return self.own.stop - self.own.start

    def listed(self) -> Tensor:
        """Mark the items here that a ranking may hold, ``[n]`` bool: all but padding."""
        listed = torch.ones(self.n_own, dtype=torch.bool)
        listed[: self.padding_rows] = False
        return listed

    def of(self, of_items: Tensor) -> Tensor:
        """Take the rows here of ``[N, ...]``: ``[n, ...]``."""
        return of_items

    def pool(self, vectors: Tensor, history: Rows, weights: Tensor | None) -> Tensor:
        """Sum the vectors of histories with weights, over all items, ``[B, D]``.

        Args:
            vectors: ``[n, D]``, the rows here.
            history: B rows of ids below N.
            weights: ``[nnz]``; ``None`` for the history's own.
        """
        if vectors.requires_grad and weights is not None:
            # this gradient takes a fraction of the time of embedding_bag's
            return pool_rows(vectors, history.offsets, history.ids, weights)
        return pool(vectors, history, weights)

    def gather(self, scores: Tensor) -> Tensor:
        """Collect the scores of all items from those of the rows here, ``[B, n]`` -> ``[B, N]``."""
        return scores

    def lowest(self, values: Tensor, mask: Tensor) -> Tensor:
        """Find the smallest of ``values`` (``[n]``) where ``mask`` (``[n]`` bool) holds, over all items; 0 without any."""
        return values[mask].min() if bool(mask.any()) else values.new_zeros(())

    def catalog_loss(
        self,
        loss_type: str,
        *operands: Tensor,
        bias: Tensor,
        neg_weight: float,
        backend: str,
        confidence: Tensor | None = None,
    ) -> Tensor:
        """Sum of the rows' losses over the whole catalogue.

        Args:
            loss_type: ``catalog_bce`` or ``catalog_ce``.
            operands: queries ``[B, D]``, the candidates here ``[n, D]``, target offsets ``[B + 1]`` and ids.
            bias: ``[n]``.
            neg_weight: of the negatives; only ``catalog_bce`` reads it.
            backend: of the kernels.
            confidence: factor of every target's part of the loss, ``[nnz]``; ``None`` for ones. Under ``catalog_bce`` the
                negatives' part stays.
        """
        query, item, offsets, ids = operands
        if confidence is None:
            if loss_type == "catalog_ce":
                return catalog_ce(query, item, offsets, ids, item_bias=bias, reduction="sum", backend=backend)
            return catalog_bce(
                query, item, offsets, ids, item_bias=bias, neg_weight=neg_weight, reduction="sum", backend=backend
            )
        sizes = offsets.diff()
        row = torch.repeat_interleave(torch.arange(len(sizes), device=ids.device), sizes)
        if loss_type == "catalog_bce":  # the kernel weighs rows: what a target's weight adds to 1 is a loss of pairs
            plain = catalog_bce(
                query, item, offsets, ids, item_bias=bias, neg_weight=neg_weight, reduction="sum", backend=backend
            )
            label, weight = torch.ones_like(confidence), confidence - 1
            return plain + pair_bce(
                query, item, row, ids, label, item_bias=bias, weight=weight, reduction="sum", backend=backend
            )
        # sum_t c_t (log Z - s_t) = mean(c) sum_t (log Z - s_t) + sum_t (mean(c) - c_t) s_t
        mean = torch.zeros_like(query[:, 0]).index_add_(0, row, confidence.to(query.dtype)) / sizes.clamp(min=1)
        whole = catalog_ce(query, item, offsets, ids, item_bias=bias, weight=mean, reduction="sum", backend=backend)
        logits = pair_dot(query, item, row, ids, item_bias=bias, backend=backend)
        return whole + ((mean[row] - confidence) * logits).sum()

    def topk(self, query: Tensor, item: Tensor, k: int, **options: Any) -> Any:
        """Call :func:`recbole_llm_kernels.score_topk` over all items; ``item`` and the bias are the rows here."""
        return score_topk(query, item, k, **options)


class ShardedRows(AllRows):
    """Rank r holds the items [N r / R, N (r + 1) / R) of the R ranks of ``torch.distributed``.

    Every method is a collective: all ranks call it, in the same order and with the same users.

    Args:
        n_items: N.
        own: the items whose rows are here.
    """

    sharded = True

    def __init__(self, n_items: int, own: slice) -> None:
        super().__init__(n_items)
        self.own = own

    def of(self, of_items: Tensor) -> Tensor:
        """Copy the rows here of ``[N, ...]``."""
        return of_items[self.own].clone()

    def pool(self, vectors: Tensor, history: Rows, weights: Tensor | None) -> Tensor:
        """Sum as :meth:`AllRows.pool`: each rank's part of the sums, added up over the ranks."""
        if weights is None:
            weights = torch.ones_like(history.ids, dtype=torch.float32) if history.weights is None else history.weights
        here = (history.ids >= self.own.start) & (history.ids < self.own.stop)
        mine = Rows(history.offsets, history.ids, weights).keep(here)
        assert mine.weights is not None
        shifted = Rows(mine.offsets, mine.ids - self.own.start, mine.weights)
        return over_ranks.sum_over_ranks(super().pool(vectors, shifted, mine.weights))

    def gather(self, scores: Tensor) -> Tensor:
        """Collect as :meth:`AllRows.gather`, on every rank."""
        whole = scores.new_zeros(len(scores), self.n_items)
        whole[:, self.own] = scores
        dist.all_reduce(whole)
        return whole

    def lowest(self, values: Tensor, mask: Tensor) -> Tensor:
        """Find the minimum as :meth:`AllRows.lowest`, over all ranks."""
        least = values.masked_fill(~mask, torch.inf).min()
        dist.all_reduce(least, dist.ReduceOp.MIN)
        return torch.where(least.isinf(), 0.0, least)

    def catalog_loss(
        self,
        loss_type: str,
        *operands: Tensor,
        bias: Tensor,
        neg_weight: float,
        backend: str,
        confidence: Tensor | None = None,
    ) -> Tensor:
        """Compute the loss as :meth:`AllRows.catalog_loss`, the same number on every rank; without ``confidence``."""
        assert confidence is None  # refused where options are read
        if loss_type == "catalog_ce":
            return over_ranks.catalog_ce(*operands, item_bias=bias, reduction="sum")
        return over_ranks.catalog_bce(
            *operands, item_bias=bias, neg_weight=neg_weight, reduction="sum", backend=backend
        )

    def topk(self, query: Tensor, item: Tensor, k: int, **options: Any) -> Any:
        """Rank as :meth:`AllRows.topk`, the same places on every rank."""
        return over_ranks.score_topk(query, item, k, **options)
