"""A night from its lease to its record: plan, tune what changed, compare, publish a version, move the alias or not."""

import time
from collections import Counter
from collections.abc import Iterator, Sequence
from contextlib import contextmanager, suppress
from dataclasses import replace
from functools import partial
from pathlib import Path

from pydantic import ValidationError
from rich.console import Console

from pipeline.bank import CarriedPrompt, NewPrompt, PromptBank
from pipeline.errors import LeaseError, SettingsError, StorageError
from pipeline.refresh.ending import check_conditions, exit_of, verdict
from pipeline.refresh.inputs import NightInputs, read_inputs
from pipeline.refresh.outcomes import NightDecision, decide, planned_record
from pipeline.refresh.record import NightRecord, NightRecordWriter, read_record
from pipeline.refresh.tuned import tune, with_readable_incumbents
from pipeline.reporting.events import EventLog, telling_why
from pipeline.reporting.html.from_record import night_of_record
from pipeline.reporting.progress import follow
from pipeline.run.bank import check_fit, open_bank, readable_bank
from pipeline.run.checks import CheckedRun, check_run
from pipeline.run.lease import Lease, held
from pipeline.run.publishing import library_versions
from pipeline.run.report import write_report
from pipeline.run.stages import make_run_folder, retry_while_unreachable
from pipeline.run.tracking import followed
from pipeline.settings import RunSettings, Settings
from pipeline.tuning.connection import ray_on_demand

_LOOK_BACK = 20


def night_settings(settings: Settings, date: str) -> Settings:
    """The settings of one night: a run of its own, in which a task that cannot be used does not stop the others.

    Raises: SettingsError where the date cannot stand in a run's name.
    """
    name = f"{settings.run.name}-{date}"
    try:
        run = RunSettings.model_validate({**settings.run.model_dump(), "name": name, "on_bad_task": "skip"})
    except ValidationError as error:
        raise SettingsError(
            f"--date {date}: {name!r} can name no run; use letters, digits, '.', '_' and '-'"
        ) from error
    return settings.model_copy(update={"run": run})


def run_night(settings: Settings, date: str, console: Console) -> NightRecord:
    """Refresh the bank; its record, which says how it ended. A night that was stopped goes on where it was.

    Raises: PromptBankError for everything that a user can fix; `night.json` then says so, too.
    """
    own = night_settings(settings, date)
    lease_folder = make_run_folder(own).parent / ".leases" / settings.run.name
    folder = make_run_folder(own)
    rules = settings.refresh
    with held(lease_folder, own.run.name, rules.lease_expiry, rules.wait_for_lease) as lease:
        before = read_record(folder)
        if before is not None and before.state == "finished" and before.version is not None:
            return before
        writer = NightRecordWriter(folder, _blank(own, date), lease.check)
        try:
            with _telling_failures(writer):
                if before is not None and before.state == "publishing":
                    completed = _complete(own, before, writer)
                    if completed is not None:
                        return completed
                return _refresh(own, folder, lease, writer, console)
        finally:
            with suppress(LeaseError):  # the folder is another night's by now
                lease.check()
                price = own.cluster.price_per_rank_hour
                write_report(folder, lambda: night_of_record(folder, readable_bank(own.bank), price), console, "night")


def plan_night_only(settings: Settings, date: str, folder: Path, console: Console) -> NightInputs:
    """What a night would do. Trains nothing, takes no lease; `folder` may be a temporary one."""
    checked = check_run(night_settings(settings, date), new_backbone=True)
    events = folder / "events.jsonl"
    with EventLog(events) as log, ray_on_demand(settings.cluster) as connect, follow(events, console):
        return read_inputs(checked, folder, log, connect)


def _refresh(
    settings: Settings, folder: Path, lease: Lease, writer: NightRecordWriter, console: Console
) -> NightRecord:
    writer.write()
    with writer.stage("check"):
        checked = check_run(settings, new_backbone=True)
        check_fit(settings.bank)
    with (
        EventLog(folder / "events.jsonl") as log,
        telling_why(log),
        ray_on_demand(settings.cluster) as connect,
        followed(settings, folder, console),
    ):

        def connect_timed() -> None:
            with writer.stage("cluster"):
                connect()

        log.write("begin", tasks=len(settings.tasks))
        with writer.stage("corpus"):
            inputs = read_inputs(checked, folder, log, connect_timed)
        inputs, incumbents = with_readable_incumbents(checked, inputs)
        writer.write(
            model=settings.model.path,
            backbone=checked.identity.fingerprint,
            new_backbone=not inputs.bank.same_backbone,
            alias_before=inputs.bank.version,
            tasks=tuple(planned_record(planned, settings) for planned in inputs.plan),
        )
        kinds = Counter(planned.decision for planned in inputs.plan)
        log.write("stage", name="plan", text=", ".join(f"{count} {kind}" for kind, count in kinds.items()))
        with writer.stage("tuning"):
            tuned = tune(checked, inputs, incumbents, folder, log, connect_timed)
        decisions = decide(settings, inputs, tuned)
        record = _publish(checked, inputs, decisions, lease, writer, log)
        unlearned = {task.trial: task.reason for task in record.tasks if task.trial and task.learned is False}
        log.write("end", version=record.version, exit=record.exit_code, not_learned=unlearned)
        return record


def _publish(
    checked: CheckedRun,
    inputs: NightInputs,
    decisions: Sequence[NightDecision],
    lease: Lease,
    writer: NightRecordWriter,
    log: EventLog,
) -> NightRecord:
    settings = checked.settings
    records = tuple(decision.record for decision in decisions)
    conditions = check_conditions(records, settings.refresh)
    may_move = all(condition.held for condition in conditions)
    if not any(_is_news(decision) for decision in decisions):
        writer.write(tasks=records, conditions=conditions)
        return _end(writer, None, inputs.bank.version)
    log.write("stage", name="publish", text=f"to {settings.bank.uri}")
    writer.write(state="publishing", tasks=records, conditions=conditions, alias_may_move=may_move)
    with writer.stage("publish"):
        number = retry_while_unreachable(partial(_publish_once, checked, decisions, may_move, lease), "publish", log)
        stands_at = _alias_version(open_bank(settings.bank), settings)
    return _end(writer, number, stands_at)


def _publish_once(checked: CheckedRun, decisions: Sequence[NightDecision], may_move: bool, lease: Lease) -> int:
    """Publish the night's version, or only advance the alias to it: the store may have lost its answer alone."""
    settings = checked.settings
    bank, alias = open_bank(settings.bank, create=True), settings.bank.alias if may_move else None
    number = _version_of(bank, settings.run.name)
    if number is not None:
        if alias is not None:
            bank.advance(alias, number, by=f"run {settings.run.name}")
        return number
    lease.check()  # the last moment: a night that took over may have published
    prompts, records = [decision.prompt for decision in decisions], [decision.record for decision in decisions]
    return bank.publish(
        [prompt for prompt in prompts if isinstance(prompt, NewPrompt)],
        checked.identity,
        settings.run.name,
        library_versions(),
        alias,
        standing=[prompt for prompt in prompts if isinstance(prompt, CarriedPrompt)],
        removed={record.task: record.why for record in records if record.result == "removed"},
        new_backbone=True,
    )


def _version_of(bank: PromptBank, run: str) -> int | None:
    """The version that this night published, if it is among the newest."""
    return next((n for n in bank.versions()[::-1][:_LOOK_BACK] if bank.at(str(n)).header.run == run), None)


def _is_news(decision: NightDecision) -> bool:
    """Whether the bank must be told: of a new prompt, one that left, or one that was tuned and not taken."""
    prompt = decision.prompt
    if isinstance(prompt, NewPrompt):
        return prompt.array is not None
    return decision.record.result == "removed" or (prompt is not None and prompt.inputs_digest is not None)


def _complete(settings: Settings, before: NightRecord, writer: NightRecordWriter) -> NightRecord | None:
    """Finish a night that was stopped while it published; None when its version is not there yet."""
    bank = open_bank(settings.bank, create=True)
    number = _version_of(bank, before.run)
    if number is None:
        return None
    kept = {"attempts": writer.record.attempts, "stages": writer.record.stages}
    writer.record = replace(before, **kept)  # type: ignore[arg-type]
    if before.alias_may_move:
        bank.advance(settings.bank.alias, number, by=f"run {before.run}")
    return _end(writer, number, _alias_version(bank, settings))


def _end(writer: NightRecordWriter, version: int | None, alias: int | None) -> NightRecord:
    code, outcome = verdict(writer.record, version)
    return writer.write(
        state="finished",
        version=version,
        alias_after=alias,
        exit_code=int(code),
        outcome=outcome,
        failure=None,
        ended=time.time(),
    )


def _alias_version(bank: PromptBank, settings: Settings) -> int | None:
    move = bank.alias_move(settings.bank.alias)
    return move.version if move else None


def _blank(settings: Settings, date: str) -> NightRecord:
    return NightRecord(
        run=settings.run.name,
        date=date,
        started=time.time(),
        bank=settings.bank.uri,
        alias=settings.bank.alias,
        ranks=settings.cluster.num_workers,
        alpha=settings.refresh.alpha,
        margin=settings.refresh.margin,
    )


@contextmanager
def _telling_failures(writer: NightRecordWriter) -> Iterator[None]:
    """A night that fails says so in its record, unless the disk refuses that too, or the lease was lost."""
    try:
        yield
    except BaseException as error:
        interrupted = isinstance(error, KeyboardInterrupt)
        failure = "interrupted" if interrupted else str(error) or type(error).__name__
        # What was stopped while it published is looked for in the bank when it is started again.
        state = "publishing" if writer.record.state == "publishing" else "failed"
        with suppress(StorageError, LeaseError):
            writer.write(
                state=state,
                failure=failure,
                exit_code=int(exit_of(error)),
                outcome=f"The night did not end: {failure}",
                ended=time.time(),
            )
        raise
