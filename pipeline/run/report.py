"""`report.html` in the folder of a run or a night, and what that of a run tells."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from pipeline.bank import BackboneId, PromptBank
from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.reporting.html import Curve, NightReport, PastVersion, TaskNight, Verdict, render
from pipeline.reporting.html.history import past_versions
from pipeline.reporting.html.run_files import faults_of, read_curve, stages_of
from pipeline.reporting.table import TrialResult
from pipeline.reporting.watched import read_events
from pipeline.run.bank import readable_bank
from pipeline.run.publishing import library_versions
from pipeline.run.results import NO_GAIN, TaskResult, result_of
from pipeline.settings import Settings
from pipeline.tuning.state import TrialState
from pipeline.whole_files import write_atomically


def write_report(folder: Path, report: Callable[[], NightReport], console: Console, whose: str) -> Path | None:
    """Write the page and say where it is; where that cannot be done, a warning is all."""
    path = folder / "report.html"
    try:
        write_atomically(path, render(report()).encode())
    except Exception as error:  # not even a defect of ours in making it changes how a run or a night has ended
        console.print(f"warning: the {whose}'s report was not written: {error}", markup=False, highlight=False)
        return None
    return path


def report_of(
    folder: Path,
    settings: Settings,
    identity: BackboneId,
    entries: Sequence[TaskResult],
    refused: Sequence[TrialResult],
    corpora: Mapping[str, TaskCorpus],
    version: int | None,
) -> NightReport:
    """Everything that the page shows, of a run that has come to its end. Raises: StorageError."""
    events = list(read_events(folder / "events.jsonl"))
    stages = stages_of(events)
    ranks = settings.cluster.num_workers
    held = sum(stage.seconds for stage in stages if stage.name in ("backbone", "tuning"))
    bank = readable_bank(settings.bank)
    past: dict[str, list[PastVersion]] = {}
    if bank is not None:
        past = past_versions(bank, {entry.task: entry.chosen.trial.settings.metric for entry in entries}, version)
    tasks = [_task(folder, entry, corpora[entry.task], past.get(entry.task, [])) for entry in entries]
    tasks += [TaskNight(result.task, "failed", result.reason or "", result.metric) for result in refused]
    failed = sum(task.decision == "failed" for task in tasks)
    alias = settings.bank.alias
    verdict: Verdict = "bad" if version is None else "partial" if failed else "good"
    before, after = _alias(bank, alias, settings.run.name)
    libraries = ", ".join(f"{name} {number}" for name, number in library_versions().items())
    return NightReport(
        title=f"Run {settings.run.name}",
        run=settings.run.name,
        verdict=verdict,
        outcome="No prompt was published." if version is None else f"Version {version} is published.",
        started=float(events[0]["time"]),
        ended=float(events[-1]["time"]),
        tasks=tasks,
        bank=settings.bank.uri,
        alias=alias,
        version=version,
        alias_before=before,
        alias_after=after,
        faults=faults_of(events),
        stages=stages,
        ranks=ranks,
        rank_seconds=ranks * held,
        price_per_rank_hour=settings.cluster.price_per_rank_hour,
        facts={
            "model": f"{settings.model.path}, {settings.model.weights}",
            "backbone": identity.fingerprint[:12],
            "seed": str(settings.run.seed),
            "folder": str(folder),
            "libraries": libraries,
        },
    )


def _task(folder: Path, entry: TaskResult, corpus: TaskCorpus, history: Sequence[PastVersion]) -> TaskNight:
    state, settings = entry.chosen, entry.chosen.trial.settings
    result = result_of(entry)
    return TaskNight(
        name=entry.task,
        decision="failed" if entry.failed or entry.withheld else "warm" if settings.prompt.init == "bank" else "cold",
        why=_why(entry, result),
        metric=settings.metric,
        tuned=None if entry.failed else result.dev_after,
        start=result.dev_before,
        constant=result.dev_constant,
        learned=entry.learned,
        steps=state.step,
        history=history,
        curves=[_curve(folder, trial, trial is state) for trial in entry.trials],
        rows=corpus.counts,
    )


def _why(entry: TaskResult, result: TrialResult) -> str:
    if entry.failed:
        return result.reason or "no reason was recorded"
    if entry.learned is False:
        withheld = ", and withheld from the bank (bank.not_learned)" if entry.withheld else ""
        return f"not learned{withheld}: {entry.reason}"
    if entry.unjudged is not None:
        return entry.unjudged
    if not entry.chosen.best_at:
        return NO_GAIN
    prompt = entry.chosen.trial.settings.prompt
    start = f"the bank's {prompt.source}" if prompt.init == "bank" else prompt.init.replace("_", " ")
    return f"{result.status}, from {start}" + (f"; {result.among}" if result.among else "")


def _curve(folder: Path, state: TrialState, best: bool) -> Curve:
    curve = read_curve(folder, state.trial.name)
    return replace(curve, best=best, status=state.status, reason=state.reason)


def _alias(bank: PromptBank | None, alias: str, run: str) -> tuple[int | None, int | None]:
    """Where the alias was before this run, and where it is."""
    moves = bank.alias_history(alias) if bank is not None else ()
    if not moves:
        return None, None
    before = moves[-1] if moves[-1].by != f"run {run}" else moves[-2] if len(moves) > 1 else None
    return before.version if before else None, moves[-1].version
