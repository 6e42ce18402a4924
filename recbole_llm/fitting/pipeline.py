"""The fit, from interactions and content to a calibrated score, in the order in which it happens.

Each stage takes values and returns a value; nothing is undone. Every choice is made on validation data. Without validation data
the documented constants apply. docs/architecture.md has the stages as a table with their conditions and costs.
"""

from collections.abc import Callable, Iterator
from dataclasses import replace
from logging import getLogger
from typing import Any, Protocol

import torch
from torch import Tensor

from recbole_llm.fitting.blend import BLEND_WEIGHTS, choose_blend
from recbole_llm.fitting.calibration import fit_platt, fit_probability
from recbole_llm.fitting.closed_form import MAX_DENSE_ITEMS, ClosedForm, fit_closed_form
from recbole_llm.fitting.cold_start.boost import ColdBoost
from recbole_llm.fitting.cold_start.kernel_ridge import MU, Shares, any_present
from recbole_llm.fitting.cold_start.placement import UNMEASURED, Evidence, Fitted, choose_place, place, placed_in_words
from recbole_llm.fitting.data import TrainingData
from recbole_llm.fitting.decay_search import CLOSED_DECAYS, CONTENT_DECAYS, FOLLOWING_DECAYS, choose_fading
from recbole_llm.fitting.ease import Setting
from recbole_llm.fitting.hyperparameters import DIM, EXACT_ITEMS
from recbole_llm.fitting.large_catalogue import NEIGHBOURHOODS
from recbole_llm.fitting.logs import quietly, stage
from recbole_llm.fitting.next_item import CONTENT, TRANSITIONS, choose_decay, fit_next_item
from recbole_llm.fitting.sequence import fit_sequence, require_order, takes_part
from recbole_llm.fitting.signals import SignalOptions, choose_dislikes
from recbole_llm.fitting.stage_values import (
    FittedBlock,
    FittedScore,
    on_device,
    solved_blocks,
    weights_of,
    with_weights,
)
from recbole_llm.fitting.validation import DEFAULT_METRIC, MAX_PAIRS, MIN_USERS, Validation, evenly, user_metric
from recbole_llm.scoring.rows import Rows, log_length
from recbole_llm.scoring.score import LinearBlock, Score, Scorer
from recbole_llm.scoring.sequence import SEQUENCE, SequenceBlock

MAX_BLEND_USERS = 20_000  # users by whom the weight between the blocks is chosen
MAX_ORDER_USERS = 6_000  # by whom the next-item block and the decays are chosen, one block after the other
MAX_DECAY_USERS = 6_000  # the same of all decays together, which takes 20 rankings, and 560 of candidates
MIN_DECAY_USERS, MAX_DECAY_PAIRS = 500, 200_000_000  # pairs of users and items: fewer users above 40,000 items
MAX_CALIBRATION_USERS = 5_000  # two numbers are fitted to millions of pairs
MAX_CALIBRATION_PAIRS = 25_000_000  # of users and items; a pass over so many takes seconds, and there are ten
DEFAULT_LEARNED_SHARE = 0.35  # without validation data; the median of what validation chose on three datasets

log = getLogger(__name__)


class FitOptions(SignalOptions, Protocol):
    """The options that the fit reads, as :class:`recbole_llm.bridge.options.Options` has them."""

    @property
    def blocks(self) -> tuple[str, ...]:
        """Of ``closed_form``, ``learned``, ``sequence`` and ``auto_sequence``."""

    @property
    def closed_form_dim(self) -> int | str:
        """Rank of the closed form, ``auto`` or ``full``."""

    @property
    def cold_map(self) -> str:
        """``ridge`` or ``none``."""

    @property
    def cold_boost(self) -> float | str:
        """``auto``, or the factor of cold-start items."""


def fit(
    data: TrainingData,
    validation: Validation | None,
    options: FitOptions,
    train_towers: Callable[[], LinearBlock],
    *,
    start: FittedScore | None = None,
    rank_all_cold: bool = False,
    agree: Callable[[Any], Any] = lambda value: value,
) -> FittedScore:
    """Fit a score.

    Args:
        data: training data.
        validation: by which choices are made; ``None`` for the documented constants.
        options: which blocks, and how.
        train_towers: trains the learned block and returns it; called once, if ``options.blocks`` names it.
        start: an earlier fit of the same data, whose closed form and next-item block are taken over.
        rank_all_cold: whether cold-start items take part in the ranking even where that gains nothing.
        agree: gives every process of a group the same value; rounding may decide otherwise on another device.

    Returns:
        The calibrated score.

    Raises:
        ValueError: if ``options.blocks`` names the sequence block and the interactions have no order, or no block could be fitted.
    """
    require_order(options.blocks, data)
    if start is None or start.score.block("closed_form") is None:
        with stage("closed form"):
            closed = fit_closed_form_block(data, validation, options) if "closed_form" in options.blocks else None
            following = fit_next_item_block(data, closed, validation) if closed is not None else ()
        closed, following = on_device(data.history.ids.device, agree((closed, following)))
    else:
        closed, following = solved_blocks(start, data.trained)
    learned = None
    if "learned" in options.blocks:
        with stage("towers"):
            learned = train_towers()
    sequence = None
    if takes_part(options.blocks, data, validation is not None):
        with stage("sequence block"):
            sequence = agree(fit_sequence_block(data, validation))
        sequence = None if sequence is None else sequence.to(data.history.ids.device)
    with stage("weights of the blocks"):
        score = weigh(data, validation, closed, following, learned, sequence)
        score = choose_decays(score, data, validation)
        score = with_weights(score, agree(weights_of(score)))
        score = choose_dislikes(score, data, validation, options, agree)
    setting = None if closed is None else closed.setting
    with stage("items without interactions"):
        score = place_cold_items(score, data, validation, options, setting, rank_all_cold)
    with stage("probabilities"):
        score = calibrate(score, data, validation)
    return FittedScore(score, setting)


# ---------------------------------------------------------------- the blocks that are solved for


def fit_closed_form_block(data: TrainingData, validation: Validation | None, options: FitOptions) -> FittedBlock:
    """Fit the closed form, and if interactions are ordered, how fast its histories fade.

    Constants and decay depend on each other. So a decay is chosen for the documented constants, the constants for that decay,
    and the decay once more.
    """
    if not data.is_ordered or validation is None:
        found = _closed_form(data, data.history, validation, options)
        return FittedBlock(found.block(), found.setting)
    users, value = _users_and_value(data, validation)
    histories = data.history.select(users)
    # one solution tells a decay; its factors would take longer than it does
    many = EXACT_ITEMS < int(data.trained.sum()) <= MAX_DENSE_ITEMS
    with quietly():
        first = _closed_form(data, data.history, None, options, **({"dim": "full"} if many else {}))
    decay, _ = choose_decay(first.block(), histories, value)
    validation = replace(validation, history=data.history.decayed(decay))
    found = _closed_form(data, data.history, validation, options)
    decay, best = choose_decay(found.block(), histories, value)
    log.info(f"histories of the closed form fade by exp(-rank / {decay}): {validation.metric} {best:.4f}")
    return FittedBlock(replace(found.block(), decay=decay), found.setting)


def _closed_form(
    data: TrainingData, history: Rows, validation: Validation | None, options: FitOptions, **fixed: Any
) -> ClosedForm:
    return fit_closed_form(history, data.n_items, data.content, validation, **{"dim": options.closed_form_dim} | fixed)


def fit_next_item_block(
    data: TrainingData, closed: FittedBlock | None, validation: Validation | None
) -> tuple[LinearBlock, ...]:
    """Fit the next-item block beside the closed form, if interactions are ordered.

    Returns:
        Its transitions and, where they read content, that; nothing if it adds nothing.
    """
    if closed is None or not data.is_ordered or validation is None:
        return ()
    users, value = _users_and_value(data, validation)
    histories, block = data.history.select(users), closed.block
    dim = None if block.target is None else block.dim
    scorer = block.scorer(histories)
    return fit_next_item(data.history, histories, data.n_items, scorer, value, dim, data.trained, data.content)


def fit_sequence_block(data: TrainingData, validation: Validation | None) -> SequenceBlock | None:
    """Train the sequence block, its best epoch by validation.

    Raises:
        ValueError: if the interactions have no order.
    """
    require_order((SEQUENCE,), data)
    if validation is None:
        return fit_sequence(data, None, data.history)
    users, value = _users_and_value(data, validation)
    return fit_sequence(data, value, data.history.select(users))


def _users_and_value(data: TrainingData, validation: Validation) -> tuple[Tensor, Callable[[Scorer], float]]:
    """Users who have a validation target, and the mean metric of a scorer of these users among the trained items."""
    users = evenly(torch.nonzero(validation.targets.sizes).squeeze(1), MAX_ORDER_USERS)
    targets, seen = validation.targets.select(users), validation.seen.select(users)

    def value(scorer: Scorer) -> float:
        return float(user_metric(scorer, targets, seen, data.n_items, validation.metric, excluded=~data.trained).mean())

    return users, value


# ---------------------------------------------------------------- how much each block counts


def weigh(
    data: TrainingData,
    validation: Validation | None,
    closed: FittedBlock | None,
    following: tuple[LinearBlock, ...],
    learned: LinearBlock | None,
    sequence: LinearBlock | None = None,
) -> Score:
    """Start the score from the solved blocks as they were weighed against each other, and join the trained ones to them.

    Raises:
        ValueError: if there is no block at all.
    """
    blocks = () if closed is None else (closed.block, *following)
    trained = [block for block in (learned, sequence) if block is not None]
    if not blocks and not trained:
        raise ValueError("No block could be fitted: histories of one item leave nothing to a sequence block alone.")
    first = blocks or (trained.pop(0),)
    score = Score(first, data.rows.listed().to(data.history.ids.device), rows=data.rows)
    for block in trained:
        score = join(score, block, data, validation)
    return score


def join(score: Score, block: LinearBlock, data: TrainingData, validation: Validation | None) -> Score:
    """Return the score with one more block, its weight chosen on validation, 0 among the choices.

    Both parts are scaled by the standard deviation of their scores. Without validation data, or a target in it, the block gets
    ``DEFAULT_LEARNED_SHARE`` of the whole.

    Args:
        score: not calibrated yet.
        block: of scale 1, with a name of its own.
        data: training data.
        validation: by which the weight is chosen.
    """
    chooses = validation is not None and len(validation.targets.ids) > 0
    rated = validation.targets if validation is not None and chooses else data.history
    most = min(MAX_BLEND_USERS, max(MIN_USERS, MAX_PAIRS // data.n_items))
    users = evenly(torch.nonzero(rated.sizes).squeeze(1), most)

    def value(scorer: Scorer) -> float:
        assert validation is not None
        targets, seen = validation.targets.select(users), validation.seen.select(users)
        return float(user_metric(scorer, targets, seen, data.n_items, validation.metric, excluded=~data.trained).mean())

    chosen = choose_blend(
        _scorer(score, users, data.history),
        _scorer(replace(score, blocks=(block,)), users, data.history),
        torch.arange(len(users), device=users.device),
        data.n_items,
        value if chooses else lambda scorer: 0.0,
        weights=BLEND_WEIGHTS if chooses else (DEFAULT_LEARNED_SHARE,),
        columns=data.trained,
    )
    log.info(f"share of the {block.name} block in the score: {chosen.weight:g}")
    first, second = chosen.scales
    scaled = tuple(replace(each, scale=each.scale * first) for each in score.blocks)
    return replace(score, blocks=(*scaled, replace(block, scale=second)))


def _scorer(score: Score, users: Tensor, histories: Rows) -> Scorer:
    """Scores of all items, those without a place included, for chosen known users."""

    def scores(rows: Tensor) -> Tensor:
        some = users[rows]
        return score.scores(histories.select(some), score.user_parts(some), unlisted=True)

    return scores


def choose_decays(score: Score, data: TrainingData, validation: Validation | None) -> Score:
    """Choose decays and weights of all blocks once more, jointly, if interactions are ordered.

    Each block was tuned before the later ones existed. What was chosen block by block stays where the best of the grid is no
    better, both measured by whole rankings.
    """
    closed, learned, following, content, sequence = (
        score.block(name) for name in ("closed_form", "learned", TRANSITIONS, CONTENT, SEQUENCE)
    )
    if not data.is_ordered or validation is None or closed is None or not closed.scale:
        return score
    most = min(MAX_DECAY_USERS, max(MIN_DECAY_USERS, MAX_DECAY_PAIRS // data.n_items))
    users = evenly(torch.nonzero(validation.targets.sizes).squeeze(1), most)
    if not len(users):
        return score
    targets, seen, histories = (rows.select(users) for rows in (validation.targets, validation.seen, data.history))

    def fading(block: LinearBlock, tau: float | None) -> Scorer:
        return replace(block, decay=tau, scale=1.0).scorer(histories)

    decays = FOLLOWING_DECAYS if content is None else CONTENT_DECAYS
    choice = choose_fading(
        {tau: fading(closed, tau) for tau in CLOSED_DECAYS},
        {} if following is None else {tau: fading(following, tau) for tau in decays},
        None if learned is None else replace(learned, scale=1.0).scorer(histories, users),
        targets,
        seen,
        validation.metric,
        ~data.trained,
        {} if content is None else {tau: fading(content, tau) for tau in decays},
        None if sequence is None else replace(sequence, scale=1.0).scorer(histories),
    )
    closed_factor, following_factor, share = choice.factors
    if not closed_factor:  # no history to tell by
        return score
    blocks: list[LinearBlock] = [replace(closed, decay=choice.closed, scale=closed_factor)]
    if following is not None and choice.following is not None:
        blocks.append(replace(following, decay=choice.following, scale=following_factor))
    if content is not None and choice.content is not None:
        blocks.append(replace(content, decay=choice.content, scale=choice.content_factor))
    if learned is not None:
        blocks.append(replace(learned, scale=share))
    if sequence is not None:
        blocks.append(replace(sequence, scale=choice.sequence_factor))
    candidate = replace(score, blocks=tuple(blocks))

    def values(of: Score) -> list[float]:
        metrics = validation.metric, replace(validation.metric, k=2 * validation.metric.k)
        scorer = _scorer(of, users, data.history)
        return [float(user_metric(scorer, targets, seen, data.n_items, m, ~data.trained).mean()) for m in metrics]

    before, found = values(score), values(candidate)
    if sum(found) > sum(before):
        log.info(
            f"score, in deviations of each block: {choice}: {validation.metric} {found[0]:.4f}, {before[0]:.4f} before"
        )
        return candidate
    log.info(
        f"decays and weights stay as chosen block by block: {validation.metric} {before[0]:.4f}; {found[0]:.4f} for {choice}"
    )
    return score


# ---------------------------------------------------------------- items that nobody has touched


def place_cold_items(
    score: Score,
    data: TrainingData,
    validation: Validation | None,
    options: FitOptions,
    setting: Setting | None,
    rank_all: bool = False,
    given: tuple[float, ColdBoost, Shares] | None = None,
) -> Score:
    """Give the items without a training interaction vectors from their content, and a place beside the trained ones.

    Targets, bias and sources come from a kernel ridge map of content to trained items. ``cold_boost: auto`` chooses ridge, factor
    and offset (:func:`recbole_llm.fitting.cold_start.placement.choose_place`), under a floor for the trained items' quality.
    Without validation data the place is the ``given`` one, or a documented one.
    """
    cold = ~data.trained
    cold[0] = False
    n_cold = int(cold.sum())
    if not n_cold:
        return score
    if data.rows.sharded:
        log.info(f"{n_cold} items have no training interaction; with shard_items cold_map does not place them")
        return score
    if not data.content or options.cold_map == "none":
        log.info(
            f"{n_cold} items have no training interaction, and nothing to place them by (cold_map {options.cold_map})"
        )
        return score
    present = any_present(data.content)
    placed = torch.nonzero(cold & present).squeeze(1)
    log.info(f"{n_cold} items have no training interaction; {placed_in_words(data.content, placed)}")
    if not len(placed) or not bool((data.trained & present).any()):
        return score
    evidence = Evidence(
        data.history,
        data.history if validation is None else validation.targets,
        DEFAULT_METRIC if validation is None else validation.metric,
        data.content,
        data.trained,
        data.popularity,
    )

    def refit(left: Rows) -> Fitted:
        return _without_items(score, data, left, options, setting), left

    mu, boost, shares = given or (MU, UNMEASURED, {})
    if options.cold_boost != "auto":
        boost = ColdBoost(joint=True, kappa=float(options.cold_boost))
    elif validation is not None and given is None:
        mu, boost, shares = choose_place(evidence, placed, score, refit)
    log.info(str(boost))
    # a value-based metric asks for the score of a pair, wherever a ranking would place it
    return place(evidence, placed, score, replace(boost, joint=boost.joint or rank_all), mu, shares)


def _without_items(score: Score, data: TrainingData, left: Rows, options: FitOptions, setting: Setting | None) -> Score:
    """The score without some items' interactions: the closed form fitted anew, the learned block as it is.

    It only tells where cold-start items should stand. So the next-item block is left out, and beyond ``EXACT_ITEMS`` items the
    SVD form of rank ``DIM`` does, where the kernels have one; for a closed form by neighbourhoods, that form.
    """
    closed, learned = score.block("closed_form"), score.block("learned")
    if closed is None:
        return score
    target = closed.target
    fixed: dict[str, Any] = {"dim": "full" if target is None else target.shape[1]}
    if closed.direct is not None:
        fixed["form"] = NEIGHBOURHOODS
    elif (setting is None or setting.is_linear) and int(data.trained.sum()) > EXACT_ITEMS:
        fixed = {"dim": DIM if target is None else min(DIM, target.shape[1]), "max_dense_items": 0}
    with quietly():
        found = _closed_form(data, left, None, options, setting=setting, **fixed)
    anew = replace(closed, source=found.source, target=found.target, direct=found.direct)
    return replace(score, blocks=(anew,) if learned is None else (anew, learned))


# ---------------------------------------------------------------- from a score to a probability


def calibrate(score: Score, data: TrainingData, validation: Validation | None) -> Score:
    """Fit slope and intercept of the score, and the map from it to a probability.

    P(i|u) is the probability that item i turns up among the user's next interactions, as many as validation holds of the
    user, given that it is in none of those that training and validation hold (:mod:`recbole_llm.fitting.calibration`). Only
    items with a training interaction count. Without validation data the score stays as it is.
    """
    if validation is None:
        return score
    most = min(MAX_CALIBRATION_USERS, max(MAX_CALIBRATION_PAIRS // data.n_items, 1))
    users = evenly(torch.nonzero(validation.targets.sizes).squeeze(1), most)

    def batches(of: Score) -> Iterator[tuple[Tensor, Tensor, Tensor]]:
        for few in users.split(max(1, 2**22 // data.n_items)):
            targets, seen, history = (rows.select(few) for rows in (validation.targets, validation.seen, data.history))
            label = torch.zeros(len(few), data.n_items, dtype=torch.bool, device=few.device)
            label[targets.row_of_entry(), targets.ids] = True
            counts = data.trained.expand(len(few), -1).clone()
            counts[seen.row_of_entry(), seen.ids] = False
            length = log_length(history)[:, None].expand_as(counts)
            yield of.scores(history, of.user_parts(few))[counts], length[counts], label[counts]

    slope, intercept = fit_platt(lambda: ((scores, label) for scores, _, label in batches(score)))
    scaled = replace(score, slope=slope, intercept=intercept)
    probability = fit_probability(lambda: batches(scaled), intercept)
    log.info(f"score = {slope:.4g} blocks {intercept:+.4g}; {probability}; fitted on validation")
    return replace(scaled, probability=probability)
