"""From what a caller gives, a task and a text, to token ids behind a prompt. Shapes: T tokens, P prompt tokens."""

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from pipeline.bank import Prompt, PromptRecord
from pipeline.corpus.encoding import encode_inputs, encode_targets, without_embedding
from pipeline.corpus.template import parse_template, render
from pipeline.corpus.values import value_text
from pipeline.errors import CorpusError, NoLabelsError, RowTooLongError
from pipeline.serving.served_backbone import ServedBackbone

Text = str | Mapping[str, Any]
"""A row: the columns that its task's template names, or the text of the one column."""


@dataclass(frozen=True)
class Request:
    """Rows that are answered together, or refused together."""

    texts: Sequence[Text]
    tasks: Sequence[str]
    """Of each row: `name`, `name@3` or `name@alias`."""
    max_new_tokens: int = 64


@dataclass(frozen=True, eq=False)
class EncodedRow:
    """One row as token ids, with the prompt that it runs behind."""

    prompt: Prompt
    input_ids: np.ndarray
    """`[T]`"""
    max_new_tokens: int
    labels: Mapping[str, np.ndarray]
    """Token ids of each label; empty when text is to be generated."""

    @property
    def length(self) -> int:
        """Prompt and input tokens."""
        return len(self.prompt.array) + len(self.input_ids)


def encode_rows(
    request: Request, load: Callable[[str], Prompt], served: ServedBackbone, labelled: bool, longest: int
) -> list[EncodedRow]:
    """Render and tokenise a request's rows; with its answer none may be above `longest` tokens.

    Raises: what `load` raises; NoLabelsError; CorpusError for a row that lacks a column, is empty or has a
    token without an embedding; RowTooLongError.
    """
    prompts = {task: load(task) for task in request.tasks}
    labels = {task: _label_ids(prompt.record, served) if labelled else {} for task, prompt in prompts.items()}
    where = [f"row {number} for task '{task}'" for number, task in enumerate(request.tasks)]
    texts = [
        _rendered(text, prompts[task].record, of_row)
        for text, task, of_row in zip(request.texts, request.tasks, where, strict=True)
    ]
    rows = []
    inputs = encode_inputs(served.tokenizer, served.architecture, texts)
    for ids, task, of_row in zip(inputs, request.tasks, where, strict=True):
        row = EncodedRow(prompts[task], np.array(ids, dtype=np.int64), request.max_new_tokens, labels[task])
        _check_length(row, of_row, longest)
        if (reason := without_embedding(served.tokenizer, ids, served.backbone.embedding_rows)) is not None:
            raise CorpusError(f"{of_row} {reason}")
        rows.append(row)
    return rows


def _rendered(row: Text, record: PromptRecord, where: str) -> str:
    template = parse_template(record.template.input, f"prompt '{record.name}'")
    if isinstance(row, str):
        if len(template.columns) != 1:
            columns = ", ".join(template.columns) or "none"
            raise CorpusError(f"{where} takes not one text but the columns {columns}; give them by name")
        row = {template.columns[0]: row}
    missing = [column for column in template.columns if row.get(column) is None]
    if missing:
        raise CorpusError(f"{where} needs the column(s) {', '.join(missing)}")
    text = render(template, {column: value_text(row[column]) for column in template.columns})
    try:
        text.encode()
    except UnicodeEncodeError as error:
        raise CorpusError(f"{where} holds half a character (a lone surrogate); send whole Unicode text") from error
    return text


def _label_ids(record: PromptRecord, served: ServedBackbone) -> Mapping[str, np.ndarray]:
    if not record.labels:
        raise NoLabelsError(f"prompt '{record.name}' was tuned without a label set; use generate")
    ids = encode_targets(served.tokenizer, served.architecture, record.template.separator, record.labels)
    for label, of_label in zip(record.labels, ids, strict=True):
        if (reason := without_embedding(served.tokenizer, of_label, served.backbone.embedding_rows)) is not None:
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
