"""What validation chose, and the fit that repeats it on more interactions.

A model is chosen on validation and then fitted once more on everything, as published protocols do. Here all that validation
decided is a value, :class:`Chosen`, and :func:`refit` is the sequence of :func:`recbole_llm.fitting.pipeline.fit` with every
choice given. A block's weight is kept in units of the deviation of its scores, which more interactions make larger.
"""

from collections.abc import Callable, Mapping
from dataclasses import asdict, dataclass, field, replace
from logging import getLogger
from typing import Any

import torch
from torch import Tensor

from recbole_llm.fitting.blend import score_deviation
from recbole_llm.fitting.closed_form import fit_closed_form
from recbole_llm.fitting.cold_start.boost import ColdBoost
from recbole_llm.fitting.data import TrainingData
from recbole_llm.fitting.ease import Setting
from recbole_llm.fitting.factors import FactorForm
from recbole_llm.fitting.large_catalogue import NEIGHBOURHOODS
from recbole_llm.fitting.logs import quietly
from recbole_llm.fitting.next_item import TRANSITIONS, blocks_once_more, directions_of
from recbole_llm.fitting.pipeline import FitOptions, place_cold_items
from recbole_llm.fitting.sequence import fit_sequence, require_order
from recbole_llm.fitting.signals import Signals
from recbole_llm.fitting.stage_values import FittedScore
from recbole_llm.fitting.tower_choice import TowerChoice
from recbole_llm.fitting.validation import evenly
from recbole_llm.scoring.probability import ProbabilityMap
from recbole_llm.scoring.score import LinearBlock, Score
from recbole_llm.scoring.sequence import SEQUENCE

MAX_USERS, MAX_PAIRS = 5_000, 100_000_000  # over whose scores deviations are taken, and pairs of users and items

log = getLogger(__name__)


@dataclass(frozen=True)
class ChosenBlock:
    """A block as it was weighed.

    Attributes:
        name: of it.
        weight: in units of the deviation of its scores; 0 for a block that does not count.
        decay: by which its histories fade.
        dim: rank, or ``full``; of the learned block, its columns.
        constants: numbers that it was solved with.
        dislikes: how much disliked items count against it.
    """

    name: str
    weight: float
    decay: float | None
    dim: int | str
    constants: Mapping[str, float]
    dislikes: float = 0.0


@dataclass(frozen=True)
class ChosenPlace:
    """Where items without a training interaction stand: ridge and shares of their map, and the boost."""

    mu: float
    joint: bool
    kappa: float
    offset: float
    shares: Mapping[str, float] = field(default_factory=dict)


@dataclass(frozen=True)
class Chosen:
    """All that validation decided.

    Attributes:
        blocks: in their order.
        setting: constants of the closed form; ``None`` without one.
        epochs: of the learned block, up to its best one.
        cold: place of items without a training interaction; ``None`` where there were none.
        slope: of the calibration.
        intercept: of the calibration.
        probability: the map from scores to probabilities.
        towers: how the learned block was trained; ``None`` where the options say it.
        signals: how the confidence of interactions counts.
    """

    blocks: tuple[ChosenBlock, ...]
    setting: Setting | None
    epochs: int
    cold: ChosenPlace | None
    slope: float
    intercept: float
    probability: ProbabilityMap
    towers: TowerChoice | None = None
    signals: Signals = field(default_factory=Signals)

    def block(self, name: str) -> ChosenBlock | None:
        """The block of a name, if it counts."""
        return next((block for block in self.blocks if block.name == name and block.weight), None)

    def to_state(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        return {
            "blocks": [asdict(block) for block in self.blocks],
            "setting": None if self.setting is None else self.setting.to_state(),
            "epochs": self.epochs,
            "cold": None if self.cold is None else asdict(self.cold),
            "slope": self.slope,
            "intercept": self.intercept,
            "probability": asdict(self.probability),
            "towers": None if self.towers is None else self.towers.to_state(),
            "signals": self.signals.to_state(),
        }

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "Chosen":
        """The inverse of :meth:`to_state`."""
        towers = state.get("towers")  # checkpoints of before there was a choice hold none
        return cls(
            tuple(ChosenBlock(**block) for block in state["blocks"]),
            None if state["setting"] is None else Setting.from_state(state["setting"]),
            int(state["epochs"]),
            None if state["cold"] is None else ChosenPlace(**state["cold"]),
            float(state["slope"]),
            float(state["intercept"]),
            ProbabilityMap.from_json(state["probability"]),
            None if towers is None else TowerChoice.from_state(towers),
            Signals.from_state(state.get("signals")),
        )


def chosen_of(
    fitted: FittedScore,
    data: TrainingData,
    epochs: int,
    towers: TowerChoice | None = None,
    signals: Signals | None = None,
) -> Chosen:
    """What the fit of a score has chosen.

    Args:
        fitted: the score.
        data: what it was fitted on.
        epochs: of the learned block.
        towers: how it was trained.
        signals: how the confidence of interactions counts in ``data``; ``None`` for not at all.
    """
    score = fitted.score
    blocks = tuple(
        ChosenBlock(
            block.name,
            block.scale * deviation(score, block, data) if block.scale else 0.0,
            block.decay,
            "full" if block.target is None else block.dim,
            dict(block.constants),
            block.dislikes,
        )
        for block in score.blocks
    )
    placed = score.cold
    place: ChosenPlace | None = None
    if placed is not None:
        place = ChosenPlace(placed.mu, placed.joint, placed.kappa, placed.offset, dict(placed.shares))
    calibrated = score.slope, score.intercept, score.probability
    return Chosen(blocks, fitted.setting, epochs, place, *calibrated, towers, signals or Signals())


def deviation(score: Score, block: LinearBlock, data: TrainingData) -> float:
    """Standard deviation of a block's scores of the trained items, with scale 1, over users with a history."""
    most = min(MAX_USERS, max(MAX_PAIRS // data.n_items, 1))
    users = evenly(torch.nonzero(data.history.sizes).squeeze(1), most)
    alone = replace(score, blocks=(replace(block, scale=1.0),), slope=1.0, intercept=0.0)

    def scorer(rows: Tensor) -> Tensor:
        some = users[rows]
        return alone.scores(data.history.select(some), alone.user_parts(some), unlisted=True)

    rows = torch.arange(len(users), device=users.device)
    return score_deviation(scorer, rows, data.n_items, data.trained)


def refit(
    data: TrainingData,
    chosen: Chosen,
    options: FitOptions,
    train_towers: Callable[[], LinearBlock],
    *,
    rank_all_cold: bool = False,
    agree: Callable[[Any], Any] = lambda value: value,
) -> FittedScore:
    """Fit a score with every choice given.

    Args:
        data: what it is fitted on.
        chosen: what validation decided for less data.
        options: as of :func:`recbole_llm.fitting.pipeline.fit`.
        train_towers: trains the learned block for as many epochs as were chosen, and returns it.
        rank_all_cold: as there.
        agree: as there.

    Raises:
        ValueError: if a block that reads the order was chosen, and the interactions have none.
    """
    require_order([block.name for block in chosen.blocks], data)
    blocks = [] if chosen.setting is None else agree(_solved(data, chosen))
    blocks = [block.to(data.history.ids.device) for block in blocks]
    if any(block.name == "learned" for block in chosen.blocks):
        blocks.append(train_towers())
    chosen_sequence = next((block for block in chosen.blocks if block.name == SEQUENCE), None)
    if chosen_sequence is not None:
        sequence = agree(fit_sequence(data, None, data.history, int(chosen_sequence.constants["epochs"])))
        blocks += [] if sequence is None else [sequence.to(data.history.ids.device)]
    score = Score(tuple(blocks), data.rows.listed().to(data.history.ids.device), rows=data.rows)
    scaled = []
    for block in score.blocks:
        choice = chosen.block(block.name)
        weight = 0.0 if choice is None else choice.weight
        if choice is not None:
            block = replace(block, decay=choice.decay, dislikes=choice.dislikes, disliked=data.disliked)
        found = deviation(score, block, data) if weight else 0.0
        scaled.append(replace(block, scale=weight / found if found else 0.0))
        log.info(f"{block.name} block: weight {weight:.3g} in deviations of its scores, as chosen on validation")
    score = replace(score, blocks=tuple(agree_on_scales(scaled, agree)))
    at = chosen.cold
    place = None if at is None else (at.mu, ColdBoost(at.joint, at.kappa, at.offset), at.shares)
    score = place_cold_items(score, data, None, options, chosen.setting, rank_all_cold, place)
    score = replace(score, slope=chosen.slope, intercept=chosen.intercept, probability=chosen.probability)
    return FittedScore(score, chosen.setting)


def agree_on_scales(blocks: list[LinearBlock], agree: Callable[[Any], Any]) -> list[LinearBlock]:
    """The blocks with one process's scales."""
    scales = agree([block.scale for block in blocks])
    return [replace(block, scale=scale) for block, scale in zip(blocks, scales, strict=True)]


def _solved(data: TrainingData, chosen: Chosen) -> list[LinearBlock]:
    """The blocks that are solved for."""
    found = []
    for block in chosen.blocks:
        if block.name == "closed_form":
            with quietly():
                form = fit_closed_form(
                    data.history,
                    data.n_items,
                    data.content,
                    None,
                    dim=block.dim,
                    setting=chosen.setting,
                    factors=FactorForm.from_constants(block.constants),
                    form=NEIGHBOURHOODS if "neighbours" in block.constants else None,
                )
            log.info(f"closed form solved once more, {chosen.setting}, rank {block.dim}")
            found.append(form.block())
        if block.name == TRANSITIONS:
            if not data.is_ordered:
                raise ValueError("A next-item block was chosen, and the histories have no order: load the time column.")
            dim = block.dim if isinstance(block.dim, int) else None
            directions = directions_of(data.content, data.trained)
            found += blocks_once_more(data.history, data.n_items, block.constants, dim, directions)
    return found
