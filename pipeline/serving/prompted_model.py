"""A model that answers for every task of a bank: each row runs behind its own task's prompt."""

from collections import OrderedDict
from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass
from functools import cache, partial
from threading import Lock
from typing import Any, Generic, TypeVar
from weakref import WeakKeyDictionary

import numpy as np
import torch
from torch import Tensor

from pipeline.backbone import prompted
from pipeline.backbone.label_scores import label_scores
from pipeline.backbone.rows import NO_TOKENS
from pipeline.bank import Prompt, PromptBank, Snapshot
from pipeline.errors import PromptBankError, UnknownNameError, UnknownTaskError
from pipeline.serving.requests import EncodedRow, PromptTexts, Request, Text, encode_rows, template_beginning
from pipeline.serving.running_batch import Key, RunningBatch
from pipeline.serving.served_backbone import ServedBackbone
from pipeline.serving.streamed_text import AnswerDecoder, StreamedText

Answer = TypeVar("Answer")
Other = TypeVar("Other")


@dataclass(frozen=True)
class BatchAnswers(Generic[Answer]):
    """The answers to each request of a batch, or why it was refused."""

    version: int
    """Version of the bank for all tasks named without a revision; 0 before its first."""
    of_request: Sequence[list[Answer] | PromptBankError]
    """Answers in the order of the request's rows, or why it was refused."""

    def map(self, change: "Callable[[Answer], Other]") -> "BatchAnswers[Other]":
        """The same with each answer changed."""
        of_request = [r if isinstance(r, PromptBankError) else list(map(change, r)) for r in self.of_request]
        return BatchAnswers(self.version, of_request)

    def only(self) -> list[Answer]:
        """The answers to a single request. Raises: why it was refused."""
        (reply,) = self.of_request
        if isinstance(reply, PromptBankError):
            raise reply
        return reply


@dataclass(frozen=True)
class Completion:
    """An answer as the model wrote it, and what it took."""

    text: str
    """The template's separator stands before the answer. It ends before the first of the request's stops."""
    input_tokens: int
    """Of prompt and input."""
    tokens: int
    """Of the answer, with the token that ended it; of a text that was cut, up to the end of its stop."""
    ended: bool
    """False where the answer had as many tokens as it may have, and might have gone on."""

    @property
    def answer(self) -> str:
        """The text without the space around it."""
        return self.text.strip()


class PromptStateCache:
    """Keys and values of the prompts used last, so that a prompt runs once and not once a batch.

    Holds at most `limit` bytes; the least recently used prompt leaves first. Keys are digests of prompts' blobs, so
    that versions of a bank share what they have in common, and behind them the tokens that rows begin with.
    """

    def __init__(self, limit: int) -> None:
        self.limit = limit
        self.nbytes = 0
        """Bytes that are held."""
        self.hits = 0
        """How often a state was asked for and held."""
        self.misses = 0
        """How often one had to be made."""
        self.evictions = 0
        """How often one left for want of room."""
        self._states: OrderedDict[str, prompted.PromptState] = OrderedDict()

    def get(self, digest: str, make: Callable[[], prompted.PromptState]) -> prompted.PromptState:
        """The state of a prompt, made only if it is not held."""
        if digest in self._states:
            self.hits += 1
        else:
            self.misses += 1
            state = self._states[digest] = make()
            self.nbytes += state.nbytes
        self._states.move_to_end(digest)
        state = self._states[digest]
        while self.nbytes > self.limit:  # a state larger than the limit leaves at once
            self.nbytes -= self._states.popitem(last=False)[1].nbytes
            self.evictions += 1
        return state


class PromptedModel:
    """One frozen model in this process, serving the prompts of a bank; many threads may call it.

        from promptbank import PromptBank, PromptedModel, load_backbone

        model = PromptedModel(load_backbone("smollm2-135m"), PromptBank.open("./bank"))
        model.classify(["wonderful"], ["sentiment"])  # [{"negative": -7.1, "positive": -0.1}]

    `cache_bytes`: how much of the prompts' keys and values is kept (decoder-only models).
    `token_budget`: most tokens, padding included, that run at once; longer calls are split. No single
    row may be longer than this, nor longer than the model's context.
    """

    def __init__(
        self, backbone: ServedBackbone, bank: PromptBank, cache_bytes: int = 512 * 2**20, token_budget: int = 8192
    ) -> None:
        self.backbone = backbone
        self.bank = bank
        self._told = PromptTexts(backbone)
        self._decoder = AnswerDecoder(backbone.tokenizer)
        self.states = PromptStateCache(cache_bytes)
        self._beginnings: WeakKeyDictionary[Prompt, np.ndarray] = WeakKeyDictionary()
        self.token_budget = token_budget
        self.longest = min(backbone.context or token_budget, token_budget)
        """Most tokens of prompt, input and answer of a row."""
        # One batch at a time: a model's attention is a setting of the whole model (backbone/packed.py).
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

        Where the prompt's record says so, it is the mean over a label's tokens (`label_score`), less the label's offset
        (`label_offsets`): what the prompt was measured by.
        Raises: BankError for an unknown task or one without labels; CorpusError as `generate`.
        """
        return self.classify_each([Request(texts, tasks)]).only()

    def generate_each(self, requests: Sequence[Request]) -> BatchAnswers[str]:
        """`generate` for many callers in one batch: a bad row refuses its own request alone."""
        return self.complete_each(requests).map(lambda completion: completion.answer)

    def complete_each(self, requests: Sequence[Request]) -> BatchAnswers[Completion]:
        """As `generate_each`, with the answers as they were written and counted."""
        return self._answer_each(requests, False, lambda row: row.length + row.max_new_tokens, self._decode)

    def classify_each(self, requests: Sequence[Request]) -> BatchAnswers[dict[str, float]]:
        """`classify` for many callers in one batch: a bad row refuses its own request alone."""
        return self._answer_each(requests, True, _tokens_with_labels, self._score)

    def _answer_each(
        self,
        requests: Sequence[Request],
        labelled: bool,
        tokens: Callable[[EncodedRow], int],
        answer: Callable[[Sequence[EncodedRow]], list[Answer]],
    ) -> BatchAnswers[Answer]:
        """Encode all rows, answer them in batches of like length, and put the answers back into the requests' order.

        tokens: how many tokens a row takes while it runs.
        """
        version, encoded = self.encode_each(requests, labelled)
        rows = [row for of_request in encoded if isinstance(of_request, list) for row in of_request]
        answers: dict[int, Answer] = {}
        for batch in split_by_budget([tokens(row) for row in rows], self.token_budget):
            with self._running:
                answers |= zip(batch, answer([rows[i] for i in batch]), strict=True)
        in_order = (answers[i] for i in range(len(rows)))
        replies = [e if isinstance(e, PromptBankError) else [next(in_order) for _ in e] for e in encoded]
        return BatchAnswers(version, replies)

    def encode_each(
        self, requests: Sequence[Request], labelled: bool
    ) -> tuple[int, list[list[EncodedRow] | PromptBankError]]:
        """The rows of each request, or why it is refused, all by one version of the bank, which comes first."""
        snapshot = self.bank.current
        load = cache(lambda task: self._load(task, snapshot))
        encoded: list[list[EncodedRow] | PromptBankError] = []
        for request in requests:
            try:
                encoded.append(encode_rows(request, load, self._told, labelled, self.longest))
            except PromptBankError as error:
                encoded.append(error)
        return snapshot.version if snapshot else 0, encoded

    def _load(self, task: str, snapshot: Snapshot | None) -> Prompt:
        try:
            name, version = self.bank.find(task) if "@" in task or snapshot is None else (task, snapshot)
            return version.load(name, self.backbone.identity)
        except UnknownNameError as error:
            raise UnknownTaskError(str(error)) from error

    def running_batch(self) -> RunningBatch[Any] | None:
        """A batch that `join` puts rows into; None where rows of this model cannot join others (`shares_prompts`)."""
        return RunningBatch(self.backbone.backbone) if self.backbone.backbone.shares_prompts else None

    def join(
        self, running: RunningBatch[Key], rows: Sequence[EncodedRow], keys: Sequence[Key]
    ) -> list[tuple[Key, np.ndarray]]:
        """Let rows of `encode_each` join a batch: -> the ids of the answers that are done already, by key."""
        with self._running:
            return self._join(running, rows, keys)

    def step(self, running: RunningBatch[Key]) -> list[tuple[Key, np.ndarray]]:
        """One token more for all rows of a batch: -> the ids of the answers that are done, by key."""
        with self._running:
            return running.step()

    def _join(
        self, running: RunningBatch[Key], rows: Sequence[EncodedRow], keys: Sequence[Key]
    ) -> list[tuple[Key, np.ndarray]]:
        ends, most = [row.end for row in rows], [row.max_new_tokens for row in rows]
        stopped = [partial(_has_stop, row, self._decoder) for row in rows]
        return running.join(self._packed(rows), keys, ends, most, stopped)

    def completion(self, row: EncodedRow, ids: np.ndarray) -> Completion:
        """The answer to a row, of the ids `[T]` that the model wrote."""
        return _completion(row, ids, self._decoder)

    def streamed_text(self, row: EncodedRow) -> StreamedText:
        """What hands over the answer to a row in pieces."""
        return StreamedText(self._decoder, row.stops)

    def _decode(self, rows: Sequence[EncodedRow]) -> list[Completion]:
        running: RunningBatch[int] | None = self.running_batch()
        if running is None:
            return self._decode_together(rows)
        ids = dict(self._join(running, rows, range(len(rows))))
        while len(running):
            ids |= running.step()
        return [self.completion(row, ids[place]) for place, row in enumerate(rows)]

    def _decode_together(self, rows: Sequence[EncodedRow]) -> list[Completion]:
        answers: dict[int, Completion] = {}
        for end in dict.fromkeys(row.end for row in rows):  # chats may end otherwise than texts
            places = [place for place, row in enumerate(rows) if row.end == end]
            packed = self._packed([rows[place] for place in places])
            limits = [rows[place].max_new_tokens for place in places]
            ids = self.backbone.backbone.run(prompted.greedy_decode, packed, limits, end)
            answers |= {place: self.completion(rows[place], of_row) for place, of_row in zip(places, ids, strict=True)}
        return [answers[place] for place in range(len(rows))]

    def _score(self, rows: Sequence[EncodedRow]) -> list[dict[str, float]]:
        labels = [list(row.labels.values()) for row in rows]
        scores = self.backbone.backbone.run(prompted.label_log_likelihoods, self._packed(rows), labels)
        answers = []
        for row, likelihoods in zip(rows, scores, strict=True):
            tokens, record = [len(ids) for ids in row.labels.values()], row.prompt.record
            own = label_scores(likelihoods, tokens, record.label_score, record.label_offsets)
            answers.append(dict(zip(row.labels, map(float, own), strict=True)))
        return answers

    def _packed(self, rows: Sequence[EncodedRow]) -> prompted.Rows:
        """The rows with each of their prompts once: as keys and values from the cache where shared, else as vectors.

        In the cache stands with a prompt what its template begins with, and the rows run without that.
        """
        shares = self.backbone.backbone.shares_prompts
        beginnings = [self._beginning(row) if shares else NO_TOKENS for row in rows]
        keys = [
            str(row.prompt.record.digest) + beginning.tobytes().hex()
            for row, beginning in zip(rows, beginnings, strict=True)
        ]
        of_key = {key: (row.prompt, beginning) for key, row, beginning in zip(keys, rows, beginnings, strict=True)}
        place = {key: i for i, key in enumerate(of_key)}
        of_row = [place[key] for key in keys]
        inputs = [row.input_ids[len(beginning) :] for row, beginning in zip(rows, beginnings, strict=True)]
        if not shares:
            return prompted.Rows([self._tensor(prompt) for prompt, _ in of_key.values()], of_row, inputs)
        return prompted.Rows([self._state(key, *both) for key, both in of_key.items()], of_row, inputs)

    def _state(self, key: str, prompt: Prompt, beginning: np.ndarray) -> prompted.PromptState:
        run = self.backbone.backbone.run
        return self.states.get(key, lambda: run(prompted.prompt_state, self._tensor(prompt), beginning))

    def _beginning(self, row: EncodedRow) -> np.ndarray:
        """The tokens that the row begins with because its template does; none for a row that begins otherwise."""
        if row.prompt not in self._beginnings:
            self._beginnings[row.prompt] = template_beginning(row.prompt, self._told)
        beginning = self._beginnings[row.prompt]
        # A text may merge with the template's last word into one token.
        begins = len(row.input_ids) > len(beginning) and (row.input_ids[: len(beginning)] == beginning).all()
        return beginning if begins else beginning[:0]

    def _tensor(self, prompt: Prompt) -> Tensor:
        return torch.from_numpy(prompt.array.copy()).to(self.backbone.backbone.device)


def _has_stop(row: EncodedRow, decoder: AnswerDecoder, ids: Sequence[int]) -> bool:
    """Whether one of the row's stops stands in the answer, which then needs no more tokens."""
    if not row.stops:
        return False
    text = decoder.text(ids)
    return any(stop in text for stop in row.stops)


def _completion(row: EncodedRow, ids: np.ndarray, decoder: AnswerDecoder) -> Completion:
    """What the ids `[T]` of an answer, without the token that ends it, are as text, cut before the row's first stop."""
    text = decoder.text(ids)
    if any(stop in text for stop in row.stops):
        texts = ((tokens, decoder.text(ids[:tokens])) for tokens in range(1, len(ids) + 1))
        tokens, text = next(found for found in texts if any(stop in found[1] for stop in row.stops))
        cut = min(text.index(stop) for stop in row.stops if stop in text)
        return Completion(text[:cut], row.length, tokens, ended=True)
    ended = len(ids) < row.max_new_tokens
    return Completion(text, row.length, len(ids) + ended, ended)


def _tokens_with_labels(row: EncodedRow) -> int:
    # A label of several tokens is a segment of its own, which attends to prompt and input again.
    longer = sum(len(ids) > 1 for ids in row.labels.values())
    return (row.length + max(map(len, row.labels.values()))) * (1 + longer)


def split_by_budget(lengths: Sequence[int], budget: int) -> Iterator[list[int]]:
    """Places of rows in batches of like length, each at most `budget` tokens when padded to its longest row.

    A row that is longer than the budget makes a batch alone.
    """
    order = np.argsort([-length for length in lengths], kind="stable").tolist()
    while order:
        rows = max(1, budget // lengths[order[0]])
        yield order[:rows]
        order = order[rows:]
