"""A model that answers for every task of a bank: each row runs behind its own task's prompt."""

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache
from threading import Lock
from typing import Generic, TypeVar

import numpy as np
import torch
from torch import Tensor

from pipeline.backbone import prompted
from pipeline.bank import Missing, Prompt, PromptBank, Snapshot, Unknown
from pipeline.errors import PromptBankError
from pipeline.serving.questions import Question, Request, Text, UnknownTaskError, make_questions
from pipeline.serving.served_backbone import ServedBackbone
from pipeline.serving.state_cache import StateCache

Answer = TypeVar("Answer")


@dataclass(frozen=True)
class Replies(Generic[Answer]):
    """What became of each request of a batch."""

    version: int
    """Of the bank, for all tasks named without a revision of their own; 0 before its first."""
    of_request: Sequence[list[Answer] | PromptBankError]
    """Answers in the order of the request's rows, or why it was refused."""

    def only(self) -> list[Answer]:
        """The answers to a single request. Raises: why it was refused."""
        (reply,) = self.of_request
        if isinstance(reply, PromptBankError):
            raise reply
        return reply


class PromptedModel:
    """One frozen model in this process, serving the prompts of a bank; may be called from many threads.

    `cache_bytes`: how much of the prompts' keys and values is kept (decoder-only models).
    `token_budget`: most tokens, padding included, that run at once; longer calls are split. No single
    row may be longer, nor longer than the model's context.
    """

    def __init__(
        self, backbone: ServedBackbone, bank: PromptBank, cache_bytes: int = 512 * 2**20, token_budget: int = 8192
    ) -> None:
        self.backbone = backbone
        self.bank = bank
        self.states = StateCache(cache_bytes)
        self._token_budget = token_budget
        self._longest = min(backbone.context or token_budget, token_budget)
        # One run at a time: how a model attends is a setting of the whole model (backbone/packed.py).
        self._running = Lock()

    def generate(self, texts: Sequence[Text], tasks: Sequence[str], max_new_tokens: int = 64) -> list[str]:
        """Greedy answers, all by one version of the bank.

        A text is a string where its task's template has one column, else a mapping of columns; a task is
        `name`, `name@3` or `name@alias`.
        Raises: BankError for an unknown task or a prompt of another backbone; CorpusError for a row
        without a needed column, empty or too long.
        """
        return self.generate_each([Request(texts, tasks, max_new_tokens)]).only()

    def classify(self, texts: Sequence[Text], tasks: Sequence[str]) -> list[dict[str, float]]:
        """For each row, log P(label | prompt, input) in nats of every label of its task, by one version of the bank.

        Raises: BankError for an unknown task or one without labels; CorpusError as `generate`.
        """
        return self.classify_each([Request(texts, tasks)]).only()

    def generate_each(self, requests: Sequence[Request]) -> Replies[str]:
        """`generate` for many callers in one batch: a bad row refuses its own request alone."""
        return self._answer_each(requests, False, lambda q: q.length + q.max_new_tokens, self._decode)

    def classify_each(self, requests: Sequence[Request]) -> Replies[dict[str, float]]:
        """`classify` for many callers in one batch: a bad row refuses its own request alone."""
        return self._answer_each(requests, True, _label_cost, self._score)

    def _answer_each(
        self,
        requests: Sequence[Request],
        labelled: bool,
        cost: Callable[[Question], int],
        answer: Callable[[Sequence[Question]], list[Answer]],
    ) -> Replies[Answer]:
        snapshot = self.bank.current
        load = cache(lambda task: self._load(task, snapshot))
        prepared = [self._prepared(request, load, labelled) for request in requests]
        questions = [question for of_request in prepared if isinstance(of_request, list) for question in of_request]
        answers = iter(self._in_order(questions, cost, answer))
        replies = [
            reply if isinstance(reply, PromptBankError) else [next(answers) for _ in reply] for reply in prepared
        ]
        return Replies(snapshot.version if snapshot else 0, replies)

    def _prepared(
        self, request: Request, load: Callable[[str], Prompt], labelled: bool
    ) -> list[Question] | PromptBankError:
        try:
            return make_questions(request, load, self.backbone, labelled, self._longest)
        except PromptBankError as error:
            return error

    def _load(self, task: str, snapshot: Snapshot | None) -> Prompt:
        try:
            name, version = self.bank.find(task) if "@" in task or snapshot is None else (task, snapshot)
            return version.load(name, self.backbone.identity)
        except (Missing, Unknown) as error:
            raise UnknownTaskError(str(error)) from error

    def _in_order(
        self,
        questions: Sequence[Question],
        cost: Callable[[Question], int],
        answer: Callable[[Sequence[Question]], list[Answer]],
    ) -> list[Answer]:
        """Answers in the order of the questions, which run in batches of rows of like length."""
        answers: dict[int, Answer] = {}
        for batch in split_by_budget([cost(question) for question in questions], self._token_budget):
            with self._running:
                answers |= zip(batch, answer([questions[i] for i in batch]), strict=True)
        return [answers[i] for i in range(len(questions))]

    def _decode(self, questions: Sequence[Question]) -> list[str]:
        tokenizer = self.backbone.tokenizer
        limits = [question.max_new_tokens for question in questions]
        ids = self.backbone.backbone.run(prompted.greedy_decode, self._rows(questions), limits, tokenizer.eos_token_id)
        return [tokenizer.decode(row, skip_special_tokens=True).strip() for row in ids]

    def _score(self, questions: Sequence[Question]) -> list[dict[str, float]]:
        labels = [list(question.labels.values()) for question in questions]
        scores = self.backbone.backbone.run(prompted.label_log_likelihoods, self._rows(questions), labels)
        return [
            dict(zip(question.labels, map(float, of_labels), strict=True))
            for question, of_labels in zip(questions, scores, strict=True)
        ]

    def _rows(self, questions: Sequence[Question]) -> prompted.Rows:
        of_digest = {str(question.prompt.record.digest): question.prompt for question in questions}
        place = {digest: i for i, digest in enumerate(of_digest)}
        of_row = [place[str(question.prompt.record.digest)] for question in questions]
        inputs = [question.input_ids for question in questions]
        if self.backbone.architecture == "encoder-decoder":
            return prompted.Rows([self._tensor(prompt) for prompt in of_digest.values()], of_row, inputs)
        return prompted.Rows([self._state(*item) for item in of_digest.items()], of_row, inputs)

    def _state(self, digest: str, prompt: Prompt) -> prompted.PromptState:
        return self.states.get(digest, lambda: self.backbone.backbone.run(prompted.prompt_state, self._tensor(prompt)))

    def _tensor(self, prompt: Prompt) -> Tensor:
        return torch.from_numpy(prompt.array.copy()).to(self.backbone.backbone.device)


def _label_cost(question: Question) -> int:
    # A label of several tokens is a segment of its own, which looks at prompt and input again.
    longer = sum(len(ids) > 1 for ids in question.labels.values())
    return (question.length + max(map(len, question.labels.values()))) * (1 + longer)


def split_by_budget(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Places of rows in batches of like length, each at most `budget` tokens when padded to its longest row.

    A row that is longer than the budget makes a batch alone.
    """
    order = np.argsort([-length for length in lengths], kind="stable").tolist()
    while order:
        rows = max(1, budget // lengths[order[0]])
        yield order[:rows]
        order = order[rows:]
