"""Full-ranking evaluation without a ``[users, items]`` matrix, for our model and, on request, for stock ones.

RecBole scores ``eval_batch_size // n_items`` users at a time (one, beyond 4,096 items), marks their positives in a dense
matrix and selects the top items twice (``evaluator/collector.py:137-198``). Here a batch is as large as memory allows, the
top items are selected once, and a hit is looked up in the sorted positives. RecBole's own metrics are then computed from the
same two tensors, ``rec.items`` and ``rec.topk``; equal scores are ordered by the smaller id, where RecBole leaves the order
to ``torch.topk``.

Shapes: M rows (users, or interactions of a sequential model), N items, K places.
"""

from collections.abc import Callable, Iterator
from logging import getLogger
from typing import Any

import torch
from torch import Tensor

from recbole_llm.bridge import distributed
from recbole_llm.bridge.evaluation.rows import RankedRows, ranked_rows
from recbole_llm.bridge.options import EVAL_BACKENDS
from recbole_llm.fitting.validation import hide_seen
from recbole_llm.progress import progress_bar
from recbole_llm.scoring.rows import Rows
from recbole_llm_kernels import score_topk

SCORES = 2**24  # scores held at once where a model gives whole rows of them: 64 MiB of float32
QUERIES = 2**24  # elements of the queries held at once where it gives vectors
EVERY_SCORE = ("rec.meanrank", "rec.score", "data.label")  # what metrics ask the collector for that no ranking gives

_said: set[str] = set()  # reasons already in the log of this process


# ---------------------------------------------------------------- the k best items of every row


def rank_all(model: Any, rows: RankedRows, k: int, n_items: int, device: torch.device, progress: Any = None) -> Tensor:
    """Find the ``k`` best items of every row that are neither padding nor seen.

    Args:
        model: in evaluation mode; with ``item_vectors`` and ``user_vectors`` as ``LLMTwoTower``, or ``full_sort_predict``.
        rows: what to rank for.
        k: places K; may exceed N.
        n_items: N, padding item 0 included.
        device: the model's device.
        progress: wraps the batches, for a progress bar; called with them as a list.

    Returns:
        ``[M, K]`` int64 on the CPU; under several processes every process ranks a part (of the rows, or of the items
        where the model spreads them) and all get the whole. Where a
        row has fewer candidates, the remaining places hold its masked items in ascending order, as a stable sort of the
        masked scores would, then 0.
    """
    spread = getattr(model, "item_rows", None)
    shards = spread is not None and spread.sharded
    part = slice(0, len(rows)) if shards else distributed.own_part(len(rows))
    best = score_topk if spread is None else spread.topk
    by_vectors = getattr(model, "has_item_vectors", False)
    if by_vectors:
        item, bias = model.item_vectors()
        size = max(1, QUERIES // item.shape[1])
    else:
        item, bias, size = None, None, max(1, SCORES // n_items)
    batches = list(torch.arange(part.start, part.stop).split(size))
    found = []
    for index in batches if progress is None else progress(batches):
        first = int(index[0]) if len(index) else 0
        seen = None if rows.seen is None else rows.seen.stretch(first, first + len(index))
        if item is not None:
            query = model.user_vectors(rows.users[index].to(device))
            csr = {} if seen is None else {"seen_offsets": seen.offsets.to(device), "seen_ids": seen.ids.to(device)}
            ids = best(query, item, k, item_bias=bias, backend=model.options.kernel_backend, **csr).ids.cpu()
        else:
            scores = model.full_sort_predict(rows.batch(index).to(device)).view(-1, n_items)
            ids = _best(scores, seen, k)
        found.append(_fill(ids, seen))
    own = torch.cat(found) if found else torch.empty(0, k, dtype=torch.int64)
    return own if shards else distributed.gather_rows(own, device)


def _best(scores: Tensor, seen: Rows | None, k: int) -> Tensor:
    scores[:, 0] = -torch.inf
    if seen is not None:
        hide_seen(scores, seen.to(scores.device))
    places = min(k, scores.shape[1])
    value, ids = _largest(scores, places)
    ids = ids.masked_fill(value == -torch.inf, -1).cpu()
    return torch.nn.functional.pad(ids, (0, k - places), value=-1)


def _largest(scores: Tensor, k: int) -> tuple[Tensor, Tensor]:
    """Find the ``k`` largest of each row, descending, ties to the smaller column: values and columns, ``[B, k]``."""
    value, column = scores.topk(min(k + 1, scores.shape[1]), dim=1)
    if value.shape[1] > k:  # topk keeps any of the columns that tie for the last place
        tied = (value[:, k - 1] == value[:, k]).nonzero()[:, 0]
        value, column = value[:, :k], column[:, :k]
        if len(tied):
            ranked, order = scores[tied].sort(dim=1, descending=True, stable=True)
            value, column = value.index_copy(0, tied, ranked[:, :k]), column.index_copy(0, tied, order[:, :k])
    column, by_column = column.sort(1)
    value, by_value = value.gather(1, by_column).sort(dim=1, descending=True, stable=True)
    return value, column.gather(1, by_value)


def _fill(ids: Tensor, seen: Rows | None) -> Tensor:
    """Replace the -1 of rows with fewer candidates than places, see :func:`rank_all`."""
    for row in (ids[:, -1] < 0).nonzero()[:, 0].tolist():
        own = [] if seen is None else seen.ids[seen.offsets[row] : seen.offsets[row + 1]].tolist()
        empty = ids[row] < 0
        masked = sorted({0, *own})[: int(empty.sum())]
        ids[row, empty] = torch.tensor(masked + [0] * (int(empty.sum()) - len(masked)))
    return ids


def hits(ids: Tensor, positives: Rows, n_items: int) -> Tensor:
    """Look up each place among the row's positives: ``[M, K]`` int64 ids -> ``[M, K]`` int32, 1 for a hit."""
    keys = positives.row_of_entry() * n_items + positives.ids
    wanted = torch.arange(len(ids))[:, None] * n_items + ids
    at = torch.searchsorted(keys, wanted).clamp(max=len(keys) - 1)
    return (keys[at] == wanted).int()


# ---------------------------------------------------------------- in RecBole's trainers


def stock_reason(trainer: Any, loader: Any) -> str | None:
    """Say why this evaluation must take RecBole's own path; ``None`` if it can be streamed."""
    from recbole.data.dataloader import FullSortEvalDataLoader
    from recbole.model.abstract_recommender import AbstractRecommender

    if not isinstance(loader, FullSortEvalDataLoader):
        return "its candidates are sampled or labelled, not the whole catalogue"
    other = [need for need in EVERY_SCORE if trainer.eval_collector.register.need(need)]
    if other:
        return f"its metrics need {', '.join(other)}, that is, every score"
    if type(trainer.model).full_sort_predict is AbstractRecommender.full_sort_predict:
        return f"{type(trainer.model).__name__} has no full_sort_predict"
    return None


def evaluate(trainer: Any, loader: Any, show_progress: bool) -> Any:
    """Compute RecBole's metrics of the trainer's model on a full-ranking loader.

    The model is put into evaluation mode.
    """
    model, collector = trainer.model.eval(), trainer.eval_collector
    rows, n_items = ranked_rows(loader), loader._dataset.item_num
    ids = rank_all(model, rows, max(trainer.config["topk"]), n_items, trainer.device, _bar if show_progress else None)
    if collector.register.need("rec.items"):
        collector.data_struct.set("rec.items", ids)
    if collector.register.need("rec.topk"):
        found = hits(ids, rows.positives, n_items)
        collector.data_struct.set("rec.topk", torch.cat([found, rows.positives.sizes.int()[:, None]], 1))
    collector.model_collect(model)
    result = trainer.evaluator.evaluate(collector.get_data_struct())
    trainer.wandblogger.log_eval_metrics(result, head="eval")
    return result


def _bar(batches: list[Tensor]) -> Iterator[Tensor]:
    from recbole.utils import set_color

    return iter(progress_bar(batches, ncols=100, desc=set_color("Evaluate   ", "pink")))


def backend_of(config: Any) -> str:
    """Read ``eval_backend`` of a configuration; stock models take RecBole's own path unless told otherwise.

    Raises:
        ValueError: if it is unknown.
    """
    value = config["eval_backend"] or "stock"
    if value not in EVAL_BACKENDS:
        raise ValueError(f"eval_backend must be one of {', '.join(EVAL_BACKENDS)}, got {value!r}.")
    return str(value)


def streaming(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``Trainer.evaluate``: stream if ``eval_backend`` and the metrics allow it, otherwise call ``stock``."""

    @torch.no_grad()
    def evaluate_(
        self: Any,
        eval_data: Any,
        load_best_model: bool = True,
        model_file: str | None = None,
        show_progress: bool = False,
    ) -> Any:
        if not eval_data:
            return None
        reason = None
        if backend_of(self.config) == "streamed":
            reason = stock_reason(self, eval_data)
            if reason is None:
                if load_best_model:
                    _load_best(self, model_file)
                return evaluate(self, eval_data, show_progress)
        if reason is not None and reason not in _said:
            _said.add(reason)
            getLogger().info("Evaluation takes RecBole's own path: %s.", reason)
        return stock(self, eval_data, load_best_model, model_file, show_progress)

    return evaluate_


def _load_best(trainer: Any, model_file: str | None) -> None:
    """Load the best checkpoint as ``Trainer.evaluate`` does (``trainer/trainer.py:581-590``).

    It is a file that this run wrote, or that the caller names.

    LLMTwoTower's trainer does not come here: it reads its files without running code of theirs.
    """
    file = model_file or trainer.saved_model_file
    checkpoint = torch.load(file, map_location=trainer.device, weights_only=False)
    trainer.model.load_state_dict(checkpoint["state_dict"])
    trainer.model.load_other_parameter(checkpoint.get("other_parameter"))
    trainer.logger.info(f"Loading model structure and parameters from {file}")
