"""Whether the order of histories matters on these data, as a figure of a run: :mod:`recbole_llm.fitting.order_effect`."""

from typing import Any

import torch

from recbole_llm.bridge.evaluation.rows import RankedRows
from recbole_llm.bridge.training.validation_data import validation_of
from recbole_llm.fitting.order_effect import order_effect
from recbole_llm.fitting.validation import TopKMetric
from recbole_llm.reporting.intervals import ratio
from recbole_llm.scoring.rows import Rows


def order_figures(trained: Any, rows: RankedRows, k: int) -> dict[str, Any]:
    """Measure the share of NDCG that shuffled histories lose on the test split.

    Args:
        trained: :class:`recbole_llm.reporting.quality.Trained`, ranking as for the test.
        rows: of the test split that are measured.
        k: places.

    Returns:
        ``order`` with the figures; nothing where the split is not by time, ``order_test`` is off, the model is none of ours or has
        no closed form, or its items are shared out among processes.
    """
    model = trained.model
    options, fitted = getattr(model, "options", None), getattr(model, "fitted", None)
    if fitted is None or not getattr(options, "order_test", False):
        return {}
    data = model.training_data()
    if data.rows.sharded or not data.is_ordered:
        return {}
    device = data.history.ids.device
    targets = rows.positives.to(device)
    nothing = Rows(torch.zeros_like(targets.offsets), targets.ids[:0])
    found = order_effect(
        fitted,
        data,
        validation_of(trained.config, model, trained.valid, trained.training),
        model.ranking_history.select(rows.users.to(device)),
        targets,
        nothing if rows.seen is None else rows.seen.to(device),
        TopKMetric("ndcg", k),
    )
    if found is None:
        return {}
    lost = ratio((found.ordered - found.shuffled).numpy(), found.ordered.numpy())
    values = {"ordered": float(found.ordered.mean()), "shuffled": float(found.shuffled.mean())}
    return {"order": {"users": len(found.ordered), **values, "lost": vars(lost)}}
