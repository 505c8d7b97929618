"""Context distillation: the frozen model behind many words teaches the same model behind a short soft prompt.

The words are an instruction, a document or solved rows, and the prompt learns to stand for them (Askell et al. 2021, "A
General Language Assistant as a Laboratory for Alignment"; Snell et al. 2022, "Learning by Distilling Context"). There,
all weights learn; here the prompt alone.

The words' embeddings stand before a row as a soft prompt does, and no gradient goes there. They are tokenised by
themselves, with the special tokens that the tokenizer puts before a text, and the row that follows has its own tokens
without those: where words and row would have merged into one token, they do not.

Shapes: Q tokens of the words, H hidden.
"""

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
import pyarrow as pa
import torch
from torch import Tensor

from pipeline.backbone.host import Backbone
from pipeline.corpus.encoding import Architecture, added_tokens, decode_inputs, encode_inputs
from pipeline.corpus.token_set import TokenSet, flat_column
from pipeline.settings import TaskSettings, TeacherSettings
from pipeline.tuning.trials import Trial


@dataclass(frozen=True, eq=False)
class Teacher:
    """What teaches a trial's prompt, beside the labels."""

    words: Tensor
    """`[Q, H]`: the embeddings of the words, which stand where the student has its prompt."""
    shown: frozenset[int]
    """Ids of the rows that are among the words, solved. What the teacher says of one of them is copied, so such a row
    teaches by its label alone."""
    skipped: int
    """Tokens that begin every row and, behind words, would stand in the middle of a text."""

    def teaches(self, split: TokenSet, row: int) -> bool:
        return int(split.row_ids[row]) not in self.shown

    def input_ids(self, split: TokenSet, row: int) -> np.ndarray:
        """`[T]` the row's tokens behind the words; an empty row keeps its special ones."""
        ids = split.input_ids(row)
        return ids[self.skipped :] if len(ids) > self.skipped else ids


def asked_at_labels(unlabelled: TokenSet, labels: Sequence[str], label_ids: Sequence[Sequence[int]]) -> TokenSet:
    """Unlabelled rows, each with one of the task's labels where a target stands, at whose tokens the teacher is asked.

    label_ids: `[labels][T]`. A row's own content decides which label that is, and so it is the same on every rank and
    in every step. It decides little: before the first token of any label stands the same context, the input, and there
    the teacher's whole distribution is learned. The drawn label only stands before its own later tokens.
    """
    offsets = np.cumsum([0, *map(len, label_ids)])
    targets = flat_column(np.concatenate(label_ids).astype(np.int32), offsets, pa.array(labels, pa.large_string()))
    # Ids are hashes of the inputs. Only a label's number is held for each row, a byte or two.
    drawn = (unlabelled.row_ids % np.uint64(len(labels))).astype(np.min_scalar_type(len(labels)))
    return replace(unlabelled, targets=targets.take(drawn))


TeacherKey = tuple[str, int | None, TeacherSettings]


def teacher_key(trial: Trial) -> TeacherKey | None:
    """What decides a trial's teacher, if it has one: trials of a sweep may share theirs."""
    teacher = trial.settings.teacher
    if teacher is None:
        return None
    words = teacher.model_copy(update={"weight": 1.0, "unlabelled": None})
    return trial.task, None if teacher.examples is None else trial.seed, words


def make_teacher(trial: Trial, backbone: Backbone, tokenizer: Any, train: TokenSet) -> Teacher:
    """The teacher of a trial's prompt. Every rank makes the same one, in the same order."""
    settings = trial.settings
    shown = drawn_examples(trial, len(train))
    ids = teacher_ids(settings, train, shown, tokenizer, backbone.architecture)
    skipped, _ = added_tokens(tokenizer, backbone.architecture)
    row_ids = frozenset(int(train.row_ids[row]) for row in shown)
    return Teacher(backbone.embed(torch.as_tensor(ids)), row_ids, skipped)


def drawn_examples(trial: Trial, rows: int) -> np.ndarray:
    """Numbers `[teacher.examples]` of the train rows, of so many, that a trial's teacher sees solved."""
    count = trial.settings.teacher.examples if trial.settings.teacher else None
    return trial.generator("teacher").choice(rows, min(count or 0, rows), replace=False)


def teacher_ids(
    settings: TaskSettings,
    train: TokenSet | None,
    shown: Sequence[int] | np.ndarray,
    tokenizer: Any,
    architecture: Architecture,
) -> list[int]:
    """The tokens `[Q]` of a teacher's words, of which the solved rows of `shown` are the last."""
    teacher = settings.teacher
    assert teacher is not None
    solved = []
    if train is not None and len(shown):
        solved = solved_rows(train, shown, settings.separator, tokenizer, architecture)
    text = joined([*([] if teacher.text is None else [teacher.text]), *solved], teacher.between)
    (ids,) = encode_inputs(tokenizer, architecture, [text])
    _, behind = added_tokens(tokenizer, architecture)  # an encoder's eos stands behind the row
    return ids[: len(ids) - behind]


def solved_rows(
    train: TokenSet, rows: Sequence[int] | np.ndarray, separator: str, tokenizer: Any, architecture: Architecture
) -> list[str]:
    """Texts of inputs, each with its target behind it."""
    inputs = decode_inputs(tokenizer, architecture, [train.input_ids(int(row)).tolist() for row in rows])
    return [text + separator + train.target(int(row)) for text, row in zip(inputs, rows, strict=True)]


def joined(parts: Sequence[str], between: str) -> str:
    return "".join(part + between for part in parts)
