"""The trainer of a model whose items are spread over processes, and its checkpoints, which are those of one process.

A checkpoint holds whole tables, so that everything that reads checkpoints reads these, in one process or in another number
of them. They are written without ever being in one process's memory: rank after rank sends its rows in pieces, rank 0 puts
them into a temporary file beside the checkpoint, and the checkpoint is saved from that file, mapped into memory. Reading
maps the checkpoint and copies the rows that are wanted.
"""

import mmap
import os
import tempfile
from collections.abc import Callable, Mapping
from contextlib import nullcontext
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from recbole_llm.bridge import distributed
from recbole_llm.bridge.checkpoint import RUN_PARTS, read_checkpoint, unwritable
from recbole_llm.bridge.evaluation import EVERY_SCORE, stock_reason
from recbole_llm.bridge.trainer import LLMTwoTowerTrainer

PIECE_BYTES = 2**24  # sent and written at once


class ShardedTrainer(LLMTwoTowerTrainer):
    """What ``LLMTwoTowerTrainer(config, model)`` gives for a :class:`recbole_llm.sharded_model.ShardedTwoTower`.

    Every process sees the whole of every batch, and computes the same loss and the same gradients of what all have.

    Raises:
        ValueError: if a metric needs every score of every user.
    """

    def __init__(self, config: Any, model: Any) -> None:
        super().__init__(config, model)
        needs = [need for need in EVERY_SCORE if self.eval_collector.register.need(need)]
        if needs:
            raise ValueError(
                f"With shard_items, metrics must be of the first places, got {config['metrics']}, which need "
                f"{', '.join(needs)}. Leave out AUC, GAUC, LogLoss, MAE and RMSE, or set shard_items to false."
            )

    def evaluate(
        self,
        eval_data: Any,
        load_best_model: bool = True,
        model_file: str | None = None,
        show_progress: bool = False,
    ) -> Any:
        """As ``Trainer.evaluate``; each process reads its rows of the best model."""
        reason = stock_reason(self, eval_data) if eval_data else None
        if reason:
            raise ValueError(
                f"With shard_items, evaluation must rank all items: {reason}. Or set shard_items to false."
            )
        return super().evaluate(eval_data, load_best_model, model_file, show_progress)

    def _tell_of_large_catalogue(self, log: Any) -> None:
        rows = [stop - start for start, stop in distributed.gather_objects((self.model.own.start, self.model.own.stop))]
        log(
            f"shard_items: {self.model.n_items:,} rows of items over {len(rows)} processes, at most {max(rows):,} in each"
        )

    # ------------------------------------------------------------------ a step

    def _step(self, interaction: Any, loss_func: Any) -> Tensor:
        # the sum over ranks, which is what an epoch's loss is, then counts every batch once
        return super()._step(interaction, loss_func) / distributed.world_size()

    def _share_of_batch(self, interaction: Any) -> None:
        return None

    def _clip_gradients(self, max_norm: float, norm_type: float = 2.0, **others: Any) -> None:
        tables = self.model.sharded_names
        own: list[Tensor] = []
        common: list[Tensor] = []
        for name, parameter in self.model.named_parameters():
            if parameter.grad is not None:
                (own if name in tables else common).append(parameter.grad)
        norm = torch.nn.utils.get_total_norm
        parts = [*distributed.gather_objects(float(norm(own, norm_type))), float(norm(common, norm_type))]
        total = torch.linalg.vector_norm(torch.tensor(parts, device=self.device), norm_type)
        if others.get("error_if_nonfinite") and not bool(total.isfinite()):
            raise RuntimeError(f"clip_grad_norm: the norm of the gradients is {float(total)}.")
        torch.nn.utils.clip_grads_with_norm_(self.model.parameters(), max_norm, total)

    # ------------------------------------------------------------------ checkpoints

    def _read(self, file: str, device: torch.device | str | None = None) -> dict[str, Any]:
        """A checkpoint with this process's rows of the tables, on the CPU."""
        n_items, own = self.model.n_items, self.model.own

        def rows_here(name: str, value: Tensor) -> Tensor:
            return value[own] if value.dim() and len(value) == n_items else value

        return _copied(self._with_tables(read_checkpoint(file, mapped=True, parts=RUN_PARTS), rows_here))

    def _write(self, file: str, state: dict[str, Any]) -> None:
        writes, n_here = self.config["local_rank"] in (None, 0), len(self.model.item_bias)

        def whole(name: str, value: Tensor) -> Tensor:
            return _rows_of_all(value, file, writes) if value.dim() and len(value) == n_here else value

        with self._interruption.held():
            try:
                state = self._with_tables(state, whole)
            except OSError as error:
                raise unwritable(file, error) from error
        super()._write(file, state)

    def _with_tables(self, state: dict[str, Any], change: Callable[[str, Tensor], Tensor]) -> dict[str, Any]:
        """``state`` with what ``change`` makes of each table of items and of the optimizer's tensors beside it."""
        names, tables = dict(enumerate(name for name, _ in self.model.named_parameters())), self.model.sharded_names
        moments = {
            index: {
                key: change(key, value) if names.get(index) in tables and isinstance(value, Tensor) else value
                for key, value in values.items()
            }
            for index, values in state["optimizer"]["state"].items()
        }
        model = {n: change(n, value) if n in tables else value for n, value in state["state_dict"].items()}
        return {**state, "state_dict": model, "optimizer": {**state["optimizer"], "state": moments}}


def _rows_of_all(own: Tensor, file: str, writes: bool) -> Tensor:
    """Every rank's rows one after another, in a file that is mapped into memory and gone with the tensor.

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
    """``value`` with tensors of its own, so that nothing of the file stays mapped."""
    if isinstance(value, Tensor):
        return value.clone()
    if isinstance(value, Mapping):
        return {key: _copied(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(_copied(item) for item in value)
    return value
