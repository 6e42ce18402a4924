"""Which implementation runs, and what every launcher may rely on: the only place that chooses.

The choice goes by the tensor, at call time.
"""

import importlib
import os
from collections.abc import Iterator
from contextlib import contextmanager
from functools import cache
from importlib.util import find_spec
from types import ModuleType

import torch
from torch import Tensor

from recbole_llm_kernels.checks import (
    check_ids,
    check_rows,
    disorder,
    mask_ids,
    rows_with,
    synchronising_checks,
    without_repeats,
)

BACKENDS = ("auto", "triton", "torch")


def default_backend(device: torch.device | str) -> str:
    """The backend that ``backend="auto"`` stands for on ``device``: "triton" or "torch".

    RECBOLE_LLM_KERNELS_BACKEND, where set and not "auto", decides; otherwise Triton where there is a GPU and Triton is
    installed. float64 always runs on PyTorch.

    Args:
        device: a device or its name.

    Returns:
        "triton" or "torch".

    Raises:
        ValueError: if the environment variable holds an unknown name.
    """
    override = os.environ.get("RECBOLE_LLM_KERNELS_BACKEND", "auto")
    if override not in BACKENDS:
        raise ValueError(f"RECBOLE_LLM_KERNELS_BACKEND must be one of {', '.join(BACKENDS)}, got {override!r}")
    if override != "auto":
        return override
    return "triton" if torch.device(device).type == "cuda" and _has_triton() else "torch"


@cache
def _has_triton() -> bool:
    return find_spec("triton") is not None


def launchers(module: str, like: Tensor, backend: str) -> ModuleType:
    """The module of launchers that runs on ``like``; triton_ops, the sole importer of Triton, is loaded here."""
    if backend == "auto":
        backend = "torch" if like.dtype == torch.float64 else default_backend(like.device)
    if backend == "torch":
        return _load(f"torch_ops.{module}")
    if like.dtype == torch.float64:
        raise ValueError(
            "the triton backend computes in float32 and takes float32, bfloat16 and float16, got float64; "
            'use backend="torch"'
        )
    if not _has_triton():
        raise ValueError('backend "triton" needs the package triton: pip install triton, or use backend="torch"')
    if like.device.type == "cpu" and os.environ.get("TRITON_INTERPRET") != "1":
        raise ValueError(
            'backend "triton" was asked for tensors on the CPU, where Triton only interprets, slowly: set '
            'TRITON_INTERPRET=1 before Python starts, move the tensors to a GPU, or use backend="torch"'
        )
    return _load(f"triton_ops.{module}")


@cache
def _load(module: str) -> ModuleType:
    return importlib.import_module(f"recbole_llm_kernels.{module}")


@contextmanager
def as_given(like: Tensor) -> Iterator[None]:
    """Autocast off: functional.py has applied it to the operands, and sums are kept in float32."""
    if torch.is_autocast_enabled(like.device.type):
        with torch.autocast(like.device.type, enabled=False):
            yield
    else:
        yield


def checked(
    like: Tensor, run: ModuleType, *named: tuple[str, Tensor, Tensor], again: bool = False
) -> tuple[list[Tensor], Tensor | None]:
    """Range-check (name, ids, matrix), or, where that would synchronise, mask ids for launchers that leave it to us.

    Returns the ids, and a scalar to add to the loss: NaN if any was masked. ``again``: the forward has checked them.
    """
    check = synchronising_checks(like.device)
    if check and not again:
        for name, ids, matrix in named:
            check_ids(name, ids, len(matrix))
    if check or ".triton_ops." in run.__name__:
        return [ids for _, ids, _ in named], None
    masked = [mask_ids(ids, len(matrix)) for _, ids, matrix in named]
    any_bad = torch.stack([bad.any() for _, bad in masked]).any()
    return [safe for safe, _ in masked], torch.where(any_bad, torch.nan, 0.0)


def checked_rows(
    run: ModuleType,
    offsets_name: str,
    offsets: Tensor,
    ids_name: str,
    ids: Tensor,
    matrix: Tensor,
    again: bool = False,
) -> tuple[Tensor, Tensor, Tensor | None]:
    """Check row lists, or, where that would synchronise, make them safe for launchers that leave it to us.

    The launchers of ``triton_ops`` take the lists as they are. Those of ``torch_ops`` get every id of a row once. They
    read the lists' values anyway.

    Args:
        run: the launchers.
        offsets_name: the argument's name.
        offsets: where each row's ids begin, ``[B + 1]``.
        ids_name: the argument's name.
        ids: ``[T]``, ascending within a row; equal neighbours count once.
        matrix: whose rows the ids are.
        again: the forward has checked them.

    Returns:
        Offsets and ids, and NaN for rows with an id out of range or a descending pair, ``[B]`` float32; None: no such row.

    Raises:
        IndexError: an id is out of range (CPU, or debug mode).
        ValueError: offsets or ids are not in order (CPU, or debug mode).
    """
    is_checked, has_repeats, poison = synchronising_checks(offsets.device), True, None
    if is_checked and not again:
        check_ids(ids_name, ids, len(matrix))
        has_repeats = check_rows(offsets_name, offsets, ids_name, ids)
    if ".triton_ops." in run.__name__:
        return offsets, ids, None
    if not is_checked:
        falls = disorder(offsets, ids)[1]
        ids, bad = mask_ids(ids, len(matrix))
        poison = torch.where(rows_with(bad | falls, offsets), torch.nan, 0.0)
    return (*without_repeats(offsets, ids), poison) if has_repeats else (offsets, ids, poison)
