"""Several processes of ``torch.distributed``: who does which part, and what all of them share.

Every function is its trivial self where no process group exists.
"""

import torch
import torch.distributed as dist
from torch import Tensor


def active() -> bool:
    """Whether this process belongs to a group of more than one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """This process's number in the group, from 0."""
    return dist.get_rank() if active() else 0


def world_size() -> int:
    """Processes in the group."""
    return dist.get_world_size() if active() else 1


def own_part(total: int) -> slice:
    """This process's contiguous part of ``range(total)``; the parts of all processes cover it once."""
    size, number = world_size(), rank()
    return slice(total * number // size, total * (number + 1) // size)


def gather_rows(own: Tensor, device: torch.device) -> Tensor:
    """Concatenate every process's ``[m, K]`` tensor (m may differ) in the order of ranks, on the CPU of all.

    Args:
        own: this process's rows, on the CPU.
        device: where the group's backend communicates from.
    """
    if not active():
        return own
    sizes = [torch.zeros(1, dtype=torch.int64, device=device) for _ in range(world_size())]
    dist.all_gather(sizes, torch.tensor([len(own)], device=device))
    lengths = [int(size) for size in sizes]
    padded = own.new_zeros(max(lengths), *own.shape[1:], device=device)
    padded[: len(own)] = own.to(device)
    parts = [torch.empty_like(padded) for _ in lengths]
    dist.all_gather(parts, padded)
    return torch.cat([part[:length].cpu() for part, length in zip(parts, lengths, strict=True)])
