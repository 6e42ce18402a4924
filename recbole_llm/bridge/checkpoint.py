"""Checkpoints: written whole or not at all, read without running code, refused when they do not fit.

A checkpoint is RecBole's dictionary (``trainer/trainer.py:289``) with what else a resume needs, in a ``torch.save`` file that
both sides read: RecBole's ``load_data_and_model`` unpickles the ``Config`` inside, and :func:`read_checkpoint`, which reads
with ``weights_only=True``, leaves it as bytes.
"""

import copy
import hashlib
import os
import pickle
import random
import struct
import sys
import zipfile
import zlib
from collections.abc import Collection, Mapping
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from recbole_llm.atomic import atomic_file
from recbole_llm.bridge.checkpoint_settings import take_settings
from recbole_llm.bridge.register import is_ours

FORMAT = "recbole-llm checkpoint"
VERSION = 1
LAST_SUFFIX = "-last.pth"
# what a model needs of a file, and what a run that goes on needs besides
MODEL_PARTS: dict[str, type | tuple[type, ...]] = {"state_dict": dict, "other_parameter": dict, "data": str}
RUN_PARTS: dict[str, type | tuple[type, ...]] = MODEL_PARTS | {
    "epoch": int,
    "cur_step": int,
    "best_valid_score": (int, float),
    "best_valid_result": (dict, type(None)),
    "train_loss_dict": dict,
    "optimizer": dict,
    "scaler": dict,
    "random_states": list,
}
# of reading a part of a checkpoint that has the right type and other contents than ours
WRONG_CONTENTS = (RuntimeError, ValueError, TypeError, LookupError, AttributeError)
# what belongs to a process and not to a run
_PROCESS_KEYS = ("local_rank", "world_size", "ip", "port", "nproc", "offset", "resume_from", "refit_from")


# ---------------------------------------------------------------- files


def last_file(best: str | os.PathLike[str]) -> str:
    """Return the path of the last epoch's checkpoint that stands beside ``best``."""
    return str(best).removesuffix(".pth") + LAST_SUFFIX


def best_file(path: str | os.PathLike[str]) -> str:
    """Return the path of the best epoch's checkpoint that belongs to ``path``.

    ``path`` may be the file of the last epoch or already that of the best one.
    """
    name = str(path)
    return name.removesuffix(LAST_SUFFIX) + ".pth" if name.endswith(LAST_SUFFIX) else name


# ---------------------------------------------------------------- content


class _Pickled:
    """An object kept as pickled bytes: a full ``torch.load`` gives the object, :func:`read_checkpoint` the bytes."""

    def __init__(self, value: Any) -> None:
        self._bytes = torch.frombuffer(bytearray(pickle.dumps(value, protocol=4)), dtype=torch.uint8)

    def __reduce__(self) -> tuple[Any, ...]:
        return unpickled, (self._bytes,)


def unpickled(content: Tensor) -> Any:
    """Unpickle ``content``, ``[n]`` uint8. Checkpoints name this function, so it keeps its place."""
    return pickle.loads(content.cpu().numpy().tobytes())


def _left_pickled(content: Tensor) -> Tensor:
    return content


def plain(value: Any) -> Any:
    """Convert ``value`` to what ``weights_only=True`` reads.

    These are tensors, numbers, strings, lists, tuples, dictionaries and ``None``.
    """
    if isinstance(value, Mapping):
        return {plain(key): plain(item) for key, item in value.items()}
    if isinstance(value, (list, tuple)):
        return type(value)(plain(item) for item in value) if type(value) in (list, tuple) else list(map(plain, value))
    if isinstance(value, (np.generic, np.ndarray)):
        return value.tolist()
    if value is None or isinstance(value, (bool, int, float, str, Tensor)):
        return value
    return str(value)


def random_state(loader_generator: torch.Generator | None) -> dict[str, Any]:
    """Return the state of every random stream of this process, as plain values."""
    name, keys, *rest = np.random.get_state()
    return {
        "python": random.getstate(),
        "numpy": (name, np.asarray(keys).tolist(), *rest),
        "torch": torch.get_rng_state(),
        "cuda": torch.cuda.get_rng_state_all() if torch.cuda.is_available() else [],
        "loader": None if loader_generator is None else loader_generator.get_state(),
    }


def set_random_state(state: Mapping[str, Any], loader_generator: torch.Generator | None) -> None:
    """Restore what :func:`random_state` returned.

    Raises:
        ValueError: if it is of another form.
    """
    try:
        random.setstate(state["python"])
        name, keys, *rest = state["numpy"]
        np.random.set_state((name, np.array(keys, dtype=np.uint32), *rest))
        torch.set_rng_state(state["torch"].cpu())
        if state["cuda"] and len(state["cuda"]) == torch.cuda.device_count():
            torch.cuda.set_rng_state_all([device.cpu() for device in state["cuda"]])
        if loader_generator is not None and state["loader"] is not None:
            loader_generator.set_state(state["loader"].cpu())
    except WRONG_CONTENTS as error:
        raise ValueError(
            f"checkpoint: its state of the random numbers is none of this version's ({error}). Resume with the version that "
            "wrote it, or start the run again."
        ) from error


def data_fingerprint(offsets: Tensor, ids: Tensor) -> str:
    """Hash the training interactions, given in CSR form."""
    digest = hashlib.sha256()
    for tensor in (offsets, ids):
        digest.update(tensor.cpu().contiguous().numpy().tobytes())
    return digest.hexdigest()


def settings_of(config: Any) -> dict[str, Any]:
    """Return the settings given to a run beyond the defaults, as plain values.

    They come from files, dictionaries and the command line.
    """
    given = {key: value for key, value in config.external_config_dict.items() if key not in _PROCESS_KEYS}
    return {"model": config["model"], "dataset": config["dataset"], "given": plain(given)}


def _for_readers(config: Any) -> Any:
    """Return the configuration under which one process reads what several have written.

    A class of a notebook, a script or a function is found by no other process: its nearest base that is stands for it. Readers
    look the class up by the model's name.
    """
    twin = copy.copy(config)
    if not config["single_spec"]:
        twin.final_config_dict = config.final_config_dict | {"single_spec": True, "local_rank": 0}
    twin.model_class = next(kind for kind in config.model_class.__mro__ if _is_importable(kind))
    return twin


def _is_importable(kind: type) -> bool:
    found: Any = sys.modules.get(kind.__module__)
    for name in kind.__qualname__.split("."):
        found = getattr(found, name, None)
    return found is kind and kind.__module__ != "__main__"


def write_checkpoint(path: str | os.PathLike[str], state: Mapping[str, Any], config: Any) -> None:
    """Write ``state`` and the configuration to ``path``, atomically.

    Args:
        path: the file.
        state: tensors and plain values.
        config: RecBole's ``Config``.

    Raises:
        OSError: if it cannot be written, for instance on a full disk; a file that was there is still whole.
    """
    content = {
        "format": FORMAT,
        "version": VERSION,
        "settings": settings_of(config),
        **state,
        "config": _Pickled(_for_readers(config)),
    }
    try:
        with atomic_file(path) as file:
            torch.save(content, file)
    except (OSError, RuntimeError) as error:
        raise unwritable(path, error) from error


def unwritable(path: str | os.PathLike[str], error: Exception) -> OSError:
    """Build the error to raise after ``error`` kept a checkpoint from being written."""
    return OSError(
        f"The checkpoint {path} could not be written ({error}). An earlier one of that name is unharmed: "
        "make room, or set checkpoint_dir to another disk, and resume from it."
    )


def read_checkpoint(
    path: str | os.PathLike[str],
    device: torch.device | str = "cpu",
    *,
    mapped: bool = False,
    parts: Mapping[str, type | tuple[type, ...]] | None = None,
) -> dict[str, Any]:
    """Read a checkpoint of ours without running code from it; its ``config`` stays pickled.

    Args:
        path: the file.
        device: where tensors go.
        mapped: leave tensors in the file, for who needs some of their rows; ``device`` is then the CPU.
        parts: names that must be there, with their types, such as ``MODEL_PARTS``.

    Raises:
        ValueError: if there is no such file, it is damaged, or nothing that recbole-llm wrote.
    """
    if not os.path.isfile(path):
        raise ValueError(
            f"checkpoint: {str(path)!r} does not exist. Give a file such as saved/LLMTwoTower-...-last.pth."
        )
    try:
        with zipfile.ZipFile(path) as archive:
            damaged = archive.testzip()  # torch.load does not verify what it reads
        if damaged is not None:
            raise zipfile.BadZipFile(f"{damaged} does not match its checksum")
    except (zipfile.BadZipFile, zlib.error, struct.error, EOFError, OSError, RuntimeError, ValueError) as error:
        raise ValueError(
            f"checkpoint: {str(path)!r} is damaged or no checkpoint at all ({error}). "
            "Resume from another file, or start the run again."
        ) from error
    own = (_left_pickled, f"{unpickled.__module__}.{unpickled.__qualname__}")
    try:
        with torch.serialization.safe_globals([own]):  # type: ignore[list-item]
            content = torch.load(os.fspath(path), map_location=device, weights_only=True, mmap=mapped)
    except (OSError, MemoryError):
        raise
    except Exception as error:  # the unpickler of torch checks no operand: it raises whatever a wrong one leads to
        raise _foreign(path) from error
    if not isinstance(content, dict) or content.get("format") != FORMAT or type(content.get("version")) is not int:
        raise _foreign(path)
    if content["version"] > VERSION:
        raise ValueError(f"checkpoint: {str(path)!r} was written by a newer recbole-llm; upgrade this one.")
    lacking = [name for name, kind in (parts or {}).items() if not isinstance(content.get(name, ...), kind)]
    if lacking:
        raise ValueError(
            f"checkpoint: {str(path)!r} lacks {', '.join(lacking)}, or they are of another form: it is no checkpoint that "
            "recbole-llm wrote. Give one such as saved/LLMTwoTower-....pth."
        )
    return content


def _foreign(path: str | os.PathLike[str]) -> ValueError:
    return ValueError(
        f"checkpoint: {str(path)!r} was not written by recbole-llm for LLMTwoTower. Checkpoints of other models and programs "
        "are read by RecBole's load_data_and_model, and by none of ours."
    )


def settings_for_resume(path: str | os.PathLike[str], own: Collection[str] = ()) -> tuple[str, str, dict[str, Any]]:
    """Return model, dataset and configuration dictionary with which training goes on from ``path``.

    The model is LLMTwoTower or a registered subclass. :mod:`recbole_llm.bridge.checkpoint_settings` says what is taken of the
    file; the log names what is not.

    Args:
        path: the file.
        own: the keys that the caller gives a value himself.

    Raises:
        ValueError: see :func:`read_checkpoint` and :func:`~recbole_llm.bridge.checkpoint_settings.take_settings`.
    """
    settings = take_settings(read_checkpoint(path, parts=RUN_PARTS).get("settings"), str(path), own, is_ours)
    left = [key for key in settings.left if key != "checkpoint_dir"]  # the folder of the file stands for it
    if left:
        getLogger().warning(
            "Settings that are not taken from the checkpoint, but may be given again as --key=value: %s",
            ", ".join(left),
        )
    again = {"checkpoint_dir": str(Path(path).resolve().parent), "resume_from": str(path)}
    return settings.model, settings.dataset, as_given(settings.given) | again


def settings_for_refit(path: str | os.PathLike[str], own: Collection[str] = ()) -> tuple[str, dict[str, Any]]:
    """Dataset and configuration dictionary of a fit that repeats the choices of ``path``.

    Args:
        path: the file; its folder is where the new checkpoint goes.
        own: the keys that the caller gives a value himself.

    Raises:
        ValueError: see :func:`read_checkpoint` and :func:`~recbole_llm.bridge.checkpoint_settings.take_settings`.
    """
    settings = take_settings(read_checkpoint(path, parts=MODEL_PARTS).get("settings"), str(path), own)
    return settings.dataset, as_given(settings.given) | {"checkpoint_dir": str(Path(path).resolve().parent)}


def as_given(settings: Mapping[str, Any]) -> dict[str, Any]:
    """Convert values for the ``config_dict`` of a ``Config``.

    RecBole parses strings there, so a string that would change is written as a literal.
    """
    from recbole_llm.bridge.repairs.configuration import parse_value

    return {
        key: repr(value) if isinstance(value, str) and parse_value(value) != value else value
        for key, value in settings.items()
    }
