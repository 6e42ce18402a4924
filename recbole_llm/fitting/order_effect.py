r"""What the order of histories is worth on some data: the shuffle test of "Does It Look Sequential?" (RecSys 2024).

Every history is shuffled once, what is to be predicted stays where it is, and the share of the metric that is lost says whether
order matters on these data:

    lost = 1 - value with shuffled histories / value with the histories as they are

Both values are of the solved blocks alone: the cost is one solution and two searches of decays and weights by
``MAX_CHOOSING_USERS`` users, and no training.
What reads the order is fitted anew on the shuffled histories: the next-item block is solved once more with its constants, and
decays and weights of all blocks are chosen once more by validation. Without that a model that trusts the order would be asked
about histories of which it knows nothing, and lose more than the data can tell. The closed form's own matrix knows no order and
stays.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from logging import getLogger

import torch
from torch import Tensor

from recbole_llm.fitting.data import TrainingData
from recbole_llm.fitting.logs import quietly
from recbole_llm.fitting.next_item import TRANSITIONS, blocks_once_more, directions_of
from recbole_llm.fitting.pipeline import choose_decays, weigh
from recbole_llm.fitting.stage_values import FittedBlock, FittedScore, solved_blocks
from recbole_llm.fitting.validation import TopKMetric, Validation, evenly, user_metric
from recbole_llm.scoring.rows import Rows
from recbole_llm.scoring.score import LinearBlock

MAX_USERS = 6_000  # who are ranked, evenly chosen
MAX_CHOOSING_USERS = 2_000  # by whom decays and weights are chosen, a third of those of a fit
SEED = 0  # of the shuffle

log = getLogger(__name__)


@dataclass(frozen=True, eq=False)
class OrderEffect:
    """The values of each user, ``[M]`` float64.

    Attributes:
        ordered: with the histories as they are.
        shuffled: with their order destroyed.
    """

    ordered: Tensor
    shuffled: Tensor

    @property
    def lost(self) -> float:
        """Share of the value that is lost; negative where the shuffled histories do better."""
        return 1 - float(self.shuffled.sum() / self.ordered.sum())


def shuffled(history: Rows, generator: torch.Generator) -> Rows:
    """Return the same histories in a random order.

    Args:
        history: with ranks.
        generator: on the CPU.
    """
    assert history.ranks is not None
    row, ranks = history.row_of_entry().cpu(), history.ranks.cpu()
    drawn = torch.randperm(len(row), generator=generator)
    order = drawn[torch.argsort(row[drawn], stable=True)]  # of each entry another one of its row
    return replace(history, ranks=ranks[order].to(history.ids.device))


def order_effect(
    fitted: FittedScore,
    data: TrainingData,
    validation: Validation | None,
    histories: Rows,
    targets: Rows,
    seen: Rows,
    metric: TopKMetric,
) -> OrderEffect | None:
    """Measure what the order of histories is worth.

    Args:
        fitted: a fit of ``data``, whose solved blocks are taken.
        data: training data.
        validation: by which decays and weights are chosen.
        histories: of every user, by which the users are ranked.
        targets: as many rows, the relevant items.
        seen: as many rows, items without a place.
        metric: of the values.

    Returns:
        ``None`` where interactions have no order, there is no validation data or no target, or no closed form counts.
    """
    closed = fitted.score.block("closed_form")
    users = evenly(torch.nonzero(targets.sizes).squeeze(1), MAX_USERS)
    if closed is None or not closed.scale or not data.is_ordered or validation is None or not len(users):
        return None
    solved, following = solved_blocks(fitted, data.trained)
    assert solved is not None
    generator = torch.Generator().manual_seed(SEED)
    chooses = evenly(torch.nonzero(validation.targets.sizes).squeeze(1), MAX_CHOOSING_USERS)
    validation = replace(
        validation, targets=validation.targets.keep(torch.isin(validation.targets.row_of_entry(), chooses))
    )
    without = replace(data, history=shuffled(data.history, generator))
    with quietly():
        again = _solve_again(following, without)
        values = [
            _values(
                some,
                (solved, blocks),
                validation,
                rows.select(users),
                targets.select(users),
                seen.select(users),
                metric,
            )
            for some, blocks, rows in ((data, following, histories), (without, again, shuffled(histories, generator)))
        ]
    found = OrderEffect(*values)
    if not float(found.ordered.sum()):
        return None
    log.info(f"order of the histories: {found.lost:.1%} of {metric} is lost where they are shuffled")
    return found


def _values(
    data: TrainingData,
    blocks: tuple[FittedBlock, Sequence[LinearBlock]],
    validation: Validation,
    histories: Rows,
    targets: Rows,
    seen: Rows,
    metric: TopKMetric,
) -> Tensor:
    validation = replace(validation, history=data.history)
    score = choose_decays(weigh(data, validation, blocks[0], tuple(blocks[1]), None), data, validation)
    scorer = lambda rows: score.scores(histories.select(rows), unlisted=True)  # noqa: E731
    return user_metric(scorer, targets, seen, data.n_items, metric, excluded=~data.trained).cpu()


def _solve_again(following: Sequence[LinearBlock], data: TrainingData) -> tuple[LinearBlock, ...]:
    """The next-item block of other histories, its constants, decays and weights as they are."""
    first = next((block for block in following if block.name == TRANSITIONS), None)
    if first is None:
        return ()
    dim = None if first.target is None else first.dim
    directions = directions_of(data.content, data.trained)
    found = blocks_once_more(data.history, data.n_items, first.constants, dim, directions)
    before = {block.name: block for block in following}
    return tuple(
        replace(block, scale=before[block.name].scale, decay=before[block.name].decay).to(data.history.ids.device)
        for block in found
        if block.name in before
    )
