r"""Where items without a training interaction stand among the others: vectors from their content, a place chosen on evidence.

The trained score is <x_u, w_i> + b_i with x_u a sum over the user's history. Kernel ridge regression (``kernel_ridge.py``) maps
content to (w_i, b_i) and to the source vector by which the item counts in a history. A cold item then scores

    kappa (<x_u, w_i> + b_i) + <x_u, r>,    <x_u, r> ~ offset sd_u

The ridge mu and the shares of the modalities are those by which such items are ranked best among themselves, kappa and offset
are those of the best joint ranking that keeps the trained items' quality. Where enough of validation's targets are cold, they
decide. Where they are few or none, *hidden* items do: as many trained items as are cold lose their interactions, the closed
form is fitted once more without them, and their content places them like cold ones. They count as often as trained items are
bought, and take part in any case: validation cannot tell of items that nobody was offered. The trained items' quality has a
higher floor then.
"""

from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from logging import getLogger

import torch
from torch import Tensor

from recbole_llm.fitting.cold_start.boost import (
    UNTOLD_WARM_FLOOR,
    WARM_FLOOR,
    ColdBoost,
    choose_cold_boost,
    deviation_direction,
    highest_place,
)
from recbole_llm.fitting.cold_start.kernel_ridge import (
    MU,
    Shares,
    any_present,
    map_weights,
    share_candidates,
    weighed,
)
from recbole_llm.fitting.validation import CHUNK_ELEMENTS, TopKMetric, evenly, user_metric
from recbole_llm.fitting.warm_items import ContentTables
from recbole_llm.scoring.rows import Rows, union
from recbole_llm.scoring.score import ColdRows, ItemTable, Score

MUS = (0.3, 1.0)
MAX_HIDDEN_SHARE = 0.3  # of the trained items that have a text
MAX_USERS = 5_000  # by whom the place is chosen
MAX_USERS_OF_SHIFT = 3_000  # by whose scores the offset becomes a vector
MAX_ANCHORS_TO_CHOOSE_MU = 8_000  # beyond, a factorisation for every mu is not worth its time
ENOUGH_TARGETS = 100  # cold ones in validation that decide without hidden items
LEAST_EVENTS = 500  # interactions with hidden items by which a place can be told
UNMEASURED = ColdBoost(joint=True, kappa=1.0, offset=-1.0)  # without validation data

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


def map_items(
    score: Score, evidence: Evidence, trained: Tensor, ids: Tensor, mu: float, shares: Shares | None = None
) -> tuple[ColdRows, Tensor]:
    """Map the content of the items ``ids`` to rows, and to the bias of each, ``[C]``, in units of the score.

    Args:
        score: whose trained items are mapped onto.
        evidence: content and popularity.
        trained: ``[N]`` bool, the items to map onto.
        ids: ``[C]``, items that have content.
        mu: ridge.
        shares: of the modalities; ``None`` for equal ones.
    """
    known, weights = map_weights(evidence.content, trained, ids, evidence.popularity, mu=mu, shares=shares)
    rows, bias = score.mapped(known, weights, trained & evidence.present)
    return replace(rows, ids=ids, mu=mu, shares=dict(shares or {})), bias


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
        add_direct: adds what direct rows give for chosen rows to their scores ``[B, N]`` in place.
    """

    queries: Tensor
    table: ItemTable
    target: Tensor
    bias: Tensor
    ids: Tensor
    trained: Tensor
    targets: Rows
    seen: Rows
    add_direct: Callable[[Tensor, Tensor], Tensor] = lambda scores, rows: scores

    def scores(self, rows: Tensor) -> Tensor:
        """Compute scores ``[B, N]`` with factor 1 and offset 0."""
        x = self.queries[rows]
        scores = self.add_direct(self.table.scores(x), rows)
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

    def boost(self, metric: TopKMetric, warm_floor: float = WARM_FLOOR) -> ColdBoost:
        """The factor and offset that gain most while the trained items keep that share of their quality."""
        cold, excluded = self._cold_and_excluded()
        return choose_cold_boost(
            self.scores, self.targets, self.seen, cold, metric, self.deviations(), excluded, warm_floor=warm_floor
        )

    def highest(self, metric: TopKMetric) -> ColdBoost:
        """The largest offset that the trained items allow, of items that are nobody's targets."""
        cold, excluded = self._cold_and_excluded()
        return highest_place(self.scores, self.targets, self.seen, cold, metric, self.deviations(), excluded)

    def _cold_and_excluded(self) -> tuple[Tensor, Tensor]:
        cold = torch.zeros_like(self.trained)
        cold[self.ids] = True
        return cold, ~(self.trained | cold)


Refit = Callable[[Rows], Fitted]
"""Histories without the hidden items -> the score fitted on them, and the histories to ask it with."""


def choose_place(evidence: Evidence, ids: Tensor, score: Score, refit: Refit) -> tuple[float, ColdBoost, Shares]:
    """Choose the ridge of the map, the shares of the modalities, the factor and the offset of the items ``ids``.

    Args:
        evidence: what they are chosen by.
        ids: ``[C]``, cold items that have content.
        score: of the model.
        refit: fits once more without some items.

    Returns:
        mu, the boost, and the shares; ``joint=False`` where enough cold targets of validation say that nothing is gained.
    """
    cold = torch.zeros_like(evidence.trained)
    cold[ids] = True
    n_targets = int(cold[evidence.targets.ids].sum())
    n_known = int((evidence.trained & evidence.present).sum())
    mus = MUS if n_known <= MAX_ANCHORS_TO_CHOOSE_MU else (MU,)
    if n_targets >= ENOUGH_TARGETS:
        mu, trial, shares = _best(
            evidence,
            lambda mus, shares: validation_trials(evidence, ids, score, mus, shares),
            mus,
            f"{n_targets} cold targets of validation",
        )
        return mu, trial.boost(evidence.metric), shares
    hidden = hide(evidence, len(ids))
    if hidden.events >= LEAST_EVENTS and len(hidden.ids) <= MAX_HIDDEN_SHARE * n_known:
        by = f"{len(hidden.ids)} hidden items with {hidden.events} interactions"
        fitted = refit(hidden.left)
        mu, trial, shares = _best(
            evidence, lambda mus, shares: hidden_trials(evidence, hidden, lambda _: fitted, mus, shares), mus, by
        )
        boost = trial.boost(evidence.metric, UNTOLD_WARM_FLOOR)
        if boost.joint:
            return mu, boost, shares
        log.info("cold items: hidden ones gain nothing; the place is as high as the trained items allow")
    else:
        mu, shares = MU, {}
        log.info(
            f"cold items: {len(hidden.ids)} hidden items of {n_known} have {hidden.events} interactions, and {LEAST_EVENTS} are "
            "needed to tell a place by them; the place is as high as the trained items allow"
        )
    return mu, validation_trials(evidence, ids, score, (mu,), shares)[mu].highest(evidence.metric), shares


def _best(
    evidence: Evidence,
    trials_of: Callable[[Sequence[float], Shares], dict[float, PlacementTrial]],
    mus: Sequence[float],
    by: str,
) -> tuple[float, PlacementTrial, Shares]:
    """The ridge and the shares by which the mapped items are ranked best among themselves, and their trial.

    Ridges are compared with equal shares, then shares with the best ridge, and ridges once more with the best shares.
    """
    candidates = share_candidates([m for m, (_, has) in evidence.content.items() if bool(has[evidence.trained].any())])
    values: dict[tuple[float, int], float] = {}
    best: tuple[float, int] = mus[0], 0
    trial: PlacementTrial | None = None  # the best one's alone: each holds a query of every user

    def best_of(some: Sequence[float], at: int) -> tuple[float, int]:
        nonlocal best, trial
        new = [mu for mu in some if (mu, at) not in values]
        for mu, found in trials_of(new, candidates[at]).items() if new else ():
            values[mu, at] = found.cold_only(evidence.metric)
            if trial is None or values[mu, at] > values[best]:
                best, trial = (mu, at), found
        return best

    mu, _ = best_of(mus, 0)
    equal = values[mu, 0]
    for other in range(1, len(candidates)):
        best_of((mu,), other)
    mu, at = best_of(mus, best[1])
    assert trial is not None
    shared = "" if len(candidates) == 1 else f", {shares_in_words(candidates[at])}; {equal:.4f} with equal shares"
    log.info(f"cold items among themselves, by {by}: {evidence.metric} {values[mu, at]:.4f} with ridge {mu:g}{shared}")
    return mu, trial, candidates[at]


def placed_in_words(content: ContentTables, ids: Tensor) -> str:
    """Say how many items are placed by what; of several modalities each is counted.

    Args:
        content: of the items.
        ids: ``[C]``, those that have some.
    """
    counted = ""
    if len(content) > 1:
        each = (f"{modality} {int(present[ids].sum())}" for modality, (_, present) in content.items())
        counted = f" ({', '.join(each)}; what an item lacks is left out of the sum)"
    return f"{len(ids)} of them have a {' or '.join(content)} and are placed by it{counted}"


def shares_in_words(shares: Shares) -> str:
    """Say what each modality counts for."""
    return ", ".join(f"{name} share {share:g}" for name, share in shares.items()) or "equal shares"


def _trials(
    evidence: Evidence,
    fitted: Fitted,
    users: Tensor,
    ids: Tensor,
    trained: Tensor,
    targets: Rows,
    seen: Rows,
    mus: Sequence[float],
    shares: Shares | None,
) -> dict[float, PlacementTrial]:
    score, histories = fitted
    queries, table = score.queries(histories.select(users), score.user_parts(users)), score.item_table()
    table = replace(table, bias=table.bias.nan_to_num(neginf=0.0))  # untrained rows are excluded or overwritten
    found = {}
    for mu in mus:
        rows, bias = map_items(score, evidence, trained, ids, mu, shares)
        target = score.side_by_side(rows.target)
        wanted, hidden = targets.select(users), seen.select(users)
        add = _direct_adder(score, histories, users)
        found[mu] = PlacementTrial(queries, table, target, bias, ids, trained, wanted, hidden, add)
    return found


def _direct_adder(score: Score, histories: Rows, users: Tensor) -> Callable[[Tensor, Tensor], Tensor]:
    def add(scores: Tensor, rows: Tensor) -> Tensor:
        some = users[rows]
        return score.add_direct(scores, histories.select(some), score.user_parts(some))

    return add


def validation_trials(
    evidence: Evidence, ids: Tensor, score: Score, mus: Sequence[float], shares: Shares | None = None
) -> dict[float, PlacementTrial]:
    """Rank the cold items themselves against validation's targets."""
    users = evenly(torch.nonzero(evidence.targets.sizes).squeeze(1), MAX_USERS)
    fitted = score, evidence.history
    return _trials(evidence, fitted, users, ids, evidence.trained, evidence.targets, evidence.history, mus, shares)


@dataclass(frozen=True, eq=False)
class Hidden:
    """Trained items that are taken for cold ones.

    Attributes:
        ids: ``[H]`` int64, ascending.
        left: training interactions without them.
        targets: validation's targets among the items still trained, and interactions with the hidden items.
        events: of these, those with hidden items.
    """

    ids: Tensor
    left: Rows
    targets: Rows
    events: int


def hide(evidence: Evidence, n_cold: int, seed: int = 0) -> Hidden:
    """Hide as many trained items as are cold, more where these have too few interactions to tell a place by.

    The hidden items' training interactions become targets, thinned to the rate at which validation holds the other items, but to
    no fewer than ``LEAST_EVENTS``. At most ``MAX_HIDDEN_SHARE`` of the items with content are hidden.
    """
    trained, history = evidence.trained, evidence.history
    known = torch.nonzero(trained & evidence.present).squeeze(1)
    generator = torch.Generator().manual_seed(seed)
    order = known[torch.randperm(len(known), generator=generator).to(known.device)]
    enough = int((evidence.popularity[order].cumsum(0) < LEAST_EVENTS).sum()) + 1
    count = max(1, min(max(n_cold, enough), int(MAX_HIDDEN_SHARE * len(known))))
    ids = order[:count].sort().values
    hidden = torch.zeros_like(trained)
    hidden[ids] = True
    left, lost = history.keep(~hidden[history.ids]), history.keep(hidden[history.ids])
    warm = evidence.targets.keep((trained & ~hidden)[evidence.targets.ids])
    rate = len(warm.ids) / max(len(left.ids), 1)
    wanted = min(max(round(rate * len(lost.ids)), LEAST_EVENTS), len(lost.ids))
    kept = torch.zeros(len(lost.ids), dtype=torch.bool)
    kept[torch.randperm(len(lost.ids), generator=generator)[:wanted]] = True
    lost = lost.keep(kept.to(hidden.device))
    return Hidden(ids, left, union(warm, lost), len(lost.ids))


def hidden_trials(
    evidence: Evidence, hidden: Hidden, refit: Refit, mus: Sequence[float], shares: Shares | None = None
) -> dict[float, PlacementTrial]:
    """The hidden items placed by mu, with the score fitted without them."""
    rest = torch.zeros_like(evidence.trained)
    rest[hidden.ids] = True
    users = evenly(torch.nonzero((hidden.targets.sizes > 0) & (hidden.left.sizes > 0)).squeeze(1), MAX_USERS)
    trained = evidence.trained & ~rest
    return _trials(evidence, refit(hidden.left), users, hidden.ids, trained, hidden.targets, hidden.left, mus, shares)


def place(
    evidence: Evidence, ids: Tensor, score: Score, boost: ColdBoost, mu: float, shares: Shares | None = None
) -> Score:
    """Return the score with the items ``ids`` placed.

    Args:
        evidence: content and popularity.
        ids: ``[C]``, items that have content; those whose content has no share are left out.
        score: of the model, without them.
        boost: factor and offset.
        mu: ridge of the map.
        shares: of the modalities; ``None`` for equal ones.
    """
    has_share = any_present(weighed(evidence.content, shares))[ids]
    if not bool(has_share.all()):
        log.info(f"cold items: {int((~has_share).sum())} have nothing but content without a share, and get no place")
        ids = ids[has_share]
    if not len(ids):
        return score
    rows, bias = map_items(score, evidence, evidence.trained, ids, mu, shares)
    target = score.side_by_side(rows.target)
    shift = torch.zeros_like(target[0])
    if boost.offset:
        users = evenly(torch.nonzero(evidence.history.sizes).squeeze(1), MAX_USERS_OF_SHIFT)
        x = score.queries(evidence.history.select(users), score.user_parts(users))
        table = score.item_table()
        table = replace(table, bias=table.bias.nan_to_num(neginf=0.0))
        add, history = _direct_adder(score, evidence.history, users), evidence.history
        trial = PlacementTrial(x, table, target, bias, ids, evidence.trained, history, history, add)
        shift = boost.offset * deviation_direction(x, trial.deviations())
    shifts = score.by_block(shift)
    cold = replace(
        rows,
        target={name: boost.kappa * table + shifts[name] for name, table in rows.target.items()},
        bias={name: boost.kappa * each for name, each in rows.bias.items()},
        joint=boost.joint,
        kappa=boost.kappa,
        shift=shifts,
        offset=boost.offset,
    )
    return score.with_cold(cold)
