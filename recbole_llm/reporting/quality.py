"""The figures of a report: how many held-out interactions a model finds, beside baselines, and what it shows.

Everything is measured as RecBole evaluates a full ranking: the items of training and validation have no place, every other item
competes, and the users are those with a held-out interaction. The result is a plain dictionary of numbers and short texts
(:mod:`recbole_llm.reporting.record`), which a checkpoint can hold.

Shapes: M users with a held-out interaction, N items with padding row 0, K places.
"""

import datetime
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.bridge.evaluation.popularity import BUCKETS, popularity_buckets
from recbole_llm.bridge.evaluation.rows import RankedRows, ranked_rows
from recbole_llm.fitting.validation import TopKMetric, evenly
from recbole_llm.reporting.baselines import fit_baselines
from recbole_llm.reporting.intervals import ratio
from recbole_llm.reporting.order import order_figures
from recbole_llm.reporting.ranking import K, Ranking, rank_rows, some_rows
from recbole_llm.reporting.record import VERSION
from recbole_llm.scoring.rows import Rows

MAX_SCORES = 5_000_000_000  # of one model; with more users times items, fewer users are measured, evenly spaced
MAX_CALIBRATION_USERS = 5_000
ACTIVITY = (0, 1, 3, 6, 11, 21, 51, 101)  # lower ends of the groups of users, by items known of them
N_BINS = 10


@dataclass(frozen=True, eq=False)
class Trained:
    """A trained model with the splits of its data.

    Attributes:
        config: RecBole's ``Config``.
        model: in evaluation mode, its best state loaded.
        training: dataset of the training split.
        test: RecBole's loader of the test split.
        interactions: how many there are in all splits.
        history: what was seen while it trained: ``loss`` and ``valid`` by epoch, ``search``, ``stages``; may be empty.
        metrics: ``valid`` and ``test`` results by name, where they are at hand.
        valid: RecBole's loader of the validation split, by which baselines choose their settings; ``None`` without one.
    """

    config: Any
    model: Any
    training: Any
    test: Any
    interactions: int
    history: Mapping[str, Any] = field(default_factory=dict)
    metrics: Mapping[str, Any] = field(default_factory=dict)
    valid: Any = None


def reason_without(test: Any) -> str | None:
    """Why there is no full ranking to measure; ``None`` if there is one."""
    from recbole.data.dataloader import FullSortEvalDataLoader

    if not test:
        return "there is no test split"
    if not isinstance(test, FullSortEvalDataLoader):
        return "candidates are sampled or labelled (eval_args.mode), and the words are of a ranking of all items"
    return None


def measure(trained: Trained, say: Callable[[str], None] = lambda text: None) -> dict[str, Any]:
    """Measure a model and the baselines on the test split.

    Args:
        trained: the model and its data.
        say: told what is being done.

    Returns:
        The record.

    Raises:
        ValueError: if there is no full ranking to measure.
    """
    if (why := reason_without(trained.test)) is not None:
        raise ValueError(f"no report: {why}.")
    every = ranked_rows(trained.test)
    n_items = trained.training.item_num
    rows = every
    if len(every) > (most := max(1000, MAX_SCORES // n_items)):
        rows = some_rows(every, evenly(torch.arange(len(every)), most))
    name = type(trained.model).__name__
    say("fitting the baselines")
    chosen_on = None if reason_without(trained.valid) else ranked_rows(trained.valid)
    baselines = fit_baselines(trained.training, chosen_on, without=name)
    rankings = {}
    with at_test(trained.model):
        for label, model in [(name, trained.model), *((each.name, each) for each in baselines.fitted)]:
            say(f"ranking by {label}")
            device = trained.config["device"] if model is trained.model else torch.device("cpu")
            rankings[label] = rank_rows(model, rows, n_items, device)
        say("probabilities")
        calibration = _calibration(trained.model, rows, rankings[name])
        say("the same with shuffled histories")
        order = order_figures(trained, rows, K)
    count = torch.from_numpy(np.asarray(trained.training.inter_matrix(form="csr").sum(axis=0)).ravel()).long()
    views = _views(rankings, rows, count)
    of = trained.test._dataset
    return {
        "version": VERSION,
        "date": datetime.datetime.now(datetime.timezone.utc).date().isoformat(),
        "model": name,
        "dataset": str(trained.config["dataset"]),
        "k": K,
        "rated": trained.config["RATING_FIELD"] in trained.training.inter_feat,
        "split": _split(trained.config),
        "data": {
            "users": trained.training.user_num - 1,
            "items": n_items - 1,
            "interactions": trained.interactions,
            "training": len(trained.training.inter_feat),
            "test": len(of.inter_feat),
        },
        "measured": {"users": len(rows), "of": len(every), "targets": int(rows.positives.sizes.sum())},
        "best_baseline": views.best,
        "models": views.models,
        "about": {each.name: each.about for each in baselines.fitted},
        "not_fitted": dict(baselines.left_out),
        "lead": views.lead,
        **order,
        "popularity": {
            bucket: {"items": int((popularity_buckets(count) == n).sum())} for n, bucket in enumerate(BUCKETS)
        },
        "left_out": _left_out(trained, rankings[name], count, rows),
        "calibration": calibration,
        "metrics": {part: _numbers(result) for part, result in trained.metrics.items() if result},
        "history": dict(trained.history),
    }


@contextmanager
def at_test(model: Any) -> Iterator[None]:
    """Let the model rank as for the test, where histories hold the validation items if time splits."""
    before = getattr(model, "at_test", None)
    if before is not None:
        model.at_test = True
    try:
        with torch.no_grad():
            yield
    finally:
        if before is not None:
            model.at_test = before


# ---------------------------------------------------------------- figures of each model


@dataclass(frozen=True)
class _Views:
    models: dict[str, Any]
    best: str
    lead: dict[str, Any]


def _views(rankings: Mapping[str, Ranking], rows: RankedRows, count: Tensor) -> _Views:
    targets = rows.positives.sizes
    known = rows.seen.sizes if rows.seen is not None else torch.zeros_like(targets)
    group = torch.bucketize(known, torch.tensor(ACTIVITY), right=True) - 1
    bucket = popularity_buckets(count)
    models = {
        label: _figures(ranking, targets, group, bucket, rows.positives, count) for label, ranking in rankings.items()
    }
    own, *others = models
    best = max(others, key=lambda label: models[label]["found"]["value"])
    difference = (rankings[own].hit.sum(1) - rankings[best].hit.sum(1)).numpy()
    return _Views(models, best, vars(ratio(difference, targets.numpy())))


def _figures(
    ranking: Ranking, targets: Tensor, group: Tensor, bucket: Tensor, positives: Rows, count: Tensor
) -> dict[str, Any]:
    hit, items = ranking.hit, ranking.items[ranking.shown]
    found = hit.sum(1)
    of_target, row = bucket[positives.ids], positives.row_of_entry()
    hit_bucket = bucket[ranking.items][hit]
    by_popularity = {}
    for number, name in enumerate(BUCKETS):
        wanted = torch.bincount(row[of_target == number], minlength=len(targets))
        if not int(wanted.sum()):
            continue
        got = torch.bincount(torch.nonzero(hit)[:, 0][hit_bucket == number], minlength=len(targets))
        by_popularity[name] = _share(got, wanted)
    by_activity = [
        {"from": ACTIVITY[number], **_share(found[group == number], targets[group == number])}
        for number in range(len(ACTIVITY))
        if bool((group == number).any())
    ]
    by_rank = torch.argsort(torch.argsort(count[1:], descending=True, stable=True)) + 1  # 1: the bestseller
    return {
        "found": vars(ratio(found.numpy(), targets.numpy())),
        "users_with_a_hit": float((found > 0).double().mean()),
        "ndcg": float(TopKMetric("ndcg", K).of(hit, targets).mean()),
        "recall": float(TopKMetric("recall", K).of(hit, targets).mean()),
        "items_shown": int(items.unique().numel()),
        "median_place": float(by_rank[items - 1].double().median()) if len(items) else 0.0,
        "shown_by_popularity": {
            name: float((bucket[items] == n).double().mean()) if len(items) else 0.0 for n, name in enumerate(BUCKETS)
        },
        "by_popularity": by_popularity,
        "by_activity": by_activity,
    }


def _share(found: Tensor, targets: Tensor) -> dict[str, Any]:
    asked = targets > 0
    return {
        "users": int(asked.sum()),
        "targets": int(targets.sum()),
        **vars(ratio(found[asked].numpy(), targets[asked].numpy())),
    }


# ---------------------------------------------------------------- what is left out, and how sure it is


def _left_out(trained: Trained, ranking: Ranking, count: Tensor, rows: RankedRows) -> dict[str, int]:
    """Items and users that a reader might miss, as counts."""
    sizes = np.diff(trained.training.inter_matrix(form="csr").indptr)
    untouched = count == 0
    untouched[0] = False
    listed = _listed(trained.model, len(count))
    return {
        "items_without_interactions": int(untouched.sum()),
        "items_that_cannot_be_shown": int((~listed[1:]).sum()),
        "items_never_shown": len(count) - 1 - int(ranking.items[ranking.shown].unique().numel()),
        "users_without_history": int((sizes[1:] == 0).sum()),
        "measured_users_without_history": int((sizes[rows.users.numpy()] == 0).sum()),
        "items_not_read": trained.training.unread_items() if hasattr(trained.training, "unread_items") else 0,
        **_placed(trained.model),
    }


def _placed(model: Any) -> dict[str, int]:
    """How many items without an interaction content places; nothing of a model that reads no content, as every stock one."""
    if not hasattr(model, "item_rows"):
        return {}
    placed = None if model.item_rows.sharded else model.score.cold
    return {"items_placed_by_content": 0 if placed is None else len(placed.ids)}


def _listed(model: Any, n_items: int) -> Tensor:
    """``[N]`` bool, items that a ranking of the model may hold."""
    if hasattr(model, "score") and not model.item_rows.sharded:
        return model.score.listed.cpu()
    return torch.ones(n_items, dtype=torch.bool)


def _calibration(model: Any, rows: RankedRows, ranking: Ranking) -> list[dict[str, float]]:
    """Probabilities of the items shown beside how often they were held-out interactions, in bins of equal size."""
    if not hasattr(model, "probabilities") or model.item_rows.sharded:
        return []
    kept = evenly(torch.arange(len(rows)), MAX_CALIBRATION_USERS)
    said, came = [], []
    for index in kept.split(max(1, 2**24 // model.n_items)):
        users = rows.users[index].to(model.item_bias.device)
        chance = model.probabilities(users).cpu().gather(1, ranking.items[index])
        said.append(chance[ranking.shown[index]])
        came.append(ranking.hit[index][ranking.shown[index]])
    chance, hit = torch.cat(said).double(), torch.cat(came).double()
    order = torch.argsort(chance)
    return [
        {"said": float(chance[part].mean()), "came": float(hit[part].mean()), "pairs": len(part)}
        for part in order.tensor_split(N_BINS)
        if len(part)
    ]


def _split(config: Any) -> dict[str, Any]:
    given = config["eval_args"] or {}
    shares = next(iter((given.get("split") or {}).values()), None)
    files = config["benchmark_filename"]
    return {
        "order": str(given.get("order") or ""),
        "by_user": given.get("group_by") == "user",
        "shares": [float(share) for share in shares]
        if isinstance(shares, Sequence) and not isinstance(shares, str)
        else [],
        "files": bool(files),
        "seed": int(config["seed"] or 0),
    }


def _numbers(result: Mapping[str, Any]) -> dict[str, float]:
    return {str(name): float(value) for name, value in result.items()}
