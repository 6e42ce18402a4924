r"""What an interaction says beside that it happened: how much it counts, and what a user did not like.

    confidence c_uj    of an interaction, 1 on average: a rating, a count, a kind of event, its age
    G                  of X_uj = c_uj^(a / 2), so that X'WX weighs an interaction c_uj^a            the fit
    loss               of a positive times c_uj^a
    t_uj               = c_uj^b                                                                     the histories
    part_u             - d sum_j v_j over the items j that the user has seen and not liked          dislikes

a, b and d are chosen on validation, 0 among the choices: for a and b by the closed form of documented constants, for d by the
weighed score. Of several choices the best is often lucky, so a choice counts only where its gain is more than ``ERRORS`` standard
errors over the users. What is set aside is said.
"""

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from logging import getLogger
from typing import Any, Protocol, TypeVar

import torch
from torch import Tensor

from recbole_llm.fitting.closed_form import fit_closed_form
from recbole_llm.fitting.data import TrainingData
from recbole_llm.fitting.hyperparameters import DIM, EXACT_ITEMS
from recbole_llm.fitting.logs import quietly
from recbole_llm.fitting.next_item import choose_decay
from recbole_llm.fitting.validation import Validation, evenly, user_metric
from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.score import LinearBlock, Score, Scorer

EXPONENTS = (0.0, 0.5, 1.0)  # of the confidence
AS_GIVEN = 1.0  # without validation data
DISLIKES = (0.0, 0.1, 0.25, 0.5, 1.0)
ERRORS = 2.0  # standard errors that a gain must have; with 1, ratings were taken on ml-100k, to no gain on test
MAX_USERS = 20_000

log = getLogger(__name__)
Choice = TypeVar("Choice")


@dataclass(frozen=True)
class Signals:
    """How the confidence of interactions counts.

    Attributes:
        fit: exponent a, where a model is fitted.
        history: exponent b, where histories are summed.
    """

    fit: float = 0.0
    history: float = 0.0

    def applied(self, rows: Rows) -> Rows:
        """Return histories as a fit and a score read them, from those with the confidence of each interaction."""
        given = rows.confidence
        if given is None:
            return rows
        confidence = None
        if self.fit:
            confidence = given**self.fit
            confidence = confidence / confidence.mean() if len(given) else confidence
        weights = rows.weights
        if self.history:
            weights = given**self.history if weights is None else weights * given**self.history
        return replace(rows, weights=weights, confidence=confidence)

    def to_state(self) -> dict[str, float]:
        """As plain values, for a checkpoint."""
        return {"fit": self.fit, "history": self.history}

    @classmethod
    def from_state(cls, state: Mapping[str, Any] | None) -> "Signals":
        """The inverse of :meth:`to_state`; of an earlier checkpoint's ``None``, no signal."""
        return cls() if state is None else cls(float(state["fit"]), float(state["history"]))

    def __str__(self) -> str:
        return f"exponent {self.fit:g} in the fit, {self.history:g} in histories"


class SignalOptions(Protocol):
    """The options that these choices read."""

    @property
    def blocks(self) -> tuple[str, ...]:
        """Of ``closed_form`` and ``learned``."""

    @property
    def weight_exponent(self) -> float | str:
        """``auto``, or the exponent of the confidence of interactions."""

    @property
    def dislike_weight(self) -> float | str:
        """``auto``, or how much disliked items count as negative evidence."""


def choose_signals(data: TrainingData, validation: Validation | None, options: SignalOptions) -> Signals:
    """Choose how the confidence of interactions counts.

    Args:
        data: training data whose history holds the confidence of each interaction, if there is one.
        validation: by which it is chosen; ``None`` for as given.
        options: whether it is chosen; without a closed form there is nothing to choose by.
    """
    given, exponent = data.history.confidence, options.weight_exponent
    if given is None:
        return Signals()
    if exponent != "auto":
        return Signals(float(exponent), float(exponent))
    if validation is None or "closed_form" not in options.blocks or not len(validation.targets.ids):
        log.info("interaction weights count as given: there is nothing to choose their exponent by")
        return Signals(AS_GIVEN, AS_GIVEN)
    if float(given.max() - given.min()) <= 1e-6 * float(given.max()):
        log.info("interaction weights are all equal and count for nothing")
        return Signals()
    users, of_users = _metric(data, validation)
    decay: float | None = None
    values: dict[Signals, Tensor] = {}
    for fit in EXPONENTS:
        block = _documented(replace(data, history=Signals(fit, 0.0).applied(data.history)))
        if data.is_ordered and not fit:
            plain = replace(data.history, confidence=None).select(users)
            decay, _ = choose_decay(block, plain, lambda scorer: float(of_users(scorer).mean()))
        for history in EXPONENTS:
            signals = Signals(fit, history)
            rows = signals.applied(data.history).select(users)
            values[signals] = of_users(replace(block, decay=decay).scorer(rows))
    chosen = surely_best(values, Signals())
    told = ", ".join(f"{s.fit:g}/{s.history:g}: {float(v.mean()):.4f}" for s, v in values.items())
    log.info(f"interaction weights, exponent in the fit/in histories: {validation.metric} {told}")
    log.info(f"interaction weights: {chosen}" if chosen != Signals() else "interaction weights are set aside: no gain")
    return chosen


def _documented(data: TrainingData) -> LinearBlock:
    """The closed form of documented constants."""
    many = int(data.trained.sum()) > EXACT_ITEMS
    fixed: dict[str, Any] = {"dim": DIM, "max_dense_items": 0} if many else {"dim": "full"}
    with quietly():
        return fit_closed_form(data.history, data.n_items, data.content, **fixed).block()


def _metric(data: TrainingData, validation: Validation) -> tuple[Tensor, Callable[[Scorer], Tensor]]:
    """At most ``MAX_USERS`` users with a validation target, and the metric of each of them by a scorer of theirs."""
    users = evenly(torch.nonzero(validation.targets.sizes).squeeze(1), MAX_USERS)
    targets, seen = validation.targets.select(users), validation.seen.select(users)

    def of_users(scorer: Scorer) -> Tensor:
        return user_metric(scorer, targets, seen, data.n_items, validation.metric, excluded=~data.trained)

    return users, of_users


def surely_best(values: Mapping[Choice, Tensor], plain: Choice) -> Choice:
    """Find the choice with the highest mean; ``plain`` unless the gain over it is more than ``ERRORS`` standard errors.

    Args:
        values: ``[M]`` of the same M users by choice, that of ``plain`` among them.
        plain: the choice that needs no reason.
    """
    best = max(values, key=lambda choice: float(values[choice].mean()))
    gain = values[best] - values[plain]
    if len(gain) < 2 or float(gain.mean()) <= ERRORS * float(gain.std()) / len(gain) ** 0.5:
        return plain
    return best


def choose_dislikes(
    score: Score,
    data: TrainingData,
    validation: Validation | None,
    options: SignalOptions,
    agree: Callable[[Any], Any] = lambda value: value,
) -> Score:
    """Choose how much disliked items count against what they would add to a history, in the closed form.

    Args:
        score: the weighed score.
        data: training data.
        validation: by which it is chosen; ``None`` for not at all.
        options: whether it is chosen.
        agree: gives every process of a group the same value.
    """
    closed = score.block("closed_form")
    if data.disliked is None or closed is None or not closed.scale:
        return score
    weight = options.dislike_weight
    blocks = {d: replace(closed, dislikes=d, disliked=data.disliked) for d in DISLIKES}
    if weight != "auto":
        return score.with_blocks(replace(blocks[0.0], dislikes=float(weight)))
    if validation is None:
        return score
    users, _ = _metric(data, validation)
    users = users[data.disliked.sizes[users] > 0]
    targets, seen = validation.targets.select(users), validation.seen.select(users)
    values: dict[float, Tensor] = {}
    for d, block in blocks.items() if len(users) else ():
        of = score.with_blocks(block)

        def scorer(rows: Tensor, of: Score = of) -> Tensor:
            some = users[rows]
            return of.scores(data.history.select(some), of.user_parts(some), unlisted=True)

        values[d] = user_metric(scorer, targets, seen, data.n_items, validation.metric, excluded=~data.trained)
    if not values:
        log.info("dislikes are set aside as evidence: no user with a validation target dislikes an item")
        return score
    chosen = agree(surely_best(values, 0.0))
    told = ", ".join(f"{d:g}: {float(v.mean()):.4f}" for d, v in values.items())
    log.info(f"dislikes of {len(users)} users, by their weight as negative evidence: {validation.metric} {told}")
    log.info(f"dislikes count {chosen:g}" if chosen else "dislikes are set aside as evidence: no gain")
    return score.with_blocks(blocks[chosen]) if chosen else score
