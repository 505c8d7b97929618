"""Follows an alias in the background: a new version is swapped in whole, or not at all."""

import logging
import threading
from collections.abc import Callable
from dataclasses import dataclass
from types import TracebackType

from pipeline.errors import BankError, StorageError

_log = logging.getLogger(__name__)


@dataclass(frozen=True)
class WatchEvent:
    """A new version is served, or reading the bank began to fail, or works again."""

    version: int
    """The version that is served now."""
    previous: int
    error: Exception | None
    """Why no new version is served; the previous one is served on."""


class Watcher:
    """Calls `refresh` every `every` seconds in a thread of its own until it is stopped.

    `on_event` is called in that thread: for each new version, and when failure begins, changes or ends.
    """

    def __init__(self, refresh: Callable[[], int], seen: int, every: float, on_event: Callable[[WatchEvent], None]):
        self._refresh = refresh
        self._every = every
        self._on_event = on_event
        self._stopped = threading.Event()
        self._served = seen
        self._failure: str | None = None
        self._thread = threading.Thread(target=self._run, name="prompt-bank-watch", daemon=True)
        self._thread.start()

    def stop(self) -> None:
        """End the thread, after the refresh that is under way."""
        self._stopped.set()
        if self._thread is not threading.current_thread():
            self._thread.join()

    def __enter__(self) -> "Watcher":
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self.stop()

    def _run(self) -> None:
        while not self._stopped.wait(self._every):
            self._refresh_once()

    def _refresh_once(self) -> None:
        try:
            version = self._refresh()
        except Exception as error:  # any exception: a thread that ended silently would never refresh again
            if not isinstance(error, BankError | StorageError):
                _log.exception("the prompt bank's watcher failed, and goes on")
            if str(error) != self._failure:
                self._failure = str(error)
                self._notify(WatchEvent(self._served, self._served, error))
            return
        if version != self._served or self._failure is not None:
            event = WatchEvent(version, self._served, None)
            self._served, self._failure = version, None
            self._notify(event)

    def _notify(self, event: WatchEvent) -> None:
        try:
            self._on_event(event)
        except Exception:  # the callback belongs to the service: its defects must not end the watcher
            _log.exception("the callback of the prompt bank's watch failed")
