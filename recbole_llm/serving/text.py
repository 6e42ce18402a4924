"""Texts to vectors for requests: the encoder loads in a thread of its own, and texts are encoded in batches.

torch and transformers are imported here alone on the request's path, inside that thread.
"""

import asyncio
import shlex
import time
from collections import OrderedDict
from collections.abc import Callable, Sequence
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any, NamedTuple, Protocol

import numpy as np

from recbole_llm.content.encoder_settings import SETTINGS
from recbole_llm.export.manifest import ENCODER_FOLDER, SEARCH, Manifest
from recbole_llm.export.reader import Export
from recbole_llm.export.search_tables import plain
from recbole_llm.serving.batching import Batcher, DeadlineExceeded, QueueFull
from recbole_llm.serving.encoding import EncoderUnavailable, Encoding
from recbole_llm.serving.metrics import Metrics
from recbole_llm.serving.settings import Settings

MAX_BATCH = 32
CACHED_TEXTS = 4096

# for clients; the log has the name, which may be a folder
ENCODER_UNNAMED = (
    "This export does not hold its encoder, and the service was not told to load it: texts cannot be used until it is started "
    "with --encoder NAME. Its log says which."
)

log = getLogger(__name__)


class SentenceEncoder(Protocol):
    """Anything that turns texts into vectors."""

    @property
    def fingerprint(self) -> str:
        """Of everything that changes a vector."""

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode texts to ``[n, F]`` float32, with how many tokens of each were not read, ``[n]`` int64."""


class EncodedText(NamedTuple):
    """A text's vector ``[F]`` float32 and how many of its tokens the encoder did not read."""

    vector: np.ndarray
    cut: int


def encoder_refusal(manifest: Manifest, named: Sequence[str]) -> str | None:
    """Say why the encoder of an export must not be loaded, with the way out; ``None`` if it may be.

    Args:
        manifest: of the export, with an encoder.
        named: the encoders that the caller has named, folders or names on the hub. An export is a file that anybody may have
            written: what it names outside its folder is loaded only if the caller names an encoder too.
    """
    spec = manifest.encoder
    if spec is None or spec.bundled or named:
        return None
    return (
        f"The texts of this export need the encoder {spec.name!r}, which is not in its folder, and nothing is loaded because a "
        f"file names it. Name the encoder yourself with --encoder {shlex.quote(spec.name)} (or a folder that holds it), or "
        "export again with --bundle-encoder."
    )


class TransformerEncoder:
    """The encoder of an export, with its weights loaded.

    Args:
        folder: the export.
        manifest: its manifest, with an encoder.
        named: the encoders that the caller has named; needed where the export does not bundle its own.

    Raises:
        ValueError: if the caller has named none, it cannot be found, or gives other vectors than the model was trained on.
    """

    def __init__(self, folder: Path, manifest: Manifest, named: Sequence[str] = ()) -> None:
        import torch

        torch.set_num_threads(1)
        self._encoder: Any = _find(folder, manifest, named)
        self.fingerprint = self._encoder.fingerprint
        self.encode(["warm up"])
        _hold_weights(self._encoder)

    def encode(self, texts: Sequence[str]) -> tuple[np.ndarray, np.ndarray]:
        """Encode as :class:`SentenceEncoder` says; texts of like length share a forward pass."""
        import torch

        samples = self._encoder.prepare(list(texts))
        order = sorted(range(len(samples)), key=lambda at: samples[at].size)
        vectors = np.empty((len(samples), self._encoder.dim), np.float32)
        limit = self._encoder.batch_cost or 1 << 30
        start = 0
        with torch.inference_mode():
            while start < len(order):
                stop = start + 1
                while stop < len(order) and (stop + 1 - start) * samples[order[stop]].size <= limit:
                    stop += 1
                batch = order[start:stop]
                vectors[batch] = self._encoder.encode([samples[at] for at in batch]).float().cpu().numpy()
                start = stop
        return vectors, np.array([sample.cut for sample in samples], np.int64)


def vector_of_question(export: Export, text: str) -> np.ndarray:
    """Encode what is asked for, ``[F]`` float32, with the encoder of an export, which is loaded for it.

    Raises:
        ValueError: if the text is empty, or the model takes none; as :class:`TransformerEncoder`.
    """
    if not text.strip():
        raise ValueError("text is empty; say what is asked for.")
    space = None if export.search is None else export.search.space
    if export.manifest.encoder is None or (space is None and export.text_map is None):
        raise ValueError("text: this model has no encoder of texts, or no place for them; recommend by users or items.")
    vectors, _ = TransformerEncoder(export.folder, export.manifest, export.encoders).encode([plain(text)])
    vector: np.ndarray = vectors[0]
    return vector


def _hold_weights(encoder: Any) -> None:
    """Copy the weights into memory of the process.

    transformers maps their file, which may be cut off or written over.
    """
    import torch

    # the model was loaded in this mode, and a tensor of it that is given other data must get them in it too
    with torch.inference_mode():
        for part in vars(encoder).values():
            if isinstance(part, torch.nn.Module):
                for tensor in (*part.parameters(), *part.buffers()):
                    tensor.data = tensor.data.clone()


def _find(folder: Path, manifest: Manifest, named: Sequence[str]) -> Any:
    """Find the first allowed encoder with the fingerprint of the export's; no weights are loaded for that."""
    from recbole_llm.content.encoders.transformer import load_encoder

    spec = manifest.encoder
    assert spec is not None
    refusal = encoder_refusal(manifest, named)
    if refusal is not None:
        raise ValueError(refusal)
    # the folder beside the vectors was hashed with them; else the caller's names, the one that the export means first
    places = [str(folder / ENCODER_FOLDER)] if spec.bundled else sorted(named, key=lambda name: name != spec.name)
    failures = []
    for place in places:
        revision = spec.revision if place == spec.name and not spec.bundled else None
        try:
            # these names and no others: trust_remote_code comes from no file
            encoder = load_encoder(
                place, revision=revision, **{n: spec.settings[n] for n in SETTINGS if n in spec.settings}
            )
            if encoder.fingerprint == spec.fingerprint:
                return encoder
            failures.append(f"{place!r} is another one than the model was trained with")
        except (ValueError, TypeError, LookupError, AttributeError, OSError) as error:  # files of any form
            failures.append(str(error))
    raise ValueError(
        f"encoder {spec.name!r}: {'; '.join(failures)}. Install the one it was trained with, or export with --bundle-encoder."
    )


class TextEncoding(Encoding[SentenceEncoder]):
    """Encodes texts of requests, HTML entities replaced.

    Args:
        load: makes the encoder; called once, in a thread. ``None``: there is none.
        metrics: to count in.
        max_queue: most texts that wait.
        reason: why there is none.
    """

    def __init__(
        self,
        load: Callable[[], SentenceEncoder] | None,
        metrics: Metrics,
        max_queue: int = 64,
        reason: str = "This export names no encoder: texts cannot be used.",
    ) -> None:
        super().__init__(load, reason, "encoder")
        self._metrics = metrics
        self._cache: OrderedDict[str, EncodedText] = OrderedDict()
        self._batcher: Batcher[str, EncodedText] = Batcher(
            self._encode, max_batch=MAX_BATCH, max_queue=max_queue, name="encoder"
        )

    @property
    def fingerprint(self) -> str | None:
        """Of the loaded encoder."""
        return None if self._encoder is None else self._encoder.fingerprint

    def close(self) -> None:
        """Let the thread end."""
        self._batcher.close()

    def encode_now(self, texts: Sequence[str]) -> np.ndarray:
        """Encode texts to ``[n, F]`` in the calling thread, while an export is loaded.

        Raises:
            EncoderUnavailable: if it is not loaded.
        """
        encoder = self.loaded()
        texts = [plain(text) for text in texts]
        parts = [texts[at : at + MAX_BATCH] for at in range(0, len(texts), MAX_BATCH)]
        return np.concatenate([encoder.encode(part)[0] for part in parts])

    async def encode(self, texts: Sequence[str], seconds: float) -> list[EncodedText]:
        """Encode texts.

        Args:
            texts: any number.
            seconds: until the deadline.

        Raises:
            EncoderUnavailable: if there is no encoder (now).
            QueueFull: if too many texts wait.
            DeadlineExceeded: if the deadline passes.
        """
        self.loaded()
        known = {text: self._cache[text] for text in texts if text in self._cache}
        missing = list(dict.fromkeys(text for text in texts if text not in known))
        for first in range(0, len(missing), MAX_BATCH):  # a long list takes turns with other requests
            part = missing[first : first + MAX_BATCH]
            results = await asyncio.gather(
                *(self._batcher.submit(text, seconds) for text in part), return_exceptions=True
            )
            for text, result in zip(part, results, strict=True):
                if isinstance(result, BaseException):
                    raise result
                known[text] = result
        for text, found in known.items():
            self._cache[text] = found
            self._cache.move_to_end(text)
        while len(self._cache) > CACHED_TEXTS:
            self._cache.popitem(last=False)
        answers = [known[text] for text in texts]
        self._metrics.truncated_texts.add(sum(found.cut > 0 for found in answers))
        return answers

    async def vectors_for(
        self, manifest: Manifest, texts: Sequence[str], seconds: float
    ) -> dict[str, np.ndarray] | None:
        """Encode texts for an export, by text ``[F]`` float32.

        Args:
            manifest: of the export.
            texts: any number.
            seconds: until the deadline.

        Returns:
            ``None`` where this is another encoder than the export's, or cannot encode now.
        """
        wanted = None if manifest.encoder is None else manifest.encoder.fingerprint
        if self.state != "ready" or self.fingerprint != wanted:
            return None
        try:
            encoded = await self.encode(texts, seconds)
        except (EncoderUnavailable, QueueFull, DeadlineExceeded) as error:
            log.warning("%d changed texts cannot be encoded now: %r", len(texts), error)
            return None
        return {text: found.vector for text, found in zip(texts, encoded, strict=True)}

    def _encode(self, texts: list[str]) -> list[EncodedText]:
        assert self._encoder is not None
        started = time.perf_counter()
        vectors, cut = self._encoder.encode([plain(text) for text in texts])
        self._metrics.encode_seconds.observe(time.perf_counter() - started)
        return [EncodedText(vector, int(n)) for vector, n in zip(vectors, cut, strict=True)]


def text_encoding(
    folder: Path,
    manifest: Manifest,
    settings: Settings,
    metrics: Metrics,
    make_encoder: Callable[[Path, Manifest], SentenceEncoder] | None = None,
) -> TextEncoding:
    """Choose the encoding of texts that a service of these settings has for an export.

    :meth:`TextEncoding.start` loads it.

    Args:
        folder: the export.
        manifest: its manifest.
        settings: of the service.
        metrics: to count in.
        make_encoder: takes the place of the export's own transformer.
    """
    for lacks, reason in (
        (
            manifest.text_map is None and SEARCH not in manifest.files and manifest.profile_text is None,
            "This export maps no texts.",
        ),
        (manifest.encoder is None, "This export names no encoder."),
        (not settings.encoder, "The service was started without its encoder."),
    ):
        if lacks:
            return TextEncoding(None, metrics, reason=reason)
    refusal = None if make_encoder else encoder_refusal(manifest, settings.encoders)
    if refusal is not None:
        log.warning("%s", refusal)
        encoding = TextEncoding(None, metrics, reason=ENCODER_UNNAMED)
        encoding.unnamed = refusal
        return encoding
    make = make_encoder or partial(TransformerEncoder, named=settings.encoders)
    return TextEncoding(partial(make, folder, manifest), metrics, settings.limits.encode_queue)
