"""Questions to the ranks after tuning, each a prompt before every row of a split, and the answers that are kept.

A file of answers is named by the digest of all that decides them, so a question is never answered twice.
"""

import hashlib
import json
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Literal

import numpy as np
from safetensors.numpy import load, save

from pipeline.errors import StorageError
from pipeline.lab.comparison.tensor_files import load_tensors, save_tensors
from pipeline.tuning.evaluate import Answers, EvalRequest, score_texts
from pipeline.whole_files import write_atomically

Split = Literal["dev", "test"]


@dataclass(frozen=True)
class SplitQuestion:
    """A prompt or text to put before every row of a task's split; plain values, for ranks."""

    task: str
    """Whose rows are answered, with its labels and by its metric."""
    split: Split
    rows: int | None
    """At most so many rows, a fixed random subset; None for all."""
    prompt: str | None = None
    """Digest of a prompt that `save_prompt` wrote."""
    text: str | None = None
    """Or the words that stand before every row."""

    def digest(self, *surroundings: str) -> str:
        """surroundings: all else that decides the answers, such as corpus, backbone and products."""
        parts = json.dumps([asdict(self), *surroundings], sort_keys=True)
        return hashlib.sha256(parts.encode()).hexdigest()[:32]


@dataclass(frozen=True)
class SplitAnswers:
    """A split's answers, N rows in their order."""

    nll: np.ndarray
    """[N] nats of each row's target."""
    lengths: np.ndarray
    """[N] tokens of each target."""
    targets: list[str]
    texts: list[str] | None
    """None for the metric `loss`."""
    label_scores: np.ndarray | None
    """[N, L] log P of each label, for metrics of labels."""
    labels: tuple[str, ...] | None

    @property
    def loss(self) -> float:
        return float(self.nll.sum() / self.lengths.sum())

    def only(self, rows: np.ndarray) -> "SplitAnswers":
        """The answers of some rows; rows: `[N]` whether to keep a row."""
        places = np.flatnonzero(rows)
        return SplitAnswers(
            nll=self.nll[places],
            lengths=self.lengths[places],
            targets=[self.targets[place] for place in places],
            texts=None if self.texts is None else [self.texts[place] for place in places],
            label_scores=None if self.label_scores is None else self.label_scores[places],
            labels=self.labels,
        )

    def value(self, metric: str) -> float:
        """The task's metric."""
        return self.loss if self.texts is None else score_texts(metric, self.texts, self.targets)


def to_split_answers(request: EvalRequest, answers: Answers) -> SplitAnswers:
    """The part of a request's answers that is kept."""
    lengths = request.split.target_lengths
    return SplitAnswers(answers.nll, lengths, answers.wanted, answers.texts, answers.label_scores, request.labels)


def save_prompt(folder: Path, prompt: np.ndarray) -> str:
    """Write a prompt `[P, H]` where the ranks read it; returns its digest. Raises: StorageError."""
    data = save({"prompt": np.ascontiguousarray(prompt, np.float32)})
    digest = hashlib.sha256(data).hexdigest()[:32]
    path = folder / "prompts" / f"{digest}.safetensors"
    if not path.exists() or path.read_bytes() != data:
        write_atomically(path, data)
    return digest


def load_prompt(folder: Path, digest: str) -> np.ndarray:
    """The prompt `[P, H]` that `save_prompt` wrote. Raises: StorageError."""
    path = folder / "prompts" / f"{digest}.safetensors"
    try:
        data = path.read_bytes()
    except OSError as error:
        raise StorageError(f"cannot read {path}: {error}; start the comparison again") from error
    if hashlib.sha256(data).hexdigest()[:32] != digest:
        raise StorageError(f"{path} is damaged: its content is not that of its name; start the comparison again")
    prompt: np.ndarray = load(data)["prompt"]
    return prompt


def answer_paths(
    run_folder: str, questions: Sequence[SplitQuestion], digests: Sequence[str]
) -> dict[SplitQuestion, Path]:
    """The file of a phase with the answers to each question; digests: by question."""
    files = Path(run_folder) / "files"
    return {q: files / f"{digest}.safetensors" for q, digest in zip(questions, digests, strict=True)}


def save_answers(path: Path, answered: SplitAnswers) -> None:
    """Raises: StorageError."""
    arrays = {"nll": answered.nll, "lengths": answered.lengths}
    if answered.label_scores is not None:
        arrays["label_scores"] = np.ascontiguousarray(answered.label_scores)
    values = {"targets": answered.targets, "texts": answered.texts, "labels": answered.labels}
    save_tensors(path, arrays, values, save)


def load_answers(path: Path) -> SplitAnswers | None:
    """The answers; None where the file is missing or damaged."""
    found = load_tensors(path, load)
    if found is None:
        return None
    values, arrays = found
    labels = None if values["labels"] is None else tuple(values["labels"])
    return SplitAnswers(
        arrays["nll"], arrays["lengths"], values["targets"], values["texts"], arrays.get("label_scores"), labels
    )


def all_answers(paths: Mapping[SplitQuestion, Path]) -> dict[SplitQuestion, SplitAnswers] | None:
    """The answers to all questions; None while some are missing."""
    found = {}
    for question, path in paths.items():
        answered = load_answers(path)
        if answered is None:
            return None
        found[question] = answered
    return found
