"""Signals of a running service."""

import signal
from logging import getLogger
from typing import Any

log = getLogger(__name__)


def reload_on_hangup(service: Any, loop: Any) -> None:
    """Load the newest export on SIGHUP, if this thread may handle signals."""

    def report(task: Any) -> None:
        if not task.cancelled() and task.exception() is not None:
            log.error("reload: %s", task.exception())

    def hangup() -> None:
        loop.create_task(service.reload()).add_done_callback(report)

    try:
        loop.add_signal_handler(signal.SIGHUP, hangup)
    except (ValueError, RuntimeError, NotImplementedError, AttributeError):  # a test's thread; Windows
        log.debug("SIGHUP is not handled in this thread, or not known to the system")
