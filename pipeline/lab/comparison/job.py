"""A whole comparison, phase after phase: tune, choose on dev, and only then answer test rows and make the tables.

When it is started again, it resumes: each phase keeps what it has done, and reads it back.
"""

import json
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

from rich.console import Console

from pipeline.backbone.files import context_length, embedding_rows
from pipeline.errors import PromptBankError
from pipeline.lab.comparison import tables, transfer
from pipeline.lab.comparison.answers import AnswersByKey, CandidatePrompts, QuestionList
from pipeline.lab.comparison.candidates import Cost, MeasuredCandidate
from pipeline.lab.comparison.checks import check_corpora
from pipeline.lab.comparison.choice import SeedGroup, choose_best, group_over_seeds
from pipeline.lab.comparison.derived_settings import with_own_bank
from pipeline.lab.comparison.fine_tuning import fine_tune
from pipeline.lab.comparison.hard_prompts import HardPrompt, check_hard_prompt, hard_prompts
from pipeline.lab.comparison.instruction_search import searched_prompts
from pipeline.lab.comparison.lora import train_adapters
from pipeline.lab.comparison.overlap import find_seen_rows
from pipeline.lab.comparison.page.markdown import to_markdown
from pipeline.lab.comparison.page.render import render_comparison
from pipeline.lab.comparison.prompts import tune_prompts
from pipeline.lab.comparison.results import Results, TaskFacts, write_results
from pipeline.lab.comparison.study import Study
from pipeline.reporting.events import EventLog, telling_why
from pipeline.run.bank import check_fit
from pipeline.run.checks import CheckedRun
from pipeline.run.lease import run_lease
from pipeline.run.publishing import library_versions
from pipeline.run.stages import make_run_folder, prepare_corpora, save_model_description
from pipeline.run.tracking import followed
from pipeline.tuning.connection import ray_on_demand
from pipeline.tuning.machine import device_name
from pipeline.whole_files import write_atomically


@dataclass(frozen=True)
class ComparisonResult:
    results: Results
    folder: Path

    @property
    def failed(self) -> int:
        """Candidates that failed, and tasks that were left out."""
        return sum(number.failed is not None for number in self.results.numbers) + len(self.results.left_out)


@dataclass(frozen=True)
class _Candidates:
    """All candidates with their dev metrics."""

    measured: Sequence[MeasuredCandidate]
    prompts: CandidatePrompts


def run_comparison(checked: CheckedRun, console: Console) -> ComparisonResult:
    """Compare what the settings name; they come from `comparison_settings`. Leaves `results.json` and its pages.

    Raises: PromptBankError for everything that a user can fix.
    """
    settings, started = checked.settings, time.time()
    folder = make_run_folder(settings)
    with (
        run_lease(folder, settings.run.name) as lease,
        EventLog(folder / "events.jsonl") as log,
        telling_why(log),
        ray_on_demand(settings.cluster) as connect,
    ):
        log.write("begin", tasks=len(checked.plans))
        check_fit(with_own_bank(settings, folder).bank)
        with followed(settings, folder, console):
            tokenizer = save_model_description(checked, folder)
            corpora, refused = prepare_corpora(checked, tokenizer, log, connect)
        study = Study(checked, folder, corpora, console, connect)
        check_corpora(study)
        candidates = _make_candidates(study)
        groups = group_over_seeds(candidates.measured)
        chosen = choose_best(groups, study.metrics)
        _write_choices(folder / "chosen.json", chosen)
        answers = _answer_test_rows(study, candidates, chosen)
        results = _results(study, groups, chosen, answers, candidates, refused, started)
        lease.check()
        write_results(folder / "results.json", results)
        write_atomically(folder / "report.md", to_markdown(results).encode())
        write_atomically(folder / "report.html", render_comparison(results).encode())
        log.write("end", version=None, exit=0)
    return ComparisonResult(results, folder)


def _make_candidates(study: Study) -> _Candidates:
    compare = study.settings.compare
    hard = _hard_prompts(study)
    tuned = tune_prompts(study, study.checked, "prompts", "prompt tuning")
    measured = [*_measured_hard(study, hard), *tuned.measured]
    prompts = dict(tuned.arrays)
    if compare.transfer is not None and compare.transfer.starts:
        best = choose_best(group_over_seeds(tuned.measured), study.metrics)
        of_task = {task: group for (_, task), group in best.items()}
        moved = transfer.tune_from_others(study, compare.transfer.starts, tuned, of_task)
        if moved is not None:
            measured += moved.measured
            prompts |= moved.arrays
    if compare.lora is not None:
        measured += train_adapters(study, compare.lora)
    if compare.fine_tuning is not None:
        measured += fine_tune(study, compare.fine_tuning)
    return _Candidates(measured, CandidatePrompts(prompts, {prompt.candidate.name: prompt.text for prompt in hard}))


def _hard_prompts(study: Study) -> list[HardPrompt]:
    """Raises: SettingsError when one does not fit the model's context."""
    compare, checked = study.settings.compare, study.checked
    if compare.hard_prompts is None:
        return []
    tasks, tokenizer, architecture = study.settings.tasks, checked.tokenizer, checked.architecture
    found = list(hard_prompts(compare.hard_prompts, tasks, study.corpora, compare.seeds, tokenizer, architecture))
    _check_hard_prompts(study, found)  # before a search takes its time
    if compare.hard_prompts.search is not None:
        searched = searched_prompts(study, compare.hard_prompts.search)
        _check_hard_prompts(study, searched)
        found += searched
    return found


def _check_hard_prompts(study: Study, prompts: Sequence[HardPrompt]) -> None:
    checked = study.checked
    context, rows = context_length(checked.config), embedding_rows(checked.config)
    for prompt in prompts:
        task = study.settings.tasks[prompt.candidate.task]
        check_hard_prompt(prompt, task, checked.tokenizer, checked.architecture, context, rows)


def _measured_hard(study: Study, prompts: Sequence[HardPrompt]) -> list[MeasuredCandidate]:
    """Hard prompts with their dev metric."""
    checked = study.checked
    unmeasured = [MeasuredCandidate(prompt.candidate, float("nan"), float("nan")) for prompt in prompts]
    questions = QuestionList(study, CandidatePrompts({}, {prompt.candidate.name: prompt.text for prompt in prompts}))
    questions.add_all(unmeasured, "dev")
    answers = questions.answers()
    found = []
    for prompt in prompts:
        task = prompt.candidate.task
        answered = answers[prompt.candidate.name, task, "dev"]
        context = None  # checked before
        tokens = check_hard_prompt(prompt, study.settings.tasks[task], checked.tokenizer, checked.architecture, context)
        cost = Cost(
            stored_bytes=len(prompt.text.encode()),
            rank_seconds=prompt.rank_seconds,
            prompt_tokens=tokens if prompt.text else 0,
        )
        found.append(MeasuredCandidate(prompt.candidate, answered.value(study.metrics[task]), answered.loss, cost))
    return found


def _answer_test_rows(study: Study, candidates: _Candidates, chosen: tables.Chosen) -> AnswersByKey:
    """Every candidate's answers on its task's test rows, and the chosen ones' answers for the other tables."""
    compare = study.settings.compare
    questions = QuestionList(study, candidates.prompts)
    questions.add_all(candidates.measured, "test")
    for (method, task), group in chosen.items():
        if compare.ensembles and method == "prompt tuning" and len(group.succeeded) > 1:
            questions.add_all(group.succeeded, "dev")
        for on in compare.domain_shift.get(task, ()):
            for one in group.succeeded:
                questions.add(one, on, "test")
    if compare.transfer is not None and compare.transfer.matrix:
        for one in _best_prompts(study, chosen).values():
            for on in study.corpora:
                questions.add(one, on, tables.last_split(study, on))
    return questions.answers()


def _best_prompts(study: Study, chosen: tables.Chosen) -> dict[str, MeasuredCandidate]:
    """By task, the tuned prompt that is best on dev."""
    found = {task: g.best(study.metrics[task]) for (method, task), g in chosen.items() if method == "prompt tuning"}
    return {task: one for task, one in found.items() if one is not None}


def _results(
    study: Study,
    groups: Sequence[SeedGroup],
    chosen: tables.Chosen,
    answers: AnswersByKey,
    candidates: _Candidates,
    refused: Mapping[str, PromptBankError],
    started: float,
) -> Results:
    settings, checked = study.settings, study.checked
    compare, judged = settings.compare, tables.CountedAnswers(answers, study.metrics, find_seen_rows(study))
    best = _best_prompts(study, chosen)
    matrix = compare.transfer is not None and compare.transfer.matrix
    return Results(
        run=settings.run.name,
        model=settings.model.path,
        weights=settings.model.weights,
        backbone=checked.identity.fingerprint,
        parameters=checked.memory.parameters,
        ranks=settings.cluster.num_workers,
        device=device_name(),
        started=started,
        ended=time.time(),
        tasks=tuple(_facts(study, task, judged) for task in study.corpora),
        numbers=tuple(tables.candidate_rows(groups, chosen, judged)),
        rows=tuple(tables.method_rows(groups, chosen, judged)),
        ensembles=tuple(tables.ensemble_rows(chosen, judged)) if compare.ensembles else (),
        transfer=tuple(tables.transfer_cells(best, judged, study)) if matrix else (),
        likeness=transfer.prompt_similarities(
            {task: candidates.prompts.soft[one.candidate.name] for task, one in best.items()}
        ),
        starts=tuple(tables.start_rows(groups, chosen, judged)),
        shifts=tuple(tables.shift_rows(compare.domain_shift, chosen, judged)),
        panels=tuple(tables.panel(key, groups, judged) for key in compare.panels),
        left_out={task: str(error) for task, error in refused.items()},
        libraries=library_versions(),
        settings=settings.model_dump(mode="json"),
    )


def _facts(study: Study, task: str, judged: tables.CountedAnswers) -> TaskFacts:
    corpus = study.corpora[task]
    answered: dict[str, int] = {split: len(given.nll) for (_, on, split), given in judged.answers.items() if on == task}
    rows = {split: counts["ok"] for split, counts in corpus.counts.items()}
    answered.setdefault("dev", min(rows["dev"], study.settings.tasks[task].eval_rows))
    repeated = int(judged.seen(task, task, "test").sum()) if "test" in answered else 0
    return TaskFacts(task, study.metrics[task], corpus.labels, rows, answered, repeated)


def _write_choices(path: Path, chosen: tables.Chosen) -> None:
    """Write down what was chosen, before any test row is answered. Raises: StorageError."""
    plain = [
        {
            "method": method,
            "task": task,
            "choice": dict(group.choice),
            "seeds": [one.candidate.seed for one in group.succeeded],
            "dev": [one.value for one in group.succeeded],
        }
        for (method, task), group in chosen.items()
    ]
    write_atomically(path, (json.dumps(plain, indent=1) + "\n").encode())
