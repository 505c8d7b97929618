"""What the page takes from a run's folder: the curve of a trial, time and memory by stage."""

from collections.abc import Iterable
from dataclasses import replace
from pathlib import Path

from pipeline.errors import StorageError
from pipeline.reporting.events import Event, finite
from pipeline.reporting.html.night import Curve, Fault, Stage
from pipeline.reporting.series import read_series

_STARTING = "starting ranks"


def read_curve(run_folder: Path, trial: str) -> Curve:
    """The curve in `metrics/<trial>.jsonl`; empty where the trial never started. Raises: StorageError."""
    path = run_folder / "metrics" / f"{trial}.jsonl"
    losses: list[tuple[int, float | None]] = []
    evaluations: list[tuple[int, float | None]] = []
    try:
        points = read_series(path)
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error.strerror}") from error
    for point in points:
        if "dev_metric" in point:
            evaluations.append((point["step"], finite(point["dev_metric"])))
        else:
            losses.append((point["step"], finite(point["loss"])))
    return Curve(trial, losses, evaluations)


def stages_of(events: Iterable[Event]) -> list[Stage]:
    """Seconds and memory of each stage, over all starts of the run; the time between two starts counts for no stage."""
    found: dict[str, Stage] = {}
    current, last = "", 0.0
    for event in events:
        now = float(event.get("time") or last)
        if current and event["event"] != "begin":
            found[current] = replace(found[current], seconds=found[current].seconds + max(0.0, now - last))
        last = now
        if event["event"] in ("begin", "launch", "stage"):
            current = {"begin": "corpus", "launch": _STARTING}.get(event["event"]) or str(event.get("name") or "")
            found.setdefault(current, Stage(current, 0.0))
        elif event["event"] == "memory" and event.get("stage") in found:
            stage = found[event["stage"]]
            found[stage.name] = replace(stage, peak_bytes=max(stage.peak_bytes or 0, int(event.get("peak_bytes") or 0)))
    return list(found.values())


def faults_of(events: Iterable[Event]) -> list[Fault]:
    """Ranks that were lost, and starts that did not come to an end, as far as the events show them."""
    found: list[Fault] = []
    stepped = launched = False
    for event in events:
        time = float(event.get("time") or 0.0)
        match event:
            case {"event": "launch"}:
                launched = True
            case {"event": "step"}:
                stepped, launched = True, False
            case {"event": "resume", "step": step} if stepped:
                what = "the run was started again" if launched else "ranks were lost and started again"
                found.append(Fault(time, f"{what}, from the checkpoint of step {step}"))
                launched = False
            case {"event": "stopped", "reason": reason}:
                found.append(Fault(time, f"stopped: {reason}"))
    return found
