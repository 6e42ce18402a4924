"""Values that are made once and kept while they are asked for."""

import hashlib
from collections import OrderedDict
from collections.abc import Mapping
from typing import Any, Generic, TypeVar

MAX_KEY_CHARACTERS = 256  # of a condition as it stands; longer ones are hashed, to 64

V = TypeVar("V")


class Kept(Generic[V]):
    """The values that were asked for last.

    Args:
        most: how many.
        most_bytes: of all of them together; one is kept whatever its size.

    Example:
        >>> kept = Kept(2, 100)
        >>> for name in "abac":
        ...     if kept.get(name) is None:
        ...         kept.put(name, name.upper(), 10)
        >>> list(kept)
        ['a', 'c']
    """

    def __init__(self, most: int, most_bytes: int) -> None:
        self._most, self._most_bytes = most, most_bytes
        self._values: OrderedDict[Any, tuple[V, int]] = OrderedDict()
        self._bytes = 0

    def __len__(self) -> int:
        """How many values are kept."""
        return len(self._values)

    def __iter__(self) -> Any:
        """Keys, the one that was asked for last at the end."""
        return iter(self._values)

    def get(self, key: Any) -> V | None:
        """Return a value, or ``None`` where it is not kept."""
        found = self._values.get(key)
        if found is None:
            return None
        self._values.move_to_end(key)
        return found[0]

    def put(self, key: Any, value: V, size: int) -> None:
        """Keep a new value of so many bytes; those that were asked for least recently go."""
        self._values[key] = (value, size)
        self._bytes += size
        while len(self._values) > 1 and (len(self._values) > self._most or self._bytes > self._most_bytes):
            self._bytes -= self._values.popitem(last=False)[1][1]

    def clear(self) -> None:
        """Let go of all values."""
        self._values.clear()
        self._bytes = 0


def key_of(condition: Mapping[str, Any]) -> str:
    """Make a key of a condition, which may be as long as a request's body.

    Example:
        >>> key_of({"year": 1994, "genre": ["Drama"]})
        "[('genre', ['Drama']), ('year', 1994)]"
    """
    key = repr(sorted(condition.items()))
    if len(key) <= MAX_KEY_CHARACTERS:
        return key
    return hashlib.sha256(key.encode("utf-8", "surrogatepass")).hexdigest()
