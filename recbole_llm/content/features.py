"""Turn raw values into a table of vectors through the store, so that each distinct value is encoded once."""

import time
from collections.abc import Iterator, Sequence
from itertools import compress
from logging import getLogger
from typing import Any

import numpy as np
import torch

from recbole_llm.content.encoders.transformer import Encoder, Sample
from recbole_llm.content.halving import Halving
from recbole_llm.content.processes import number_of_processes
from recbole_llm.content.store.feature_table import FeatureTable, apply_transform
from recbole_llm.content.store.store import FeatureStore, Shards, raw_key
from recbole_llm.content.store.vector_files import load_features
from recbole_llm.progress import progress_bar

__all__ = ["FeatureStore", "FeatureTable", "apply_transform", "encode_texts", "load_features"]

# distinct texts that are tokenised, sorted by length and cut into batches together; bounds the memory of their tokens
WINDOW_TEXTS = 32768
# rows of a shard: what a kill may cost
SHARD_ROWS = 1024

log = getLogger(__name__)


def encode_texts(
    texts: Sequence[str | None],
    encoder: Encoder[Any],
    store: FeatureStore | None = None,
    *,
    batch_size: int = 64,
    show_progress: bool = False,
) -> FeatureTable:
    """Look texts up in the store, and encode and store those that it lacks.

    Distinct texts are encoded once, in batches of similar length. Batches and shards depend on the texts that are not
    stored yet and on nothing else, so a run that was killed and begun again ends with the same store, bit for bit, on
    the same machine and threads. (The same text in another batch may differ in the last bits, about 1e-7, since matrix
    products round by the shape of the batch; what a run uses is what it has stored, so the next run uses the same.)

    Under ``torch.distributed`` or ``torchrun`` each rank encodes its share of the shards, then helps with what is missing;
    ranks meet only in the store, so no rank waits for another and the number of processes may change from run to run.

    Args:
        texts: one per row; ``None``: the row is absent.
        encoder: of modality ``text``.
        store: where vectors are kept; ``None``: nowhere.
        batch_size: most texts of one forward pass; halved on out of memory.
        show_progress: draw a progress bar.

    Raises:
        ValueError: on a batch size below 1, or an encoder that gives NaN or infinity.
        MemoryError: if a single text does not fit.
    """
    if batch_size < 1:
        raise ValueError(f"encoder_batch_size must be at least 1, got {batch_size}.")
    index: dict[bytes, int] = {}
    distinct: list[str] = []
    rows = np.full(len(texts), -1, dtype=np.int64)
    for row, text in enumerate(texts):
        if text is None:
            continue
        key = raw_key(text.encode("utf-8"))
        at = index.setdefault(key, len(index))
        if at == len(distinct):
            distinct.append(text)
        rows[row] = at
    job = _Job(list(index), distinct, encoder, store, batch_size, show_progress)
    job.run()
    present = torch.from_numpy(rows >= 0)
    vectors = torch.zeros(len(texts), encoder.dim)
    vectors[present] = torch.from_numpy(job.vectors[rows[rows >= 0]])
    job.report(int(present.sum()), len(texts))
    return FeatureTable(vectors, present, encoder.modality, encoder.fingerprint)


class _Job:
    """Distinct raw values of one call on their way to vectors."""

    def __init__(
        self,
        keys: list[bytes],
        raw: list[Any],
        encoder: Encoder[Any],
        store: FeatureStore | None,
        batch_size: int,
        show_progress: bool,
    ) -> None:
        self.keys, self.raw, self.encoder = keys, raw, encoder
        self.batches = _Batches(encoder, batch_size)
        self.show_progress = show_progress
        self.shards: Shards | None = store.shards(encoder) if store is not None else None
        self.vectors = np.zeros((len(keys), encoder.dim), dtype=np.float32)
        self.cut = np.zeros(len(keys), dtype=np.int32)
        self.have = np.zeros(len(keys), dtype=bool)
        self.encoded = self.units = 0
        self.seconds = 0.0

    def run(self) -> None:
        """Fill ``vectors`` and ``cut``."""
        self._read(np.arange(len(self.keys)))
        if self.shards is not None:
            self.shards.touch()
        missing = int((~self.have).sum())
        if not missing:
            return
        start = time.perf_counter()
        with progress_bar(
            total=missing, unit="text", desc="Encoding", disable=not self.show_progress, dynamic_ncols=True
        ) as bar:
            for first in range(0, len(self.keys), WINDOW_TEXTS):
                window = np.arange(first, min(first + WINDOW_TEXTS, len(self.keys)))
                self._run_window(window[~self.have[window]], bar)
        self.seconds = time.perf_counter() - start
        if self.shards is not None:
            # the run uses what is stored, also where another process stored a text first
            self.shards = Shards(self.shards.folder, self.encoder)
            self._read(np.arange(len(self.keys)))

    def _read(self, at: np.ndarray) -> None:
        if self.shards is None or not len(at):
            return
        vectors, cut = np.empty((len(at), self.encoder.dim), np.float32), np.empty(len(at), np.int32)
        found = self.shards.read([self.keys[i] for i in at], vectors, cut)
        self.vectors[at[found]], self.cut[at[found]], self.have[at[found]] = vectors[found], cut[found], True

    def _run_window(self, at: np.ndarray, bar: Any) -> None:
        samples: dict[int, Sample] = {}
        for part in np.array_split(at, max(len(at) // SHARD_ROWS, 1)):
            samples.update(zip(part.tolist(), self.encoder.prepare([self.raw[i] for i in part]), strict=True))
        # longest first: what does not fit into memory shows at once; ties by key, so that the order of the rows is
        # nothing
        order = sorted(samples, key=lambda i: (-samples[i].size, self.keys[i]))
        for shard in _shares(list(_group(self.batches.plan(order, samples))), self.keys):
            self._run_shard(shard, samples, bar)

    def _run_shard(self, shard: list[list[int]], samples: dict[int, Sample], bar: Any) -> None:
        members = np.array([i for batch in shard for i in batch])
        if self.shards is not None:
            self.shards.refresh()
            self._read(members[[self.keys[i] in self.shards for i in members]])
        new = members[~self.have[members]]
        bar.update(len(members) - len(new))
        absent = set(new.tolist())
        for batch in shard:
            if absent.isdisjoint(batch):
                continue
            vectors = self.batches.encode([samples[i] for i in batch]).float().cpu().numpy()
            if not np.isfinite(vectors).all():
                bad = batch[int(np.flatnonzero(~np.isfinite(vectors).all(1))[0])]
                raise ValueError(
                    f"The encoder gives NaN or infinity for {str(self.raw[bad])[:80]!r}. "
                    "Set encoder_dtype to float32 (or bfloat16, which has its range)."
                )
            for i, vector in zip(batch, vectors, strict=True):
                if i in absent:
                    self.vectors[i], self.cut[i] = vector, samples[i].cut
            bar.update(len(absent.intersection(batch)))
            self.units += sum(samples[i].size for i in batch)
            bar.set_postfix_str(f"{self.units / max(bar.format_dict['elapsed'], 1e-9):,.0f} tokens/s", refresh=False)
        self.have[new] = True
        self.encoded += len(new)
        if self.shards is not None:
            self.shards.write([self.keys[i] for i in new], self.vectors[new], self.cut[new])

    def report(self, present: int, n: int) -> None:
        """Say in the log what was done and what the encoder did not see."""
        where = f" in {self.shards.folder}" if self.shards is not None else ""
        if self.encoded:
            log.info(
                "Encoded %d texts in %.1f s (%.0f texts/s, %.0f tokens/s); %d came from the store%s",
                self.encoded,
                self.seconds,
                self.encoded / self.seconds,
                self.units / self.seconds,
                len(self.keys) - self.encoded,
                where,
            )
        else:
            log.info("All %d distinct texts came from the store%s", len(self.keys), where)
        log.info("%d of %d rows have a vector; %d distinct texts", present, n, len(self.keys))
        truncated = int((self.cut > 0).sum())
        if truncated:
            log.warning(
                "%d of %d texts were longer than encoder_max_tokens; %d tokens were cut. encoder_overflow chunk_mean "
                "reads them all, head_tail keeps both ends",
                truncated,
                len(self.keys),
                int(self.cut.sum(dtype=np.int64)),
            )


class _Batches:
    """Forms batches and encodes them; smaller ones after running out of memory."""

    def __init__(self, encoder: Encoder[Any], batch_size: int) -> None:
        self.encoder = encoder
        self.encode = Halving(encoder.encode, batch_size, "encoder_batch_size", _too_long)

    def plan(self, order: Sequence[int], samples: dict[int, Sample]) -> Iterator[list[int]]:
        """Cut an order (longest first) into batches.

        A batch's length follows from its first member alone: without some of the batches the others stay the same.
        """
        at = 0
        while at < len(order):
            count = self.encode.limit
            if self.encoder.batch_cost is not None:
                count = max(1, min(count, self.encoder.batch_cost // max(samples[order[at]].size, 1)))
            yield list(order[at : at + count])
            at += count


def _too_long(sample: Sample) -> str:
    return (
        f"A text of {sample.size} tokens does not fit into memory alone. Lower encoder_max_tokens, take a smaller encoder, or set "
        "encoder_dtype to bfloat16."
    )


def _group(batches: Iterator[list[int]]) -> Iterator[list[list[int]]]:
    """Group whole batches into shards of at least ``SHARD_ROWS`` rows."""
    shard: list[list[int]] = []
    for batch in batches:
        shard.append(batch)
        if sum(map(len, shard)) >= SHARD_ROWS:
            yield shard
            shard = []
    if shard:
        yield shard


def _shares(shards: list[list[list[int]]], keys: Sequence[bytes]) -> list[list[list[int]]]:
    """Order the shards for this rank: its own first, then the others in reverse, so that two ranks overlap on at most one shard.

    A shard is a rank's by its first text and not by its place: a rank that starts late plans without the shards that are
    stored by then, and must not take the others' for its own.
    """
    rank, world = number_of_processes()
    own = [int.from_bytes(keys[shard[0][0]][:8], "big") % world == rank for shard in shards]
    return list(compress(shards, own)) + [
        s for s, mine in zip(reversed(shards), reversed(own), strict=True) if not mine
    ]
