"""The night's training: trials of the tasks that changed, on the ranks, and the bank's prompts measured beside them."""

from collections.abc import Mapping
from dataclasses import dataclass, replace
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np

from pipeline.errors import BankError, TuningError
from pipeline.refresh.inputs import NightInputs
from pipeline.refresh.plan import without_incumbent
from pipeline.refresh.starts import reference, with_warm_starts
from pipeline.reporting.events import EventLog
from pipeline.run.bank import open_bank
from pipeline.run.checks import CheckedRun
from pipeline.run.results import TaskResult, choose, write_trials
from pipeline.run.stages import announce, finished_states, make_rank_job, stopped_sentence
from pipeline.settings import Settings
from pipeline.tuning.connection import Connect
from pipeline.tuning.incumbents import Pair, best_states, encode_incumbent, pair_keys, prompt_digest, read_pairs
from pipeline.tuning.launch import launch
from pipeline.tuning.loop import tune_on_rank
from pipeline.tuning.rank_job import RankJob
from pipeline.whole_files import write_atomically


@dataclass(frozen=True)
class NightResults:
    """By task, for the tasks that were trained."""

    results: Mapping[str, TaskResult]
    pairs: Mapping[str, Pair]
    """Of those that have a prompt in the bank and a trial that did not fail."""
    incumbents: Mapping[str, np.ndarray]
    """The bank's prompts, `[P, H]`."""


def with_readable_incumbents(checked: CheckedRun, inputs: NightInputs) -> tuple[NightInputs, dict[str, np.ndarray]]:
    """The bank's prompts of the tasks that will be trained; those whose prompt is damaged are planned anew.

    Raises: StorageError.
    """
    arrays: dict[str, np.ndarray] = {}
    plan, bank = [], None
    for planned in inputs.plan:
        if planned.trains and planned.incumbent is not None:
            assert inputs.bank.version is not None
            try:
                prompt = reference(planned.task, inputs.bank.version)
                bank = bank or open_bank(checked.settings.bank)
                arrays[planned.task] = bank.load(prompt, checked.identity).array
            except BankError as error:
                planned = without_incumbent(planned, str(error))
        plan.append(planned)
    return replace(inputs, plan=tuple(plan)), arrays


def tune(
    checked: CheckedRun,
    inputs: NightInputs,
    incumbents: Mapping[str, np.ndarray],
    folder: Path,
    log: EventLog,
    connect: Connect,
) -> NightResults:
    """Tune what is to be tuned, resuming an attempt that was stopped; no rank starts when all is done.

    Raises: PromptBankError.
    """
    if not inputs.trained:
        return NightResults({}, {}, {})
    settings = with_warm_starts(checked.settings, inputs.plan, inputs.bank.version)
    corpora = {planned.task: inputs.corpora[planned.task] for planned in inputs.trained}
    job = make_rank_job(replace(checked, settings=settings), corpora, folder)
    digests, records = {}, {planned.task: planned.incumbent for planned in inputs.plan}
    for task, array in incumbents.items():  # to where the ranks read them
        record = records[task]
        assert record is not None
        data = encode_incumbent(array, record)
        write_atomically(job.incumbent(task), data)
        digests[task] = prompt_digest(data)
    job = replace(job, incumbents=digests)
    announce(job, settings, log)
    done = _done(job, settings, incumbents, checked.tokenizer)
    if done is None:
        connect()
        launch(partial(tune_on_rank, job), folder, settings.cluster, settings.run, log)
        done = _done(job, settings, incumbents, checked.tokenizer)
    if done is None:
        raise TuningError(stopped_sentence(job, settings))
    write_trials(folder / "trials.json", list(done.results.values()))
    return done


def _done(
    job: RankJob, settings: Settings, incumbents: Mapping[str, np.ndarray], tokenizer: Any
) -> NightResults | None:
    """What the ranks have left, None while a trial or a comparison is missing."""
    states = finished_states(job, settings)
    if states is None:
        return None
    pairs = read_pairs(Path(job.run_folder), pair_keys(best_states(states), job.incumbents))
    if pairs is None:
        return None
    results = choose(states, job.task_corpora(), tokenizer, settings.bank.not_learned == "withhold")
    return NightResults({result.task: result for result in results}, pairs, incumbents)
