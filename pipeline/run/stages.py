"""The stages of a run before it publishes: its folder, the corpora, what ranks are sent, and what they have left."""

from collections.abc import Callable, Mapping
from dataclasses import replace
from pathlib import Path
from typing import Any, TypeVar

import torch
from safetensors import SafetensorError
from safetensors.numpy import load, save
from tenacity import RetryCallState, Retrying, retry_if_exception_type, stop_after_delay, wait_exponential

from pipeline.backbone.files import absolute_if_local, save_config_and_tokenizer, short_embedding_table
from pipeline.corpus.encoding import TokenizerSpec
from pipeline.corpus.task_corpus import TaskCorpus, prepare_tasks
from pipeline.errors import PromptBankError, SettingsError, StorageError, TuningError, UnreachableError
from pipeline.reporting.events import EventLog
from pipeline.run.bank import open_bank
from pipeline.run.checks import CheckedRun, check_storage, refuse_or_skip
from pipeline.run.teachers import check_examples
from pipeline.sealed_files import DamagedError, open_tensors, sealed_tensors
from pipeline.settings import RunSettings, Settings
from pipeline.tuning.checkpoint import load_checkpoint
from pipeline.tuning.connection import Connect
from pipeline.tuning.incumbents import prompt_digest
from pipeline.tuning.initialise import mean_prompt
from pipeline.tuning.rank_job import RankJob
from pipeline.tuning.state import TrialState
from pipeline.whole_files import write_atomically

PATIENCE_S = 240.0
"""Each try of an object store waits up to half a minute by itself."""

T = TypeVar("T")


def make_rank_job(
    checked: CheckedRun, corpora: Mapping[str, TaskCorpus], folder: Path, starts_anew: bool = False
) -> RankJob:
    """What the ranks are to do: the tasks of `corpora`.

    The bank's prompts that trials start from are kept with the run, so that a run that goes on starts from the same
    ones; `starts_anew` takes those that the bank has now. Raises: BankError, StorageError.
    """
    job = RankJob(
        settings=settings_for_ranks(checked.settings),
        corpora={name: corpus.to_dict() for name, corpus in corpora.items()},
        fingerprint=checked.identity.fingerprint,
        run_folder=str(folder),
        starts={},
    )
    return replace(job, starts=_keep_warm_starts(checked, job, starts_anew))


def settings_for_ranks(settings: Settings) -> dict[str, Any]:
    """As plain values, with paths that hold anywhere: Ray gives each worker a working directory of its own."""
    plain = settings.model_dump(mode="json")
    plain["model"]["path"] = absolute_if_local(settings.model.path)
    if settings.model.offload_folder is not None:
        plain["model"]["offload_folder"] = str(Path(settings.model.offload_folder).expanduser().resolve())
    return plain


def announce(job: RankJob, settings: Settings, log: EventLog) -> None:
    """Tell whoever watches the run which trials there will be."""
    plain = [
        {"trial": trial.name, "task": trial.task, "max_steps": trial.settings.max_steps, "digest": trial.digest}
        for trial in job.trials(settings)
    ]
    log.write("launch", trials=plain)


def make_run_folder(settings: Settings) -> Path:
    """Where a run keeps everything. Raises: SettingsError, StorageError."""
    return make_folder_of(settings.run)


def make_folder_of(run: RunSettings) -> Path:
    """The folder of a run of any job. Raises: SettingsError where it can be none, StorageError."""
    check_storage(run)
    folder = Path(run.storage).expanduser().resolve() / run.name
    try:
        folder.mkdir(parents=True, exist_ok=True)
    except OSError as error:
        raise StorageError(f"run.storage {run.storage}: cannot make {folder}: {error.strerror}") from error
    return folder


def save_model_description(checked: CheckedRun, folder: Path) -> TokenizerSpec:
    """Write config and tokenizer to where the ranks read them. Raises: StorageError."""
    try:
        save_config_and_tokenizer(checked.config, checked.tokenizer, folder / "model")
    except Exception as error:  # tokenizers raises nothing more special on a full disk
        raise StorageError(f"cannot write {folder / 'model'}: {error}; make room and start the run again") from error
    short = short_embedding_table(checked.config, checked.tokenizer)
    return TokenizerSpec(str(folder / "model"), checked.identity.tokenizer, checked.architecture, short)


def retry_while_unreachable(action: Callable[[], T], stage: str, log: EventLog) -> T:
    """`action()`, repeated for some minutes while the store that it needs cannot be reached.

    It must be safe to repeat. Raises: what `action` raises, the last UnreachableError in the end.
    """

    def tell(state: RetryCallState) -> None:
        assert state.outcome is not None
        log.write("stage", name=stage, text=f"trying again soon: {state.outcome.exception()}")

    retrying = Retrying(
        retry=retry_if_exception_type(UnreachableError),
        wait=wait_exponential(multiplier=1, max=15),
        stop=stop_after_delay(PATIENCE_S),
        before_sleep=tell,
        reraise=True,
    )
    return retrying(action)


def prepare_corpora(
    checked: CheckedRun, tokenizer: TokenizerSpec, log: EventLog, connect: Connect
) -> tuple[dict[str, TaskCorpus], Mapping[str, PromptBankError]]:
    """Every task's corpus, and what is wrong with those that cannot be used. Connects to Ray if one must be tokenised.

    Raises: the PromptBankError that stops the run.
    """
    settings = checked.settings
    storage = Path(settings.run.storage).expanduser().resolve()
    prepared: dict[str, TaskCorpus | PromptBankError] = {}

    def prepare() -> None:
        left = {name: settings.tasks[name] for name in checked.plans if not isinstance(prepared.get(name), TaskCorpus)}
        prepared.update(prepare_tasks(left, checked.plans, tokenizer, storage, connect))
        for outcome in prepared.values():
            if isinstance(outcome, UnreachableError):
                raise outcome

    retry_while_unreachable(prepare, "corpus", log)
    corpora: dict[str, TaskCorpus] = {}
    refused = dict(checked.refused)
    for name in checked.plans:
        try:
            corpora[name] = _usable(prepared[name])
            check_examples(name, settings, corpora[name], checked.config, checked.tokenizer)
            log.write("stage", name="corpus", text=f"{name}: {_counted(corpora[name])}")
            for remark in checked.plans[name].left_out:
                log.write("stage", name="corpus", text=remark)
        except (StorageError, TuningError, SettingsError):  # no mistake of the task's, nor a cluster that is away
            raise
        except PromptBankError as error:
            corpora.pop(name, None)
            refused[name] = error
    refuse_or_skip(settings, refused)
    return corpora, refused


def _usable(prepared: TaskCorpus | PromptBankError) -> TaskCorpus:
    if isinstance(prepared, PromptBankError):
        raise prepared
    return prepared


def _counted(corpus: TaskCorpus) -> str:
    splits = []
    for split, counts in corpus.counts.items():
        unused = {status.replace("_", " "): count for status, count in counts.items() if status != "ok" and count}
        dropped = [f"{count} {status}" for status, count in unused.items()]
        splits.append(f"{counts['ok']} {split} rows" + (f" ({', '.join(dropped)} left out)" if dropped else ""))
    return ", ".join(splits)


def _keep_warm_starts(checked: CheckedRun, job: RankJob, anew: bool) -> dict[str, str]:
    """Keep the prompts that trials start from with the run; their digests."""
    settings, starts, bank = checked.settings, {}, None
    for trial in job.trials(settings):
        prompt = trial.settings.prompt
        if prompt.init == "bank":
            path = job.warm_start(trial)
            if anew or not _is_kept(path):
                bank = bank or open_bank(settings.bank)
                arrays = [bank.load(source, checked.identity).array for source in prompt.sources]
                write_atomically(path, sealed_tensors(save({"prompt": mean_prompt(arrays)})))
            starts[trial.name] = prompt_digest(save({"prompt": load(path.read_bytes())["prompt"]}))
    return starts


def _is_kept(path: Path) -> bool:
    """Whether a prompt is there whole; one that is damaged is taken from the bank again."""
    try:
        data = path.read_bytes()
        open_tensors(data, ())
        return "prompt" in load(data)
    except (OSError, DamagedError, SafetensorError):
        return False


def finished_states(job: RankJob, settings: Settings) -> list[TrialState] | None:
    """The final state of every trial, if the run's checkpoint holds them all."""
    checkpoint = load_checkpoint(Path(job.run_folder) / "checkpoints")
    if checkpoint is None:
        return None
    states = []
    for trial in job.trials(settings):
        state = checkpoint.state_of(trial, torch.device("cpu"))
        if state is None or not state.ended:
            return None
        states.append(state)
    return states


def stopped_sentence(job: RankJob, settings: Settings) -> str:
    """Where the ranks stopped that ended before every trial had."""
    checkpoint = load_checkpoint(Path(job.run_folder) / "checkpoints")
    at = f"at step {checkpoint.step}, with a checkpoint of it" if checkpoint else "before its first step"
    return f"run '{settings.run.name}' was told to stop and did, {at}; start it again to go on from there"
