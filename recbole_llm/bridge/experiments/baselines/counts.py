"""Rows that count: bestsellers, and what followed what.

Popularity: s_ui = training interactions of i

Transitions: s_ui = sum_{j in H_u} exp(-rank_uj / tau) sum over histories with j at gap d before i of exp(-d / tau)
"""

from torch import Tensor

from recbole_llm.bridge.experiments.baselines.solved import Solved, refuse_many, steps_read
from recbole_llm.bridge.experiments.leave_one_out import LeaveOneOut
from recbole_llm.fitting.next_item import next_item_gram
from recbole_llm.scoring.score import LinearBlock

TRANSITION_DECAYS = (0.5, 1.0, 2.0, 4.0, 10.0)


def popularity(rows: LeaveOneOut) -> Solved:
    """Rank by the number of training interactions."""
    count = rows.data.popularity.float()

    def scorer(users: Tensor) -> Tensor:
        return count.expand(len(users), -1).clone()

    return Solved("", rows.validation.value(scorer, rows.data.n_items, rows.padding), scorer)


def transitions(rows: LeaveOneOut) -> Solved:
    """Rank by counts of what followed the items of a history, both decayed; the decay by validation.

    Holds three ``[N, N]`` float32 matrices at most.

    Raises:
        RefusedRowError: if the data set has more than ``MAX_ITEMS`` items.
    """
    refuse_many("Transitions", rows.data.n_items)
    best: tuple[float, float, LinearBlock] | None = None
    for tau in TRANSITION_DECAYS:
        counts = next_item_gram(rows.data.history, rows.data.n_items, tau)[1].to_dense()
        block = LinearBlock("transitions", counts, decay=tau)
        value = rows.validation.value(block.scorer(rows.data.history), rows.data.n_items, rows.padding)
        if best is None or value > best[0]:
            best = value, tau, block
    assert best is not None
    return Solved(f"decay {best[1]:g}{steps_read(rows.data.history)}", best[0], best[2].scorer(rows.later))
