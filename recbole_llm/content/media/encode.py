"""Picture and sound files to a table of vectors through the store, each file once, whatever its name.

The store's key is the sha256 of the file's bytes. Files are taken in the order of their keys, in groups and batches that depend
on the files alone: not on what is stored. So a run that was killed and begun again ends with the same store, bit for bit, on the
same machine and threads.
"""

import time
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field
from logging import getLogger
from pathlib import Path
from typing import Any

import numpy as np
import torch

from recbole_llm.content.halving import Halving
from recbole_llm.content.media.files import some
from recbole_llm.content.media.kinds import FileKind, UnreadableError
from recbole_llm.content.processes import number_of_processes
from recbole_llm.content.store.feature_table import FeatureTable
from recbole_llm.content.store.store import FeatureStore, Shards, raw_key
from recbole_llm.progress import progress_bar

GROUP = 256  # files of a shard: what a kill may cost
PLACEHOLDER_SHARE, PLACEHOLDER_ITEMS = 0.01, 10  # a file of more items than both says nothing of an item

log = getLogger(__name__)


@dataclass
class FileCounts:
    """What became of the files of a list of items.

    Attributes:
        kind: of files.
        items: that name a file.
        files: different ones, by their bytes.
        encoded: of these, those that the store lacked.
        with_vector: items that have a vector now.
        unreadable: reason to the files.
        placeholders: files that too many items share, with the number of items.
        seconds: that encoding took.
    """

    kind: FileKind
    items: int = 0
    files: int = 0
    encoded: int = 0
    with_vector: int = 0
    unreadable: dict[str, list[str]] = field(default_factory=dict)
    placeholders: dict[str, int] = field(default_factory=dict)
    seconds: float = 0.0

    def lines(self) -> list[str]:
        """Format the counts as lines for a log."""
        many, one = self.kind.many, self.kind.one
        lines = [
            f"Encoded {self.encoded} {many} in {self.seconds:.1f} s ({self.encoded / max(self.seconds, 1e-9):.0f} {many}/s); "
            f"{self.files - self.encoded} came from the store or cannot be read"
            if self.encoded
            else f"All {self.files} distinct {many} that can be read came from the store"
        ]
        for reason, files in self.unreadable.items():
            lines.append(f"{len(files)} {many} count as missing, {reason}: {some(files)}")
        for name, items in self.placeholders.items():
            lines.append(
                f"The {one} {name!r} stands for {items} items, so that it says nothing of one: it counts as missing"
            )
        lines.append(f"{self.with_vector} of {self.items} items that name a {one} have a vector; the others are masked")
        return lines


def encode_files(
    kind: FileKind,
    paths: Sequence[Sequence[Path]],
    encoder: Any,
    store: FeatureStore | None = None,
    *,
    show_progress: bool = False,
) -> tuple[FeatureTable, FileCounts]:
    """Look files up in the store, and read, encode and store those that it lacks.

    Args:
        kind: of files.
        paths: the files of each row, none for a row without one; the mean of several vectors is the row's.
        encoder: of :func:`recbole_llm.content.encoders.images.load_image_encoder` or of its twin for sounds.
        store: where vectors are kept; ``None``: nowhere.
        show_progress: draw a progress bar.

    Returns:
        The table, whose rows without a readable file are absent, and the counts. Files that cannot be read never stop it.

    Raises:
        ValueError: if the encoder gives NaN or infinity.
        MemoryError: if a single file does not fit.
    """
    job = _Job(kind, encoder, store, show_progress)
    keys_of = job.take(paths)
    job.run()
    vectors, present = torch.zeros(len(paths), encoder.dim), torch.zeros(len(paths), dtype=torch.bool)
    for row, keys in enumerate(keys_of):
        usable = [job.at[key] for key in keys if job.usable(key)]
        if usable:
            vectors[row] = torch.from_numpy(job.vectors[usable]).mean(0)
            present[row] = True
    job.counts.with_vector = int(present.sum())
    return FeatureTable(vectors, present, encoder.modality, encoder.fingerprint), job.counts


def placeholders_among(keys_of: Sequence[Sequence[bytes]], items: int) -> dict[bytes, int]:
    """Find the files that stand for so many items that they say nothing of one.

    Args:
        keys_of: the keys of each row's files, each once.
        items: rows that name a file.

    Returns:
        Key to its number of rows.
    """
    shared = Counter(key for keys in keys_of for key in keys)
    most = max(PLACEHOLDER_SHARE * items, PLACEHOLDER_ITEMS)
    return {key: rows for key, rows in shared.items() if rows > most}


def usable_files(kind: FileKind, paths: Sequence[Sequence[Path]], encoder: Any) -> list[list[Path]]:
    """List the files of each row whose vectors :func:`encode_files` averages: each once, read, and no placeholder."""
    job = _Job(kind, encoder, None, False)
    return [[job.file_of[key] for key in keys if key in job.at] for keys in job.take(paths)]


class _Job:
    """The distinct files of one call on their way to vectors."""

    def __init__(self, kind: FileKind, encoder: Any, store: FeatureStore | None, show_progress: bool) -> None:
        self.kind = kind
        self.encoder, self.show_progress = encoder, show_progress
        self.shards: Shards | None = None if store is None else store.shards(encoder)
        self.counts = FileCounts(kind)
        self.file_of: dict[bytes, Path] = {}
        self.at: dict[bytes, int] = {}
        self.placeholders: set[bytes] = set()
        alone = f"A single {kind.one} does not fit into memory. Take a smaller encoder."
        self._encode = Halving(encoder.encode, encoder.batch_size, f"the batch of {kind.many}", lambda sample: alone)

    def take(self, paths: Sequence[Sequence[Path]]) -> list[list[bytes]]:
        """Read the files for their keys; returns those of each row."""
        key_of: dict[Path, bytes | None] = {}
        keys_of: list[list[bytes]] = []
        for files in paths:
            keys = []
            for path in files:
                if path not in key_of:
                    key_of[path] = self._key(path)
                key = key_of[path]
                if key is not None and key not in keys:
                    self.file_of.setdefault(key, path)
                    keys.append(key)
            keys_of.append(keys)
            self.counts.items += bool(files)
        shared = placeholders_among(keys_of, self.counts.items)
        self.placeholders = set(shared)
        for key in sorted(shared):
            self.counts.placeholders[self.file_of.pop(key).name] = shared[key]
        self.counts.files = len(self.file_of)
        self.order = sorted(self.file_of)
        self.at = {key: at for at, key in enumerate(self.order)}
        self.vectors = np.zeros((len(self.order), self.encoder.dim), np.float32)
        self.have = np.zeros(len(self.order), bool)
        return keys_of

    def usable(self, key: bytes) -> bool:
        """Whether a file has a vector."""
        return key in self.at and bool(self.have[self.at[key]])

    def _key(self, path: Path) -> bytes | None:
        try:
            return raw_key(self.kind.read(path))
        except UnreadableError as error:
            self._miss(path, error)
            return None

    def _miss(self, path: Path, error: UnreadableError) -> None:
        self.counts.unreadable.setdefault(str(error), []).append(path.name)

    def run(self) -> None:
        """Fill ``vectors`` and ``have``."""
        everything = np.arange(len(self.order))
        self._read(everything)
        if self.shards is not None:
            self.shards.touch()
        missing = int((~self.have).sum())
        if not missing:
            return
        start = time.perf_counter()
        with progress_bar(
            total=missing,
            unit=self.kind.one,
            desc=f"Encoding {self.kind.many}",
            disable=not self.show_progress,
            dynamic_ncols=True,
        ) as bar:
            for group in _shares([everything[at : at + GROUP] for at in range(0, len(everything), GROUP)]):
                self._run_group(group, bar)
        self.counts.seconds = time.perf_counter() - start
        if self.shards is not None:  # the run uses what is stored, also where another process stored a file first
            self.shards.refresh()
            self._read(everything)

    def _read(self, at: np.ndarray) -> None:
        if self.shards is None or not len(at):
            return
        vectors, cut = np.empty((len(at), self.encoder.dim), np.float32), np.empty(len(at), np.int32)
        found = self.shards.read([self.order[i] for i in at], vectors, cut)
        self.vectors[at[found]], self.have[at[found]] = vectors[found], True

    def _run_group(self, group: np.ndarray, bar: Any) -> None:
        if self.shards is not None and not self.have[group].all():
            self.shards.refresh()
            self._read(group[~self.have[group]])
        new: list[int] = []
        for first in range(0, len(group), self.encoder.batch_size):
            batch = group[first : first + self.encoder.batch_size]
            lacking = batch[~self.have[batch]]
            samples = {int(i): self._sample(int(i)) for i in lacking}
            if all(sample is None for sample in samples.values()):
                bar.update(len(lacking))
                continue
            # those that are stored go along: products round by the shape of the batch
            samples |= {int(i): self._sample(int(i), count=False) for i in batch if int(i) not in samples}
            members = sorted(i for i, sample in samples.items() if sample is not None)
            found = self._encode([samples[i] for i in members]).float().cpu().numpy()
            for i, vector in zip(members, found, strict=True):
                if not np.isfinite(vector).all():
                    name = self.file_of[self.order[i]].name
                    raise ValueError(f"The encoder gives NaN or infinity for the {self.kind.one} {name!r}.")
                if not self.have[i]:
                    self.vectors[i] = vector
                    new.append(i)
            bar.update(len(lacking))
        self.have[new] = True
        self.counts.encoded += len(new)
        if self.shards is not None and new:
            self.shards.write([self.order[i] for i in new], self.vectors[new], np.zeros(len(new), np.int32))

    def _sample(self, at: int, count: bool = True) -> Any | None:
        path = self.file_of[self.order[at]]
        try:
            data = self.kind.read(path)
            if raw_key(data) != self.order[at]:
                raise UnreadableError("changed while it was read")
            return self.encoder.prepare([self.kind.decode(data, self.encoder)])[0]
        except UnreadableError as error:
            if count:
                self._miss(path, error)
            return None


def _shares(groups: list[np.ndarray]) -> list[np.ndarray]:
    """Order the groups for this process: its own first, then the others in reverse, so that two overlap on at most one."""
    rank, world = number_of_processes()
    return groups[rank::world] + [group for at, group in reversed(list(enumerate(groups))) if at % world != rank]
