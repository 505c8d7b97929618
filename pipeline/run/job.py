"""The main job, from settings to a published version of the bank."""

from dataclasses import dataclass, replace
from enum import IntEnum
from functools import partial
from pathlib import Path

from rich.console import Console

from pipeline.errors import TuningError
from pipeline.reporting.events import EventLog, telling_why
from pipeline.run.bank import check_fit
from pipeline.run.checks import CheckedRun
from pipeline.run.lease import run_lease
from pipeline.run.publishing import publish_prompts
from pipeline.run.report import report_of, write_report
from pipeline.run.results import RefusedTask, TaskResult, choose, write_trials
from pipeline.run.stages import (
    announce,
    finished_states,
    make_rank_job,
    make_run_folder,
    prepare_corpora,
    retry_while_unreachable,
    save_model_description,
    stopped_sentence,
)
from pipeline.run.tracking import followed
from pipeline.tuning.connection import ray_on_demand
from pipeline.tuning.launch import launch
from pipeline.tuning.loop import tune_on_rank


class Exit(IntEnum):
    """Exit codes of the job; 1 is Python's own, for a defect."""

    ALL_PUBLISHED = 0
    BAD_INPUT = 2
    SOME_PUBLISHED = 3
    NONE_PUBLISHED = 4
    INTERRUPTED = 5
    UNDER_WAY = 7


@dataclass(frozen=True)
class RunResult:
    results: tuple[TaskResult | RefusedTask, ...]
    version: int | None
    """Of the bank; None when nothing was published."""
    report: Path | None = None
    """The run's page; None when it could not be written."""

    @property
    def exit(self) -> Exit:
        failed = sum(result.status == "failed" or result.withheld for result in self.results)
        if self.version is None:
            return Exit.NONE_PUBLISHED
        return Exit.SOME_PUBLISHED if failed else Exit.ALL_PUBLISHED


def run_job(checked: CheckedRun, console: Console) -> RunResult:
    """Prepare corpora, tune every trial, publish; resumes a run of the same name.

    Raises: PromptBankError for everything that a user can fix; nothing is then published.
    """
    settings = checked.settings
    folder = make_run_folder(settings)
    with (
        run_lease(folder, settings.run.name) as lease,
        EventLog(folder / "events.jsonl") as log,
        telling_why(log),
        ray_on_demand(settings.cluster) as connect,
        followed(settings, folder, console),
    ):
        log.write("begin", tasks=len(checked.plans))
        check_fit(settings.bank)
        tokenizer = save_model_description(checked, folder)
        corpora, refused = prepare_corpora(checked, tokenizer, log, connect)
        job = make_rank_job(checked, corpora, folder)
        announce(job, settings, log)
        states = finished_states(job, settings)
        if states is None:
            connect()
            # On every rank; what they leave is the run's last checkpoint.
            launch(partial(tune_on_rank, job), folder, settings.cluster, settings.run, log)
            states = finished_states(job, settings)
        if states is None:
            raise TuningError(stopped_sentence(job, settings))
        log.write("stage", name="publish", text=f"to {settings.bank.uri}")
        results = choose(states, corpora, checked.tokenizer, settings.bank.not_learned == "withhold")
        write_trials(folder / "trials.json", results)

        def publish() -> int | None:
            lease.check()  # the last moment: a start that took over, while this one was stopped or waited, may publish
            return publish_prompts(settings, checked.identity, results, corpora)

        version = retry_while_unreachable(publish, "publish", log)
        left_out = [RefusedTask(name, settings.tasks[name].metric, str(error)) for name, error in refused.items()]
        run_result = RunResult((*results, *left_out), version)
        not_learned = {result.trial: result.reason for result in results if result.learned is False}
        log.write("end", version=version, exit=int(run_result.exit), not_learned=not_learned)
        report = partial(report_of, folder, settings, checked.identity, results, left_out, corpora, version)
        return replace(run_result, report=write_report(folder, report, console, "run"))
