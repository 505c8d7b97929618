"""The work of both sides: tasks, their rows, and the rows of every step."""

from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
from transformers import PretrainedConfig

from pipeline.corpus.encoding import encode_inputs, encode_targets
from pipeline.corpus.reader import SplitRef
from pipeline.corpus.rows import Recipe, tokenise_rows
from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.corpus.template import parse_template
from pipeline.corpus.token_set import TokenSet, flat_column
from pipeline.corpus.writing import write_rows
from pipeline.errors import CorpusError
from pipeline.settings import TaskSettings
from pipeline.tuning.batches import rows_of_step
from pipeline.tuning.trials import Trial, make_trial

_LONGEST_INPUT = 256
_SEPARATOR = " "
_INSTRUCTION = (
    "You read short texts that people wrote and decide which of the labels fits each one best. Read the whole text "
    "before you decide, weigh what the writer means and not single words, and answer with one label and nothing else. "
)


@dataclass(frozen=True)
class WorkOptions:
    length: int
    """Length of every prompt."""
    batch_size: int
    """Rows a step of every task."""
    rate: float = 0.001
    """A low rate by default, so that the sides' losses can be compared step by step."""
    seeds: int = 1
    """Trials of every task."""
    rows: int = 1_000
    """Train rows of every task, at most."""
    dev_rows: int = 0
    instruction: int = 0
    """Tokens of an instruction that every input begins with."""


@dataclass(frozen=True)
class TaskWork:
    trial: Trial
    train: TokenSet
    dev: TokenSet | None
    labels: tuple[str, ...]
    label_ids: tuple[tuple[int, ...], ...]

    def rows(self, step: int) -> np.ndarray:
        """Row numbers of a step, which are the same on both sides."""
        return rows_of_step(self.trial, self.train, step)

    def text_tokens(self, step: int) -> int:
        """Input and target tokens of a step, without padding and prompt."""
        return sum(len(self.train.input_ids(row)) + len(self.train.target_ids(row)) for row in self.rows(step))


def load_work(
    data: Path, names: Sequence[str], tokenizer: Any, architecture: Any, options: WorkOptions
) -> list[TaskWork]:
    """Tasks of `data/<name>/{train,dev}.parquet` with the columns text and label; a name may occur several times.

    Raises: CorpusError.
    """
    settings = _settings(options)
    splits: dict[str, tuple[TokenSet, TokenSet | None]] = {}
    work = []
    beginning: list[int] = []
    if options.instruction:
        (words,) = encode_inputs(tokenizer, architecture, [_INSTRUCTION * (1 + options.instruction // 30)])
        beginning = words[: options.instruction]
    read = partial(_token_set, tokenizer, architecture, beginning)
    for place, name in enumerate(names):
        if name not in splits:
            train, dev = read(data / name / "train.parquet", options.rows), options.dev_rows
            splits[name] = (train, read(data / name / "dev.parquet", dev) if dev else None)
        train, held_out = splits[name]
        labels = tuple(train.rows_by_target)
        label_ids = tuple(tuple(ids) for ids in encode_targets(tokenizer, architecture, _SEPARATOR, labels))
        for seed in range(options.seeds):
            # Another seed for each trial of a name, so that it draws other rows.
            own = seed + options.seeds * names[:place].count(name)
            trial = make_trial(name, settings, own, "benchmark", "benchmark")
            work.append(TaskWork(trial, train, held_out, labels, label_ids))
    return work


def _settings(options: WorkOptions) -> TaskSettings:
    return TaskSettings.model_validate(
        {
            "train": "in memory",
            "dev": "in memory",
            "prompt": {"length": options.length},
            "batch_size": options.batch_size,
            "optimizer": {"name": "adafactor", "lr": options.rate, "schedule": "constant"},
        }
    )


def random_work(
    count: int,
    vocabulary: int,
    options: WorkOptions,
    input_tokens: tuple[int, int] = (4, 12),
    target_tokens: tuple[int, int] = (1, 4),
) -> list[TaskWork]:
    """`count` tasks of random tokens, whose rows have from the first to the second number of tokens, both included."""
    settings = _settings(options)
    return [
        TaskWork(
            make_trial(f"task{place}", settings, place, "benchmark", "benchmark"),
            _random_rows(np.random.default_rng(place), vocabulary, options.rows, (input_tokens, target_tokens)),
            None,
            (),
            (),
        )
        for place in range(count)
    ]


def _random_rows(
    rng: np.random.Generator, vocabulary: int, rows: int, between: tuple[tuple[int, int], tuple[int, int]]
) -> TokenSet:
    lengths = [rng.integers(least, most + 1, rows) for least, most in between]
    texts = pa.array([""] * rows, pa.large_string())
    inputs, targets = (
        flat_column(rng.integers(3, vocabulary, of.sum()).astype(np.int32), np.concatenate([[0], np.cumsum(of)]), texts)
        for of in lengths
    )
    return TokenSet(np.arange(rows, dtype=np.uint64), inputs, targets)


def needed_tokens(
    config: PretrainedConfig, tasks: Sequence[TaskWork], prompts: Sequence[np.ndarray], steps: int
) -> float:
    """Tokens that a step must compute at least: each row's text once, and each prompt `[P, H]` once. An encoder reads
    the prompt again with each row.
    """
    text = sum(task.text_tokens(step) for task in tasks for step in range(steps)) / steps
    rows = [task.trial.settings.batch_size if config.is_encoder_decoder else 1 for task in tasks]
    return text + sum(len(prompt) * count for prompt, count in zip(prompts, rows, strict=True))


def write_token_shards(
    folder: Path, data: Path, name: str, tokenizer: Any, architecture: Any, dev_rows: int, rows: int = 1_000
) -> TaskCorpus:
    """Token shards, made without Ray, of the first rows of `data/<name>/{train,dev}.parquet`. Raises: CorpusError."""
    recipe = Recipe(parse_template("{text}", ""), parse_template("{label}", ""), _SEPARATOR, 256, 16, architecture)
    splits, counts, labels = {}, {}, set()
    for split, most in (("train", rows), ("dev", dev_rows)):
        texts, found = read_rows(data / name / f"{split}.parquet", most)
        labels |= set(found)
        place = folder / name / split
        write_rows(place, tokenise_rows(recipe, tokenizer, {"text": texts, "label": found}, len(texts)))
        splits[split], counts[split] = SplitRef(str(place)), {"ok": len(texts)}
    ordered = tuple(sorted(labels))
    ids = encode_targets(tokenizer, architecture, _SEPARATOR, ordered)
    return TaskCorpus(name, splits, ordered, tuple(map(tuple, ids)), counts, f"benchmark {name}")


def read_rows(path: Path, rows: int) -> tuple[list[str], list[str]]:
    """Texts and labels of a file's first rows. Raises: CorpusError."""
    try:
        table = pq.read_table(path, columns=["text", "label"]).slice(0, rows)
    except (OSError, pa.ArrowInvalid) as error:
        raise CorpusError(f"{path} cannot be read as Parquet with the columns text and label: {error}") from error
    return table["text"].to_pylist(), [str(label) for label in table["label"].to_pylist()]


def _token_set(tokenizer: Any, architecture: Any, beginning: list[int], path: Path, rows: int) -> TokenSet:
    texts, labels = read_rows(path, rows)
    inputs = [[*beginning, *ids[:_LONGEST_INPUT]] for ids in encode_inputs(tokenizer, architecture, texts)]
    targets = encode_targets(tokenizer, architecture, _SEPARATOR, labels)
    flat = [np.concatenate(rows).astype(np.int32) for rows in (inputs, targets)]
    offsets = [
        np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64) for rows in (inputs, targets)
    ]
    ids = np.arange(len(texts), dtype=np.uint64)
    texts_of = pa.array(labels, pa.large_string())
    return TokenSet(ids, flat_column(flat[0], offsets[0]), flat_column(flat[1], offsets[1], texts_of))
