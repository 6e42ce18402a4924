"""An encoder that loads in a thread of its own while the service answers what needs none."""

import threading
from collections.abc import Callable
from logging import getLogger
from typing import Generic, TypeVar

E = TypeVar("E")

log = getLogger(__name__)


class EncoderUnavailable(RuntimeError):  # noqa: N818
    """Texts, or pictures, cannot be encoded now; ``retry`` says whether waiting helps."""

    def __init__(self, message: str, retry: bool) -> None:
        super().__init__(message)
        self.retry = retry


class Encoding(Generic[E]):
    """The state of an encoder.

    Args:
        load: makes it; called once, in a thread. ``None``: there is none.
        reason: why there is none.
        name: what it is, for messages.

    Attributes:
        unnamed: the encoder that nobody has named, and what to do, for the log.
    """

    def __init__(self, load: Callable[[], E] | None, reason: str, name: str) -> None:
        self._load, self._name = load, name
        self._encoder: E | None = None
        self._failure: str | None = None if load is not None else reason
        self._ready = threading.Event()
        self.unnamed: str | None = None

    @property
    def state(self) -> str:
        """``none``, ``loading``, ``ready`` or ``failed``."""
        if self._load is None:
            return "none"
        if self._encoder is not None:
            return "ready"
        return "loading" if self._failure is None else "failed"

    def start(self, when_ready: Callable[[], object] | None = None) -> None:
        """Start to load; ``when_ready`` is called in the loading thread."""
        if self._load is None:
            return

        def load() -> None:
            assert self._load is not None
            try:
                self._encoder = self._load()
            except Exception as error:
                self._failure = f"The {self._name} could not be loaded; the service's log says why."
                log.error("The %s could not be loaded: %s", self._name, error)
            self._ready.set()
            if self._encoder is not None and when_ready is not None:
                when_ready()

        threading.Thread(target=load, name="encoder-loading", daemon=True).start()

    def wait(self, seconds: float) -> bool:
        """Wait until it is loaded or failed; whether it is loaded."""
        self._ready.wait(seconds)
        return self._encoder is not None

    def loaded(self) -> E:
        """Return the encoder.

        Raises:
            EncoderUnavailable: if it is not loaded.
        """
        if self._failure is not None:
            raise EncoderUnavailable(self._failure, retry=False)
        if self._encoder is None:
            raise EncoderUnavailable(f"The {self._name} is still loading.", retry=True)
        return self._encoder
