"""Counters, gauges and histograms in Prometheus' text format, of one process."""

from bisect import bisect_left
from collections.abc import Callable, Iterable, Mapping, Sequence
from typing import Any

import numpy as np

SECONDS = (0.0005, 0.001, 0.0025, 0.005, 0.01, 0.025, 0.05, 0.1, 0.25, 0.5, 1.0, 2.5)
SIZES = (1, 2, 4, 8, 16, 32, 64)
PREFIX = "recbole_llm_"
COVERAGE_WINDOW = 10_000  # answers
COVERAGE_ITEMS = 200_000  # in those answers: fewer answers are remembered where they are long


class Counter:
    """A number per combination of labels that only rises."""

    kind = "counter"

    def __init__(self) -> None:
        self.values: dict[tuple[tuple[str, str], ...], float] = {}

    def add(self, amount: float = 1, **labels: str) -> None:
        """Raise the number of these labels."""
        key = tuple(labels.items())
        self.values[key] = self.values.get(key, 0) + amount

    def lines(self, name: str) -> Iterable[str]:
        """Format the metric as text."""
        return (f"{name}{_labels(key)} {_number(value)}" for key, value in sorted(self.values.items()))


class Histogram:
    """How often a value fell below each bound."""

    kind = "histogram"

    def __init__(self, bounds: tuple[float, ...]) -> None:
        self.bounds = bounds
        self.counts = [0] * (len(bounds) + 1)
        self.total = 0.0

    def observe(self, value: float) -> None:
        """Count a value."""
        self.counts[bisect_left(self.bounds, value)] += 1
        self.total += value

    def lines(self, name: str) -> Iterable[str]:
        """Format the metric as text."""
        running = 0
        for bound, count in zip((*self.bounds, "+Inf"), self.counts, strict=True):
            running += count
            yield f'{name}_bucket{{le="{bound}"}} {running}'
        yield f"{name}_sum {self.total:.6f}"
        yield f"{name}_count {running}"


class Gauge:
    """Numbers that are asked for when they are read."""

    kind = "gauge"

    def __init__(self, read: Callable[[], Mapping[tuple[tuple[str, str], ...], float]]) -> None:
        self.read = read

    def lines(self, name: str) -> Iterable[str]:
        """Format the metric as text."""
        return (f"{name}{_labels(key)} {_number(value)}" for key, value in self.read().items())


def _number(value: float) -> str:
    """A value with all its digits: rates are made of small differences of large counts."""
    return str(int(value)) if float(value).is_integer() else repr(float(value))


def _labels(key: tuple[tuple[str, str], ...]) -> str:
    if not key:
        return ""
    escape = lambda text: text.replace("\\", r"\\").replace('"', r"\"").replace("\n", r"\n")  # noqa: E731
    return "{" + ",".join(f'{name}="{escape(value)}"' for name, value in key) + "}"


class Shown:
    """Which items the last answers held.

    But for a number per item all memory is taken at the start. An object for every answer, kept long after the burst that it
    came in, would keep the memory around it from being given back.

    Args:
        answers: most answers that are remembered.
        items: most items in them.

    Attributes:
        answers: that are remembered.
    """

    def __init__(self, answers: int, items: int) -> None:
        self._lengths = np.zeros(answers, dtype=np.int32)
        self._ring = np.zeros(items, dtype=np.int32)  # the numbers of the items, answer after answer
        self._next_answer = self._next_item = 0
        self.answers = self._remembered = 0
        self._numbers: dict[str, int] = {}

    def __len__(self) -> int:
        """Return how many different items they held."""
        return int(np.count_nonzero(np.bincount(self._last())))

    def _last(self) -> np.ndarray:
        first, end = self._next_item - self._remembered, self._next_item
        return self._ring[first:end] if first >= 0 else np.concatenate([self._ring[first:], self._ring[:end]])

    def add(self, ids: Sequence[str]) -> None:
        """Remember an answer, and forget the oldest that no longer have a place; of a longer one only the first items."""
        ring, size, at = self._ring, len(self._ring), self._next_item
        ids = ids[:size]
        n = len(ids)
        while self.answers == len(self._lengths) or self._remembered + n > size:
            self._remembered -= int(self._lengths[(self._next_answer - self.answers) % len(self._lengths)])
            self.answers -= 1
        known = self._numbers.get
        found = [known(item_id) for item_id in ids]
        numbers: Sequence[Any] = self._new(ids) if None in found else found
        split = size - at
        ring[at : at + n] = numbers[:split]
        if n > split:
            ring[: n - split] = numbers[split:]
        self._next_item = (at + n) % size
        self._lengths[self._next_answer] = n
        self._next_answer = (self._next_answer + 1) % len(self._lengths)
        self.answers += 1
        self._remembered += n

    def _new(self, ids: Sequence[str]) -> list[int]:
        """Number the items that have no number; items that were shown long ago lose theirs where there are too many."""
        numbers = self._numbers
        if len(numbers) + len(ids) > 2 * len(self._ring):
            kept = np.zeros(len(numbers), dtype=bool)
            kept[self._last()] = True
            self._ring[:] = (np.cumsum(kept) - 1)[self._ring]
            names = [item_id for item_id, keep in zip(numbers, kept.tolist(), strict=True) if keep]
            self._numbers = numbers = {item_id: number for number, item_id in enumerate(names)}
        return [numbers.setdefault(item_id, len(numbers)) for item_id in ids]


class Metrics:
    """What the service counts."""

    def __init__(self) -> None:
        self.requests = Counter()
        self.rejected = Counter()
        self.swaps = Counter()
        self.unknown_ids = Counter()
        self.truncated_texts = Counter()
        self.recommended = Counter()
        self.seconds = Histogram(SECONDS)
        self.queue_seconds = Histogram(SECONDS)
        self.encode_seconds = Histogram(SECONDS)
        self.batch_size = Histogram(SIZES)
        self.gauges: dict[str, tuple[str, Gauge]] = {}
        self.shown = Shown(COVERAGE_WINDOW, COVERAGE_ITEMS)

    def batch(self, size: int, waited: list[float]) -> None:
        """Count a batch of the scorer."""
        self.batch_size.observe(size)
        for seconds in waited:
            self.queue_seconds.observe(seconds)

    def answer(self, ids: tuple[str, ...], cold: int) -> None:
        """Count an answer's items."""
        if cold:
            self.recommended.add(cold, kind="cold")
        if len(ids) > cold:
            self.recommended.add(len(ids) - cold, kind="warm")
        self.shown.add(ids)

    @property
    def distinct_shown(self) -> int:
        """Different items in the last answers."""
        return len(self.shown)

    def text(self) -> str:
        """Format everything in Prometheus' text format."""
        table: list[tuple[str, str, Counter | Histogram | Gauge]] = [
            ("requests_total", "Requests by route and status.", self.requests),
            ("request_seconds", "Time from the request's head to the answer's end.", self.seconds),
            ("queue_seconds", "Time a request waited for the scorer.", self.queue_seconds),
            ("batch_size", "Requests scored together.", self.batch_size),
            ("encode_seconds", "Time a batch of texts took to encode.", self.encode_seconds),
            ("rejected_total", "Requests turned away, by reason.", self.rejected),
            ("swaps_total", "Exports loaded, by result.", self.swaps),
            ("unknown_ids_total", "Ids in requests that no item or user has.", self.unknown_ids),
            ("truncated_texts_total", "Texts longer than the encoder reads.", self.truncated_texts),
            ("recommended_items_total", "Items in answers, by kind.", self.recommended),
            *((name, help_text, gauge) for name, (help_text, gauge) in self.gauges.items()),
        ]
        lines: list[str] = []
        for name, help_text, metric in table:
            lines += [f"# HELP {PREFIX}{name} {help_text}", f"# TYPE {PREFIX}{name} {metric.kind}"]
            lines += metric.lines(PREFIX + name)
        return "\n".join(lines) + "\n"
