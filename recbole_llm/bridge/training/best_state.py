"""The best epoch's parameters in memory, for a training that writes no checkpoint."""

from collections.abc import Callable
from typing import Any


class BestState:
    """Keeps the parameters of the epoch whose validation was best so far. RecBole calls it after each validation.

    Args:
        trainer: whose ``cur_step`` is 0 after a validation that was the best so far.
        callback: what else is to be called; ``None`` for nothing.
    """

    def __init__(self, trainer: Any, callback: Callable[[int, float], None] | None = None) -> None:
        self.trainer, self.callback = trainer, callback
        self._state: dict[str, Any] | None = None
        self._epochs = 0

    def __call__(self, epoch: int, value: float) -> None:
        """Take the state of an epoch if it is the best one."""
        if self.trainer.cur_step == 0:
            self._state = {name: tensor.clone() for name, tensor in self.trainer.model.state_dict().items()}
            self._epochs = epoch + 1
        if self.callback is not None:
            self.callback(epoch, value)

    def restore(self, otherwise: int) -> int:
        """Give the model the best epoch's parameters; return its number from 1, or ``otherwise`` without validations."""
        if self._state is None:
            return otherwise
        self.trainer.model.load_state_dict(self._state)
        return self._epochs
