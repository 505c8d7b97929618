"""What the events of a run say so far, and the words for it."""

from dataclasses import dataclass, field

from pipeline.reporting.events import Event


@dataclass
class TrialState:
    task: str
    max_steps: int
    step: int = 0
    loss: float | None = None
    metric: str | None = None
    """Name of the dev metric, once there was an evaluation; `value` is its last."""
    value: float | None = None
    live: bool = False
    finished: bool = False


@dataclass
class RunState:
    stage: str = ""
    step: int = 0
    tokens_per_second: float = 0.0
    trials: dict[str, TrialState] = field(default_factory=dict)

    @property
    def live(self) -> dict[str, TrialState]:
        return {name: trial for name, trial in self.trials.items() if trial.live}

    @property
    def waiting(self) -> int:
        return sum(not trial.live and not trial.finished for trial in self.trials.values())

    def apply(self, event: Event) -> None:
        """Take one event in. A field that is absent leaves what was known before."""
        match event["event"]:
            case "launch":
                self._launch(event)
            case "stage":
                self.stage = str(event.get("text") or event.get("name") or "")
            case "resume":
                self.step = int(event.get("step") or 0)
            case "step":
                self._step(event)
            case "eval" if trial := self.trials.get(event.get("trial", "")):
                trial.step = max(trial.step, int(event.get("step") or 0))
                trial.metric, trial.value = event.get("metric"), event.get("value")
            case "finished" if trial := self.trials.get(event.get("trial", "")):
                trial.live, trial.finished = False, True

    def _launch(self, event: Event) -> None:
        """Workers that start again know of the trials only what their checkpoint says: so do we.
        What was measured stays shown until it is measured again."""
        before = self.trials
        self.trials = {}
        for launched in event.get("trials") or []:
            name = launched["trial"]
            trial = before.get(name, TrialState(launched.get("task", name), 0))
            trial.max_steps = int(launched.get("max_steps") or 0)
            trial.live = trial.finished = False
            self.trials[name] = trial

    def _step(self, event: Event) -> None:
        self.step = int(event.get("step") or 0)
        self.tokens_per_second = float(event.get("tokens_per_second") or 0.0)
        running = event.get("trials") or {}
        for name, trial in self.trials.items():
            trial.live = name in running
        for name, now in running.items():
            trial = self.trials.setdefault(name, TrialState(name, 0, live=True))
            trial.step, trial.loss = int(now.get("step") or 0), now.get("loss")


def headline(state: RunState) -> str:
    """`step 40/100 · 3 live · 310 tokens/s`; how many steps there will be is known once no trial waits."""
    live = state.live
    counts = f"{len(live)} live" + (f", {state.waiting} waiting" if state.waiting else "")
    step = f"step {state.step}"
    if live and not state.waiting:
        step += f"/{state.step + max(trial.max_steps - trial.step for trial in live.values())}"
    return f"{step} · {counts} · {state.tokens_per_second:.0f} tokens/s"


def number(value: float | None) -> str:
    """`0.87`; `–` for what was not measured or is not finite."""
    return "–" if value is None else f"{value:.2f}"
