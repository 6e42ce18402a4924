"""Number this process among several, to share the encoding."""

import os


def number_of_processes() -> tuple[int, int]:
    """Return this process's number from 0, and how many there are.

    Of the process group of ``torch.distributed`` where one exists, else what ``torchrun`` says in ``RANK`` and
    ``WORLD_SIZE``, else 0 and 1.

    Raises:
        ValueError: if ``RANK`` and ``WORLD_SIZE`` are no such numbers.
    """
    import torch

    if torch.distributed.is_available() and torch.distributed.is_initialized():
        return torch.distributed.get_rank(), torch.distributed.get_world_size()
    given = os.environ.get("RANK", "0"), os.environ.get("WORLD_SIZE", "1")
    try:
        rank, world = map(int, given)
    except ValueError:
        rank, world = 0, 0
    if not 0 <= rank < world:
        raise ValueError(
            f"RANK is {given[0]!r} and WORLD_SIZE {given[1]!r} in the environment; expected a number below the other. "
            "torchrun sets both; unset them for one process."
        )
    return rank, world
