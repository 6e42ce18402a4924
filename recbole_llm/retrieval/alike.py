"""In what two items are alike: the cosines of their content, by modality. An explanation names them beside what it adds up."""

from collections.abc import Container, Mapping, Sequence

import numpy as np


def alike(
    content: Mapping[str, np.ndarray], row: int, others: Sequence[int], unpainted: Container[int] = ()
) -> list[dict[str, float]]:
    """Compute the cosines of an item's content with that of others.

    Args:
        content: by modality ``[N, f]`` float32 unit vectors, centred, zero where an item has none.
        row: the item; beyond N for one that was added since.
        others: other rows.
        unpainted: rows whose pictures do not count.

    Returns:
        One for each of ``others``, by the modalities that both items have; empty where there is one modality alone, since a
        name then says nothing.

    Example:
        >>> tables = {"text": np.eye(2, dtype=np.float32), "image": np.float32([[1.0, 0.0], [0.6, 0.8]])}
        >>> alike(tables, 0, [1])
        [{'text': 0.0, 'image': 0.6}]
    """
    found: list[dict[str, float]] = [{} for _ in others]
    if len(content) < 2:
        return found
    for name, table in content.items():
        without = unpainted if name == "image" else ()
        if row >= len(table) or row in without or not table[row].any():
            continue
        for at, other in enumerate(others):
            if other < len(table) and other not in without and table[other].any():
                found[at][name] = round(float(table[row] @ table[other]), 4)
    return found
