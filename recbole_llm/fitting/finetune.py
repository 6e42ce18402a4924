r"""Fine-tuning of an item encoder through the towers' loss over the whole catalogue.

The vectors V ``[N, F]`` of all items are kept, and the towers read them. A step:

    V                leaf -> towers -> catalogue loss L -> dL/dV
    rows             some of the trained items, drawn anew
    v = encode(rows) with gradients, a few items at a time; (N'/m) <v, dL/dV[rows]> is propagated into the encoder
    V[rows] = v

N' trained items that have content, m of them a step. With m = N' this is GradCache (Gao et al., RepL4NLP 2021), the gradient
of L itself. The encoder's memory is that of a few items, whatever the catalogue. Every ``refresh`` steps, and at the end, all
items are encoded anew.

The same steps with the encoder frozen are the control, on the same users and histories. All chance comes from seed and step, so
that a fine-tuning that was killed goes on as if it had not been.
"""

from collections.abc import Callable, Iterator, Mapping
from dataclasses import dataclass
from logging import getLogger
from typing import Any, Protocol

import torch
from torch import Tensor, nn
from torch.nn.utils.clip_grad import clip_grad_norm_

from recbole_llm.fitting.data import TrainingData
from recbole_llm.fitting.encoder_gate import Verdict, judge
from recbole_llm.fitting.finetune_recipe import Recipe
from recbole_llm.fitting.validation import Validation, evenly, user_metric
from recbole_llm.scoring.losses import TowerLoss
from recbole_llm.scoring.tables import FrozenTensor
from recbole_llm.scoring.towers import TwoTowers

TOWER_RATE = 0.2  # of the towers' learning rate: they have converged
CLIP = 1.0  # norm of the encoder's gradient
GATE_USERS = 20_000  # by whom the gate judges at most

log = getLogger(__name__)


class ItemEncoder(Protocol):
    """What makes the items' vectors, with gradients."""

    def parameters(self) -> list[nn.Parameter]:
        """List what is trained."""

    def state(self) -> dict[str, Tensor]:
        """Copy what is trained."""

    def load(self, state: Mapping[str, Tensor]) -> None:
        """Take over such a copy."""

    def encode(self, rows: Tensor) -> Iterator[tuple[Tensor, Tensor]]:
        """Give places in ``rows`` and vectors ``[c, F]`` of the items there, with gradients, a few at a time."""

    def encode_all(self) -> Tensor:
        """Encode every item without gradients, ``[N, F]``; rows without content are 0."""


Space = Callable[[Tensor], tuple[Tensor, Tensor | None]]
"""Vectors ``[N, F]`` -> centre ``[F]`` and map ``[F, F]`` (``None``: none), by which the towers read them."""


@dataclass(frozen=True, eq=False)
class Frame:
    """How the towers read vectors: ``(v - centre) T``, 0 where there is none; constant between two refreshes.

    Attributes:
        centre: ``[F]`` float64.
        matrix: ``[F, F]`` float64, or ``None``.
        present: ``[N]`` bool.
    """

    centre: Tensor
    matrix: Tensor | None
    present: Tensor

    def __call__(self, vectors: Tensor) -> Tensor:
        """Map ``[N, F]`` float32 to what the towers read."""
        found = vectors - self.centre.to(vectors)
        if self.matrix is not None:
            found = found @ self.matrix.to(vectors)
        return found * self.present[:, None]


def gradient_at_vectors(
    table: FrozenTensor, frame: Frame, vectors: Tensor, loss: Callable[[], Tensor]
) -> tuple[Tensor, Tensor]:
    """Propagate a loss into the towers and into the items' vectors.

    Args:
        table: what the towers read; holds the mapped vectors afterwards.
        frame: the map.
        vectors: ``[N, F]``.
        loss: of the towers.

    Returns:
        The loss, detached, and dL/dV ``[N, F]``.
    """
    leaf = vectors.detach().requires_grad_()
    mapped = frame(leaf)
    table.value = mapped
    try:
        value = loss()
        value.backward()  # type: ignore[no-untyped-call]
    finally:
        table.value = mapped.detach()
    assert leaf.grad is not None
    return value.detach(), leaf.grad


def propagate(encoder: ItemEncoder, rows: Tensor, gradient: Tensor, factor: float = 1.0) -> Tensor:
    """Encode items once more, with gradients, and propagate the gradient at their vectors into the encoder.

    Args:
        encoder: whose parameters' gradients are added to.
        rows: ``[m]`` int64.
        gradient: dL/dV ``[N, F]``.
        factor: on the gradient.

    Returns:
        The items' vectors ``[m, F]``, detached.
    """
    fresh = gradient.new_zeros(len(rows), gradient.shape[1])
    for places, vectors in encoder.encode(rows):
        ((vectors * gradient[rows[places]]).sum() * factor).backward()
        fresh[places] = vectors.detach()
    return fresh


@dataclass(frozen=True, eq=False)
class Tuning:
    """What a fine-tuning works on.

    Attributes:
        recipe: how.
        towers: converged.
        loss: theirs, over the catalogue.
        table: what they read.
        vectors: ``[N, F]``, as the encoder gives them.
        present: ``[N]`` bool, items with content.
        space: how a refresh maps the vectors.
        encoder: with gradients.
        learning_rate: of the towers.
        weight_decay: of the towers.
        batch_size: users of a step.
        seed: of all chance.
    """

    recipe: Recipe
    towers: TwoTowers
    loss: TowerLoss
    table: FrozenTensor
    vectors: Tensor
    present: Tensor
    space: Space
    encoder: ItemEncoder
    learning_rate: float
    weight_decay: float
    batch_size: int
    seed: int = 0

    def frame(self, vectors: Tensor) -> Frame:
        """How vectors are read until the next refresh."""
        centre, matrix = self.space(vectors)
        return Frame(centre.to(vectors.device), None if matrix is None else matrix.to(vectors.device), self.present)


@dataclass(frozen=True, eq=False)
class Outcome:
    """What became of it.

    Attributes:
        verdict: of the gate.
        vectors: ``[N, F]`` of the tuned encoder; ``None`` where the base stays.
    """

    verdict: Verdict
    vectors: Tensor | None


def fine_tune(
    tuning: Tuning,
    data: TrainingData,
    validation: Validation,
    resume: Mapping[str, Any] | None = None,
    save: Callable[[dict[str, Any]], None] = lambda state: None,
    observe: Callable[[str], None] = lambda name: None,
) -> Outcome:
    """Fine-tune an encoder, and keep it where it is better than the frozen one of as many steps.

    Towers, their table and the encoder's parameters are those of the winner afterwards.

    Args:
        tuning: what is tuned, and how.
        data: training data.
        validation: by which the winner is told.
        resume: what ``save`` was given last, to go on from there.
        save: keeps a state of plain values and tensors; called after every refresh.
        observe: called with ``start``, ``control`` and ``tuned`` while towers and table are in that state.
    """
    towers, recipe = tuning.towers, tuning.recipe
    begun, read = [each.detach().clone() for each in towers.parameters()], tuning.table.value
    users = evenly(torch.nonzero(validation.targets.sizes).squeeze(1), GATE_USERS)
    histories, targets, seen = (rows.select(users) for rows in (data.history, validation.targets, validation.seen))

    def values() -> Tensor:
        scorer = towers.block().scorer(histories, users)
        return user_metric(scorer, targets, seen, data.n_items, validation.metric, ~data.trained)

    start = values()
    observe("start")
    if len(users) < recipe.gate_users:
        verdict = judge(start, start, start, recipe, str(validation.metric))
        log.info(f"fine-tuning: {verdict.reason}: no step is made", extra={"finetune": verdict.to_state()})
        return Outcome(verdict, None)
    steps = _Steps(tuning, data)
    for step in range(1, recipe.steps + 1):
        steps.of_towers(step)
    control = values()
    observe("control")
    log.info(
        f"fine-tuning: {validation.metric} {float(start.mean()):.4f}, {float(control.mean()):.4f} with the encoder frozen"
    )
    _put(towers, begun)
    vectors = _tuned_vectors(tuning, data, values, resume, save)
    observe("tuned")
    verdict = judge(values(), control, start, recipe, str(validation.metric))
    log.info(f"fine-tuning: {verdict}", extra={"finetune": verdict.to_state()})
    if not verdict.kept:
        _put(towers, begun)
        tuning.table.value = read
        return Outcome(verdict, None)
    return Outcome(verdict, vectors)


def _tuned_vectors(
    tuning: Tuning,
    data: TrainingData,
    values: Callable[[], Tensor],
    resume: Mapping[str, Any] | None,
    save: Callable[[dict[str, Any]], None],
) -> Tensor:
    """Make the steps of encoder and towers, and encode all items by what came of it."""
    recipe, steps = tuning.recipe, _Steps(tuning, data)
    if resume is not None:
        steps.load(resume)
    while steps.done < recipe.steps:
        loss = steps.of_encoder(steps.done + 1)
        if steps.done % recipe.refresh == 0 or steps.done == recipe.steps:
            steps.refresh()
            found = float(values().mean())
            log.info(f"fine-tuning: step {steps.done} of {recipe.steps}, loss {loss:.4f}, validation {found:.4f}")
            save(steps.state())
    tuning.table.value = steps.frame(steps.vectors)
    return steps.vectors


class _Steps:
    """The steps of towers and encoder with their optimizers.

    Args:
        tuning: what is tuned.
        data: training data.
    """

    def __init__(self, tuning: Tuning, data: TrainingData) -> None:
        self.tuning, self.history = tuning, data.history
        self.users = torch.nonzero(data.history.sizes).squeeze(1)
        self.items = torch.nonzero(data.trained & tuning.present).squeeze(1)
        self.vectors = tuning.vectors.clone()
        self.frame = tuning.frame(self.vectors)
        self.done = 0
        self._parameters = tuning.towers.parameters()
        self._towers = torch.optim.AdamW(self._parameters, tuning.learning_rate, weight_decay=tuning.weight_decay)
        self._encoder = torch.optim.AdamW(tuning.encoder.parameters(), tuning.recipe.learning_rate, weight_decay=0.0)

    def _drawn(self, step: int) -> tuple[Tensor, Tensor]:
        """Users and items of a step."""
        generator = torch.Generator().manual_seed((self.tuning.seed << 32) + step)
        users = torch.randperm(len(self.users), generator=generator)[: self.tuning.batch_size]
        items = torch.randperm(len(self.items), generator=generator)[: self.tuning.recipe.items_per_step]
        return self.users[users.to(self.users.device)], self.items[items.to(self.items.device)]

    def _loss(self, step: int, users: Tensor) -> Tensor:
        """The loss of users whose histories are dropped out by the step alone."""
        with torch.random.fork_rng([users.device] if users.is_cuda else []):
            torch.manual_seed((self.tuning.seed << 32) + step)
            return self.tuning.loss.of_users(users, self.history)

    def _rated(self, step: int) -> None:
        rate, tuning = self.tuning.recipe.rate(step), self.tuning
        for optimizer, highest in (
            (self._towers, TOWER_RATE * tuning.learning_rate),
            (self._encoder, tuning.recipe.learning_rate),
        ):
            for group in optimizer.param_groups:
                group["lr"] = rate * highest

    def of_towers(self, step: int) -> None:
        """One step of the towers with the encoder frozen."""
        users, _ = self._drawn(step)
        self._rated(step)
        self._towers.zero_grad()
        self._loss(step, users).backward()  # type: ignore[no-untyped-call]
        self._towers.step()

    def of_encoder(self, step: int) -> float:
        """One step of both; gives the loss."""
        users, rows = self._drawn(step)
        encoder = self.tuning.encoder
        self._rated(step)
        self._towers.zero_grad()
        self._encoder.zero_grad()
        loss, gradient = gradient_at_vectors(
            self.tuning.table, self.frame, self.vectors, lambda: self._loss(step, users)
        )
        fresh = propagate(encoder, rows, gradient, len(self.items) / max(len(rows), 1))
        clip_grad_norm_(encoder.parameters(), CLIP)
        self._towers.step()
        self._encoder.step()
        self.vectors[rows] = fresh
        self.tuning.table.value = self.frame(self.vectors)
        self.done = step
        if not bool(torch.isfinite(loss)):
            raise ValueError(f"finetune: the loss is {float(loss)} in step {step}. Lower finetune.learning_rate.")
        return float(loss)

    def refresh(self) -> None:
        """Encode all items anew, and map them as they lie now."""
        self.vectors = self.tuning.encoder.encode_all().to(self.vectors)
        self.frame = self.tuning.frame(self.vectors)
        self.tuning.table.value = self.frame(self.vectors)

    def state(self) -> dict[str, Any]:
        """Everything that a later step depends on."""
        return {
            "step": self.done,
            "towers": [each.detach().cpu().clone() for each in self._parameters],
            "tower_optimizer": self._towers.state_dict(),
            "encoder": self.tuning.encoder.state(),
            "encoder_optimizer": self._encoder.state_dict(),
            "vectors": self.vectors.cpu(),
        }

    def load(self, state: Mapping[str, Any]) -> None:
        """Take over what :meth:`state` gave."""
        _put(self.tuning.towers, state["towers"])
        self.tuning.encoder.load(state["encoder"])
        self._towers.load_state_dict(state["tower_optimizer"])
        self._encoder.load_state_dict(state["encoder_optimizer"])
        self.vectors, self.done = state["vectors"].to(self.vectors), int(state["step"])
        self.frame = self.tuning.frame(self.vectors)
        self.tuning.table.value = self.frame(self.vectors)


@torch.no_grad()
def _put(towers: TwoTowers, values: list[Tensor]) -> None:
    """Give the towers' parameters these values."""
    for parameter, value in zip(towers.parameters(), values, strict=True):
        parameter.copy_(value)
