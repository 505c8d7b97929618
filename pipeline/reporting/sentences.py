"""Events of a run as lines of text, for logs and for `promptbank runs tail`."""

from pipeline.reporting.events import Event
from pipeline.reporting.state import RunState, headline, number

SECONDS_BETWEEN_LINES = 10.0
MOST_LOSSES = 8  # in one plain line


class Narrator:
    """One line per event that matters; for steps, one line every ten seconds by the events' own clock."""

    def __init__(self) -> None:
        self.state = RunState()
        self._last = float("-inf")

    def tell(self, event: Event) -> str:
        """Apply the next event and return its line, empty when it needs none."""
        self.state.apply(event)
        now = float(event.get("time") or 0.0)
        if event["event"] == "step" and now - self._last >= SECONDS_BETWEEN_LINES:
            self._last = now
            return step_line(self.state)
        return sentence(event)


def sentence(event: Event) -> str:
    """The line for this event alone; empty for steps, and for events that this version does not know."""
    match event:
        case {"event": "launch", "trials": trials}:
            return f"launch: {len(trials)} trial{'s' if len(trials) != 1 else ''}"
        case {"event": "stage", "name": name, "text": text}:
            return f"{name}: {text}"
        case {"event": "resume", "step": step}:
            return f"resumed from the checkpoint of step {step}"
        case {"event": "eval", "trial": trial, "step": step, "metric": metric, "value": value}:
            loss = "" if metric == "loss" else f" · dev loss {number(event.get('loss'))}"
            return f"{trial} · step {step} · dev {metric} {number(value)}{loss}"
        case {"event": "finished", "trial": trial, "status": status}:
            return f"{trial} · {status}" + (f": {event['reason']}" if event.get("reason") else "")
        case {"event": "stopped", "reason": reason}:
            return f"stopped: {reason}"
        case {"event": "end"}:
            version = event.get("version")
            return "ended: nothing was published" if version is None else f"ended: published version {version}"
        case _:
            return ""


def step_line(state: RunState) -> str:
    """`step 40/100 · 3 live · 310 tokens/s · loss sst2 0.71 trec 1.92`"""
    live = list(state.live.items())
    losses = " ".join(f"{name} {number(trial.loss)}" for name, trial in live[:MOST_LOSSES])
    more = f" and {len(live) - MOST_LOSSES} more" if len(live) > MOST_LOSSES else ""
    return headline(state) + (f" · loss {losses}{more}" if losses else "")
