"""How an encoder is fine-tuned: the numbers of ``finetune``, and the learning rate of each step."""

from dataclasses import asdict, dataclass
from typing import Any

METHODS = ("lora", "last_layers")
TUNABLE = ("text", "image")
# lora: twice as much destroyed MiniLM on amazon-office where it came without warm-up
LEARNING_RATES = {"lora": 1e-4, "last_layers": 3e-5}
LAST_LAYERS = 1  # of method last_layers, where no number is given
WARMUP = (0.1, 0.25)  # share of the steps
LEAST_UNITS = 500  # hidden users by whom a tuned encoder is compared with the frozen one


@dataclass(frozen=True)
class Recipe:
    """What ``finetune`` says, its defaults filled in.

    Attributes:
        encoder: ``text`` or ``image``.
        method: ``lora`` or ``last_layers``.
        layers: the last so many blocks of the transformer; ``None`` for all, with ``lora``.
        rank: of the adapters; of ``lora``.
        alpha: an adapter's product is multiplied by alpha / rank.
        learning_rate: of the encoder at the end of the warm-up.
        warmup: share of the steps over which the learning rate rises.
        decay: the learning rate of the last step as a share of the highest.
        steps: of the encoder and of the towers beside it.
        items_per_step: items that are encoded with gradients in a step.
        refresh: steps after which all items are encoded anew.
        max_tokens: tokens read of a text in this run, by the frozen encoder too; ``None`` for ``encoder_max_tokens``.
        gate_level: of the test that keeps the tuned encoder.
        gate_users: hidden users that this test needs at least.
    """

    encoder: str
    method: str = "lora"
    layers: int | None = None
    rank: int = 8
    alpha: float = 16.0
    learning_rate: float = LEARNING_RATES["lora"]
    warmup: float = 0.2
    decay: float = 0.05
    steps: int = 200
    items_per_step: int = 256
    refresh: int = 100
    max_tokens: int | None = None
    gate_level: float = 0.01
    gate_users: int = LEAST_UNITS

    def to_state(self) -> dict[str, Any]:
        """As plain values, for a checkpoint."""
        return asdict(self)

    def rate(self, step: int) -> float:
        """Factor on the learning rate in a step, counted from 1: a rise over the warm-up, then a straight fall to ``decay``.

        Example:
            >>> recipe = Recipe("text", steps=10, warmup=0.2, decay=0.0)
            >>> [recipe.rate(step) for step in (1, 2, 6, 10)]
            [0.5, 1.0, 0.5, 0.0]
        """
        risen = max(1, round(self.warmup * self.steps))
        if step <= risen:
            return step / risen
        return 1 - (1 - self.decay) * (step - risen) / max(self.steps - risen, 1)
