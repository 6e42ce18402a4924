"""What every part of the program asks of the ids of users and items."""

from numbers import Integral
from typing import Any

# a longer id is refused by the service (422), and so by the import
MAX_ID_CHARACTERS = 256
# GET /v1/items/ID/similar and /v1/items/ID/image are routes of their own: an item id with such an ending, written with a plain
# slash, cannot be read by GET /v1/items/ID
ITEM_ROUTE_ENDINGS = ("/similar", "/image")


def ids_of(argument: str, given: Any) -> list[str]:
    """Return external ids as text: one id, or several; an integer is the id that its digits make.

    Raises:
        ValueError: naming ``argument``, on anything else, and without an id.
    """
    several = [given] if isinstance(given, (str, Integral)) else list(given)
    for value in several:
        if not isinstance(value, (str, Integral)) or isinstance(value, bool):
            raise ValueError(f"{argument} holds {value!r}; an id is a string or an integer.")
    if not several:
        raise ValueError(f"{argument} is empty; give at least one id.")
    return [str(value) for value in several]
