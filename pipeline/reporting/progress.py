"""Progress of a run while the driver waits for it: bars on a terminal, plain lines in a log."""

import json
import threading
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from types import TracebackType
from typing import Protocol, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
from rich.markup import escape
from rich.progress_bar import ProgressBar
from rich.table import Table
from rich.text import Text

from pipeline.reporting.events import Event, EventTail
from pipeline.reporting.sentences import Narrator, sentence
from pipeline.reporting.state import RunState, headline, number
from pipeline.reporting.trackers import Tracker, TrackerGroup

POLL_SECONDS = 0.25
MOST_BARS = 12


@contextmanager
def follow(
    events_file: Path, console: Console, trackers: Sequence[Tracker] = (), as_json: Console | None = None
) -> Iterator[None]:
    """Show what is appended to `events_file` from now on, in a thread, until the block ends; trackers hear of it, too.

    The file may not exist yet, and its workers may be killed and start again. What was written
    before the block ended is shown before this returns, also when the block raises. On `as_json`, in
    place of `console`, every event is printed as it is written, for machines that read logs.
    """
    tail = EventTail(events_file)
    ended = threading.Event()
    screen: Screen = JsonLines(as_json) if as_json else Bars(console) if console.is_terminal else Lines(console)
    told = TrackerGroup(trackers, console)

    def look() -> None:
        events = tail.read()
        screen.show(events)
        told.tell(events)

    def watch() -> None:
        while not ended.wait(POLL_SECONDS):
            look()
        look()
        told.close()

    with screen:
        watcher = threading.Thread(target=watch, name="progress", daemon=True)
        watcher.start()
        try:
            yield
        finally:
            ended.set()
            watcher.join()


class Screen(Protocol):
    def show(self, events: list[Event]) -> None: ...
    def __enter__(self) -> Self: ...
    def __exit__(
        self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None
    ) -> None: ...


class JsonLines:
    """Every event as one line of JSON."""

    def __init__(self, console: Console) -> None:
        self._console = console

    def show(self, events: list[Event]) -> None:
        for event in events:
            self._console.out(json.dumps(event, ensure_ascii=False), highlight=False)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass


class Lines:
    """The lines of a narrator, for logs."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._narrator = Narrator()

    def show(self, events: list[Event]) -> None:
        for line in filter(None, map(self._narrator.tell, events)):
            self._console.print(line, markup=False, highlight=False, soft_wrap=True)

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        pass


class Bars:
    """A bar per live trial, redrawn in place; stages and finished trials scroll by above them."""

    def __init__(self, console: Console) -> None:
        self._console = console
        self._state = RunState()
        self._live = Live(console=console, auto_refresh=False, transient=True)

    def show(self, events: list[Event]) -> None:
        for event in events:
            self._state.apply(event)
            line = sentence(event)
            if line and event["event"] != "eval":  # the bars show evaluations
                self._console.print(line, markup=False, highlight=False)
        self._live.update(bars(self._state), refresh=True)

    def __enter__(self) -> Self:
        self._live.start()
        return self

    def __exit__(self, kind: type[BaseException] | None, error: BaseException | None, at: TracebackType | None) -> None:
        self._live.stop()


def bars(state: RunState) -> RenderableType:
    """The picture of a run at one moment."""
    live = list(state.live.items())
    if not live:
        return Text(state.stage, style="dim")
    grid = Table.grid(padding=(0, 2))
    grid.add_column(max_width=32, no_wrap=True, overflow="ellipsis")
    for name, trial in live[:MOST_BARS]:
        grid.add_row(
            escape(name),
            ProgressBar(total=max(trial.max_steps, 1), completed=trial.step, width=24),
            f"{trial.step}/{trial.max_steps}" if trial.max_steps else str(trial.step),
            f"loss {number(trial.loss)}",
            f"dev {trial.metric} {number(trial.value)}" if trial.metric else "",
        )
    rest = [Text(f"and {len(live) - MOST_BARS} more", style="dim")] if len(live) > MOST_BARS else []
    return Group(Text(headline(state), style="bold"), grid, *rest)
