r"""Where items without a training interaction stand among the others: vectors from their texts, a place chosen on evidence.

The trained score is <x_u, w_i> + b_i with x_u a sum over the user's history. Kernel ridge regression (``cold_map.py``) maps a
text to (w_i, b_i) and to the source vector by which the item counts in a history. A cold item then scores

    kappa (<x_u, w_i> + b_i) + <x_u, r>,    <x_u, r> ~ offset sd_u

The ridge mu is the one by which such items are ranked best among themselves, kappa and offset are those of the best joint
ranking that keeps the trained items' quality. Where enough of validation's targets are cold, they decide. Where they are few,
*hidden* items do: as many trained items as are cold lose their interactions, the closed form is fitted once more without
them, and their texts place them like cold ones. Knows neither RecBole nor the kernels.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, fields, replace

import torch
from torch import Tensor

from recbole_llm.cold_map import MU, ColdBoost, choose_cold_boost, deviation_direction, map_weights
from recbole_llm.selection import CHUNK_ELEMENTS, TopKMetric, evenly, user_metric
from recbole_llm.towers import Rows, rows_from_pairs

MUS = (0.3, 1.0)  # .1 and 3 rank hidden items at most 2% better, and give scores that are harder to place
MAX_HIDDEN_SHARE = 0.3  # of the trained items that have a text
MAX_USERS = 5_000  # by whom the place is chosen
MAX_USERS_OF_SHIFT = 3_000  # by whose scores the offset becomes a vector
MAX_ANCHORS_TO_CHOOSE_MU = 8_000  # beyond, a factorisation for every mu is not worth its time
ENOUGH_TARGETS = 100  # cold ones in validation that decide without hidden items
LEAST_GAIN = 0.002  # of the joint metric, where hidden items decide

Log = Callable[[str], None]
Queries = Callable[[Tensor], Tensor]
"""Users ``[B]`` -> x_u in units of the score, ``[B, v]``."""


@dataclass(frozen=True)
class ItemTables:
    """Vectors of a trained model's items; rows of untrained items are not read.

    Attributes:
        target: w_i, ``[N, t]``, or the columns of it that follow the identity.
        bias: b_i, ``[N]``, finite.
        sources: by which the item counts in a history, ``[N, s_k]`` of every block.
        identity: whether w_i begins with the i-th row of the identity, N columns that are not stored: the first N elements of
            x_u are scores themselves.
    """

    target: Tensor
    bias: Tensor
    sources: tuple[Tensor, ...]
    identity: bool = False

    def scores(self, x: Tensor) -> Tensor:
        """<x_u, w_i> + b_i of all items, ``[B, N]`` in a fresh tensor."""
        if not self.identity:
            return torch.addmm(self.bias, x, self.target.T)
        n = len(self.bias)
        return torch.addmm(self.bias, x[:, n:], self.target.T).add_(x[:, :n])


@dataclass(frozen=True)
class PlacedItems:
    """Mapped vectors of some items; rows as in :class:`ItemTables`.

    Attributes:
        target: ``[C, v]``, the identity's columns included.
        bias: ``[C]``.
        source: ``[C, s]``, the blocks side by side.
        mean_bias: of the items mapped onto, what a text unlike all others gets.
    """

    target: Tensor
    bias: Tensor
    source: Tensor
    mean_bias: float


@dataclass(frozen=True)
class Evidence:
    """What a place is chosen by.

    Attributes:
        history: training interactions, one row per user.
        targets: validation targets, as many rows.
        metric: of the joint ranking.
        features: ``[N, f]``.
        present: ``[N]`` bool, items that have a text.
        trained: ``[N]`` bool.
        popularity: ``[N]``.
    """

    history: Rows
    targets: Rows
    metric: TopKMetric
    features: Tensor
    present: Tensor
    trained: Tensor
    popularity: Tensor


def map_items(tables: ItemTables, evidence: Evidence, trained: Tensor, ids: Tensor, mu: float) -> PlacedItems:
    """Vectors of the items ``ids`` from their texts.

    The bias is mapped as its difference from the mean: a text unlike all others gets the mean bias, and not 0, which is far
    above any trained item's.

    Args:
        tables: of the items to map onto.
        evidence: texts and popularity.
        trained: ``[N]`` bool, the items to map onto.
        ids: ``[C]``, items that have a text.
        mu: ridge.
    """
    mean = tables.bias[trained & evidence.present].mean()
    known, weights = map_weights(evidence.features, evidence.present, trained, ids, evidence.popularity, mu=mu)
    targets = [weights @ tables.target[known]]
    if tables.identity:
        rows = torch.zeros(len(ids), len(tables.bias), device=weights.device)
        rows[:, known] = weights
        targets.insert(0, rows)
    source = torch.cat([weights @ table[known] for table in tables.sources], 1)
    return PlacedItems(torch.cat(targets, 1), weights @ (tables.bias[known] - mean) + mean, source, float(mean))


@dataclass(frozen=True)
class ColdItems:
    """Items without a training interaction as a model ranks them.

    Attributes:
        ids: ``[C]`` int64.
        closed: their targets in the closed form, ``[C, d]``; no columns without one.
        learned: their targets in the learned block, ``[C, D]``.
        bias: ``[C]``, in the learned block's units.
        joint: whether they take part in the ranking of all items.
        closed_source: by which they count in a history, in the closed form, ``[C, d']``.
        learned_source: the same in the learned block, ``[C, D]``.
        kappa: factor of the mapped target and bias; already in ``closed``, ``learned`` and ``bias``.
        shift: r, ``[d + D]``, added to the target; already in ``closed`` and ``learned``.
        mean_bias: of the trained items that have a text; the map's bias is the difference from it. In the learned block's
            units.
        mu: ridge of the map.
    """

    ids: Tensor
    closed: Tensor
    learned: Tensor
    bias: Tensor
    joint: bool
    closed_source: Tensor
    learned_source: Tensor
    kappa: float
    shift: Tensor
    mean_bias: float
    mu: float

    def to(self, device: torch.device | str) -> "ColdItems":
        """The same on another device."""
        tensors = {f.name: getattr(self, f.name) for f in fields(self) if isinstance(getattr(self, f.name), Tensor)}
        return replace(self, **{name: tensor.to(device) for name, tensor in tensors.items()})


@dataclass(frozen=True)
class Trial:
    """A ranking in which some items stand as cold ones do, and what each user should get.

    Attributes:
        queries: x_u of the rows, ``[U, v]``.
        tables: of the trained items.
        placed: the mapped items.
        ids: ``[C]``, which they are.
        trained: ``[N]`` bool, without ``ids``.
        targets: U rows of relevant items.
        seen: U rows of items without a place.
    """

    queries: Tensor
    tables: ItemTables
    placed: PlacedItems
    ids: Tensor
    trained: Tensor
    targets: Rows
    seen: Rows

    def scores(self, rows: Tensor) -> Tensor:
        """Scores ``[B, N]`` with factor 1 and offset 0."""
        x = self.queries[rows]
        scores = self.tables.scores(x)
        scores[:, self.ids] = torch.addmm(self.placed.bias, x, self.placed.target.T)
        return scores

    def deviations(self) -> Tensor:
        """sd_u over the trained items, ``[U]``."""
        rows = torch.arange(len(self.queries), device=self.queries.device)
        step = max(1, CHUNK_ELEMENTS // len(self.trained))
        return torch.cat([self.scores(few)[:, self.trained].std(1, correction=0) for few in rows.split(step)])

    def cold_only(self, metric: TopKMetric) -> float:
        """Mean metric of the mapped items ranked among themselves."""
        cold = torch.zeros_like(self.trained)
        cold[self.ids] = True
        own = self.targets.keep(cold[self.targets.ids])
        return float(user_metric(self.scores, own, self.seen, len(cold), metric, excluded=~cold).mean())

    def boost(self, metric: TopKMetric) -> ColdBoost:
        """The factor and offset that gain most while the trained items keep ``cold_map.WARM_FLOOR`` of their quality."""
        cold = torch.zeros_like(self.trained)
        cold[self.ids] = True
        return choose_cold_boost(
            self.scores, self.targets, self.seen, cold, metric, self.deviations(), ~(self.trained | cold)
        )


Refit = Callable[[Rows], tuple[ItemTables, Queries]]
"""Histories without the hidden items -> tables fitted on them, and the users' vectors by these tables and histories."""


def choose_place(
    evidence: Evidence, ids: Tensor, tables: ItemTables, queries: Queries, refit: Refit, say: Log
) -> tuple[float, ColdBoost]:
    """Ridge of the map, factor and offset of the items ``ids``.

    Args:
        evidence: what they are chosen by.
        ids: ``[C]``, cold items that have a text.
        tables: of the model.
        queries: of the model.
        refit: fits once more without some items.
        say: told by what is chosen.

    Returns:
        mu, and the boost; ``joint=False`` where validation has no such item among its targets, or nothing is gained.
    """
    cold = torch.zeros_like(evidence.trained)
    cold[ids] = True
    n_targets = int(cold[evidence.targets.ids].sum())
    if not n_targets:
        say("no cold item is among validation's targets: nothing to gain by ranking them with the others")
        return MU, ColdBoost(joint=False)
    few = int((evidence.trained & evidence.present).sum()) <= MAX_ANCHORS_TO_CHOOSE_MU
    mus = MUS if few else (MU,)
    enough = n_targets >= ENOUGH_TARGETS
    trials = validation_trials(evidence, ids, tables, queries, mus) if enough else None
    if trials is None:
        trials = hidden_trials(evidence, len(ids), refit, mus)
    values = {mu: trial.cold_only(evidence.metric) for mu, trial in trials.items()}
    mu = max(values, key=lambda each: values[each])
    by = f"{n_targets} cold targets of validation" if enough else f"{len(trials[mu].ids)} hidden items"
    say(f"cold items among themselves, by {by}: {evidence.metric} {values[mu]:.4f} with ridge {mu:g}")
    boost = trials[mu].boost(evidence.metric)
    if not enough and boost.joint and boost.gain < LEAST_GAIN:
        boost = ColdBoost(joint=False)
    return mu, boost


def validation_trials(
    evidence: Evidence, ids: Tensor, tables: ItemTables, queries: Queries, mus: Sequence[float]
) -> dict[float, Trial]:
    """The cold items themselves, and validation's targets."""
    users = evenly(torch.nonzero(evidence.targets.sizes).squeeze(1), MAX_USERS)
    x, targets, seen = queries(users), evidence.targets.select(users), evidence.history.select(users)
    return {
        mu: Trial(
            x, tables, map_items(tables, evidence, evidence.trained, ids, mu), ids, evidence.trained, targets, seen
        )
        for mu in mus
    }


def hidden_trials(
    evidence: Evidence, n_cold: int, refit: Refit, mus: Sequence[float], seed: int = 0
) -> dict[float, Trial]:
    """Hide as many trained items as are cold, at most ``MAX_HIDDEN_SHARE`` of those that have a text, and place them by mu.

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
    tables, queries = refit(left)
    x, targets, seen, rest = queries(users), both.select(users), left.select(users), trained & ~hidden
    return {
        mu: Trial(x, tables, map_items(tables, evidence, rest, hidden_ids, mu), hidden_ids, rest, targets, seen)
        for mu in mus
    }


def place(
    evidence: Evidence,
    ids: Tensor,
    tables: ItemTables,
    queries: Queries,
    boost: ColdBoost,
    mu: float,
    widths: tuple[int, int],
    bias_unit: float,
) -> ColdItems:
    """The items ``ids`` with their vectors as the model will rank them.

    Args:
        evidence: texts and popularity.
        ids: ``[C]``, items that have a text.
        tables: of the model.
        queries: of the model.
        boost: factor and offset.
        mu: ridge of the map.
        widths: columns of the closed form among the targets' and among the sources'; the rest are the learned block's.
        bias_unit: factor between a bias of the learned block and ``tables.bias``.
    """
    placed = map_items(tables, evidence, evidence.trained, ids, mu)
    shift = torch.zeros_like(placed.target[0])
    if boost.offset:
        users = evenly(torch.nonzero(evidence.history.sizes).squeeze(1), MAX_USERS_OF_SHIFT)
        trial = Trial(queries(users), tables, placed, ids, evidence.trained, evidence.history, evidence.history)
        shift = boost.offset * deviation_direction(trial.queries, trial.deviations())
    target = boost.kappa * placed.target + shift
    unit = 1 / bias_unit if bias_unit else 0.0
    return ColdItems(
        ids,
        closed=target[:, : widths[0]],
        learned=target[:, widths[0] :],
        bias=boost.kappa * placed.bias * unit,
        joint=boost.joint,
        closed_source=placed.source[:, : widths[1]],
        learned_source=placed.source[:, widths[1] :],
        kappa=boost.kappa,
        shift=shift,
        mean_bias=placed.mean_bias * unit,
        mu=mu,
    )
