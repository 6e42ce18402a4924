"""Rules of a recommendation: which items may appear, what lifts them, how many of a kind, how different, what is tried out.

They apply in this order, each to what the one before leaves:

1. Conditions. ``filter``, ``exclude`` and ``only`` say which items are candidates.
2. Boosts. The score s of a candidate that meets a boost's condition becomes s + ``add``. With ``odds`` it becomes the score at
   which P(i|u) has ``odds`` times the odds: g^-1(g(s) + ln odds), with g the model's map from scores to logits. Sums come first.
3. Caps. Candidates are taken in order of their score; one that would be the (n + 1)-th with some value of a capped attribute is
   passed over. An item with several values counts for each, one without any for none.
4. Diversity. Each place goes to the open candidate with the highest trade-off (:mod:`recbole_llm.retrieval.diversity`).
5. Exploration. A share of the places goes to items drawn at random among the candidates that are left, caps included.

Values only: :mod:`recbole_llm.retrieval.reranking` applies them.
"""

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, NamedTuple

CANDIDATES_PER_ITEM = 5  # that diversity chooses among, by default
MIN_CANDIDATES = 50
LABEL_CHARACTERS = 64
SIGNS = {"gt": ">", "gte": ">=", "lt": "<", "lte": "<="}


class Applied(NamedTuple):
    """What a rule did to an item of an answer.

    Attributes:
        rule: ``boost ...``, ``cap ATTRIBUTE``, ``diversity``, ``calibration ATTRIBUTE`` or ``exploration``.
        contribution: what it added to the score; 0 for rules that change places only.
        place: the item's place by score, where a rule changed it and the place is known; 1 for the best.
    """

    rule: str
    contribution: float = 0.0
    place: int | None = None

    def __str__(self) -> str:
        added = f" {self.contribution:+.3g}" if self.contribution else ""
        return self.rule + added + (f", from place {self.place}" if self.place else "")


def _check_number(name: str, value: Any, low: float, high: float) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)) or not low <= value <= high:
        raise ValueError(f"{name} is {value!r}; expected a number from {low:g} to {high:g}.")


def _check_count(name: str, value: Any, low: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int) or value < low:
        raise ValueError(f"{name} is {value!r}; expected a whole number of at least {low}.")


@dataclass(frozen=True)
class Boost:
    """Lifts the items that meet a condition, or lowers them.

    Attributes:
        filter: attribute conditions as of :class:`Rules`, all of which must hold; at least one.
        add: what is added to the score; negative to lower.
        odds: by what the odds P / (1 - P) are multiplied; below 1 to lower.

    Raises:
        ValueError: unless there is a condition, and exactly one of ``add`` and ``odds``.
    """

    filter: Mapping[str, Any]
    add: float | None = None
    odds: float | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.filter, Mapping) or not self.filter:
            raise ValueError("boost: filter is empty; name the items that are boosted, such as {'genre': 'Drama'}.")
        if (self.add is None) == (self.odds is None):
            raise ValueError("boost: give exactly one of add (to the score) and odds (a factor).")
        if self.add is not None:
            _check_number("boost: add", self.add, -1e6, 1e6)
        else:
            _check_number("boost: odds", self.odds, 1e-6, 1e6)

    @property
    def step(self) -> float:
        """What is added: to the score, or to the logit of the probability."""
        return float(self.add) if self.add is not None else math.log(self.odds)  # type: ignore[arg-type]

    @property
    def label(self) -> str:
        """The rule's name in an answer."""
        told = ", ".join(_told(name, wanted) for name, wanted in self.filter.items())
        return "boost " + (told if len(told) <= LABEL_CHARACTERS else told[: LABEL_CHARACTERS - 1] + "…")


def _told(name: str, wanted: Any) -> str:
    if isinstance(wanted, Mapping):
        return ", ".join(f"{name}{SIGNS.get(bound, bound)}{value:g}" for bound, value in wanted.items())
    values = wanted if isinstance(wanted, list) else [wanted]
    return f"{name}=" + ",".join(f"{value:g}" if isinstance(value, float) else str(value) for value in values)


def _listed(kinds: Mapping[str, str]) -> str:
    return ", ".join(f"{name} ({kind})" for name, kind in kinds.items()) or "none"


@dataclass(frozen=True)
class Diversity:
    """Trades relevance for difference between the items of a list, or for a user's own mix.

    Attributes:
        weight: lambda, from 0 (the list as it is) to 1 (nothing but diversity).
        attribute: of kind ``token`` or ``tokens``, whose mix in the list should be that of the history (calibration); ``None``
            for maximal marginal relevance over content vectors.
        candidates: how many of the best the list is chosen from; ``None`` for five times k, at least 50.

    Raises:
        ValueError: if ``weight`` is outside 0 to 1, or ``candidates`` no positive whole number.
    """

    weight: float
    attribute: str | None = None
    candidates: int | None = None

    def __post_init__(self) -> None:
        _check_number("diversity: weight", self.weight, 0, 1)
        if self.attribute is not None and (not isinstance(self.attribute, str) or not self.attribute):
            raise ValueError(f"diversity: attribute is {self.attribute!r}; expected the name of an attribute.")
        if self.candidates is not None:
            _check_count("diversity: candidates", self.candidates, 1)

    def pool(self, k: int) -> int:
        """Return how many candidates a list of k is chosen from."""
        return max(k, self.candidates or max(CANDIDATES_PER_ITEM * k, MIN_CANDIDATES))


@dataclass(frozen=True)
class Exploration:
    """Gives places to items drawn at random.

    Attributes:
        share: of the places; where share times k is no whole number, one more is drawn with the probability of the rest.
        seed: the same seed, subject and catalogue give the same answer.

    Raises:
        ValueError: if ``share`` is outside 0 to 1, or ``seed`` no whole number from 0.
    """

    share: float
    seed: int = 0

    def __post_init__(self) -> None:
        _check_number("explore: share", self.share, 0, 1)
        _check_count("explore: seed", self.seed, 0)


@dataclass(frozen=True)
class Rules:
    """All rules of a request; without arguments, none.

    Attributes:
        filter: attribute to a value, a list of values (any of them), or for numbers bounds such as ``{"gte": 1990}``; every
            condition must hold.
        exclude: ids of items without a place.
        only: ids of the only items with a place; ``None`` for all.
        boosts: what lifts scores.
        caps: attribute to the most items with the same value of it.
        diversity: or ``None``.
        explore: or ``None``.

    Raises:
        ValueError: naming the argument, on a value of another form. Whether attributes exist is checked where the rules are used.
    """

    filter: Mapping[str, Any] = field(default_factory=dict)
    exclude: Sequence[str] = ()
    only: Sequence[str] | None = None
    boosts: Sequence[Boost] = ()
    caps: Mapping[str, int] = field(default_factory=dict)
    diversity: Diversity | None = None
    explore: Exploration | None = None

    def __post_init__(self) -> None:
        if not isinstance(self.filter, Mapping):
            raise ValueError(f"filter is {self.filter!r}; expected a mapping such as {{'genre': 'Drama'}}.")
        for name, ids in (("exclude", self.exclude), ("only", self.only)):
            if isinstance(ids, str):
                raise ValueError(f"{name} is the string {ids[:64]!r}; give a list of ids.")
        if self.only is not None and not len(self.only):
            raise ValueError("only names no item; leave it out to allow all.")
        if not isinstance(self.caps, Mapping):
            raise ValueError(f"caps is {self.caps!r}; expected a mapping such as {{'brand': 2}}.")
        for name, most in self.caps.items():
            _check_count(f"caps: {name}", most, 1)
        for boost in self.boosts:
            if not isinstance(boost, Boost):
                raise ValueError(f"boosts holds {boost!r}; expected Boost({{'genre': 'Drama'}}, add=0.5).")

    @property
    def rerank(self) -> bool:
        """Whether anything but conditions applies."""
        return bool(self.boosts or self.caps or self.diversity is not None or self.explore is not None)

    def check(self, kinds: Mapping[str, str]) -> None:
        """Compare with the attributes of an export; conditions are checked where they are evaluated.

        Args:
            kinds: attribute to kind.

        Raises:
            ValueError: if a capped attribute is unknown, or one to calibrate by is unknown or a number.
        """
        for name in self.caps:
            if name not in kinds:
                raise ValueError(f"caps: unknown attribute {name[:64]!r}; the export declares: {_listed(kinds)}.")
        calibrated = None if self.diversity is None else self.diversity.attribute
        if calibrated is not None and kinds.get(calibrated) not in ("token", "tokens"):
            raise ValueError(
                f"diversity: attribute is {calibrated[:64]!r}; expected one of kind token or tokens. "
                f"The export declares: {_listed(kinds)}."
            )

    # ------------------------------------------------------------------ what they cost

    def scans(self) -> int:
        """Count the passes over the catalogue that may be needed beside the first."""
        return int(bool(self.boosts)) + 2 * bool(self.caps or self.boosts) + bool(self.explore)

    def comparisons(self, k: int) -> int:
        """Count the pairs of items that diversity compares for a list of k."""
        return 0 if self.diversity is None else k * self.diversity.pool(k)


NO_RULES = Rules()
