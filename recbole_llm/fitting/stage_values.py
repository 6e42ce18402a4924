"""What the stages of a fit hand to each other: a fitted score, its solved blocks, the weights of all blocks."""

from dataclasses import dataclass, replace

import torch
from torch import Tensor

from recbole_llm.fitting.ease import Setting
from recbole_llm.fitting.next_item import CONTENT, TRANSITIONS
from recbole_llm.scoring.score import LinearBlock, Score


@dataclass(frozen=True, eq=False)
class FittedScore:
    """What a fit gives.

    Attributes:
        score: the score.
        setting: constants of its closed form; ``None`` without one.
    """

    score: Score
    setting: Setting | None = None


@dataclass(frozen=True, eq=False)
class FittedBlock:
    """A closed form with its constants."""

    block: LinearBlock
    setting: Setting | None


Solved = tuple[FittedBlock | None, tuple[LinearBlock, ...]]
"""A closed form and the blocks of the next item."""


def on_device(device: torch.device, blocks: Solved) -> Solved:
    """Return the same blocks on another device."""
    closed, following = blocks
    moved = None if closed is None else replace(closed, block=closed.block.to(device))
    return moved, tuple(block.to(device) for block in following)


Weights = list[tuple[str, float, float | None]]
"""Name, scale and decay of every block."""


def weights_of(score: Score) -> Weights:
    """Read off what :func:`weigh` and :func:`choose_decays` have chosen."""
    return [(block.name, block.scale, block.decay) for block in score.blocks]


def with_weights(score: Score, weights: Weights) -> Score:
    """Return the score with these choices; blocks that they do not name are left out."""
    blocks = {block.name: block for block in score.blocks}
    return replace(score, blocks=tuple(replace(blocks[name], scale=s, decay=tau) for name, s, tau in weights))


def solved_blocks(start: FittedScore, trained: Tensor) -> Solved:
    """Take the solved blocks of an earlier fit, as they were before they were weighed and cold-start items placed."""
    closed = start.score.block("closed_form")
    assert closed is not None
    following = tuple(
        _bare(block, trained, block.scale / (closed.scale or 1.0))
        for block in map(start.score.block, (TRANSITIONS, CONTENT))
        if block is not None
    )
    return FittedBlock(_bare(closed, trained, 1.0), start.setting), following


def _bare(block: LinearBlock, trained: Tensor, scale: float) -> LinearBlock:
    source, target = (None if table is None else table * trained[:, None] for table in (block.source, block.target))
    return replace(block, source=source, target=target, scale=scale, exceptions=None, dislikes=0.0)
