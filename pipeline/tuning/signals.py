"""SIGTERM and Ctrl-C: what they do to the driver and to a rank. Imports nothing heavy."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_told = threading.Event()


def sigterm_is_ctrl_c() -> None:
    """From here on SIGTERM is raised as KeyboardInterrupt in this process; in the main thread only."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextmanager
def stop_by_signal(ask: Callable[[], None]) -> Iterator[None]:
    """The first SIGTERM or Ctrl-C calls `ask`, which asks the ranks to stop; the next one is a KeyboardInterrupt."""
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    numbers = (signal.SIGTERM, signal.SIGINT)

    def first(number: int, frame: FrameType | None) -> None:
        for again in numbers:
            signal.signal(again, signal.default_int_handler)
        ask()

    before = {number: signal.signal(number, first) for number in numbers}
    try:
        yield
    finally:
        for number, handler in before.items():
            signal.signal(number, handler)


def heed_sigterm() -> None:
    """In a rank's main thread: SIGTERM is noted down for `was_told_to_stop`; a second one ends the process."""
    ending = signal.getsignal(signal.SIGTERM)

    def note(number: int, frame: FrameType | None) -> None:
        signal.signal(signal.SIGTERM, ending)
        _told.set()

    signal.signal(signal.SIGTERM, note)


def was_told_to_stop() -> bool:
    """Whether this rank got a SIGTERM."""
    return _told.is_set()
