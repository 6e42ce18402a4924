r"""Where items without a training interaction stand among the others: vectors from their content, a place chosen on evidence.

The trained score is <x_u, w_i> + b_i with x_u a sum over the user's history. Kernel ridge regression (``kernel_ridge.py``) maps
content to (w_i, b_i) and to the source vector by which the item counts in a history. A cold item then scores

    kappa (<x_u, w_i> + b_i) + <x_u, r>,    <x_u, r> ~ offset sd_u

The ridge mu is the one by which such items are ranked best among themselves, kappa and offset are those of the best joint
ranking that keeps the trained items' quality. Where enough of validation's targets are cold, they decide. Where they are few,
*hidden* items do: as many trained items as are cold lose their interactions, the closed form is fitted once more without
them, and their content places them like cold ones.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from logging import getLogger

import torch
from torch import Tensor

from recbole_llm.fitting.cold_start.boost import ColdBoost, choose_cold_boost, deviation_direction
from recbole_llm.fitting.cold_start.kernel_ridge import MU, any_present, map_weights
from recbole_llm.fitting.validation import CHUNK_ELEMENTS, TopKMetric, evenly, user_metric
from recbole_llm.fitting.warm_items import ContentTables
from recbole_llm.scoring.rows import Rows, rows_from_pairs
from recbole_llm.scoring.score import ColdRows, ItemTable, Score

MUS = (0.3, 1.0)
MAX_HIDDEN_SHARE = 0.3  # of the trained items that have a text
MAX_USERS = 5_000  # by whom the place is chosen
MAX_USERS_OF_SHIFT = 3_000  # by whose scores the offset becomes a vector
MAX_ANCHORS_TO_CHOOSE_MU = 8_000  # beyond, a factorisation for every mu is not worth its time
ENOUGH_TARGETS = 100  # cold ones in validation that decide without hidden items
LEAST_GAIN = 0.002  # of the joint metric, where hidden items decide

log = getLogger(__name__)

Fitted = tuple[Score, Rows]
"""A score, and the histories it is asked with, a row for every user."""


@dataclass(frozen=True)
class Evidence:
    """What a place is chosen by.

    Attributes:
        history: training interactions, one row per user.
        targets: validation targets, as many rows.
        metric: of the joint ranking.
        content: of the items.
        trained: ``[N]`` bool.
        popularity: ``[N]``.
    """

    history: Rows
    targets: Rows
    metric: TopKMetric
    content: ContentTables
    trained: Tensor
    popularity: Tensor

    @property
    def present(self) -> Tensor:
        """Items that have some content, ``[N]`` bool."""
        return any_present(self.content)


def map_items(score: Score, evidence: Evidence, trained: Tensor, ids: Tensor, mu: float) -> tuple[ColdRows, Tensor]:
    """Map the content of the items ``ids`` to rows, and to the bias of each, ``[C]``, in units of the score.

    Args:
        score: whose trained items are mapped onto.
        evidence: content and popularity.
        trained: ``[N]`` bool, the items to map onto.
        ids: ``[C]``, items that have content.
        mu: ridge.
    """
    known, weights = map_weights(evidence.content, trained, ids, evidence.popularity, mu=mu)
    rows, bias = score.mapped(known, weights, trained & evidence.present)
    return replace(rows, ids=ids, mu=mu), bias


@dataclass(frozen=True, eq=False)
class PlacementTrial:
    """A ranking in which some items stand as cold ones do, and what each user should get.

    Attributes:
        queries: x_u of the rows, ``[U, D]``.
        table: of the trained items.
        target: ``[C, D]`` of the mapped items.
        bias: ``[C]``.
        ids: ``[C]``, which they are.
        trained: ``[N]`` bool, without ``ids``.
        targets: U rows of relevant items.
        seen: U rows of items without a place.
    """

    queries: Tensor
    table: ItemTable
    target: Tensor
    bias: Tensor
    ids: Tensor
    trained: Tensor
    targets: Rows
    seen: Rows

    def scores(self, rows: Tensor) -> Tensor:
        """Compute scores ``[B, N]`` with factor 1 and offset 0."""
        x = self.queries[rows]
        scores = self.table.scores(x)
        scores[:, self.ids] = torch.addmm(self.bias, x, self.target.T)
        return scores

    def deviations(self) -> Tensor:
        """Compute sd_u over the trained items, ``[U]``."""
        rows = torch.arange(len(self.queries), device=self.queries.device)
        step = max(1, CHUNK_ELEMENTS // len(self.trained))
        return torch.cat([self.scores(few)[:, self.trained].std(1, correction=0) for few in rows.split(step)])

    def cold_only(self, metric: TopKMetric) -> float:
        """Compute the mean metric of the mapped items ranked among themselves."""
        cold = torch.zeros_like(self.trained)
        cold[self.ids] = True
        own = self.targets.keep(cold[self.targets.ids])
        return float(user_metric(self.scores, own, self.seen, len(cold), metric, excluded=~cold).mean())

    def boost(self, metric: TopKMetric) -> ColdBoost:
        """Choose the factor and offset that gain most while the trained items keep ``cold_map.WARM_FLOOR`` of their quality."""
        cold = torch.zeros_like(self.trained)
        cold[self.ids] = True
        return choose_cold_boost(
            self.scores, self.targets, self.seen, cold, metric, self.deviations(), ~(self.trained | cold)
        )


Refit = Callable[[Rows], Fitted]
"""Histories without the hidden items -> the score fitted on them, and the histories to ask it with."""


def choose_place(evidence: Evidence, ids: Tensor, score: Score, refit: Refit) -> tuple[float, ColdBoost]:
    """Choose the ridge of the map, the factor and the offset of the items ``ids``.

    Args:
        evidence: what they are chosen by.
        ids: ``[C]``, cold items that have content.
        score: of the model.
        refit: fits once more without some items.

    Returns:
        mu, and the boost; ``joint=False`` where validation has no such item among its targets, or nothing is gained.
    """
    cold = torch.zeros_like(evidence.trained)
    cold[ids] = True
    n_targets = int(cold[evidence.targets.ids].sum())
    if not n_targets:
        log.info("no cold item is among validation's targets: nothing to gain by ranking them with the others")
        return MU, ColdBoost(joint=False)
    few = int((evidence.trained & evidence.present).sum()) <= MAX_ANCHORS_TO_CHOOSE_MU
    mus = MUS if few else (MU,)
    enough = n_targets >= ENOUGH_TARGETS
    trials = validation_trials(evidence, ids, score, mus) if enough else hidden_trials(evidence, len(ids), refit, mus)
    values = {mu: trial.cold_only(evidence.metric) for mu, trial in trials.items()}
    mu = max(values, key=lambda each: values[each])
    by = f"{n_targets} cold targets of validation" if enough else f"{len(trials[mu].ids)} hidden items"
    log.info(f"cold items among themselves, by {by}: {evidence.metric} {values[mu]:.4f} with ridge {mu:g}")
    boost = trials[mu].boost(evidence.metric)
    if not enough and boost.joint and boost.gain < LEAST_GAIN:
        boost = ColdBoost(joint=False)
    return mu, boost


def _trials(
    evidence: Evidence,
    fitted: Fitted,
    users: Tensor,
    ids: Tensor,
    trained: Tensor,
    targets: Rows,
    seen: Rows,
    mus: Sequence[float],
) -> dict[float, PlacementTrial]:
    score, histories = fitted
    queries, table = score.queries(histories.select(users), score.user_parts(users)), score.item_table()
    table = replace(table, bias=table.bias.nan_to_num(neginf=0.0))  # untrained rows are excluded or overwritten
    found = {}
    for mu in mus:
        rows, bias = map_items(score, evidence, trained, ids, mu)
        target = score.side_by_side(rows.target)
        found[mu] = PlacementTrial(
            queries, table, target, bias, ids, trained, targets.select(users), seen.select(users)
        )
    return found


def validation_trials(
    evidence: Evidence, ids: Tensor, score: Score, mus: Sequence[float]
) -> dict[float, PlacementTrial]:
    """Rank the cold items themselves against validation's targets."""
    users = evenly(torch.nonzero(evidence.targets.sizes).squeeze(1), MAX_USERS)
    fitted = score, evidence.history
    return _trials(evidence, fitted, users, ids, evidence.trained, evidence.targets, evidence.history, mus)


def hidden_trials(
    evidence: Evidence, n_cold: int, refit: Refit, mus: Sequence[float], seed: int = 0
) -> dict[float, PlacementTrial]:
    """Hide as many trained items as are cold, at most ``MAX_HIDDEN_SHARE`` of those with content, and place them by mu.

    The hidden items' training interactions become targets, thinned to the share of cold ones among validation's targets.
    """
    trained, history = evidence.trained, evidence.history
    known = torch.nonzero(trained & evidence.present).squeeze(1)
    count = max(1, min(n_cold, int(MAX_HIDDEN_SHARE * len(known))))
    generator = torch.Generator().manual_seed(seed)
    hidden_ids = known[torch.randperm(len(known), generator=generator)[:count].to(known.device)].sort().values
    hidden = torch.zeros_like(trained)
    hidden[hidden_ids] = True
    left = history.keep(~hidden[history.ids])

    n_users = len(history.offsets) - 1
    warm = evidence.targets.keep((trained & ~hidden)[evidence.targets.ids])
    lost = history.keep(hidden[history.ids])
    n_cold_targets = int((~trained[evidence.targets.ids]).sum())
    n_warm_targets = len(evidence.targets.ids) - n_cold_targets
    wanted = n_cold_targets / max(n_warm_targets, 1) * len(warm.ids)
    share = min(1.0, wanted / max(len(lost.ids), 1))
    lost = lost.keep((torch.rand(len(lost.ids), generator=generator) < share).to(hidden.device))
    both = rows_from_pairs(
        torch.cat([warm.row_of_entry(), lost.row_of_entry()]), torch.cat([warm.ids, lost.ids]), n_users
    )
    users = evenly(torch.nonzero((both.sizes > 0) & (left.sizes > 0)).squeeze(1), MAX_USERS)
    return _trials(evidence, refit(left), users, hidden_ids, trained & ~hidden, both, left, mus)


def place(evidence: Evidence, ids: Tensor, score: Score, boost: ColdBoost, mu: float) -> Score:
    """Return the score with the items ``ids`` placed.

    Args:
        evidence: content and popularity.
        ids: ``[C]``, items that have content.
        score: of the model, without them.
        boost: factor and offset.
        mu: ridge of the map.
    """
    rows, bias = map_items(score, evidence, evidence.trained, ids, mu)
    target = score.side_by_side(rows.target)
    shift = torch.zeros_like(target[0])
    if boost.offset:
        users = evenly(torch.nonzero(evidence.history.sizes).squeeze(1), MAX_USERS_OF_SHIFT)
        x = score.queries(evidence.history.select(users), score.user_parts(users))
        table = score.item_table()
        table = replace(table, bias=table.bias.nan_to_num(neginf=0.0))
        trial = PlacementTrial(x, table, target, bias, ids, evidence.trained, evidence.history, evidence.history)
        shift = boost.offset * deviation_direction(x, trial.deviations())
    shifts = score.by_block(shift)
    cold = replace(
        rows,
        target={name: boost.kappa * table + shifts[name] for name, table in rows.target.items()},
        bias={name: boost.kappa * each for name, each in rows.bias.items()},
        joint=boost.joint,
        kappa=boost.kappa,
        shift=shifts,
    )
    return score.with_cold(cold)
