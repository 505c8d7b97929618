"""The state of a run according to its events so far."""

from collections.abc import Mapping
from dataclasses import dataclass, field

from pipeline.reporting.events import Event


@dataclass
class TrialProgress:
    """How far one trial is."""

    task: str
    max_steps: int
    step: int = 0
    loss: float | None = None
    metric: str | None = None
    """Name of the dev metric once there was an evaluation; `value` is the newest value."""
    value: float | None = None
    live: bool = False
    finished: bool = False
    status: str = ""
    """How it finished: tuned | stopped early | halved | no gain | not learned | failed."""
    reason: str | None = None


@dataclass
class RunState:
    """How far a run is: its stage, its step, and every trial."""

    stage: str = ""
    """The text of the newest stage, else its name."""
    stage_name: str = ""
    step: int = 0
    tokens_per_second: float = 0.0
    trials: dict[str, TrialProgress] = field(default_factory=dict)
    ended: bool = False
    """Whether it has run to its end; `version` is then the version that it published, None if it published none."""
    version: int | None = None
    exit: int | None = None
    stopped: str | None = None
    """Why it stopped before its end."""

    @property
    def live(self) -> dict[str, TrialProgress]:
        return {name: trial for name, trial in self.trials.items() if trial.live}

    @property
    def waiting(self) -> int:
        return sum(not trial.live and not trial.finished for trial in self.trials.values())

    def apply(self, event: Event) -> None:
        """Apply one event. An absent field leaves the value known before."""
        match event["event"]:
            case "launch":
                self._launch(event)
            case "begin":
                self.ended, self.stopped, self.version, self.exit = False, None, None, None
            case "stage":
                self.stage_name = str(event.get("name") or "")
                self.stage = str(event.get("text") or self.stage_name)
            case "resume":
                self._resume(event)
            case "step":
                self._step(event)
            case "eval" if trial := self.trials.get(event.get("trial", "")):
                self._evaluated(trial, event)
            case "finished" if trial := self.trials.get(event.get("trial", "")):
                self._finish(trial, event)
            case "end":
                self.ended, self.version, self.exit = True, event.get("version"), event.get("exit")
                self._judge(event.get("not_learned") or {})
                self._rest()
            case "stopped":
                self.stopped = str(event.get("reason") or "no reason was recorded")
                self._rest()

    def _judge(self, not_learned: Mapping[str, str | None]) -> None:
        """Mark trials as not learned, which shows only at the run's end, beside the task's constant answer."""
        for name, reason in not_learned.items():
            if trial := self.trials.get(name):
                trial.status, trial.reason = "not learned", reason

    def _rest(self) -> None:
        for trial in self.trials.values():
            trial.live = False

    def _launch(self, event: Event) -> None:
        """List the trials. Workers that start again send their checkpoint's progress when they resume.

        Until then, what was measured before stays shown.
        """
        before = self.trials
        self.trials = {}
        for launched in event.get("trials") or []:
            name = launched["trial"]
            trial = before.get(name, TrialProgress(launched.get("task", name), 0))
            trial.max_steps = int(launched.get("max_steps") or 0)
            trial.live = False
            self.trials[name] = trial

    def _resume(self, event: Event) -> None:
        self.step = int(event.get("step") or 0)
        kept = event.get("trials")
        if kept is None:
            return
        for name, trial in self.trials.items():
            there = kept.get(name, {})
            trial.step, trial.live, trial.finished = int(there.get("step") or 0), False, False
            trial.status, trial.reason = "", None
            if there.get("status"):
                self._finish(trial, there)

    def _evaluated(self, trial: TrialProgress, event: Event) -> None:
        step = int(event.get("step") or 0)
        if step == 0:  # the trial has just started, perhaps not for the first time
            trial.step, trial.finished, trial.status, trial.reason = 0, False, "", None
        trial.step = max(trial.step, step)
        # Not every step has an event, often not the last one; a trial is never ahead of the run.
        self.step = max(self.step, step)
        trial.metric, trial.value = event.get("metric"), event.get("value")

    def _finish(self, trial: TrialProgress, event: Event) -> None:
        trial.live, trial.finished = False, True
        trial.status, trial.reason = str(event.get("status") or ""), event.get("reason")

    def _step(self, event: Event) -> None:
        self.step = int(event.get("step") or 0)
        self.tokens_per_second = float(event.get("tokens_per_second") or 0.0)
        running = event.get("trials") or {}
        for name, trial in self.trials.items():
            trial.live = name in running
        for name, now in running.items():
            trial = self.trials.setdefault(name, TrialProgress(name, 0, live=True))
            trial.step, trial.loss = int(now.get("step") or 0), now.get("loss")
            trial.finished = False


def headline(state: RunState) -> str:
    """`step 40/100 · 3 live · 310 tokens/s`; the total is known once no trial waits."""
    live = state.live
    counts = f"{len(live)} live" + (f", {state.waiting} waiting" if state.waiting else "")
    step = f"step {state.step}"
    if live and not state.waiting:
        step += f"/{state.step + max(trial.max_steps - trial.step for trial in live.values())}"
    return f"{step} · {counts} · {state.tokens_per_second:.0f} tokens/s"


def number(value: float | None) -> str:
    """`0.87`; `–` for a value that was not measured or is not finite."""
    return "–" if value is None else f"{value:.2f}"
