"""Vectors on disk, one row per (encoder, hash of the raw bytes).

    <root>/<modality>-<fingerprint>/manifest.json         what the encoder is
    <root>/<modality>-<fingerprint>/<sha256>.safetensors  a shard: keys uint8 [n, 32], vectors float32 [n, dim], cut
    int32 [n]

A shard is named by the sha256 of its bytes, is written beside its place and moved there in one step, and is never
changed. So a killed process leaves whole shards or none, processes at work on the same texts write the same files, and
a damaged shard does not bear its own name: it is thrown away and its texts are encoded again.
"""

import hashlib
import json
import os
import re
import time
from collections.abc import Iterator, Sequence
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
from safetensors import SafetensorError, safe_open
from safetensors.numpy import load, save

from recbole_llm.atomic import atomic_file, is_temporary
from recbole_llm.content.cache_folder import cache_folder
from recbole_llm.content.encoders.transformer import Encoder

FORMAT = 1
KEY_BYTES = 32
SUFFIX = ".safetensors"
# a temporary file of this age belongs to a process that was killed: writing one takes seconds
ABANDONED_AFTER = 3600.0

_ENCODER_FOLDER = re.compile(r"[a-z]+-[0-9a-f]{32}")
_SHARD_FILE = re.compile(r"[0-9a-f]{64}\.safetensors")

log = getLogger(__name__)


def default_folder() -> Path:
    """Return the folder of vectors in :func:`recbole_llm.content.cache_folder.cache_folder`."""
    return cache_folder() / "features"


def raw_key(raw: bytes) -> bytes:
    """Compute the key of a raw value, its sha256.

    Example:
        >>> raw_key(b"Toy Story").hex()[:8]
        '09c10178'
    """
    return hashlib.sha256(raw).digest()


class FeatureStore:
    """The folder that holds the vectors of all encoders.

    Args:
        folder: ``feature_cache_dir``; empty: :func:`default_folder`. Made when first written to.
    """

    def __init__(self, folder: str | Path | None = None) -> None:
        self.folder = Path(folder).expanduser() if folder else default_folder()

    def shards(self, encoder: Encoder[Any]) -> "Shards":
        """Open the vectors of one encoder."""
        return Shards(self.folder / f"{encoder.modality}-{encoder.fingerprint[:32]}", encoder)

    def describe(self) -> str:
        """Write one line for a report: where, how many encoders, shards and bytes."""
        folders = encoder_folders(self.folder)
        sizes = [file.stat().st_size for folder in folders for file in shard_files(folder)]
        return f"{self.folder}: {len(folders)} encoders, {len(sizes)} shards, {sum(sizes) / 2**20:.1f} MiB"


class Shards:
    """The shards of one encoder: read by key, append.

    Args:
        folder: the encoder's folder.
        encoder: whose vectors these are.
    """

    def __init__(self, folder: Path, encoder: Encoder[Any]) -> None:
        self.folder = folder
        self._dim = encoder.dim
        self._manifest = {
            "format": FORMAT,
            "modality": encoder.modality,
            "fingerprint": encoder.fingerprint,
            "dim": encoder.dim,
            "encoder": encoder.describe(),
        }
        self._known: set[str] = set()
        self._place: dict[bytes, tuple[str, int]] = {}
        self._writable = True
        self.refresh()

    def __contains__(self, key: bytes) -> bool:
        return key in self._place

    def refresh(self) -> None:
        """Take in the shards that have appeared; of a key in several the oldest counts."""
        fresh = [path for path in shard_files(self.folder) if path.stem not in self._known]
        for path in sorted(fresh, key=_age):
            self._known.add(path.stem)
            try:
                with safe_open(path, framework="numpy") as shard:
                    keys = shard.get_tensor("keys")
                if keys.dtype != np.uint8 or keys.ndim != 2 or keys.shape[1] != KEY_BYTES:
                    raise SafetensorError("keys of another form")
            except FileNotFoundError:
                continue
            except (SafetensorError, OSError, ValueError) as error:
                self._discard(path.stem, f"cannot be read ({error})")
                continue
            for row, key in enumerate(keys):
                self._place.setdefault(key.tobytes(), (path.stem, row))

    def touch(self) -> None:
        """Note that the vectors were used: pruning goes by the time of the last use."""
        try:
            os.utime(self.folder / "manifest.json")
        except OSError:  # nothing stored yet, or a store that may only be read
            return

    def read(self, keys: Sequence[bytes], vectors: np.ndarray, cut: np.ndarray) -> np.ndarray:
        """Copy what is stored into rows of ``vectors`` and ``cut``; every shard that is used is verified.

        Args:
            keys: n keys.
            vectors: float32 ``[n, dim]``, written.
            cut: int32 ``[n]``, written.

        Returns:
            bool ``[n]``: the rows that were found.
        """
        found = np.zeros(len(keys), dtype=bool)
        wanted: dict[str, list[tuple[int, int]]] = {}
        for index, key in enumerate(keys):
            if key in self._place:
                shard, row = self._place[key]
                wanted.setdefault(shard, []).append((index, row))
        for shard, pairs in wanted.items():
            content = self._verified(shard)
            if content is None:
                continue
            to, rows = map(list, zip(*pairs, strict=True))
            vectors[to], cut[to] = content["vectors"][rows], content["cut"][rows]
            found[to] = True
        return found

    def _verified(self, shard: str) -> dict[str, np.ndarray] | None:
        path = self.folder / f"{shard}{SUFFIX}"
        try:
            data = path.read_bytes()
        except OSError as error:
            self._discard(shard, f"cannot be read ({error})")
            return None
        if hashlib.sha256(data).hexdigest() != shard:
            self._discard(shard, "is damaged (its sha256 is not its name)")
            return None
        content = load(data)
        if content["vectors"].shape[1:] != (self._dim,):
            self._discard(shard, f"holds vectors {content['vectors'].shape}, not of dimension {self._dim}")
            return None
        return content

    def _discard(self, shard: str, reason: str) -> None:
        lost = [key for key, (name, _) in self._place.items() if name == shard]
        for key in lost:
            del self._place[key]
        path = self.folder / f"{shard}{SUFFIX}"
        log.warning("Feature store: %s %s; its texts are encoded again", path, reason)
        try:
            path.unlink(missing_ok=True)
        except OSError as error:
            log.warning("Feature store: %s cannot be removed (%s)", path, error)
        else:
            self._known.discard(shard)

    def write(self, keys: Sequence[bytes], vectors: np.ndarray, cut: np.ndarray) -> None:
        """Append one shard; a store that cannot be written to is said once and then left alone.

        Args:
            keys: n keys.
            vectors: float32 ``[n, dim]``.
            cut: int32 ``[n]``, what the encoder did not see of each raw value.
        """
        if not self._writable or not keys:
            return
        table = np.frombuffer(b"".join(keys), dtype=np.uint8).reshape(len(keys), KEY_BYTES)
        data = save({"keys": table, "vectors": np.ascontiguousarray(vectors), "cut": np.ascontiguousarray(cut)})
        shard = hashlib.sha256(data).hexdigest()
        try:
            self._prepare_folder()
            _write_once(self.folder / f"{shard}{SUFFIX}", data)
        except OSError as error:
            self._writable = False
            log.warning(
                "Feature store: %s cannot be written (%s); the vectors are used and not kept", self.folder, error
            )

    def _prepare_folder(self) -> None:
        path = self.folder / "manifest.json"
        try:
            current = json.loads(path.read_text(encoding="utf-8"))
            keys = ("format", "modality", "fingerprint", "dim")
            if isinstance(current, dict) and all(current.get(key) == self._manifest[key] for key in keys):
                return
            log.warning("Feature store: %s does not describe its encoder; written again", path)
        except FileNotFoundError:
            self.folder.mkdir(parents=True, exist_ok=True)
        except (OSError, ValueError) as error:
            log.warning("Feature store: %s is damaged (%s); written again", path, error)
        for old in _scan(self.folder):
            if is_temporary(old) and time.time() - _age(old)[0] / 1e9 > ABANDONED_AFTER:
                old.unlink(missing_ok=True)
        _replace(path, (json.dumps(self._manifest, indent=2) + "\n").encode())


def encoder_folders(store: Path) -> list[Path]:
    """List the folders of a store that hold an encoder's vectors; whatever else lies there is not ours."""
    return sorted(path for path in _scan(store) if _ENCODER_FOLDER.fullmatch(path.name) and path.is_dir())


def shard_files(folder: Path) -> Iterator[Path]:
    """List the shards in an encoder's folder: files named by a sha256."""
    return (path for path in _scan(folder) if _SHARD_FILE.fullmatch(path.name))


def _scan(folder: Path) -> Iterator[Path]:
    try:
        yield from folder.iterdir()
    except OSError:  # there is none, or it may not be read: nothing is stored for us
        return


def _age(path: Path) -> tuple[int, str]:
    try:
        return path.stat().st_mtime_ns, path.name
    except OSError:
        return 0, path.name


def _write_once(path: Path, data: bytes) -> None:
    """Write a file named by its content: one that exists is left as it is."""
    if not path.exists():
        _replace(path, data)


def _replace(path: Path, data: bytes) -> None:
    with atomic_file(path) as file:
        file.write(data)
