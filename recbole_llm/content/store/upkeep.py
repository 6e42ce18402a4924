"""List what a feature store holds, and make room in it."""

import hashlib
import json
import time
from dataclasses import dataclass
from logging import getLogger
from pathlib import Path
from typing import Any

from recbole_llm.atomic import is_temporary
from recbole_llm.content.store.store import ABANDONED_AFTER, FeatureStore, encoder_folders, shard_files

log = getLogger(__name__)


@dataclass(frozen=True)
class StoredEncoder:
    """The vectors of one encoder in a store.

    Attributes:
        folder: where they lie.
        encoder: name and settings, from the manifest; empty where it cannot be read.
        modality: ``text``...
        fingerprint: of the encoder.
        dim: dimension of the vectors; 0 where the manifest cannot be read.
        shards: files of vectors.
        bytes: their size.
        used: seconds since the epoch of the last use.
    """

    folder: Path
    encoder: dict[str, Any]
    modality: str
    fingerprint: str
    dim: int
    shards: int
    bytes: int
    used: float

    @property
    def name(self) -> str:
        """The encoder's name as the user gave it."""
        return str(self.encoder.get("name", "unknown"))

    def line(self) -> str:
        """Format one line for a table."""
        days = max(time.time() - self.used, 0) / 86400
        return (
            f"{self.modality} {self.name} {self.fingerprint[:12]} dim {self.dim}: {self.shards} shards, "
            f"{self.bytes / 2**20:.1f} MiB, used {days:.1f} days ago"
        )


@dataclass(frozen=True)
class PruneReport:
    """What :func:`prune` removed, or would remove.

    Attributes:
        encoders: those removed whole.
        damaged: shards whose bytes do not match their name.
        abandoned: half-written files of killed processes.
        bytes: freed.
        dry_run: whether nothing was touched.
    """

    encoders: tuple[StoredEncoder, ...]
    damaged: tuple[Path, ...]
    abandoned: tuple[Path, ...]
    bytes: int
    dry_run: bool

    def lines(self) -> list[str]:
        """Format the report as lines for a terminal or a log."""
        verb = "Would remove" if self.dry_run else "Removed"
        lines = [f"{verb} {stored.line()}" for stored in self.encoders]
        lines += [f"{verb} damaged {path}" for path in self.damaged]
        lines += [f"{verb} half-written {path}" for path in self.abandoned]
        return [*lines, f"{verb} {self.bytes / 2**20:.1f} MiB"]


def store_info(folder: str | Path | None = None) -> list[StoredEncoder]:
    """List the encoders of a store, the one used last first.

    Args:
        folder: ``feature_cache_dir``; empty: the default.
    """
    found = []
    for path in encoder_folders(FeatureStore(folder).folder):
        manifest_file = path / "manifest.json"
        try:
            manifest = json.loads(manifest_file.read_text(encoding="utf-8"))
            used = manifest_file.stat().st_mtime
        except (OSError, ValueError):
            manifest, used = {}, path.stat().st_mtime
        if not isinstance(manifest, dict):
            manifest = {}
        sizes = [_size(file) for file in shard_files(path)]
        modality, _, short = path.name.partition("-")
        found.append(
            StoredEncoder(
                path,
                manifest.get("encoder") or {},
                modality,
                manifest.get("fingerprint", short),
                manifest.get("dim", 0),
                len(sizes),
                sum(sizes),
                used,
            )
        )
    return sorted(found, key=lambda stored: (-stored.used, stored.folder.name))


def prune(
    folder: str | Path | None = None,
    *,
    unused_days: float | None = None,
    encoder: str | None = None,
    dry_run: bool = False,
) -> PruneReport:
    """Remove damaged shards and half-written files, and on demand the vectors of encoders.

    Every shard that stays is read and verified. Only files of the store are touched: others in its folders stay.

    Args:
        folder: ``feature_cache_dir``; empty: the default.
        unused_days: remove encoders not used for so many days.
        encoder: remove the encoders of this name, or whose fingerprint begins with this (at least 6 characters).
        dry_run: only say what would be removed.

    Raises:
        ValueError: if ``unused_days`` is negative, or no encoder matches ``encoder``; lists those there are.
    """
    if unused_days is not None and not unused_days >= 0:  # NaN too: every comparison with it would be false
        raise ValueError(f"unused_days must be at least 0, got {unused_days}.")
    stored = store_info(folder)
    doomed = [entry for entry in stored if _is_asked_for(entry, unused_days, encoder)]
    if encoder is not None and not doomed:
        names = ", ".join(f"{entry.name} ({entry.fingerprint[:12]})" for entry in stored) or "none"
        raise ValueError(f"No encoder {encoder!r} in {FeatureStore(folder).folder}; there are: {names}.")
    gone = {entry.folder for entry in doomed}
    damaged = [file for entry in stored if entry.folder not in gone for file in shard_files(entry.folder) if _bad(file)]
    limit = time.time() - ABANDONED_AFTER
    abandoned = [
        file for entry in stored for file in entry.folder.iterdir() if is_temporary(file) and _changed(file) < limit
    ]
    whole = [file for entry in doomed for file in (*shard_files(entry.folder), entry.folder / "manifest.json")]
    freed = 0
    for file in (*whole, *damaged, *abandoned):
        size = _size(file)
        if not dry_run:
            file.unlink(missing_ok=True)
        freed += size
    if not dry_run:
        for path in gone:
            try:
                path.rmdir()
            except OSError:
                log.warning("Feature store: %s holds files that are not the store's, and stays", path)
    return PruneReport(tuple(doomed), tuple(damaged), tuple(abandoned), freed, dry_run)


def _is_asked_for(stored: StoredEncoder, unused_days: float | None, encoder: str | None) -> bool:
    if encoder is not None and not (
        stored.name == encoder or (len(encoder) >= 6 and stored.fingerprint.startswith(encoder))
    ):
        return False
    if unused_days is not None and time.time() - stored.used < unused_days * 86400:
        return False
    return encoder is not None or unused_days is not None


def _bad(shard: Path) -> bool:
    digest = hashlib.sha256()
    try:
        with shard.open("rb") as file:
            while block := file.read(1 << 20):
                digest.update(block)
    except FileNotFoundError:
        return False
    return digest.hexdigest() != shard.stem


def _size(file: Path) -> int:
    try:
        return file.stat().st_size
    except OSError:  # removed meanwhile
        return 0


def _changed(file: Path) -> float:
    try:
        return file.stat().st_mtime
    except OSError:
        return float("inf")
