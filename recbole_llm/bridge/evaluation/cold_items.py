"""Warm, cold and joint quality of any model, beside RecBole's own table.

An item without a training interaction, a new film, say, counts in RecBole's table like any other, whether the model has
anything to rank it by or not. Where a test split holds such items, the figures are given apart: of the trained items among
themselves, of the same with the cold ones present, of the cold ones among themselves, and of all, which is RecBole's table.
"""

import math
from collections.abc import Callable
from dataclasses import dataclass
from logging import getLogger
from typing import Any

import torch
from torch import Tensor

from recbole_llm.bridge import distributed
from recbole_llm.fitting.validation import METRICS, TopKMetric, hide_seen
from recbole_llm.scoring.rows import Rows

SCORES = 2**24  # held at once
GROUPS = ("warm items alone", "warm, cold present", "cold items alone", "all items")


@dataclass(frozen=True)
class ColdReport:
    """Quality of one model on one split, by group of items.

    Attributes:
        model: its name.
        cold_items: items without a training interaction, with or without a target.
        cold_targets: of the split's targets, those that are such items.
        targets: the split's targets.
        metrics: by group of ``GROUPS``, by metric such as ``ndcg@10``: the mean over the group's users that have a target.
        remark: what the model knows of cold items; empty if that is not told.
    """

    model: str
    cold_items: int
    cold_targets: int
    targets: int
    metrics: dict[str, dict[str, float]]
    remark: str

    def lines(self) -> list[str]:
        """Format the report as lines of a log."""
        names = list(self.metrics[GROUPS[0]])
        width = max(8, *(len(name) for name in names))
        lines = [
            f"items without a training interaction: {self.cold_items}; they are {self.cold_targets} of the "
            f"{self.targets} targets ({self.cold_targets / self.targets:.1%})",
            f"{'':19}" + " ".join(f"{name:>{width}}" for name in names),
        ]
        for group in GROUPS:
            cells = " ".join(f"{self.metrics[group][name]:>{width}.4f}" for name in names)
            lines.append(f"{group:<19}{cells}")
        return lines + ([self.remark] if self.remark else [])


def trained_items(train_data: Any, n_items: int) -> Tensor:
    """Mark the items of a training loader's interactions, ``[n_items]`` bool.

    The histories of a sequential model count as well.
    """
    dataset = train_data._dataset
    inter = dataset.inter_feat
    trained = torch.zeros(n_items, dtype=torch.bool)
    trained[inter[dataset.iid_field].long()] = True
    listed = f"{dataset.iid_field}{dataset.config['LIST_SUFFIX'] or '_list'}"
    if listed in inter:
        trained[inter[listed].long().unique()] = True
    trained[0] = False
    return trained


def remember_training(stock: Callable[..., Any]) -> Callable[..., Any]:
    """Wrap ``Collector.data_collect`` so that it keeps which items are trained, for the report after the test."""

    def data_collect(self: Any, train_data: Any) -> Any:
        self.trained_items = trained_items(train_data, train_data._dataset.item_num)
        return stock(self, train_data)

    return data_collect


def measure(model: Any, rows: Any, trained: Tensor, metrics: list[TopKMetric], device: torch.device) -> ColdReport:
    """Rank trained, cold and all items for every row of a full-ranking loader.

    Args:
        model: in evaluation mode, with ``full_sort_predict``.
        rows: :class:`recbole_llm.bridge.evaluation.rows.RankedRows`.
        trained: ``[N]`` bool.
        metrics: what is computed; at least one.
        device: the model's device.
    """
    n_items = len(trained)
    cold = ~trained
    cold[0] = False
    padding = torch.arange(n_items) == 0
    most = max(metric.k for metric in metrics)
    sums = {group: dict.fromkeys(map(str, metrics), 0.0) for group in GROUPS}
    counts = dict.fromkeys(GROUPS, 0)
    alike = int(cold.sum()) > 1  # whether every score of every cold item seen is the same for its user
    for index in torch.arange(len(rows)).split(max(1, SCORES // n_items)):
        scores = model.full_sort_predict(rows.batch(index).to(device)).view(-1, n_items).cpu().float()
        own = scores[:, cold]
        among_themselves = _cold_scores(model, rows.users[index].to(device), scores)
        alike = alike and bool(((own == own[:, :1]) | own.isinf()).all())
        positives = rows.positives.select(index)
        seen = (
            Rows(torch.zeros_like(positives.offsets), positives.ids[:0])
            if rows.seen is None
            else rows.seen.select(index)
        )
        relevant = hide_seen(scores, seen, positives, padding)
        assert relevant is not None
        if among_themselves is not None:
            hide_seen(among_themselves, seen, positives, padding)
        targets = {"warm": relevant & trained, "cold": relevant & cold, "all": relevant}
        for group, kind, allowed in zip(
            GROUPS, ("warm", "warm", "cold", "all"), (trained, None, cold, None), strict=True
        ):
            allowed_scores = scores if allowed is None else scores.masked_fill(~allowed, -math.inf)
            if kind == "cold" and among_themselves is not None:
                allowed_scores = among_themselves.masked_fill(~cold, -math.inf)
            top, items = allowed_scores.topk(min(most, n_items), dim=1)
            n_targets = targets[kind].sum(1)
            has = n_targets > 0
            hits = (targets[kind].gather(1, items) & (top > -math.inf))[has]
            counts[group] += int(has.sum())
            for metric in metrics:
                sums[group][str(metric)] += float(metric.of(hits[:, : metric.k], n_targets[has]).sum())
    means = {
        group: {
            name.lower(): total / counts[group] if counts[group] else math.nan for name, total in sums[group].items()
        }
        for group in GROUPS
    }
    ids = rows.positives.ids
    return ColdReport(
        type(model).__name__,
        int(cold.sum()),
        int(cold[ids].sum()),
        len(ids),
        means,
        _remark(model, alike),
    )


def _cold_scores(model: Any, users: Tensor, scores: Tensor) -> Tensor | None:
    """Return scores that rank the cold items a model leaves out among themselves; ``None`` for its usual scores."""
    placed = model.score.cold if hasattr(model, "cold_remark") else None
    if placed is None or placed.joint:
        return None
    every = model.score.scores(model.ranking_history.select(users), model.score.user_parts(users), unlisted=True)
    found = scores.clone()
    found[:, placed.ids.cpu()] = every[:, placed.ids].cpu().float()
    return found


def _remark(model: Any, alike: bool) -> str:
    name = type(model).__name__
    if hasattr(model, "cold_remark"):
        return str(model.cold_remark())
    if alike:
        return f"{name} cannot score cold items: it gives all of them the same score."
    from recbole.utils import ModelType

    if model.type in (ModelType.GENERAL, ModelType.TRADITIONAL, ModelType.SEQUENTIAL):
        return f"{name} cannot score cold items: it knows items by their interactions alone, and ranks these by chance."
    return ""


def report(trainer: Any, loader: Any, show: Callable[[str], None] | None = None) -> ColdReport | None:
    """Measure and log, where a test split holds items without a training interaction.

    Args:
        trainer: whose model was evaluated just now.
        loader: the split.
        show: told each line; the log of RecBole by default.

    Returns:
        The report; ``None`` where there is nothing to tell, or nothing to tell it by.
    """
    from recbole.data.dataloader import FullSortEvalDataLoader

    from recbole_llm.bridge.evaluation.rows import ranked_rows

    trained = getattr(trainer.eval_collector, "trained_items", None)
    if trained is None and hasattr(trainer.model, "cold"):
        trained = ~trainer.model.cold.cpu()
        trained[0] = False
    if trained is None or getattr(loader._sampler, "phase", None) != "test":
        return None
    dataset = loader._dataset
    items = dataset.inter_feat[dataset.iid_field].long().cpu()
    if len(trained) != dataset.item_num or bool(trained[items].all()):
        return None
    say = show or getLogger().info
    cold_targets = int((~trained[items]).sum())
    metrics = [
        TopKMetric(name.lower(), k)
        for name in trainer.config["metrics"]
        if name.lower() in METRICS
        for k in trainer.config["topk"]
    ]
    if not isinstance(loader, FullSortEvalDataLoader) or not metrics:
        say(
            f"{cold_targets} of {len(items)} targets are items without a training interaction; warm and cold figures apart "
            "need eval_args.mode full and a ranking metric."
        )
        return None
    try:
        found = measure(trainer.model.eval(), ranked_rows(loader), trained, metrics, trainer.device)
    except NotImplementedError:
        say(f"{type(trainer.model).__name__} has no full ranking: no figures of cold items.")
        return None
    if distributed.rank() == 0:
        for line in found.lines():
            say(line)
    return found
