"""Whether a fine-tuned encoder is kept: a paired test on hidden items of the same users against the frozen one.

Both have trained their towers for as many steps on the same batches. An encoder that is better by chance is the usual case: of
models that differ by chance alone, half are better on validation. So the difference must be above 0 at ``gate_level`` in a
bootstrap over users (Efron and Tibshirani 1993), of at least ``gate_users`` of them.
"""

from dataclasses import asdict, dataclass
from typing import Any

import torch
from torch import Tensor

from recbole_llm.fitting.finetune_recipe import Recipe

DRAWS = 4000


@dataclass(frozen=True)
class Verdict:
    """What the test says.

    Attributes:
        kept: whether the tuned encoder stays.
        reason: in words, of the log.
        users: who have hidden items.
        start: mean metric of the towers before the fine-tuning.
        control: after as many steps with the encoder frozen.
        tuned: after the fine-tuning.
        gain: tuned minus control.
        low: lower end of its interval at ``1 - gate_level``.
        high: upper end.
        metric: by name.
    """

    kept: bool
    reason: str
    users: int
    start: float
    control: float
    tuned: float
    gain: float
    low: float
    high: float
    metric: str

    def to_state(self) -> dict[str, Any]:
        """As plain values, for a checkpoint and a run's result."""
        return asdict(self)

    def __str__(self) -> str:
        what = "the tuned encoder is kept" if self.kept else "the base encoder stays"
        return (
            f"{what}: {self.reason}. {self.metric} of {self.users} users on validation: tuned {self.tuned:.4f}, frozen "
            f"{self.control:.4f}, before {self.start:.4f}; gain {self.gain:+.4f} [{self.low:+.4f}, {self.high:+.4f}]"
        )


def judge(tuned: Tensor, control: Tensor, start: Tensor, recipe: Recipe, metric: str) -> Verdict:
    """Decide.

    Args:
        tuned: ``[U]`` float64, the metric of each user who has hidden items.
        control: of the same users with the frozen encoder, after as many steps of the towers.
        start: likewise before these steps; the tuned encoder must not rank worse than it did then.
        recipe: ``gate_level`` and ``gate_users``.
        metric: its name.
    """
    difference = (tuned - control).double().cpu()
    before, frozen, found = (float(each.double().mean()) if len(each) else 0.0 for each in (start, control, tuned))
    low, high = interval(difference, recipe.gate_level)
    if len(difference) < recipe.gate_users:
        kept, reason = (
            False,
            f"{len(difference)} users with hidden items are too few to tell, {recipe.gate_users} are needed",
        )
    elif not low > 0:
        kept, reason = False, f"it is not better than the frozen one at the level {recipe.gate_level:g}"
    elif found < before:
        kept, reason = False, "it is better than the frozen one of as many steps, and worse than before them"
    else:
        kept, reason = True, f"it is better than the frozen one at the level {recipe.gate_level:g}"
    return Verdict(kept, reason, len(difference), before, frozen, found, found - frozen, low, high, metric)


def interval(difference: Tensor, level: float, draws: int = DRAWS, seed: int = 0) -> tuple[float, float]:
    """Bootstrap the mean of paired differences over users.

    Args:
        difference: ``[U]`` float64.
        level: chance that the interval misses the mean, half of it on either side.
        draws: resamples of U users with replacement.
        seed: of the resampling.

    Returns:
        The ends of the percentile interval; infinite without users.
    """
    if not len(difference):
        return -float("inf"), float("inf")
    generator = torch.Generator().manual_seed(seed)
    step, means = max(1, 2**22 // len(difference)), []
    for first in range(0, draws, step):
        size = min(step, draws - first), len(difference)
        means.append(difference[torch.randint(len(difference), size, generator=generator)].mean(1))
    ends = torch.tensor([level / 2, 1 - level / 2], dtype=torch.float64)
    low, high = torch.quantile(torch.cat(means), ends).tolist()
    return low, high
