"""The work that both sides do: tasks, their rows, and which rows every step takes."""

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.encoding import encode_inputs, encode_targets
from pipeline.corpus.reader import TokenSet
from pipeline.errors import CorpusError
from pipeline.settings import TaskSettings
from pipeline.tuning.batches import rows_of_step
from pipeline.tuning.trials import Trial, make_trial

_LONGEST_INPUT = 256


@dataclass(frozen=True)
class TaskWork:
    trial: Trial
    train: TokenSet

    def rows(self, step: int) -> np.ndarray:
        """Row numbers of a step, the same on both sides."""
        return rows_of_step(self.trial, len(self.train), step)

    def text_tokens(self, step: int) -> int:
        """Input and target tokens of a step, padding and prompt not counted."""
        return sum(len(self.train.input_ids(row)) + len(self.train.target_ids(row)) for row in self.rows(step))


def load_work(
    data: Path, names: Sequence[str], tokenizer: Any, architecture: Any, length: int, batch_size: int, rows: int
) -> list[TaskWork]:
    """Tasks of `data/<name>/train.parquet` with the columns text and label. Raises: CorpusError."""
    work = []
    for name in names:
        path = data / name / "train.parquet"
        try:
            table = pq.read_table(path, columns=["text", "label"]).slice(0, rows)
        except (OSError, pa.ArrowInvalid) as error:
            raise CorpusError(f"{path} cannot be read as Parquet with the columns text and label: {error}") from error
        settings = TaskSettings.model_validate(
            {
                "train": "in memory",
                "dev": "in memory",
                "prompt": {"length": length},
                "batch_size": batch_size,
                # A low rate, so that the sides' losses can be compared step by step.
                "optimizer": {"name": "adafactor", "lr": 0.001},
            }
        )
        texts, labels = (table[column].to_pylist() for column in ("text", "label"))
        trial = make_trial(name, settings, 0, "benchmark", "benchmark")
        work.append(TaskWork(trial, _token_set(tokenizer, architecture, texts, [str(label) for label in labels])))
    return work


def _token_set(tokenizer: Any, architecture: Any, texts: list[str], labels: list[str]) -> TokenSet:
    inputs = [ids[:_LONGEST_INPUT] for ids in encode_inputs(tokenizer, architecture, texts)]
    targets = encode_targets(tokenizer, architecture, " ", labels)
    flat = [np.concatenate(rows).astype(np.int32) for rows in (inputs, targets)]
    offsets = [
        np.concatenate([[0], np.cumsum([len(row) for row in rows])]).astype(np.int64) for rows in (inputs, targets)
    ]
    ids = np.arange(len(texts), dtype=np.uint64)
    return TokenSet(ids, flat[0], offsets[0], flat[1], offsets[1], pa.array(labels, pa.large_string()))
