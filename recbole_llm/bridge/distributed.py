"""Several processes of ``torch.distributed``: who does which part, and what all of them share.

Every function is its trivial self where no process group exists.
"""

import os
from collections.abc import Iterable
from typing import Any, TypeVar

import torch
import torch.distributed as dist
from torch import Tensor

T = TypeVar("T")


_OF_TORCHRUN = ("RANK", "LOCAL_RANK", "WORLD_SIZE", "LOCAL_WORLD_SIZE", "MASTER_ADDR", "MASTER_PORT")


def settings_of_torchrun() -> dict[str, Any]:
    """Return the settings that RecBole's ``run(nproc=...)`` would give this process.

    ``torchrun`` states them in the environment; without it the dictionary is empty.
    """
    given = {name: os.environ.get(name, "") for name in _OF_TORCHRUN}
    if not all(given.values()) or given["WORLD_SIZE"] == "1":
        return {}
    return {
        "local_rank": int(given["LOCAL_RANK"]),
        "offset": int(given["RANK"]) - int(given["LOCAL_RANK"]),
        "world_size": int(given["WORLD_SIZE"]),
        "nproc": int(given["LOCAL_WORLD_SIZE"]),
        "ip": given["MASTER_ADDR"],
        "port": given["MASTER_PORT"],
    }


def active() -> bool:
    """Return whether this process belongs to a group of more than one."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size() > 1


def rank() -> int:
    """Return this process's number in the group, from 0."""
    return dist.get_rank() if active() else 0


def world_size() -> int:
    """Return the number of processes in the group."""
    return dist.get_world_size() if active() else 1


def own_part(total: int) -> slice:
    """Return this process's contiguous part of ``range(total)``; the parts of all processes cover it once."""
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


def barrier() -> None:
    """Wait until every process is here."""
    if active():
        dist.barrier()


def agreed(value: T) -> T:
    """Return rank 0's ``value`` on every process. It is pickled on the way."""
    if not active():
        return value
    box = [value]
    dist.broadcast_object_list(box, src=0)
    return box[0]


def agree_on_random_numbers(device: torch.device) -> None:
    """Set every rank's random streams to those of rank 0."""
    torch.set_rng_state(agreed(torch.get_rng_state()))
    if device.type == "cuda":
        torch.cuda.set_rng_state(agreed(torch.cuda.get_rng_state(device)), device)


def gather_objects(value: T) -> list[T]:
    """Collect every process's ``value``, by rank."""
    if not active():
        return [value]
    values: list[Any] = [None] * world_size()
    dist.all_gather_object(values, value)
    return values


def sum_over_ranks(value: Tensor) -> Tensor:
    """Sum every process's tensor into a new tensor."""
    if not active():
        return value
    total = value.clone()
    dist.all_reduce(total)
    return total


def broadcast_parameters(module: torch.nn.Module) -> None:
    """Copy rank 0's parameters to every process."""
    if active():
        for parameter in module.parameters():
            dist.broadcast(parameter.data, src=0)


def sum_gradients(parameters: Iterable[torch.nn.Parameter]) -> None:
    """Add up every process's gradients in place.

    A gradient that a process lacks counts as 0 if another process has it.
    """
    parameters = [parameter for parameter in parameters if parameter.requires_grad]
    has = torch.tensor([parameter.grad is not None for parameter in parameters], dtype=torch.int32)
    has = has.to(parameters[0].device)
    dist.all_reduce(has, dist.ReduceOp.MAX)
    for parameter, wanted in zip(parameters, has.tolist(), strict=True):
        if wanted:
            if parameter.grad is None:
                parameter.grad = torch.zeros_like(parameter)
            dist.all_reduce(parameter.grad)
