"""Rows of the canonical table beside LLMTwoTower. A baseline is a function of the rows that gives back a ``Solved``."""

from collections.abc import Callable

from recbole_llm.bridge.experiments.baselines.counts import popularity, transitions
from recbole_llm.bridge.experiments.baselines.esasrec import fit_esasrec
from recbole_llm.bridge.experiments.baselines.graph import graph_heuristic
from recbole_llm.bridge.experiments.baselines.linear import ease, l3ae, tale
from recbole_llm.bridge.experiments.baselines.neighbours import item_knn, item_knn_by_recency
from recbole_llm.bridge.experiments.baselines.solved import RefusedRowError, Solved
from recbole_llm.bridge.experiments.leave_one_out import LeaveOneOut

__all__ = ["BASELINES", "WITH_BUDGET", "RefusedRowError", "Solved"]

BASELINES: dict[str, Callable[[LeaveOneOut], Solved]] = {
    "Popularity": popularity,
    "Transitions": transitions,
    "ItemKNN": item_knn,
    "ItemKNN-recency": item_knn_by_recency,
    "EASE": ease,
    "TALE": tale,
    "L3AE": l3ae,
    "TGH": graph_heuristic,
}
WITH_BUDGET: dict[str, Callable[[LeaveOneOut, float], Solved]] = {"eSASRec": fit_esasrec}
"""Rows that are trained, and only where they are asked for; their second argument is the budget in processor minutes."""
