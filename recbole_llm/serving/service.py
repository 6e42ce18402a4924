"""The service without HTTP: one recommender that answers in batches, and changes that survive and go live at once.

Threads: the event loop; the scorer (reads and changes the catalogue); the log (commits); the encoder.
"""

import asyncio
import gc
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from concurrent.futures import ThreadPoolExecutor
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from logging import getLogger
from pathlib import Path
from typing import Any, TypeVar

from recbole_llm.export.errors import ExportError
from recbole_llm.export.manifest import Manifest, read_manifest
from recbole_llm.retrieval.recommender import Recommendation, Recommender, Request
from recbole_llm.retrieval.remote import SearchError
from recbole_llm.retrieval.servers import remote_retriever
from recbole_llm.serving.batching import Batcher
from recbole_llm.serving.change_log import Change, Delete, Overlay, OverlayError, Put
from recbole_llm.serving.load_and_swap import Built, Encode, apply_all, build, find_export
from recbole_llm.serving.metrics import Gauge, Metrics
from recbole_llm.serving.open_log import open_overlay
from recbole_llm.serving.settings import Settings
from recbole_llm.serving.text import SentenceEncoder, TextEncoding, text_encoding

X = TypeVar("X")
WATCH_SECONDS = 1.0
INLINE_PRODUCTS = 50_000_000  # 2 ms of a core, 32 requests to 10,000 items of 128 dimensions: the loop waits no longer
LOADING_SWITCH_SECONDS = 0.001
ENCODER_SECONDS = 300.0  # until a new export's encoder must have loaded

log = getLogger(__name__)


class ReloadRunning(RuntimeError):  # noqa: N818
    """An export is being loaded already."""


class NotYetApplied(RuntimeError):  # noqa: N818
    """This process has not yet seen the change that the caller insists on."""


@dataclass(frozen=True)
class Versioned:
    """An answer with the state it was made from.

    Attributes:
        value: the answer.
        model: ``export_id``.
        overlay_seq: last change applied.
    """

    value: Any
    model: str
    overlay_seq: int


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
        self._overlay: Overlay | None = None
        self._stale = 0
        self._reloading = asyncio.Lock()
        self._tasks: set[asyncio.Task[Any]] = set()
        self._reload_seen = 0
        self._log_thread = ThreadPoolExecutor(1, thread_name_prefix="log")
        self._loading_thread = ThreadPoolExecutor(1, thread_name_prefix="loading")
        limits = settings.limits
        self.batcher: Batcher[Request | Callable[[Recommender], Any], Versioned] = Batcher(
            self._score,
            max_batch=limits.max_batch,
            max_queue=limits.queue,
            inline=self._is_small,
            observe=self.metrics.batch,
            name="scorer",
        )
        self.text = TextEncoding(None, self.metrics)
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
            OverlayError: if the log cannot be opened.
            SearchError: if vectors cannot be copied to where they are searched.
        """
        state = None if self.settings.read_only and self.settings.state is None else self.settings.state
        self._overlay = await self._in_log(lambda: open_overlay(state))
        changes, (self._reload_seen, _) = await self._in_log(lambda: (self._log.since(0), self._log.reload_asked()))
        folder = find_export(self.settings.export)
        built = await self._in_loading(lambda: self._build(folder, changes, None))
        self._recommender, self._stale = built.recommender, built.stale
        loop = asyncio.get_running_loop()
        manifest = built.recommender.export.manifest
        self.text = text_encoding(folder, manifest, self.settings, self.metrics, self._make_encoder)
        self.text.start(lambda: loop.call_soon_threadsafe(self._encoder_ready))
        await self._in_loading(_freeze)
        self._keep(self._follow())
        log.info("Serving export %s with %d items", self.export_id, self.recommender.catalog.live_count)

    def _encoder_ready(self) -> None:
        if self._stale:
            log.info("Encoding %d items of the log with this export's encoder", self._stale)
            self._keep(self._reload_here(None))

    async def stop(self) -> None:
        """Let go of threads and the log."""
        for task in self._tasks:
            task.cancel()
        await asyncio.gather(*self._tasks, return_exceptions=True)
        self.batcher.close()
        self.text.close()
        if self._recommender is not None:
            self._recommender.close()
        if self._overlay is not None:
            await self._in_log(self._overlay.close)
        self._log_thread.shutdown(wait=False)
        self._loading_thread.shutdown(wait=False)

    def _keep(self, work: Any) -> None:
        task = asyncio.get_running_loop().create_task(work)
        self._tasks.add(task)
        task.add_done_callback(self._tasks.discard)

    @property
    def _log(self) -> Overlay:
        assert self._overlay is not None
        return self._overlay

    async def _in_log(self, function: Callable[[], X]) -> X:
        return await asyncio.get_running_loop().run_in_executor(self._log_thread, function)

    async def _in_loading(self, function: Callable[[], X]) -> X:
        return await asyncio.get_running_loop().run_in_executor(self._loading_thread, function)

    # ------------------------------------------------------------------ answers

    def _score(self, jobs: list[Any]) -> list[Any]:
        """A batch on the scorer's thread; one recommender answers all of it."""
        recommender = self.recommender
        model, seq = recommender.export.manifest.export_id, recommender.overlay_seq
        requests = [job for job in jobs if isinstance(job, Request)]
        answers = iter(recommender.recommend_many(requests)) if requests else iter(())
        results: list[Any] = []
        for job in jobs:
            try:
                value = next(answers) if isinstance(job, Request) else job(recommender)
            except (LookupError, ValueError) as error:
                value = error
            results.append(value if isinstance(value, Exception) else Versioned(value, model, seq))
        return results

    def _is_small(self, jobs: list[Any]) -> bool:
        if self._make_retriever is not None or not all(type(job) is Request for job in jobs):
            return False
        catalog = self.recommender.catalog
        return len(jobs) * len(catalog) * catalog.export.manifest.dim <= INLINE_PRODUCTS

    async def recommend(self, request: Request) -> Versioned:
        """Answer a request; ``value`` is a :class:`Recommendation`.

        Raises:
            UnknownUserError, UnknownItemError, ValueError: as :meth:`Recommender.recommend`.
            QueueFull, DeadlineExceeded: as :meth:`Batcher.submit`.
        """
        answer = await self.batcher.submit(request, self.settings.limits.request_seconds)
        self._count(answer.value)
        return answer

    async def ask(self, job: Callable[[Recommender], Any]) -> Versioned:
        """Anything else that reads the catalogue, such as ``lambda r: r.similar("50")``; errors as :meth:`recommend`."""
        answer = await self.batcher.submit(job, self.settings.limits.request_seconds)
        if isinstance(answer.value, Recommendation):
            self._count(answer.value)
        return answer

    async def ask_many(self, requests: Sequence[Request]) -> Versioned:
        """Answer several requests from one state, in pieces that leave room for others.

        Returns:
            A list with a :class:`Recommendation` or its error for each.
        """
        size = self.settings.limits.max_batch
        seconds = self.settings.limits.request_seconds
        while True:
            answers: list[Any] = []
            states = []
            for at in range(0, max(len(requests), 1), size):
                part = await self.batcher.submit(partial(_answer_all, list(requests[at : at + size])), seconds)
                answers += part.value
                states.append(part)
            if all(state.model == states[0].model for state in states):  # else an export was swapped in between
                break
        for answer in answers:
            if isinstance(answer, Recommendation):
                self._count(answer)
        return Versioned(answers, states[-1].model, states[-1].overlay_seq)

    def _count(self, answer: Recommendation) -> None:
        self.metrics.answer(tuple(item.id for item in answer.items), sum(item.cold for item in answer.items))
        if answer.unknown:
            self.metrics.unknown_ids.add(len(answer.unknown))

    # ------------------------------------------------------------------ changes

    async def write(self, changes: Sequence[Put | Delete]) -> list[int]:
        """Commit changes and apply them here; on return they survive a kill and the next answer knows them.

        Returns:
            The seq of each.

        Raises:
            OverlayError: if they could not be committed: nothing was changed.
        """
        seqs = await self._in_log(lambda: self._log.write(changes))
        await self._catch_up()
        return seqs

    async def knows(self, ids: Sequence[str]) -> set[str]:
        """Those of the ids that the catalogue has or the log ever had."""
        row_of = self.recommender.catalog.row_of
        known = {item_id for item_id in ids if item_id in row_of}
        rest = [item_id for item_id in ids if item_id not in known]
        return known | (await self._in_log(lambda: self._log.knows(rest)) if rest else set())

    async def _catch_up(self) -> None:
        while True:
            recommender = self.recommender
            changes = await self._changes_for(recommender)
            if not changes or await self.batcher.call(partial(self._apply_live, recommender, changes)):
                return

    async def _changes_for(self, recommender: Recommender) -> list[Change]:
        return await self._in_log(lambda: self._log.since(recommender.overlay_seq))

    def _apply_live(self, recommender: Recommender, changes: Sequence[Change]) -> bool:
        """Apply on the scorer's thread, unless another export was swapped in, which stands at another seq."""
        if recommender is not self._recommender:
            return False
        apply_all(recommender, changes)
        return True

    async def wait_for(self, seq: int) -> None:
        """Wait until change ``seq`` is applied here, up to the deadline of a read.

        Raises:
            NotYetApplied: if it is not.
        """
        deadline = time.monotonic() + self.settings.limits.request_seconds
        while self.recommender.overlay_seq < seq:
            if time.monotonic() > deadline:
                raise NotYetApplied
            await asyncio.sleep(0.02)

    async def _follow(self) -> None:
        """See what other processes wrote, and exports that appear."""
        next_look = time.monotonic() + WATCH_SECONDS
        while True:
            await asyncio.sleep(self.settings.poll_seconds)
            try:
                await self._catch_up()
                number, name = await self._in_log(self._log.reload_asked)
                if number > self._reload_seen:
                    self._reload_seen = number
                    await self._reload_here(name)
                elif self.settings.watch and time.monotonic() >= next_look:
                    next_look = time.monotonic() + WATCH_SECONDS
                    if find_export(self.settings.export) != self.recommender.export.folder:
                        await self._reload_here(None)
            except (OverlayError, ExportError, SearchError, ReloadRunning) as error:
                log.warning("%s", error)

    # ------------------------------------------------------------------ another export

    async def reload(self, name: str | None = None) -> Swap:
        """Load an export and swap it in, here and then in the other processes on the same log; no request waits for it.

        Args:
            name: one of the exports of the folder that is served; ``None`` for the newest.

        Raises:
            ReloadRunning: if another one is being loaded.
            ExportError: if it cannot be served; the old one stays.
            OverlayError: if the log cannot be read.
            SearchError: if its vectors cannot be copied to where they are searched; the old one stays.
        """
        swap = await self._reload_here(name)
        number = await self._in_log(lambda: self._log.ask_reload(name))
        self._reload_seen = max(self._reload_seen, number)
        return swap

    async def _reload_here(self, name: str | None) -> Swap:
        if self._reloading.locked():
            raise ReloadRunning
        async with self._reloading:
            started, before = time.perf_counter(), self.export_id
            try:
                await self._load_and_swap(name)
            except (ExportError, OverlayError, SearchError):
                self.metrics.swaps.add(result="failed")
                raise
            self.metrics.swaps.add(result="ok")
            await self._in_loading(_freeze_young)
            swap = Swap(before, self.export_id, time.perf_counter() - started)
            log.info("Export %s replaced %s in %.2f s", swap.after, swap.before, swap.seconds)
            return swap

    async def _load_and_swap(self, name: str | None) -> None:
        changes = await self._in_log(lambda: self._log.since(0))
        built, text = await self._in_loading(lambda: self._load(name, changes))
        old, new = self.recommender, built.recommender
        while True:
            # what the old one learns meanwhile, before the new one answers: a change that was seen stays seen
            apply_all(new, await self._changes_for(new))
            if await self.batcher.call(lambda: self._swap_in(built)):
                break
        old.close()
        await self._catch_up()
        if text is not self.text:
            self.text.close()
            self.text = text

    def _load(self, name: str | None, changes: Sequence[Change]) -> tuple[Built, TextEncoding]:
        """An export brought up to date, and the encoder of its texts; in the loading thread."""
        folder = find_export(self.settings.export, name)
        manifest, text = read_manifest(folder), self.text
        wanted = None if manifest.encoder is None else manifest.encoder.fingerprint
        if (
            wanted != self._encoder_wanted()
            or text.state == "failed"
            or (manifest.text_map is None) != (text.state == "none")
        ):
            works = text.state == "ready"
            text = text_encoding(folder, manifest, self.settings, self.metrics, self._make_encoder)
            if works and text.unnamed is not None:  # texts that are answered now would not be after the swap
                raise ExportError(text.unnamed)
            text.start()
            if text.state != "none" and not text.wait(ENCODER_SECONDS):
                raise ExportError(f"The encoder of export {manifest.export_id} cannot be loaded; the log says why.")
        encode = text.encode_now if text.state == "ready" else None
        return self._build(folder, changes, encode), text

    def _build(self, folder: Path, changes: Sequence[Change], encode: Encode | None) -> Built:
        with _giving_way():
            return build(folder, changes, encode, verify=self.settings.verify, make_retriever=self._make_retriever)

    def _encoder_wanted(self) -> str | None:
        encoder = self.recommender.export.manifest.encoder
        return None if encoder is None else encoder.fingerprint

    def _swap_in(self, built: Built) -> bool:
        """On the scorer's thread, where the old one stands still."""
        if built.recommender.overlay_seq < self.recommender.overlay_seq:
            return False
        self._recommender, self._stale = built.recommender, built.stale
        return True

    # ------------------------------------------------------------------ metrics

    def _gauges(self) -> dict[str, Any]:
        def items() -> dict[tuple[tuple[str, str], ...], float]:
            if self._recommender is None:
                return {}
            return {(("kind", kind),): float(count) for kind, count in self._recommender.catalog.counts().items()}

        def single(read: Callable[[], float]) -> Gauge:
            return Gauge(lambda: {(): read()} if self._recommender is not None else {})

        return {
            "items": ("Items by kind.", Gauge(items)),
            "overlay_seq": ("Last change applied.", single(lambda: self.recommender.overlay_seq)),
            "queue_length": ("Requests that wait for the scorer.", single(lambda: self.batcher.waiting)),
            "catalogue_coverage": (
                "Share of the live items in the last 10,000 answers.",
                single(lambda: self.metrics.distinct_shown / max(self.recommender.catalog.live_count, 1)),
            ),
        }


def _answer_all(requests: list[Request], recommender: Recommender) -> list[Recommendation | Exception]:
    return recommender.recommend_many(requests)


@contextmanager
def _giving_way() -> Iterator[None]:
    """For a load beside requests: they get the interpreter after a millisecond, not five, and no collection runs."""
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
    """The same while requests are answered: nothing of an export refers back to it, so the old one is gone already."""
    gc.collect(1)
    gc.freeze()
