"""The log of changes as a service uses it: written, followed, watched over."""

import asyncio
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from functools import partial
from logging import getLogger
from typing import Any, TypeVar

import numpy as np

from recbole_llm.export.manifest import Manifest
from recbole_llm.retrieval.recommender import Recommender
from recbole_llm.serving.batching import Batcher
from recbole_llm.serving.bodies import Interrupted, in_time
from recbole_llm.serving.change_log import ChangeLog, ChangeLogError, LogLostError
from recbole_llm.serving.change_rows import Change, Delete, Put
from recbole_llm.serving.load_and_swap import apply_all, encoded_anew, foreign_of
from recbole_llm.serving.open_log import open_change_log

X = TypeVar("X")
Encode = Callable[[Manifest, Sequence[str]], Awaitable[Mapping[str, np.ndarray]]]
"""An export's manifest and texts -> vectors by text, of those that can be encoded."""
VERIFY_SECONDS = 10.0  # between two looks at all that is stored, and a hundred times as long as one takes

log = getLogger(__name__)


class NotYetApplied(RuntimeError):  # noqa: N818
    """This process has not yet seen the change that the caller insists on."""


class NoSuchChange(ValueError):  # noqa: N818
    """The log does not hold the change that the caller insists on."""


class Changes:
    """Changes to the catalogue of one service, for one event loop.

    Args:
        state: of :func:`open_change_log`.
        recommender: the current one.
        batcher: on whose thread changes are applied.
        seconds: until a change of the log must be applied here.
        encode: for changes whose vectors another process made with another encoder.

    Attributes:
        faults: ids of rows of the log that cannot be read or applied, and why; they are skipped.
        problem: why the log cannot be written; ``None`` if it can.
    """

    def __init__(
        self,
        state: str | None,
        recommender: Callable[[], Recommender],
        batcher: Batcher[Any, Any],
        seconds: float,
        encode: Encode,
    ) -> None:
        self._state, self._recommender, self._batcher, self._seconds = state, recommender, batcher, seconds
        self._encode = encode
        self._open_log: ChangeLog | None = None
        self._thread = ThreadPoolExecutor(1, thread_name_prefix="log")
        self._waiting: list[tuple[int, asyncio.Future[None]]] = []
        self._asking: asyncio.Task[int] | None = None
        self._damage: str | None = None
        self.problem: str | None = None
        self.faults: dict[str, str] = {}

    async def open(self) -> None:
        """Open the log.

        Raises:
            ChangeLogError: if it cannot be opened, or is damaged.
        """
        self._open_log = await self._in_log(lambda: open_change_log(self._state))
        await self._in_log(self._log.verify)

    async def close(self) -> None:
        """Let go of the log and its thread."""
        if self._open_log is not None:
            await self._in_log(self._open_log.close)
        self._thread.shutdown(wait=False)

    @property
    def _log(self) -> ChangeLog:
        assert self._open_log is not None
        return self._open_log

    async def _in_log(self, function: Callable[[], X]) -> X:
        return await asyncio.get_running_loop().run_in_executor(self._thread, function)

    # ------------------------------------------------------------------ writing

    async def write(self, changes: Sequence[Put | Delete]) -> list[int]:
        """Commit changes and apply them here; on return they survive a kill and the next answer knows them.

        Returns:
            The seq of each.

        Raises:
            ChangeLogError: if they could not be committed: nothing was changed.
            NotYetApplied: if they were, and the log could not be read afterwards: they are applied when it can be.
        """
        if self._damage is not None:
            raise ChangeLogError(self._damage)
        applied = self._recommender().overlay_seq
        try:
            seqs = await self._in_log(lambda: self._log.write(changes, applied))
        except LogLostError as error:
            self.note(str(error))
            raise
        try:
            await self.catch_up()
        except ChangeLogError as error:
            self.note(str(error))
            raise NotYetApplied from error
        return seqs

    async def knows(self, ids: Sequence[str]) -> set[str]:
        """Return those of the ids that the catalogue has or the log ever had."""
        row_of = self._recommender().catalog.row_of
        known = {item_id for item_id in ids if item_id in row_of}
        rest = [item_id for item_id in ids if item_id not in known]
        return known | (await self._in_log(lambda: self._log.knows(rest)) if rest else set())

    # ------------------------------------------------------------------ following

    async def all(self) -> list[Change]:
        """Read the whole log, ascending."""
        return await self._in_log(lambda: self._log.since(0))

    async def reach(self, seq: int) -> None:
        """Let the next change come after ``seq``, what an export's training data held; else a restart would leave it out."""
        if seq > await self._in_log(self._log.last_seq):
            log.warning(
                "The export holds changes up to %d of another log than this one: the next ones come after it", seq
            )
            await self._in_log(lambda: self._log.reach(seq))

    async def after(self, recommender: Recommender) -> list[Change]:
        """Read what a recommender does not know yet, ascending."""
        return await self._in_log(lambda: self._log.since(recommender.overlay_seq))

    async def catch_up(self) -> None:
        """Apply what was written, here or elsewhere, up to now."""
        while True:
            recommender = self._recommender()
            changes = await self.in_own_vectors(recommender.export.manifest, await self.after(recommender))
            if not changes or await self._batcher.call(partial(self._apply, recommender, changes)):
                self.applied()
                return

    async def in_own_vectors(
        self, manifest: Manifest, changes: list[Change], encode: Encode | None = None
    ) -> list[Change]:
        """Return changes with vectors of an export's encoder where another one made those of the log.

        Args:
            manifest: of the export.
            changes: ascending.
            encode: ``None`` for that of the export that is served.
        """
        foreign = foreign_of(changes, manifest)
        if not foreign:
            return changes
        vectors = await (encode or self._encode)(manifest, [c.text for c in foreign if c.text])
        return encoded_anew(changes, manifest, vectors)

    def _apply(self, recommender: Recommender, changes: Sequence[Change]) -> bool:
        """Apply changes on the scorer's thread, unless another export was swapped in, which stands at another seq."""
        if recommender is not self._recommender():
            return False
        faults = dict(self.faults)
        apply_all(recommender, changes, faults)
        self.set_faults(faults)
        return True

    def set_faults(self, faults: dict[str, str]) -> None:
        """Take over which rows cannot be used, and name the new ones in the log."""
        for item_id, fault in faults.items():
            if self.faults.get(item_id) != fault:
                log.error("The log's row of item %.64r is skipped: %s", item_id, fault)
        self.faults = faults

    def applied(self) -> None:
        """Wake those who waited for what the current recommender knows now."""
        seq = self._recommender().overlay_seq
        for wanted, future in self._waiting:
            if wanted <= seq and not future.done():
                future.set_result(None)
        self._waiting = [one for one in self._waiting if not one[1].done()]

    async def wait_for(self, seq: int) -> None:
        """Wait until change ``seq`` is applied here.

        Raises:
            NoSuchChange: at once, if the log does not hold it.
            NotYetApplied: if it is not applied in time.
            ChangeLogError: if the log cannot be read.
        """
        if self._recommender().overlay_seq >= seq:
            return
        # the first question may have been asked before the change was written; the second was not
        if seq > await self._last_seq() and seq > await self._last_seq():
            raise NoSuchChange("X-Min-Seq is beyond the last change of the log.")
        if self._recommender().overlay_seq >= seq:
            return
        future: asyncio.Future[None] = asyncio.get_running_loop().create_future()
        self._waiting.append((seq, future))
        try:
            await in_time(_until(future), self._seconds)
        except Interrupted:
            raise NotYetApplied from None
        finally:
            future.cancel()

    async def _last_seq(self) -> int:
        """Return the log's last change; simultaneous callers share one read."""
        if self._asking is None or self._asking.done():
            self._asking = asyncio.get_running_loop().create_task(self._in_log(self._log.last_seq))
        return await asyncio.shield(self._asking)

    # ------------------------------------------------------------------ reloads

    async def reload_asked(self) -> tuple[int, str | None]:
        """Ask the log as :meth:`ChangeLog.reload_asked` does."""
        return await self._in_log(self._log.reload_asked)

    async def ask_reload(self, name: str | None) -> int:
        """Write to the log as :meth:`ChangeLog.ask_reload` does."""
        return await self._in_log(lambda: self._log.ask_reload(name))

    # ------------------------------------------------------------------ watching over

    async def check(self) -> None:
        """Notice a log that was removed, replaced or taken back; what is wrong is said in :attr:`problem`."""
        try:
            applied = self._recommender().overlay_seq
            last = await self._in_log(self._checked)
            if last < applied:
                raise ChangeLogError(
                    f"the log ends at change {last}, and change {applied} is applied: it is another log."
                )
        except ChangeLogError as error:
            self.note(str(error))
        else:
            self.note(self._damage)

    def _checked(self) -> int:
        self._log.check()
        return self._log.last_seq()

    async def verify(self) -> None:
        """Read all that is stored again and again; runs until it is cancelled."""
        while True:
            started = time.monotonic()
            try:
                await asyncio.get_running_loop().run_in_executor(None, self._log.verify)
                self._damage = None
            except ChangeLogError as error:
                self._damage = str(error)
                self.note(self._damage)
            await asyncio.sleep(max(VERIFY_SECONDS, 100 * (time.monotonic() - started)))

    def note(self, problem: str | None) -> None:
        """Keep what is wrong with the log, and say it when it changes."""
        if problem != self.problem:
            if problem is None:
                log.warning("The log of changes is in order again")
            else:
                log.error("The log of changes: %s", problem)
        self.problem = problem


async def _until(future: Awaitable[None]) -> None:
    await future
