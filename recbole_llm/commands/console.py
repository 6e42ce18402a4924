"""What ``recbole-llm run`` shows while it runs: a line a stage with a bar, what the content of items is, and warnings."""

import logging
import re
import sys
import time
from typing import Any, TextIO

from recbole_llm.bridge.watched_run import COLOURS, epoch_of

WIDTH = 20  # of the bar
SHOWN = 160  # characters of a line about content: the first text may be long
NAME = 26  # of a stage's name
SECONDS_BETWEEN = 0.2  # two drawings of a bar


class Console(logging.Handler):
    """Shows the stages of a run.

    On a terminal the line of the current stage is drawn anew as it goes on. Elsewhere a line appears when a stage ends.

    Args:
        epochs: at most so many epochs are trained.
        stream: where lines go; standard error by default.
    """

    def __init__(self, epochs: int, stream: TextIO | None = None) -> None:
        super().__init__(logging.INFO)
        self._epochs, self._stream = max(int(epochs), 1), stream or sys.stderr
        self._live = self._stream.isatty()
        self._stage: str | None = None
        self._started = self._drawn = time.monotonic()
        self._epoch = self._trials = 0

    def emit(self, record: logging.LogRecord) -> None:
        """Draw what a record says of the run's progress, or its text where it is a warning."""
        if hasattr(record, "stage"):
            if hasattr(record, "seconds"):
                self.end(record.stage, record.seconds)
            else:
                self.begin(record.stage)
        elif (epoch := epoch_of(record)) is not None:
            if self._stage is None:  # a model of RecBole's, which has no stages
                self.begin("training")
            self._epoch = epoch[0] + 1
            self._draw()
        elif hasattr(record, "trial"):
            self._trials += 1
            self._draw()
        elif hasattr(record, "content"):
            text = record.getMessage()
            self._line(f"  {text if len(text) <= SHOWN else f'{text[:SHOWN]} ...'}")
        elif record.levelno >= logging.WARNING and record.name != "py.warnings":
            self._line(COLOURS.sub("", record.getMessage()))

    def begin(self, name: str) -> None:
        """Begin a stage; one that still runs ends."""
        self.finish()
        self._stage, self._started = name, time.monotonic()
        self._epoch = self._trials = 0
        self._draw(at_once=True)

    def end(self, name: str, seconds: float) -> None:
        """End a stage that took ``seconds``."""
        if self._stage != name:
            return
        self._line(self._text(1.0, f"{seconds:.1f} s{self._note()}"))
        self._stage = None

    def finish(self) -> None:
        """End the stage that runs, if one does."""
        if self._stage is not None:
            self.end(self._stage, time.monotonic() - self._started)

    def close(self) -> None:
        """Leave the terminal at the beginning of a line."""
        self.finish()
        super().close()

    def _note(self) -> str:
        if self._epoch:
            return f", {self._epoch} epoch{'s' if self._epoch > 1 else ''}"
        return f", {self._trials} settings tried" if self._trials else ""

    def _text(self, share: float, after: str) -> str:
        full = round(WIDTH * min(share, 1.0))
        return f"  {self._stage or '':{NAME}} {'█' * full}{'░' * (WIDTH - full)}  {after}"

    def _draw(self, at_once: bool = False) -> None:
        now = time.monotonic()
        if not self._live or (not at_once and now - self._drawn < SECONDS_BETWEEN):
            return
        self._drawn = now
        share = self._epoch / self._epochs
        after = f"epoch {self._epoch} of at most {self._epochs}" if self._epoch else f"{self._trials or ''} ..."
        self._stream.write(f"\r\x1b[2K{self._text(share, after)}")
        self._stream.flush()

    def _line(self, text: str) -> None:
        start = "\r\x1b[2K" if self._live else ""
        self._stream.write(f"{start}{plain(text)}\n")
        self._stream.flush()


def plain(text: Any) -> str:
    """A text whose characters command no terminal."""
    return re.sub(r"[\x00-\x08\x0b-\x1f\x7f-\x9f]", " ", str(text))
