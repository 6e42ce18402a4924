"""Tables of items in training: whole in every process, or spread over the processes, in steps and in checkpoints.

A checkpoint holds whole tables in either case, so that everything that reads checkpoints reads these, in one process or in
another number of them. Sharded tables are written without ever being in one process's memory: rank after rank sends its rows in
pieces, rank 0 puts them into a temporary file beside the checkpoint, and the checkpoint is saved from that file, mapped into
memory. Reading maps the checkpoint and copies the rows that are wanted.
"""

import mmap
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from functools import cached_property
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor
from torch.nn.utils.clip_grad import clip_grad_norm_

from recbole_llm.bridge import distributed
from recbole_llm.bridge.checkpoint import RUN_PARTS, read_checkpoint, unwritable
from recbole_llm.bridge.evaluation.streaming import EVERY_SCORE, stock_reason

PIECE_BYTES = 2**24  # sent and written at once


class WholeTables:
    """Every process holds every item, and its own part of each batch.

    Args:
        model: an ``LLMTwoTower``.
        device: the trainer's.
    """

    def __init__(self, model: Any, device: torch.device) -> None:
        self.model, self.device = model, device

    def begin(self) -> None:
        """Give every process the same parameters to start from."""
        distributed.broadcast_parameters(self.model)

    def agree(self, value: Any) -> Any:
        """Return the value of the first process, since a last digit may decide otherwise on another device."""
        return distributed.agreed(value) if distributed.active() else value

    def reject(self, trainer: Any) -> None:
        """Raise where the trainer's metrics need what these tables cannot give: never."""

    def reject_evaluation(self, trainer: Any, eval_data: Any) -> None:
        """Raise where an evaluation needs what these tables cannot give: never."""

    def describe(self) -> str | None:
        """Say for the log how the rows are spread; ``None`` if they are not."""
        return None

    def share_of_batch(self, users: Tensor, terms: Tensor) -> Tensor | None:
        """Return the part of a batch's terms that this process has; ``None`` if every process has the whole batch."""
        return terms / distributed.sum_over_ranks(terms).clamp(min=1) if distributed.active() else None

    def of_epoch(self, loss: Tensor) -> Tensor:
        """Return what a batch's loss adds to the sum over all processes."""
        return loss

    def clip_gradients(self, max_norm: float, norm_type: float = 2.0, **others: Any) -> None:
        """Clip the norm of all gradients together."""
        clip_grad_norm_(self.model.parameters(), max_norm, norm_type, **others)

    def read(self, file: str, device: torch.device | str | None = None) -> dict[str, Any]:
        """Read a checkpoint, onto the trainer's device unless another is named."""
        return read_checkpoint(file, device or self.device, parts=RUN_PARTS)

    def whole(self, state: dict[str, Any], file: str, writes: bool) -> dict[str, Any]:
        """Return the state with the rows of every process.

        Args:
            state: of this process.
            file: the checkpoint; temporary files are made in its folder.
            writes: whether this process writes it.
        """
        return state


class ShardedTables(WholeTables):
    """Each process holds its part of the items, and sees the whole of every batch.

    So each computes the same loss, and the same gradients of what all of them have.
    """

    def begin(self) -> None:
        """Do nothing: the processes' parameters are made alike."""

    def agree(self, value: Any) -> Any:
        """Return the value itself, since every process has computed the same."""
        return value

    def reject(self, trainer: Any) -> None:
        """Raise where a metric needs every score of every user.

        Raises:
            ValueError: naming the metrics.
        """
        needs = [need for need in EVERY_SCORE if trainer.eval_collector.register.need(need)]
        if needs:
            raise ValueError(
                f"With shard_items, metrics must be of the first places, got {trainer.config['metrics']}, which need "
                f"{', '.join(needs)}. Leave out AUC, GAUC, LogLoss, MAE and RMSE, or set shard_items to false."
            )

    def reject_evaluation(self, trainer: Any, eval_data: Any) -> None:
        """Raise where an evaluation does not rank all items.

        Raises:
            ValueError: with the reason.
        """
        reason = stock_reason(trainer, eval_data) if eval_data else None
        if reason:
            raise ValueError(
                f"With shard_items, evaluation must rank all items: {reason}. Or set shard_items to false."
            )

    def describe(self) -> str | None:
        """Say how many rows each process holds."""
        own = self.model.item_rows.own
        rows = [stop - start for start, stop in distributed.gather_objects((own.start, own.stop))]
        return f"shard_items: {self.model.n_items:,} rows of items over {len(rows)} processes, at most {max(rows):,} in each"

    def share_of_batch(self, users: Tensor, terms: Tensor) -> None:
        """Return ``None``: every process has the whole batch."""
        return None

    def of_epoch(self, loss: Tensor) -> Tensor:
        """Divide a batch's loss so that an epoch's sum over ranks counts every batch once."""
        return loss / distributed.world_size()

    @cached_property
    def names(self) -> frozenset[str]:
        """Names in ``state_dict`` of the parameters that have a row per item."""
        model = self.model
        tables = [model.item_bias, *(tower.id.weight for tower in (model.target_tower, model.source_tower) if tower.id)]
        named = model.named_parameters(remove_duplicate=False)
        return frozenset(name for name, parameter in named if any(parameter is table for table in tables))

    def clip_gradients(self, max_norm: float, norm_type: float = 2.0, **others: Any) -> None:
        """Clip the norm of all processes' gradients together."""
        own: list[Tensor] = []
        common: list[Tensor] = []
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                (own if name in self.names else common).append(parameter.grad)
        norm = torch.nn.utils.get_total_norm
        parts = [*distributed.gather_objects(float(norm(own, norm_type))), float(norm(common, norm_type))]
        total = torch.linalg.vector_norm(torch.tensor(parts, device=self.device), norm_type)
        if others.get("error_if_nonfinite") and not bool(total.isfinite()):
            raise RuntimeError(f"clip_grad_norm: the norm of the gradients is {float(total)}.")
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), max_norm, total)

    def read(self, file: str, device: torch.device | str | None = None) -> dict[str, Any]:
        """Read a checkpoint with this process's rows of the tables, onto the CPU."""
        n_items, own = self.model.n_items, self.model.item_rows.own

        def rows_here(value: Tensor) -> Tensor:
            return value[own] if value.dim() and len(value) == n_items else value

        return _copied(self._with_tables(read_checkpoint(file, mapped=True, parts=RUN_PARTS), rows_here))

    def whole(self, state: dict[str, Any], file: str, writes: bool) -> dict[str, Any]:
        """Return the state with every process's rows.

        Raises:
            ValueError: if there is no room for the temporary file.
        """
        n_here = self.model.item_rows.n_own

        def whole(value: Tensor) -> Tensor:
            return _rows_of_all(value, file, writes) if value.dim() and len(value) == n_here else value

        try:
            return self._with_tables(state, whole)
        except OSError as error:
            raise unwritable(file, error) from error

    def _with_tables(self, state: dict[str, Any], change: Callable[[Tensor], Tensor]) -> dict[str, Any]:
        """Apply ``change`` to each table of items in ``state`` and to the optimizer's tensors beside it."""
        names = dict(enumerate(name for name, _ in self.model.named_parameters()))
        moments = {
            index: {
                key: change(value) if names.get(index) in self.names and isinstance(value, Tensor) else value
                for key, value in values.items()
            }
            for index, values in state["optimizer"]["state"].items()
        }
        model = {n: change(value) if n in self.names else value for n, value in state["state_dict"].items()}
        return {**state, "state_dict": model, "optimizer": {**state["optimizer"], "state": moments}}


def tables_of(model: Any, device: torch.device) -> WholeTables:
    """Choose how the items of a model are spread over processes."""
    return (ShardedTables if model.item_rows.sharded else WholeTables)(model, device)


def _rows_of_all(own: Tensor, file: str, writes: bool) -> Tensor:
    """Write every rank's rows one after another into a mapped file, which is deleted with the tensor.

    Args:
        own: this rank's rows, ``[n, ...]``.
        file: the file is made in this one's folder.
        writes: whether this process wants them; it gets ``own`` if not.

    Raises:
        OSError: if there is no room for the file.
    """
    rows = distributed.gather_objects(len(own))
    piece = max(PIECE_BYTES // own[0].nbytes, 1)
    with tempfile.TemporaryFile(dir=os.path.dirname(file)) if writes else nullcontext() as whole:
        for rank, count in enumerate(rows):
            for first in range(0, count, piece):
                last = min(first + piece, count)
                mine = rank == distributed.rank()
                part = own[first:last].contiguous() if mine else own.new_empty(last - first, *own.shape[1:])
                dist.broadcast(part, src=rank)
                if whole is not None:
                    whole.write(part.cpu().view(torch.uint8).numpy().tobytes())
        if whole is None:
            return own
        whole.flush()
        content = mmap.mmap(whole.fileno(), 0, access=mmap.ACCESS_COPY)
    return torch.frombuffer(content, dtype=own.dtype).view(sum(rows), *own.shape[1:])


def _copied(value: Any) -> Any:
    """Copy ``value`` into tensors of its own, so that nothing of the file stays mapped."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value
