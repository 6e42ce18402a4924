"""How the towers of a large catalogue are trained, chosen by a short training of each way on validation.

Where users have few interactions and items are many, binary cross-entropy over dot products of ID vectors peaks after a few
epochs and collapses. What suits depends on the data: so each way is trained on the same few users from the same start, and
the one that ranks the validation items best is trained in full. The cost is counted in pairs of users and items and not in
seconds, so that a run repeats itself.
"""

import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from logging import getLogger
from typing import Any

import torch
from torch import Tensor, nn

from recbole_llm.fitting.data import TrainingData
from recbole_llm.fitting.hyperparameters import EXACT_ITEMS
from recbole_llm.fitting.validation import Validation, evenly, user_metric
from recbole_llm.scoring.losses import TowerLoss
from recbole_llm.scoring.towers import TwoTowers

MANY_ITEMS = (
    EXACT_ITEMS  # up to so many the documented defaults hold, which were chosen on catalogues of 1,682 to 3,260
)
TRIAL_PAIRS = 150_000_000  # of users and items that one way is trained on; some 8 seconds of a core
TRIAL_USERS = 3_000  # of validation, by whom the ways are compared
CATALOGUE_LOSSES = ("catalog_ce", "catalog_bce")
COSINE_SCALE = 10.0  # initial factor on a cosine: the logits of the best items then stand out from 10,000 others

log = getLogger(__name__)


@dataclass(frozen=True)
class TowerChoice:
    """A way to train the towers; the fields are named and meant as the configuration keys.

    Attributes:
        loss_type: a catalogue loss.
        scoring: ``dot`` or ``cosine``.
        scale_init: initial factor on the score.
        tower_features: whether content enters the towers.
        principal_start: whether its maps start at the content's principal axes, and not at random.
    """

    loss_type: str
    scoring: str
    scale_init: float
    tower_features: bool
    principal_start: bool = False

    @classmethod
    def of(cls, options: Any) -> "TowerChoice":
        """Read off what options say, whatever their loss."""
        return cls(options.loss_type, options.scoring, options.scale_init, options.tower_features)

    def to_state(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        return asdict(self)

    @classmethod
    def from_state(cls, state: Mapping[str, Any]) -> "TowerChoice":
        """The inverse of :meth:`to_state`.

        Raises:
            ValueError: if it is no choice of this version.
        """
        found = cls(
            str(state["loss_type"]),
            str(state["scoring"]),
            float(state["scale_init"]),
            bool(state["tower_features"]),
            bool(state["principal_start"]),
        )
        if found.loss_type not in CATALOGUE_LOSSES or found.scoring not in ("dot", "cosine") or found.scale_init <= 0:
            raise ValueError(f"towers were trained by {found}; this version knows no such way.")
        return found

    def __str__(self) -> str:
        content = "content in the towers" if self.tower_features else "no content in the towers"
        return f"{self.loss_type}, {self.scoring} (scale_init {self.scale_init:g}), {content}"


def candidates(given: TowerChoice, explicit: Mapping[str, Any], has_content: bool) -> tuple[TowerChoice, ...]:
    """List the ways to try: cosines under either catalogue loss, and the options as they are.

    Args:
        given: the options as they are.
        explicit: keys that a person has set, which no way changes.
        has_content: whether there is content that towers could read.
    """
    fixed: dict[str, Any] = {name: getattr(given, name) for name in asdict(given) if name in explicit}
    if not fixed.get("tower_features", True):
        fixed["principal_start"] = False
    ways = [TowerChoice(loss, "cosine", COSINE_SCALE, has_content, has_content) for loss in CATALOGUE_LOSSES]
    if "scoring" in fixed and given.scoring == "dot" and "scale_init" not in fixed:
        fixed["scale_init"] = given.scale_init  # that of cosines would start dot products too steep
    found = [replace(way, **fixed) for way in ways]
    return tuple(dict.fromkeys([*found, given]))


def choose_towers(
    ways: Sequence[TowerChoice],
    make: Callable[[TowerChoice], tuple[TwoTowers, TowerLoss]],
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    data: TrainingData,
    validation: Validation,
    batch_size: int,
) -> TowerChoice:
    """Train each way for a moment and return the one with the best validation value, the first of equals.

    Leaves the random streams as they were.

    Args:
        ways: at least one.
        make: makes new towers and their loss.
        optimizer: makes an optimizer of parameters.
        data: training data.
        validation: by which they are compared.
        batch_size: users of a step.
    """
    rated = evenly(torch.nonzero(validation.targets.sizes).squeeze(1), TRIAL_USERS)
    if len(ways) == 1 or not len(rated):
        return ways[-1]
    users = torch.nonzero(data.history.sizes).squeeze(1)
    users = evenly(users, max(batch_size, TRIAL_PAIRS // data.n_items))
    histories, targets, seen = (rows.select(rated) for rows in (data.history, validation.targets, validation.seen))
    values = {}
    for way in ways:
        started = time.perf_counter()
        with torch.random.fork_rng([users.device] if users.is_cuda else []):
            torch.manual_seed(0)
            towers, loss = make(way)
            _train(towers, loss, optimizer, users[torch.randperm(len(users)).to(users.device)], data, batch_size)
        scorer = towers.block().scorer(histories, rated)
        found = user_metric(scorer, targets, seen, data.n_items, validation.metric, ~data.trained)
        values[way] = float(found.mean())
        seconds = time.perf_counter() - started
        log.info(
            f"learned block, {way}: {validation.metric} {values[way]:.4f} after {len(users)} users, {seconds:.0f} s"
        )
    best = max(ways, key=values.__getitem__)
    log.info(f"learned block: trained by {best}, best of {len(ways)} ways on validation")
    return best


def _train(
    towers: TwoTowers,
    loss: TowerLoss,
    optimizer: Callable[[list[nn.Parameter]], torch.optim.Optimizer],
    users: Tensor,
    data: TrainingData,
    batch_size: int,
) -> None:
    parameters = towers.parameters()
    steps = optimizer(parameters)
    for batch in users.split(batch_size):
        steps.zero_grad()
        loss.of_users(batch, data.history).backward()  # type: ignore[no-untyped-call]
        steps.step()
