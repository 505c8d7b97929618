"""Tiny real corpora and a tiny real tokenizer, made in the test."""

from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from tokenizers import Tokenizer, decoders, models, pre_tokenizers, processors, trainers
from transformers import PreTrainedTokenizerFast

from pipeline.settings import TaskSettings

LINES = ["a good film about a bad story", "the actor is good, the plot is bad", "positive negative 0 1 2"]


def save_tokenizer(folder: Path, ends_inputs: bool = False, has_eos: bool = True) -> Path:
    """A byte-level BPE, so that every text, spaces included, has its own tokens; `ends_inputs` as T5's does."""
    tokenizer = Tokenizer(models.BPE())
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False)
    tokenizer.decoder = decoders.ByteLevel()
    alphabet = pre_tokenizers.ByteLevel.alphabet()
    tokenizer.train_from_iterator(
        LINES, trainers.BpeTrainer(vocab_size=320, special_tokens=["</s>"], initial_alphabet=alphabet)
    )
    if ends_inputs:
        tokenizer.post_processor = processors.TemplateProcessing(single="$A </s>", special_tokens=[("</s>", 0)])
    named: dict[str, Any] = {"eos_token": "</s>"} if has_eos else {}
    PreTrainedTokenizerFast(tokenizer_object=tokenizer, **named).save_pretrained(folder)
    return folder


@pytest.fixture(scope="session")
def tokenizer_dir(tmp_path_factory: pytest.TempPathFactory) -> Iterator[Path]:
    yield save_tokenizer(tmp_path_factory.mktemp("tokenizer"))


@pytest.fixture(scope="session")
def make_task() -> Callable[..., TaskSettings]:
    def make(train: Path | str | list[str], **settings: Any) -> TaskSettings:
        paths = {"train": train, **settings}
        return TaskSettings(**{key: str(value) if isinstance(value, Path) else value for key, value in paths.items()})

    return make


@pytest.fixture(scope="session")
def write() -> Callable[..., Path]:
    def write_rows(path: Path, rows: list[dict[str, Any]], **options: Any) -> Path:
        path.parent.mkdir(parents=True, exist_ok=True)
        pq.write_table(pa.Table.from_pylist(rows), path, **options)
        return path

    return write_rows
