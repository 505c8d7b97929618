"""Collect the questions to each candidate, and get the answers from the ranks that host its weights."""

from collections.abc import Iterable, Mapping
from dataclasses import dataclass, field

import numpy as np

from pipeline.lab.comparison.candidates import MeasuredCandidate
from pipeline.lab.comparison.eval_job import PHASE, answer_on_ranks
from pipeline.lab.comparison.fine_tuning import answers_of_models
from pipeline.lab.comparison.lora import answers_of_adapters
from pipeline.lab.comparison.questions import Split, SplitAnswers, SplitQuestion, save_prompt
from pipeline.lab.comparison.study import Study

AnswerKey = tuple[str, str, Split]
"""(candidate, task whose rows are answered, split)"""
AnswersByKey = Mapping[AnswerKey, SplitAnswers]


@dataclass(frozen=True)
class CandidatePrompts:
    """The prompts that candidates answer with."""

    soft: Mapping[str, np.ndarray]
    """Soft prompts `[P, H]`, by candidate."""
    hard: Mapping[str, str]
    """Texts of hard prompts, by candidate."""


@dataclass
class QuestionList:
    """Questions to candidates, collected before any is answered; each is asked once."""

    study: Study
    prompts: CandidatePrompts
    of_model: dict[AnswerKey, SplitQuestion] = field(default_factory=dict)
    of_adapters: dict[AnswerKey, SplitQuestion] = field(default_factory=dict)
    of_tuned: dict[AnswerKey, SplitQuestion] = field(default_factory=dict)
    """Questions to fine-tuned models."""

    def add(self, measured: MeasuredCandidate, on: str, split: Split) -> None:
        """Add a candidate's question on a task's rows, unless it failed or there are no such rows."""
        name, corpus = measured.candidate.name, self.study.corpora.get(on)
        if measured.failed is not None or corpus is None or split not in corpus.splits:
            return
        key, rows = (name, on, split), self.study.rows(on, split)
        if measured.candidate.method == "LoRA":
            self.of_adapters[key] = SplitQuestion(on, split, rows)
        elif measured.candidate.method == "fine-tuning":
            self.of_tuned[key] = SplitQuestion(on, split, rows)
        elif name in self.prompts.hard:
            self.of_model[key] = SplitQuestion(on, split, rows, text=self.prompts.hard[name])
        else:
            prompt = save_prompt(self.study.folder / PHASE, self.prompts.soft[name])
            self.of_model[key] = SplitQuestion(on, split, rows, prompt=prompt)

    def add_all(self, candidates: Iterable[MeasuredCandidate], split: Split) -> None:
        """Add each candidate's question on its own task's rows."""
        for measured in candidates:
            self.add(measured, measured.candidate.task, split)

    def answers(self) -> AnswersByKey:
        """Have all questions answered. Raises: PromptBankError."""
        found: dict[AnswerKey, SplitAnswers] = {}
        if self.of_model:
            answered = answer_on_ranks(self.study, list(self.of_model.values()))
            found |= {key: answered[question] for key, question in self.of_model.items()}
        compare = self.study.settings.compare
        if self.of_adapters and compare.lora is not None:
            given = answers_of_adapters(self.study, compare.lora, _by_candidate(self.of_adapters))
            found |= {key: given[key[0], question] for key, question in self.of_adapters.items()}
        if self.of_tuned and compare.fine_tuning is not None:
            given = answers_of_models(self.study, compare.fine_tuning, _by_candidate(self.of_tuned))
            found |= {key: given[key[0], question] for key, question in self.of_tuned.items()}
        return found


def _by_candidate(questions: Mapping[AnswerKey, SplitQuestion]) -> dict[str, tuple[SplitQuestion, ...]]:
    found: dict[str, tuple[SplitQuestion, ...]] = {}
    for (name, _, _), question in questions.items():
        found[name] = (*found.get(name, ()), question)
    return found
