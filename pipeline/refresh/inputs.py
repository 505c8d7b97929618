"""What a night starts from: tonight's corpora, the bank as it stands, and the plan that follows from both."""

from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path

from pipeline.bank import BackboneId, PromptRecord
from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.errors import PromptBankError
from pipeline.refresh.plan import PlannedTask, TaskInputs, plan_night
from pipeline.reporting.events import EventLog
from pipeline.run.bank import find_bank
from pipeline.run.checks import CheckedRun
from pipeline.run.stages import prepare_corpora, save_model_description
from pipeline.settings import Settings
from pipeline.tuning.connection import Connect
from pipeline.tuning.trials import inputs_digest


@dataclass(frozen=True)
class BankState:
    """The bank as the night finds it: the alias' version, and the names in the newest one."""

    version: int | None = None
    """None before the alias was first set."""
    same_backbone: bool = True
    records: Mapping[str, PromptRecord] = field(default_factory=dict)
    foreign: tuple[str, ...] = ()
    """Prompts that were tuned on a backbone that is no longer stated to be the version's."""
    newest: tuple[str, ...] = ()
    """Names in the newest version, which the next one passes on even where the alias stayed behind it."""


@dataclass(frozen=True)
class NightInputs:
    corpora: Mapping[str, TaskCorpus]
    refused: Mapping[str, PromptBankError]
    bank: BankState
    plan: tuple[PlannedTask, ...]

    @property
    def trained(self) -> list[PlannedTask]:
        return [planned for planned in self.plan if planned.trains]


def read_inputs(checked: CheckedRun, folder: Path, log: EventLog, connect: Connect) -> NightInputs:
    """Prepare the corpora (shards that are there are not made again, and need no Ray) and plan.

    folder: where the model's description is kept. Raises: PromptBankError.
    """
    tokenizer = save_model_description(checked, folder)
    corpora, refused = prepare_corpora(checked, tokenizer, log, connect)
    bank = read_bank_state(checked.settings, checked.identity)
    tasks = {name: _task_inputs(checked.settings, name, corpora, refused) for name in checked.settings.tasks}
    plan = plan_night(tasks, bank.records, bank.same_backbone, bank.newest, bank.foreign)
    return NightInputs(corpora, refused, bank, plan)


def read_bank_state(settings: Settings, identity: BackboneId) -> BankState:
    """Raises: BankError, StorageError."""
    bank = find_bank(settings)
    if bank is None:
        return BankState()
    numbers = bank.versions()
    newest = bank.at(str(numbers[-1])).names() if numbers else ()
    if bank.current is None:
        return BankState(newest=newest)
    snapshot = bank.current
    records = {record.name: record for record in snapshot.records()}
    foreign = (r.name for r in records.values() if r.tuned_on and not snapshot.is_of(identity, r.name))
    return BankState(bank.version, snapshot.is_of(identity), records, tuple(foreign), newest)


def _task_inputs(
    settings: Settings, name: str, corpora: Mapping[str, TaskCorpus], refused: Mapping[str, PromptBankError]
) -> TaskInputs | str:
    if name in refused:
        return str(refused[name])
    digest = corpora[name].digest
    lengths = frozenset(trial.prompt.length for trial in settings.tasks[name].trials(name).values())
    return TaskInputs(inputs_digest(settings, name, digest), digest, lengths)
