"""Repairs of RecBole in several processes: on a CPU, twice in a process, with a child that is killed.

Loads no torch before RecBole does.
"""

from collections import defaultdict
from collections.abc import Callable, Iterator
from itertools import count
from types import ModuleType
from typing import Any

from recbole_llm.bridge.repairs.registry import always, override, repair


@repair(
    "recbole.config.configurator",
    upstream="config/configurator.py:493-515 (backend nccl, a GPU for every process, an id in gpu_id for each)",
    issues="none found",
    until="RecBole chooses the backend by the device",
    condition=always("without a GPU every run of several processes ends in: no NCCL built in"),
)
def _gloo(module: ModuleType) -> None:
    """Several processes run on a CPU over gloo; with a GPU for each of them everything is as in stock."""

    def make(stock: Callable[[Any], None]) -> Callable[[Any], None]:
        def _init_device(self: Any) -> None:
            import torch

            config = self.final_config_dict
            if "local_rank" not in config or (torch.cuda.is_available() and str(config["gpu_id"])):
                stock(self)
                return
            torch.distributed.init_process_group(
                backend="gloo",
                rank=config["local_rank"] + config["offset"],
                world_size=config["world_size"],
                init_method=f"tcp://{config['ip']}:{config['port']}",
            )
            config.update(device=torch.device("cpu"), single_spec=False)
            if config["local_rank"] != 0:
                config.update(state="error", show_progress=False, verbose=False)

        return _init_device

    override(module.Config, "_init_device", make)


# of this process, by place and size; its fellows make theirs in the same order
_groups: defaultdict[tuple[str, int], Iterator[int]] = defaultdict(count)


@repair(
    "recbole.config.configurator",
    upstream="config/configurator.py:497-502 (every process group of a process meets under the same keys)",
    issues="none found",
    until="RecBole, or PyTorch, gives each group of a process keys of its own",
    condition=always("under torchrun, whose store outlives a group, a second run in a process waits for ever"),
)
def _group_keys(module: ModuleType) -> None:
    """Each process group of a process meets under keys of its own: the addresses that an earlier one left are not read."""

    def make(stock: Callable[[Any], None]) -> Callable[[Any], None]:
        def _init_device(self: Any) -> None:
            if "local_rank" not in self.final_config_dict:
                stock(self)
                return
            import torch.distributed as dist

            init = dist.init_process_group

            def init_process_group(*, init_method: str, rank: int, world_size: int, **others: Any) -> None:
                # counted by place and size: a process may have no part in another group
                number = next(_groups[init_method, world_size])
                prefix = f"recbole_llm_{number}"
                store, rank, world_size = next(iter(dist.rendezvous(init_method, rank, world_size)))
                init(store=dist.PrefixStore(prefix, store), rank=rank, world_size=world_size, **others)

            vars(dist).update(init_process_group=init_process_group)
            try:
                stock(self)
            finally:
                vars(dist).update(init_process_group=init)

        return _init_device

    override(module.Config, "_init_device", make)


@repair(
    "recbole.trainer.trainer",
    upstream="trainer/trainer.py:62 (device_ids of a module on the CPU)",
    issues="none found",
    until="RecBole passes device_ids for GPUs only",
    condition=always("DistributedDataParallel refuses device_ids for a module on the CPU"),
)
def _wrapper(module: ModuleType) -> None:
    """Stock models are wrapped on a CPU too."""

    def make(stock: Callable[..., Any]) -> Callable[..., Any]:
        def distributed_data_parallel(model: Any, device_ids: Any = None, **others: Any) -> Any:
            on_cpu = all(parameter.device.type == "cpu" for parameter in model.parameters())
            return stock(model, device_ids=None if on_cpu else device_ids, **others)

        return distributed_data_parallel

    override(module, "DistributedDataParallel", make, keep_name=False)


@repair(
    "recbole.trainer.trainer",
    "recbole.utils.url",
    upstream="trainer/trainer.py:222,603,1431 (bars of training and evaluation); utils/url.py:74 (of a download)",
    issues="none found",
    until="tqdm's default lock is no semaphore that forked processes share",
    condition=always("a forked child that is killed while it draws a bar blocks its parent's bars for ever"),
)
def _progress_lock(module: ModuleType) -> None:
    """Bars take a lock for the threads of one process; RecBole's processes never drew on each other's bars."""
    from recbole_llm.progress import use_thread_lock

    use_thread_lock()
