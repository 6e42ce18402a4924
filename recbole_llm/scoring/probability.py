r"""From a score to the probability that people are shown: a monotone map at the end, after everything has been ranked.

    logit P(i|u) = g((score - origin) n_u^-exponent) + user_gain log n_u

with n_u the length of the history that the score was made from and g piecewise linear, its slope positive everywhere, so that no
user's ranking changes. :func:`recbole_llm.fitting.calibration.fit_probability` fits it. Imports neither torch nor NumPy: a model's
tensors and a service's arrays go through the same lines.
"""

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any


@dataclass(frozen=True)
class ProbabilityMap:
    """The map of a model.

    Attributes:
        origin: score of an item about which the history says nothing.
        exponent: of the history's length, by which scores are divided.
        user_gain: what the logit rises by where a history is e times as long.
        offset: value of g at 0, its first segment continued.
        slopes: of g, positive; one more than there are knots.
        knots: where g's slope changes, ascending.

    Raises:
        ValueError: if a number is not finite, a slope not positive, or the knots do not ascend between the slopes.
    """

    origin: float = 0.0
    exponent: float = 0.0
    user_gain: float = 0.0
    offset: float = 0.0
    slopes: tuple[float, ...] = (1.0,)
    knots: tuple[float, ...] = ()

    def __post_init__(self) -> None:
        numbers = (self.origin, self.exponent, self.user_gain, self.offset, *self.slopes, *self.knots)
        if not all(type(number) in (int, float) and math.isfinite(number) for number in numbers):
            raise ValueError(f"probability map holds {numbers}; expected finite numbers.")
        if len(self.slopes) != len(self.knots) + 1 or min(self.slopes) <= 0:
            raise ValueError(f"slopes are {self.slopes}; expected {len(self.knots) + 1} positive numbers.")
        if list(self.knots) != sorted(set(self.knots)):
            raise ValueError(f"knots are {self.knots}; expected ascending numbers.")

    @classmethod
    def from_json(cls, values: Mapping[str, Any]) -> "ProbabilityMap":
        """Build the map from the fields that ``dataclasses.asdict`` gave.

        Raises:
            TypeError: if a field is unknown or no list.
            ValueError: as the class.
        """
        lists = {name: tuple(values[name]) for name in ("slopes", "knots") if name in values}
        return cls(**{**values, **lists})

    def logit(self, score: Any, log_length: Any) -> Any:
        """Compute the logit of P(i|u).

        Args:
            score: the model's scores, a tensor or an array; -inf stays.
            log_length: log of the number of items in the history, of the user of each score; a number, or what is
                broadcast to ``score``. An empty history counts as one of length 1.

        Example:
            >>> ProbabilityMap(offset=-1.0, slopes=(2.0,)).logit(1.5, 0.0)
            2.0
        """
        x = (score - self.origin) * math.e ** (-self.exponent * log_length)
        logit = self.slopes[0] * x + (self.offset + self.user_gain * log_length)
        for knot, before, after in zip(self.knots, self.slopes, self.slopes[1:], strict=False):
            logit = logit + (after - before) * (x - knot).clip(min=0)
        return logit

    def score(self, logit: Any, log_length: Any) -> Any:
        """Return the score of a logit: the inverse of :meth:`logit`, with the same arguments."""
        y = logit - (self.offset + self.user_gain * log_length)
        x = y / self.slopes[0]
        height, last = 0.0, 0.0  # of g without its offset, at the last knot
        for knot, before, after in zip(self.knots, self.slopes, self.slopes[1:], strict=False):
            height += before * (knot - last)
            last = knot
            x = x + (1 / after - 1 / before) * (y - height).clip(min=0)
        return x * math.e ** (self.exponent * log_length) + self.origin

    def __str__(self) -> str:
        if self == ProbabilityMap():
            return "P(i|u) = sigmoid(score), not fitted"
        steps = ", ".join(f"{slope:.3g}" for slope in self.slopes)
        return (
            f"P(i|u) = sigmoid(g((score {-self.origin:+.4g}) / n^{self.exponent:g}) {self.user_gain:+.3g} log n), n items in the "
            f"history, g(0) = {self.offset:.4g} and slopes {steps}"
        )
