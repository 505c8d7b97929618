"""`report.html` in the folder of a run or a night, and what that of a run tells."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import replace
from pathlib import Path

from rich.console import Console

from pipeline.bank import BackboneId, PromptBank
from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.reporting.html import NightReport, PastVersion, TaskNight, Verdict, render
from pipeline.reporting.html.from_record import past_versions
from pipeline.reporting.html.run_files import faults_of, read_curve, stages_of
from pipeline.reporting.watched import read_events
from pipeline.run.bank import readable_bank
from pipeline.run.publishing import library_versions, written_tables
from pipeline.run.results import NO_GAIN, RefusedTask, TaskResult
from pipeline.settings import Settings
from pipeline.whole_files import write_atomically


def write_report(folder: Path, report: Callable[[], NightReport], console: Console, whose: str) -> Path | None:
    """Write the page and say where it is; where that fails, only warn."""
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
    results: Sequence[TaskResult],
    refused: Sequence[RefusedTask],
    corpora: Mapping[str, TaskCorpus],
    version: int | None,
) -> NightReport:
    """Everything that the page of a finished run shows. Raises: StorageError."""
    events = list(read_events(folder / "events.jsonl"))
    stages = stages_of(events)
    ranks = settings.cluster.num_workers
    held = sum(stage.seconds for stage in stages if stage.name in ("backbone", "tuning"))
    bank = readable_bank(settings.bank)
    past: dict[str, list[PastVersion]] = {}
    if bank is not None:
        past = past_versions(bank, {result.task: result.metric for result in results}, version)
    tasks = [_task(folder, result, corpora[result.task], past.get(result.task, [])) for result in results]
    tasks += [TaskNight(result.task, "failed", result.reason, result.metric) for result in refused]
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


def _task(folder: Path, result: TaskResult, corpus: TaskCorpus, history: Sequence[PastVersion]) -> TaskNight:
    start = result.chosen.trial.settings.prompt.init
    return TaskNight(
        name=result.task,
        decision="failed" if result.failed or result.withheld else "warm" if start == "bank" else "cold",
        why=_why(result),
        metric=result.metric,
        tuned=None if result.failed else result.dev_after,
        start=result.dev_before,
        constant=result.dev_constant,
        learned=result.learned,
        steps=result.steps,
        history=history,
        curves=[
            replace(
                read_curve(folder, state.trial.name),
                best=state is result.chosen,
                status=state.status,
                reason=state.reason,
            )
            for state in result.trials
        ],
        rows=corpus.counts,
        tables=written_tables(corpus),
    )


def _why(result: TaskResult) -> str:
    if result.failed:
        return result.reason or "no reason was recorded"
    if result.learned is False:
        withheld = ", and withheld from the bank (bank.not_learned)" if result.withheld else ""
        return f"not learned{withheld}: {result.reason}"
    if result.unjudged is not None:
        return result.unjudged
    if not result.chosen.best_at:
        return NO_GAIN
    prompt = result.chosen.trial.settings.prompt
    start = f"the bank's {prompt.source}" if prompt.init == "bank" else prompt.init.replace("_", " ")
    return f"{result.status}, from {start}" + (f"; {result.among}" if result.among else "")


def _alias(bank: PromptBank | None, alias: str, run: str) -> tuple[int | None, int | None]:
    """Where the alias was before this run, and where it is."""
    moves = bank.alias_history(alias) if bank is not None else ()
    if not moves:
        return None, None
    before = moves[-1] if moves[-1].by != f"run {run}" else moves[-2] if len(moves) > 1 else None
    return before.version if before else None, moves[-1].version
