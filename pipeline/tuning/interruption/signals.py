"""SIGTERM and Ctrl-C: what they do to the driver and to a rank. Imports nothing heavy."""

import signal
import threading
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from types import FrameType

_BOTH = (signal.SIGTERM, signal.SIGINT)
_told = threading.Event()


def sigterm_is_ctrl_c() -> None:
    """From here on SIGTERM is raised as KeyboardInterrupt in this process; in the main thread only."""
    if threading.current_thread() is threading.main_thread():
        signal.signal(signal.SIGTERM, signal.default_int_handler)


@contextmanager
def stop_by_signal(ask: Callable[[], None]) -> Iterator[None]:
    """The first SIGTERM or Ctrl-C calls `ask`, which asks the ranks to stop; the next one is a KeyboardInterrupt."""

    def first(number: int, frame: FrameType | None) -> None:
        for again in _BOTH:
            signal.signal(again, signal.default_int_handler)
        ask()

    with _handled_by(first):
        yield


@contextmanager
def held_back() -> Iterator[list[int]]:
    """Within it neither signal interrupts; those that come are added to the list."""
    came: list[int] = []
    with _handled_by(lambda number, frame: came.append(number)):
        yield came


@contextmanager
def _handled_by(handler: Callable[[int, FrameType | None], None]) -> Iterator[None]:
    if threading.current_thread() is not threading.main_thread():
        yield
        return
    before = {number: signal.signal(number, handler) for number in _BOTH}
    try:
        yield
    finally:
        for number, previous in before.items():
            signal.signal(number, previous)


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
