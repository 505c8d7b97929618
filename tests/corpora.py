"""Small corpora as token shards, written without Ray, and the trials that learn them."""

from dataclasses import replace
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.corpus import writing
from pipeline.corpus.chat import ModelChat
from pipeline.corpus.encoding import encode_targets
from pipeline.corpus.reader import SplitRef
from pipeline.corpus.rows import Recipe, tokenise_rows
from pipeline.corpus.task_corpus import UNLABELLED, TaskCorpus
from pipeline.corpus.template import parse_template
from pipeline.settings import TaskSettings
from pipeline.tuning.trials import Trial, make_trial
from tests.tiny import WORDS

TOPICS = {"positive": ("good", "great", "fine"), "negative": ("bad", "awful", "poor")}


def reviews(rows: int, seed: int) -> list[tuple[str, str]]:
    """Texts of 2 to 9 words, one of which decides the label."""
    rng = np.random.default_rng(seed)
    out = []
    for _ in range(rows):
        label = str(rng.choice(list(TOPICS)))
        words = [str(rng.choice(TOPICS[label])), *map(str, rng.choice(WORDS[8:17], rng.integers(1, 9)))]
        out.append((" ".join(rng.permutation(words)), label))
    return out


def write_split(
    folder: Path, tokenizer: Any, architecture: Any, pairs: list[tuple[str, str]], chat: ModelChat | None = None
) -> SplitRef:
    asked = chat or parse_template("{text}", "")
    recipe = Recipe(asked, parse_template("{label}", ""), " ", 256, 16, architecture)
    columns = {"text": [text for text, _ in pairs], "label": [label for _, label in pairs]}
    return write_rows(folder, tokenise_rows(recipe, tokenizer, columns, len(pairs)))


def write_rows(folder: Path, rows: pa.Table) -> SplitRef:
    """A shard folder of one shard."""
    writing.write_rows(folder, rows)
    return SplitRef(str(folder))


def write_unlabelled(folder: Path, tokenizer: Any, architecture: Any, texts: list[str]) -> SplitRef:
    """Rows of a teacher that have no target."""
    asked = Recipe(parse_template("{text}", ""), None, "", 256, 0, architecture, unlabelled=True)
    return write_rows(folder, tokenise_rows(asked, tokenizer, {"text": texts}, len(texts)))


def make_corpus(
    folder: Path, tokenizer: Any, architecture: Any, task: str, seed: int = 0, rows: int = 40, unlabelled: int = 0
) -> TaskCorpus:
    """A task of random reviews with train, dev and test splits, and some rows without targets."""
    splits = {name: reviews(rows, 10 * seed + i) for i, name in enumerate(("train", "dev", "test"))}
    corpus = task_corpus(folder, tokenizer, architecture, task, splits)
    if not unlabelled:
        return corpus
    texts = [text for text, _ in reviews(unlabelled, 10 * seed + 3)]
    ref = write_unlabelled(folder / task / UNLABELLED, tokenizer, architecture, texts)
    return replace(corpus, splits={**corpus.splits, UNLABELLED: ref})


def task_corpus(
    folder: Path,
    tokenizer: Any,
    architecture: Any,
    task: str,
    splits: dict[str, list[tuple[str, str]]],
    chat: ModelChat | None = None,
) -> TaskCorpus:
    """A task's splits as token shards; its labels are the targets of train."""
    labels = tuple(sorted({label for _, label in splits["train"]}))
    ids = encode_targets(tokenizer, architecture, " ", labels, chat)
    refs = {
        name: write_split(folder / task / name, tokenizer, architecture, pairs, chat) for name, pairs in splits.items()
    }
    counts = {name: {"ok": len(pairs)} for name, pairs in splits.items()}
    return TaskCorpus(task, refs, labels, tuple(map(tuple, ids)), counts, f"digest of {task}")


def make_task(**changes: Any) -> TaskSettings:
    """Settings of a short trial; nested mappings such as `prompt` are given whole."""
    short = {
        "train": "unused",
        "dev": "unused",
        "prompt": {"length": 4},
        "optimizer": {"name": "adafactor", "lr": 0.1},
        "batch_size": 6,
        "max_steps": 20,
        "eval_every": 10,
        "eval_rows": 12,
        "max_target_tokens": 6,
    }
    return TaskSettings.model_validate({**short, **changes})


def trial(name: str, corpus: TaskCorpus, **changes: Any) -> Trial:
    return make_trial(name, make_task(**changes), 0, corpus.digest, "backbone")
