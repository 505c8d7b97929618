"""From tuned trials to a version of the bank."""

from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from importlib.metadata import version
from typing import Any

from pipeline.bank import BackboneId, ChatForm, Metrics, NewPrompt, PromptBank, TableState, Template
from pipeline.corpus.task_corpus import TaskCorpus, task_input
from pipeline.run.bank import open_bank
from pipeline.run.results import NO_GAIN, TaskResult
from pipeline.run.stages import make_run_folder
from pipeline.settings import Settings, TaskSettings
from pipeline.tuning.hosting import ROWS_RUN
from pipeline.tuning.trials import inputs_digest

_LOOK_BACK = 20
_LIBRARIES = ("torch", "transformers", "deepspeed", "bitsandbytes", "ray", "pyarrow")


def publish_prompts(
    settings: Settings, identity: BackboneId, results: Sequence[TaskResult], corpora: Mapping[str, TaskCorpus]
) -> int | None:
    """Publish what `bank.publish` says; the number of the version that holds it, None when no trial succeeded.

    A run that was published already, and is only started again, publishes nothing new.
    Raises: BankError, StorageError.
    """
    prompts = [prompt for result in results for prompt in _prompts(result, corpora[result.task], settings)]
    if all(prompt.array is None for prompt in prompts):
        return None
    bank = open_bank(settings.bank, create=True)
    published = _published_before(bank, settings.run.name, prompts)
    if published is not None:
        bank.advance(settings.bank.alias, published, by=f"run {settings.run.name}")  # if it was killed before that
        return published
    return bank.publish(prompts, identity, settings.run.name, library_versions(), settings.bank.alias)


def _prompts(result: TaskResult, corpus: TaskCorpus, settings: Settings) -> list[NewPrompt]:
    """What is published of a task: its best prompt and, with `bank.publish: all`, also that of each trial."""
    best = new_prompt(result, corpus, settings)
    if settings.bank.publish == "best" or len(result.trials) == 1:
        return [best]
    each = [replace(result, trials=[state], chosen=state) for state in result.trials]
    given = [own for own in each if not (own.failed or own.withheld)]
    named = [replace(new_prompt(own, corpus, settings), name=own.chosen.trial.name) for own in given]
    return [best, *named]


def library_versions() -> dict[str, str]:
    """Versions of the libraries that decide a prompt's numbers, by name."""
    return {name: version(name) for name in _LIBRARIES}


def new_prompt(result: TaskResult, corpus: TaskCorpus, run: Settings) -> NewPrompt:
    """A task's best prompt as the bank takes it."""
    state, failed, absent = result.chosen, result.failed, result.failed or result.withheld
    settings = state.trial.settings
    first, best = state.history[0], state.history[state.best_at]
    metrics: dict[str, Any] = {
        "dev_before": result.dev_before,
        "dev_after": result.dev_after,
        "test": result.test,
        "dev_constant": result.dev_constant,
        "test_constant": result.test_constant,
        "dev_loss_before": first.loss,
        "dev_loss_after": best.loss,
    }
    no_gain = None if failed or state.best_at else NO_GAIN
    return NewPrompt(
        name=result.task,
        array=None if absent else state.best.cpu().numpy(),
        task=result.task,
        template=_template(result.task, settings, corpus),
        labels=corpus.labels,
        metric=settings.metric,
        metrics=Metrics() if failed else Metrics(**metrics),
        initialisation=settings.prompt.init,
        length=settings.prompt.length,
        steps=best.step,
        seed=state.trial.seed,
        corpus_digest=corpus.digest,
        settings_digest=state.trial.digest,
        status="failed" if absent else "tuned",
        reason="; ".join(filter(None, (result.reason or no_gain, None if failed else state.restarted))) or None,
        learned=result.learned,
        inputs_digest=inputs_digest(run, result.task, corpus.digest),
        rows_run=_rows_run(run),
        label_score=settings.label_score,
        label_offsets=None if absent else state.label_offsets,
        tables=table_states(corpus) or None,
    )


def table_states(corpus: TaskCorpus) -> dict[str, tuple[TableState, ...]]:
    """By split, the tables that a corpus was read from, as a record has them."""
    return {split: tuple(TableState(**asdict(table)) for table in tables) for split, tables in corpus.tables.items()}


def written_tables(corpus: TaskCorpus) -> dict[str, list[str]]:
    """By split, the addresses of the tables that a corpus was read from, with their versions."""
    return {split: [state.written for state in states] for split, states in table_states(corpus).items()}


def _rows_run(settings: Settings) -> Any:
    """How the ranks ran rows, as they noted it; None of a run that was tuned before they did."""
    noted = make_run_folder(settings) / "model" / ROWS_RUN
    return noted.read_text() if noted.is_file() else None


def _template(task: str, settings: TaskSettings, corpus: TaskCorpus) -> Template:
    if corpus.chat is None:
        return Template(input=task_input(task, settings).text, target=settings.target, separator=settings.separator)
    chat = ChatForm.model_validate(corpus.chat)
    return Template(input=task_input(task, settings).text, target=settings.target, separator="", chat=chat)


def _published_before(bank: PromptBank, run: str, prompts: Sequence[NewPrompt]) -> int | None:
    """The version in which this very run published these very prompts, if it is among the newest."""
    wanted = {prompt.name: prompt.settings_digest for prompt in prompts if prompt.array is not None}
    for number in bank.versions()[::-1][:_LOOK_BACK]:
        manifest = bank.manifest(number)
        tuned = {name: record.settings_digest for name, record in manifest.prompts.items() if record.tuned_in == number}
        if manifest.run == run and tuned == wanted:
            return number
    return None
