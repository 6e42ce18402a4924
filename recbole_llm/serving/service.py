"""The service without HTTP: one recommender that answers in batches, and changes that survive and go live at once.

Threads: the event loop; the scorer (reads and changes the catalogue); the log (commits); the encoder.
"""

import asyncio
import gc
import math
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any, TypeVar

import numpy as np

from recbole_llm.export.errors import ExportError
from recbole_llm.export.manifest import Manifest, read_manifest
from recbole_llm.retrieval.recommender import Recommender
from recbole_llm.retrieval.remote import SearchError
from recbole_llm.retrieval.servers import remote_retriever
from recbole_llm.serving.change_log import ChangeLogError
from recbole_llm.serving.change_rows import Change
from recbole_llm.serving.changes import Changes
from recbole_llm.serving.load_and_swap import Built, Encode, apply_all, build, find_export
from recbole_llm.serving.metrics import Gauge, Metrics
from recbole_llm.serving.pictures import PictureEncoding, picture_encoding
from recbole_llm.serving.reading import Reader
from recbole_llm.serving.settings import Settings
from recbole_llm.serving.text import SentenceEncoder, TextEncoding, text_encoding
from recbole_llm.serving.titles import TitleVectors
from recbole_llm.serving.watch import WatchedFiles

X = TypeVar("X")
WATCH_SECONDS = 1.0
LOADING_SWITCH_SECONDS = 0.001
ENCODER_SECONDS = 300.0  # until a new export's encoder must have loaded
NAMED_FILES = 5
LOOK_SECONDS = 0.02  # between two looks at the export's files, however often /health/ready is asked

log = getLogger(__name__)


class ReloadRunning(RuntimeError):  # noqa: N818
    """An export is being loaded already."""


@dataclass(frozen=True)
class Swap:
    """Result of a reload: export ids before and after, and the seconds it took."""

    before: str
    after: str
    seconds: float


class Service:
    """Answers and changes, for one event loop.

    Args:
        settings: how it is set up.
        make_encoder: makes the encoder of an export, whatever the export names; ``None`` for the export's own transformer,
            bundled or named by ``settings.encoders``.
    """

    def __init__(
        self, settings: Settings, make_encoder: Callable[[Path, Manifest], SentenceEncoder] | None = None
    ) -> None:
        self.settings = settings
        self.metrics = Metrics()
        self._make_encoder = make_encoder
        in_memory = settings.search == "memory"
        self._make_retriever = None if in_memory else remote_retriever(settings.search, settings.state)
        self._recommender: Recommender | None = None
        self._newest: Path | None = None  # export, when one was loaded last
        self._watched: WatchedFiles | None = None
        self._files_seen = (-math.inf, "")
        self._counted: tuple[Any, dict[str, int]] = (None, {})
        self._stale = 0
        self._reloading = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reload_seen = 0
        self._loading_thread = ThreadPoolExecutor(1, thread_name_prefix="loading")
        current, limits = lambda: self.recommender, settings.limits
        self.reader = Reader(limits, self.metrics, current, inline=in_memory)
        state = None if settings.read_only and settings.state is None else settings.state
        self.changes = Changes(
            state, current, self.reader.batcher, limits.request_seconds, partial(self._vectors_of, None)
        )
        self.text = TextEncoding(None, self.metrics)
        self.pictures = PictureEncoding(None, limits)
        self.titles = TitleVectors(current, lambda: self.text, self.reader)
        self.metrics.gauges.update(self._gauges())

    @property
    def recommender(self) -> Recommender:
        """The current one; its catalogue is changed on the scorer's thread only."""
        if self._recommender is None:
            raise RuntimeError("the service is not started")
        return self._recommender

    @property
    def export_id(self) -> str:
        """Of the current export."""
        return self.recommender.export.manifest.export_id

    # ------------------------------------------------------------------ life

    async def start(self) -> None:
        """Load the export, apply the log, begin to load the encoder and to look for changes.

        Raises:
            ExportError: if the export cannot be read.
            ChangeLogError: if the log cannot be opened.
            SearchError: if vectors cannot be copied to where they are searched.
        """
        await self.changes.open()
        folder = find_export(self.settings.export)
        await self._reach(read_manifest(folder))
        changes, (self._reload_seen, _) = await self.changes.all(), await self.changes.reload_asked()
        built = await self._in_loading(lambda: self._build(folder, changes, None))
        self._recommender, self._stale, self._watched = built.recommender, built.stale, built.watched
        self._newest = folder
        self.changes.set_faults(built.faults)
        loop = asyncio.get_running_loop()
        manifest = built.recommender.export.manifest
        self.text = text_encoding(folder, manifest, self.settings, self.metrics, self._make_encoder)
        self.text.start(lambda: loop.call_soon_threadsafe(self._encoder_ready))
        self.pictures = picture_encoding(manifest, self.settings)
        self.pictures.start()
        await self._in_loading(_freeze)
        self.keep(self._follow())
        self.keep(self.changes.verify())
        log.info("Serving export %s with %d items", self.export_id, self.recommender.catalog.live_count)

    async def _reach(self, manifest: Manifest) -> None:
        if not self.settings.read_only:
            await self.changes.reach(manifest.overlay_seq)

    def _encoder_ready(self) -> None:
        if self._stale:
            log.info("Encoding %d items of the log with this export's encoder", self._stale)
            self.keep(self._reload_here(None))
        else:
            self.keep(self.titles.learn_all())

    async def stop(self) -> None:
        """Let go of threads and the log."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.reader.batcher.close()
        self.text.close()
        self.pictures.close()
        if self._recommender is not None:
            self._recommender.close()
        await self.changes.close()
        self._loading_thread.shutdown(wait=False)

    def keep(self, work: Any) -> None:
        """Run a coroutine until the service stops."""
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    async def _in_loading(self, function: Callable[[], X]) -> X:
        return await asyncio.get_running_loop().run_in_executor(self._loading_thread, function)

    # ------------------------------------------------------------------ what is the matter

    async def problems(self) -> list[str]:
        """Say why not every route answers, in sentences; empty if every one does."""
        found = []
        files = await self._changed_files()
        if files:
            found.append(files)
        if self.changes.problem is not None and not self.settings.read_only:
            found.append(f"The log of changes cannot be written: {self.changes.problem}")
        if self.text.state == "loading":
            found.append("The encoder of texts is still loading.")
        elif self.text.state == "failed":
            found.append("The encoder of texts could not be loaded; --no-encoder serves without it.")
        if self.pictures.state == "loading":
            found.append("The encoder of pictures is still loading.")
        elif self.pictures.state == "failed":
            found.append(
                "The encoder of pictures could not be loaded; without --image-encoder the service does without it."
            )
        return found

    async def _changed_files(self) -> str:
        """Tell what happened to the export's files.

        The check runs on a thread, where it may hang if a file server is gone.
        """
        watched, now = self._watched, time.monotonic()
        if watched is None:
            return ""
        if now - self._files_seen[0] >= LOOK_SECONDS:
            names = await asyncio.get_running_loop().run_in_executor(None, watched.changed)
            problem = ""
            if names:
                more = f" and {len(names) - NAMED_FILES} more" if len(names) > NAMED_FILES else ""
                problem = (
                    f"Files of the export changed after they were read: {', '.join(names[:NAMED_FILES])}{more}. An export is "
                    "immutable: put a new one beside it, and reload."
                )
            if problem and problem != self._files_seen[1]:
                log.error("%s", problem)
            if watched is self._watched:
                self._files_seen = (now, problem)
        return self._files_seen[1]

    async def _follow(self) -> None:
        """See what other processes wrote, exports that appear, and files that change."""
        next_look = time.monotonic() + WATCH_SECONDS
        said = ""
        while True:
            await asyncio.sleep(self.settings.poll_seconds)
            try:
                await self._changed_files()
                await self.changes.check()
                await self.changes.catch_up()
                number, name = await self.changes.reload_asked()
                if number > self._reload_seen:
                    if self._reloading.locked():  # what is being loaded may be another one: asked again next time
                        continue
                    self._reload_seen = number
                    await self._reload_here(name)
                elif self.settings.watch and time.monotonic() >= next_look:
                    next_look = time.monotonic() + WATCH_SECONDS
                    # what appears, and not what differs: an older one may be served that was asked for by name
                    if find_export(self.settings.export) != self._newest:
                        await self._reload_here(None)
                said = ""
            except (ChangeLogError, ExportError, SearchError, ReloadRunning) as error:
                if str(error) != said:  # not five times a second
                    log.warning("%s", error)
                said = str(error)
            except Exception:  # whatever it is, the next change must be seen
                log.exception("Following the log failed")

    # ------------------------------------------------------------------ another export

    async def reload(self, name: str | None = None) -> Swap:
        """Load an export and swap it in, here and then in the other processes on the same log; no request waits for it.

        Args:
            name: one of the exports of the folder that is served; ``None`` for the newest.

        Raises:
            ReloadRunning: if another one is being loaded.
            ExportError: if it cannot be served; the old one stays.
            ChangeLogError: if the log cannot be read.
            SearchError: if its vectors cannot be copied to where they are searched; the old one stays.
        """
        seen = self._reload_seen
        swap = await self._reload_here(name)
        number = await self.changes.ask_reload(name)
        if number == seen + 1:  # else another process has asked meanwhile: what both want is loaded again
            self._reload_seen = max(self._reload_seen, number)
        return swap

    async def _reload_here(self, name: str | None) -> Swap:
        if self._reloading.locked():
            raise ReloadRunning
        async with self._reloading:
            started, before = time.perf_counter(), self.export_id
            try:
                await self._load_and_swap(name)
            except (ExportError, ChangeLogError, SearchError):
                self.metrics.swaps.add(result="failed")
                raise
            self.metrics.swaps.add(result="ok")
            await self._in_loading(_freeze_young)
            swap = Swap(before, self.export_id, time.perf_counter() - started)
            log.info("Export %s replaced %s in %.2f s", swap.after, swap.before, swap.seconds)
            return swap

    async def _load_and_swap(self, name: str | None) -> None:
        newest = None if name is None else find_export(self.settings.export)
        changes = await self.changes.all()
        built, text, pictures = await self._in_loading(lambda: self._load(name, changes))
        old, new = self.recommender, built.recommender
        await self._reach(new.export.manifest)
        while True:
            # what the old one learns meanwhile, before the new one answers: a change that was seen stays seen
            late = await self.changes.in_own_vectors(
                new.export.manifest, await self.changes.after(new), partial(self._vectors_of, text)
            )
            apply_all(new, late, built.faults)
            if await self.reader.batcher.call(lambda: self._swap_in(built)):
                break
        self._newest = newest or new.export.folder
        old_text, old_pictures = self.text, self.pictures
        self.text, self.pictures = text, pictures  # at once: what is asked and written now is encoded for the new one
        old.close()
        self.changes.set_faults(built.faults)
        await self.changes.catch_up()
        if text is not old_text:
            old_text.close()
        if pictures is not old_pictures:
            old_pictures.close()
        if self.text.state == "ready":
            self.keep(self.titles.learn_all())

    def _load(self, name: str | None, changes: Sequence[Change]) -> tuple[Built, TextEncoding, PictureEncoding]:
        """Bring an export up to date, with the encoders of its texts and pictures; runs in the loading thread."""
        folder = find_export(self.settings.export, name)
        manifest, text = read_manifest(folder), self.text
        wanted = None if manifest.encoder is None else manifest.encoder.fingerprint
        if (
            wanted != self._encoder_wanted()
            or text.state == "failed"
            or (manifest.text_map is None and manifest.profile_text is None) != (text.state == "none")
        ):
            works = text.state == "ready"
            text = text_encoding(folder, manifest, self.settings, self.metrics, self._make_encoder)
            if works and text.unnamed is not None:  # texts that are answered now would not be after the swap
                raise ExportError(text.unnamed)
            text.start()
            if text.state != "none" and not text.wait(ENCODER_SECONDS):
                raise ExportError(f"The encoder of export {manifest.export_id} cannot be loaded; the log says why.")
        encode = text.encode_now if text.state == "ready" else None
        return self._build(folder, changes, encode), text, self._pictures_for(manifest)

    def _pictures_for(self, manifest: Manifest) -> PictureEncoding:
        """The encoding of pictures for an export: the one that is there, if it is the same."""
        now = self.recommender.export.manifest.pictures
        wanted = manifest.pictures
        same = (now is None) == (wanted is None) and (now is None or now.fingerprint == wanted.fingerprint)  # type: ignore[union-attr]
        if same and self.pictures.state != "failed":
            return self.pictures
        pictures = picture_encoding(manifest, self.settings)
        if self.pictures.state == "ready" and pictures.unnamed is not None:
            raise ExportError(pictures.unnamed)
        pictures.start()
        if pictures.state != "none" and not pictures.wait(ENCODER_SECONDS):
            raise ExportError(
                f"The encoder of pictures of export {manifest.export_id} cannot be loaded; the log says why."
            )
        return pictures

    def _build(self, folder: Path, changes: Sequence[Change], encode: Encode | None) -> Built:
        verify, mapped, make = self.settings.verify, self.settings.mapped, self._make_retriever
        with _giving_way():
            return build(folder, changes, encode, verify=verify, mapped=mapped, make_retriever=make)

    async def _vectors_of(
        self, text: TextEncoding | None, manifest: Manifest, texts: Sequence[str]
    ) -> dict[str, np.ndarray]:
        """Vectors of changed texts by an export's encoder, by default the one in use; what waits for it is counted."""
        found = await (text or self.text).vectors_for(manifest, texts, self.settings.limits.write_seconds)
        if found is None:
            self._stale += len(texts)
        return found or {}

    def _encoder_wanted(self) -> str | None:
        encoder = self.recommender.export.manifest.encoder
        return None if encoder is None else encoder.fingerprint

    def _swap_in(self, built: Built) -> bool:
        """Swap on the scorer's thread, while nothing reads the old recommender."""
        if built.recommender.overlay_seq < self.recommender.overlay_seq:
            return False
        self._recommender, self._stale, self._watched = built.recommender, built.stale, built.watched
        self._files_seen = (-math.inf, "")
        return True

    # ------------------------------------------------------------------ metrics

    def _counts(self) -> dict[str, int]:
        """Count items by kind, when the catalogue has changed, and not while it changes on the scorer's thread."""
        state = (self.export_id, self.recommender.catalog.version)
        if self._counted[0] != state:
            with suppress(ValueError, RuntimeError):  # arrays of two moments, or a dictionary that grew meanwhile
                self._counted = (state, self.recommender.catalog.counts())
        return self._counted[1]

    def _gauges(self) -> dict[str, Any]:
        def items() -> dict[tuple[tuple[str, str], ...], float]:
            if self._recommender is None:
                return {}
            return {(("kind", kind),): float(count) for kind, count in self._counts().items()}

        def coverage() -> float:
            counts = self._counts()
            return self.metrics.distinct_shown / max(counts.get("warm", 0) + counts.get("cold", 0), 1)

        def single(read: Callable[[], float]) -> Gauge:
            return Gauge(lambda: {(): read()} if self._recommender is not None else {})

        return {
            "items": ("Items by kind.", Gauge(items)),
            "overlay_seq": ("Last change applied.", single(lambda: self.recommender.overlay_seq)),
            "log_rows_skipped": ("Rows of the log that cannot be used.", single(lambda: len(self.changes.faults))),
            "log_writable": ("Whether changes can be written.", single(lambda: self.changes.problem is None)),
            "export_unchanged": (
                "Whether the export's files are as they were read.",
                single(lambda: not self._files_seen[1]),
            ),
            "queue_length": ("Requests that wait for the scorer.", single(lambda: self.reader.batcher.waiting)),
            "catalogue_coverage": (
                "Share of the live items in the last 10,000 answers.",
                single(coverage),
            ),
        }


@contextmanager
def _giving_way() -> Iterator[None]:
    """Let requests run during a load: they get the interpreter after a millisecond, not five, and no collection runs."""
    interval, collects = sys.getswitchinterval(), gc.isenabled()
    sys.setswitchinterval(LOADING_SWITCH_SECONDS)
    gc.disable()
    try:
        yield
    finally:
        if collects:
            gc.enable()
        sys.setswitchinterval(interval)


def _freeze() -> None:
    """Take what was loaded out of the garbage collector's sight: a full collection of it stalls every request."""
    gc.collect()
    gc.freeze()


def _freeze_young() -> None:
    """Freeze while requests are answered: nothing of an export refers back to it, so the old one is gone already."""
    gc.collect(1)
    gc.freeze()
