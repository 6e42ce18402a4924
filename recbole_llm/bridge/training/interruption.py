"""SIGTERM and Ctrl-C, kept from interrupting what must be whole."""

import signal
import threading
from collections.abc import Iterator
from contextlib import contextmanager
from types import FrameType, TracebackType
from typing import Any


class Interruption:
    """Turns SIGTERM into ``SystemExit`` and SIGINT into ``KeyboardInterrupt``, but not inside :meth:`held`.

    Between :meth:`postpone` and :meth:`allow` a first signal waits too; a second one ends the process at once.
    Does nothing outside the main thread, which alone receives signals.

    Attributes:
        waiting: whether a signal has come and waits.
    """

    def __init__(self) -> None:
        self._previous: dict[int, Any] = {}
        self._is_held = self._is_postponed = False
        self._waiting: int | None = None

    @property
    def waiting(self) -> bool:  # noqa: D102  # in the class's own docstring
        return self._waiting is not None

    def postpone(self) -> None:
        """Let a signal wait until :meth:`allow`."""
        self._is_postponed = True

    def allow(self) -> None:
        """Let signals take effect again, the one that waits first."""
        self._is_postponed = False
        self._end_if_waiting()

    def __enter__(self) -> "Interruption":
        if threading.current_thread() is threading.main_thread():
            for name in ("SIGTERM", "SIGINT"):
                number = getattr(signal, name, None)
                if number is not None:
                    self._previous[number] = signal.signal(number, self._receive)
        return self

    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, traceback: TracebackType | None
    ) -> None:
        for number, handler in self._previous.items():
            signal.signal(number, signal.SIG_DFL if handler is None else handler)
        self._previous.clear()
        self._is_postponed, self._waiting = False, None

    @contextmanager
    def held(self) -> Iterator[None]:
        """Open a block that a signal does not end; the signal takes effect afterwards."""
        self._is_held = True
        try:
            yield
        finally:
            self._is_held = False
        if not self._is_postponed:
            self._end_if_waiting()

    def _end_if_waiting(self) -> None:
        if self._waiting is not None:
            number, self._waiting = self._waiting, None
            self._end(number)

    def _receive(self, number: int, frame: FrameType | None) -> None:
        if self._is_held or (self._is_postponed and self._waiting is None):
            self._waiting = number
        else:
            self._end(number)

    @staticmethod
    def _end(number: int) -> None:
        if number == signal.SIGINT:
            raise KeyboardInterrupt
        raise SystemExit(128 + number)
