"""Turns what a caller gives, a task and a text, into token ids behind a prompt. Shapes: T tokens, P prompt tokens."""

import json
import sys
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any
from weakref import WeakKeyDictionary

import numpy as np

from pipeline.backbone.rows import NO_TOKENS, common_beginnings
from pipeline.bank import Prompt, PromptRecord
from pipeline.corpus.chat import ChatInput, ModelChat, recorded_chat, recorded_input
from pipeline.corpus.encoding import encode_inputs, encode_targets, missing_embedding
from pipeline.corpus.template import TextTemplate, render_row
from pipeline.corpus.values import value_text
from pipeline.errors import BankError, CorpusError, NoLabelsError, RowTooLongError
from pipeline.serving.served_backbone import ServedText

Text = str | Mapping[str, Any]
"""A row: a mapping with the columns that its task's template names, or the text of its only column."""


@dataclass(frozen=True)
class Request:
    """Rows that are answered together, or refused together."""

    texts: Sequence[Text]
    tasks: Sequence[str]
    """Of each row: `name`, `name@3` or `name@alias`."""
    max_new_tokens: int = 64
    """Longest answer."""
    shorten: bool = False
    """Whether answers are shorter where prompt and input leave less room; else such a row is refused."""
    stops: Sequence[str] = ()
    """An answer ends before the first of these that it has."""


@dataclass(frozen=True, eq=False)
class EncodedRow:
    """One row as token ids, with the prompt that it runs behind."""

    prompt: Prompt
    input_ids: np.ndarray
    """`[T]`"""
    max_new_tokens: int
    labels: Mapping[str, np.ndarray]
    """Token ids of each label; empty when text is to be generated."""
    end: int
    """The token that ends an answer."""
    stops: Sequence[str] = ()
    """Texts that an answer ends before."""

    @property
    def length(self) -> int:
        """Prompt and input tokens."""
        return len(self.prompt.array) + len(self.input_ids)


class PromptTexts:
    """What prompts' records tell of their rows' texts, as one model writes them: read once a prompt, not once a row."""

    def __init__(self, served: ServedText) -> None:
        self.served = served
        self._templates: WeakKeyDictionary[Prompt, TextTemplate | ChatInput] = WeakKeyDictionary()
        self._chats: WeakKeyDictionary[Prompt, ModelChat | None] = WeakKeyDictionary()
        self._labels: WeakKeyDictionary[Prompt, Mapping[str, np.ndarray]] = WeakKeyDictionary()

    def template(self, prompt: Prompt) -> TextTemplate | ChatInput:
        """Raises: CorpusError."""
        if prompt not in self._templates:
            self._templates[prompt] = recorded_input(prompt.record.template, f"prompt '{prompt.record.name}'")
        return self._templates[prompt]

    def chat(self, prompt: Prompt) -> ModelChat | None:
        """None for a prompt whose input is one text. Raises: BankError."""
        if prompt not in self._chats:
            self._chats[prompt] = _chat(prompt.record, self.served)
        return self._chats[prompt]

    def labels(self, prompt: Prompt) -> Mapping[str, np.ndarray]:
        """Token ids `[T]` of each label. Raises: NoLabelsError, CorpusError."""
        if prompt not in self._labels:
            self._labels[prompt] = _label_ids(prompt.record, self.served, self.chat(prompt))
        return self._labels[prompt]


def encode_rows(
    request: Request, load: Callable[[str], Prompt], told: PromptTexts, labelled: bool, longest: int
) -> list[EncodedRow]:
    """Render and tokenise a request's rows; prompt, input and answer together may be `longest` tokens.

    Raises: what `load` raises; NoLabelsError; CorpusError for a row that lacks a column, is empty or has a
    token without an embedding; BankError for a prompt whose chat this model's template writes otherwise;
    RowTooLongError.
    """
    served = told.served
    prompts = {task: load(task) for task in request.tasks}
    chats = {task: told.chat(prompt) for task, prompt in prompts.items()}
    labels = {task: told.labels(prompt) if labelled else {} for task, prompt in prompts.items()}
    where = [f"row {number} for task '{task}'" for number, task in enumerate(request.tasks)]
    texts = [
        _rendered(text, told.template(prompts[task]), chats[task], of_row)
        for text, task, of_row in zip(request.texts, request.tasks, where, strict=True)
    ]
    rows = []
    for ids, task, of_row in zip(_encoded(texts, request.tasks, chats, served), request.tasks, where, strict=True):
        chat = chats[task]
        end = served.tokenizer.eos_token_id if chat is None else chat.end_id
        most = request.max_new_tokens
        if request.shorten:
            most = max(1, min(most, longest - len(prompts[task].array) - len(ids)))
        row = EncodedRow(prompts[task], np.array(ids, dtype=np.int64), most, labels[task], end, request.stops)
        _check_length(row, of_row, longest)
        if (reason := missing_embedding(served.tokenizer, ids, served.embedding_rows)) is not None:
            raise CorpusError(f"{of_row} {reason}")
        rows.append(row)
    return rows


def template_beginning(prompt: Prompt, told: PromptTexts) -> np.ndarray:
    """The tokens `[T]` that rows of a prompt's template begin with, whatever is in their columns; may be none."""
    probes = [dict.fromkeys(told.template(prompt).columns, text) for text in ("a", "7")]
    request = Request(probes, [prompt.record.name] * 2)
    try:
        one, other = encode_rows(request, lambda _: prompt, told, labelled=False, longest=sys.maxsize)
    except CorpusError:  # a vocabulary without these, or a chat template that refuses them
        return NO_TOKENS
    (tokens,) = common_beginnings([one.input_ids, other.input_ids], [0, 0], 1)
    return one.input_ids[:tokens]


def _encoded(
    texts: Sequence[str], tasks: Sequence[str], chats: Mapping[str, ModelChat | None], served: ServedText
) -> list[list[int]]:
    """[B][T] ids; texts that are no chats go to the tokenizer together."""
    rows: list[list[int]] = [[] for _ in texts]
    for chat in {id(chat): chat for chat in chats.values()}.values():
        places = [place for place, task in enumerate(tasks) if chats[task] is chat]
        ids = encode_inputs(served.tokenizer, served.architecture, [texts[place] for place in places], chat)
        for place, of_row in zip(places, ids, strict=True):
            rows[place] = of_row
    return rows


def _chat(record: PromptRecord, served: ServedText) -> ModelChat | None:
    """The prompt's chat as this model writes it; None for a prompt whose input is one text.

    Raises: BankError when the model has another chat template than the one that the prompt was tuned with.
    """
    form = record.template.chat
    if form is None:
        return None
    where = f"prompt '{record.name}'"
    try:
        chat = recorded_chat(served.tokenizer, record.template.input, json.dumps(dict(form.options)))
    except CorpusError as error:
        raise BankError(f"{where} was tuned on a chat, and {error}") from error
    if chat.form != form:
        parts = {
            name: (getattr(form, name), getattr(chat.form, name)) for name in ("template", "options", "lead", "end")
        }
        name, (had, has) = next((name, both) for name, both in parts.items() if both[0] != both[1])
        what = f"SHA-256 {had[:12]}, here {has[:12]}" if name == "template" else f"its {name} is {had!r}, here {has!r}"
        raise BankError(
            f"{where} was tuned with another chat template than {served.identity.model} has here ({what}), so its "
            "input would differ; give the model the template that it had, or tune the prompt again"
        )
    return chat


def _rendered(row: Text, template: TextTemplate | ChatInput, chat: ModelChat | None, where: str) -> str:
    if isinstance(row, str):
        if len(template.columns) != 1:
            columns = ", ".join(template.columns) or "none"
            raise CorpusError(f"{where} takes not one text but the columns {columns}; give them by name")
        row = {template.columns[0]: row}
    missing = [column for column in template.columns if row.get(column) is None]
    if missing:
        raise CorpusError(f"{where} needs the column(s) {', '.join(missing)}")
    values = {column: value_text(row[column]) for column in template.columns}
    if isinstance(template, TextTemplate):
        text = render_row(template, values)
    else:
        assert chat is not None, "a record with messages has a chat"
        try:
            (text,) = chat.render([[render_row(message.content, values) for message in template.messages]])
        except CorpusError as error:
            raise CorpusError(f"{where}: {error}") from error
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"{where} holds half a character (a lone surrogate); send whole Unicode text") from error
    return text


def _label_ids(record: PromptRecord, served: ServedText, chat: ModelChat | None) -> Mapping[str, np.ndarray]:
    if not record.labels:
        raise NoLabelsError(f"prompt '{record.name}' was tuned without a label set; use generate")
    ids = encode_targets(served.tokenizer, served.architecture, record.template.separator, record.labels, chat)
    for label, of_label in zip(record.labels, ids, strict=True):
        if (reason := missing_embedding(served.tokenizer, of_label, served.embedding_rows)) is not None:
            raise CorpusError(f"prompt '{record.name}': its label {label!r} {reason}")
    return {label: np.array(of_label, dtype=np.int64) for label, of_label in zip(record.labels, ids, strict=True)}


def _check_length(row: EncodedRow, where: str, longest: int) -> None:
    if len(row.input_ids) == 0:
        raise CorpusError(f"{where} is empty; give it some text")
    more = max((len(ids) for ids in row.labels.values()), default=row.max_new_tokens)
    if row.length + more > longest:
        raise RowTooLongError(
            f"{where} is too long: prompt, input and answer may be {row.length + more} tokens "
            f"where {longest} fit; shorten the text"
        )
