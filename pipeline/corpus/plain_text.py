"""A corpus of plain text: Parquet -> token shards, as for a task's corpus -> one long array of tokens."""

from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from pipeline.corpus.encoding import TokenizerSpec
from pipeline.corpus.files import inspect_files
from pipeline.corpus.reader import SplitRef, open_split, summarise_split
from pipeline.corpus.rows import Recipe
from pipeline.corpus.source_files import ParquetSource
from pipeline.corpus.template import TextTemplate, check_class_names, check_columns, parse_template
from pipeline.corpus.token_set import Int32
from pipeline.corpus.values import find_integer_columns
from pipeline.errors import CorpusError
from pipeline.settings import TextSettings

_NO_LIMIT = 2**31 - 1
_WHERE = "corpus"
_LEFT_OUT = {"input_long": "over 16 MiB", "no_embedding": "with a token without an embedding"}


@dataclass(frozen=True)
class TextPlan:
    """What is known of the corpus before anything is tokenised."""

    source: ParquetSource
    text: TextTemplate
    integer_columns: Mapping[str, str]
    """Columns whose floats are written as integers: see `find_integer_columns`."""


@dataclass(frozen=True)
class TextCorpus:
    """Token shards of documents; plain data, so that it travels to workers."""

    dir: str
    counts: Mapping[str, int]
    """Documents by status: ok, null, empty; input_long and no_embedding if there are any."""
    digest: str
    """Digest of the documents: the same documents in other files give the same digest."""

    @property
    def left_out(self) -> str:
        """What was left out, and why, for people."""
        return f"{self.counts['null'] + self.counts['empty']} null or empty ones" + "".join(
            f", {self.counts[status]} {why}" for status, why in _LEFT_OUT.items() if self.counts.get(status)
        )


def check_text(settings: TextSettings) -> TextPlan:
    """Find the files, read their footers, and check the template against them; no Ray, no tokenizer.

    Raises: CorpusError naming the file and the fix.
    """
    text = parse_template(settings.text, f"{_WHERE}, text")
    if not text.columns:
        raise CorpusError(f"{_WHERE}, text: the template {settings.text!r} names no column; write one such as {{text}}")
    source = inspect_files(settings.train, f"{_WHERE}, train")
    check_columns(source, [text])
    check_class_names([source], [text])
    if not source.rows:
        raise CorpusError(f"{source.where}: {source.files[0].path} holds no row; give a file that does")
    return TextPlan(source, text, find_integer_columns({"train": source}, text.columns))


def prepare_text(
    settings: TextSettings, tokenizer: TokenizerSpec, storage: Path, connect: Callable[[], None]
) -> TextCorpus:
    """Tokenise the documents, unless their shards are there. `connect`: see `build_shards`.

    Raises: CorpusError with advice; StorageError when `storage` cannot be written.
    """
    from pipeline.corpus.shards import build_shards  # here, so that reading a corpus never imports ray

    plan = check_text(settings)
    recipe = Recipe(
        input=plan.text,
        target=None,
        separator="",
        max_input_tokens=_NO_LIMIT,
        max_target_tokens=_NO_LIMIT,
        architecture=tokenizer.architecture,
        embedding_rows=tokenizer.embedding_rows,
        integer_columns=plan.integer_columns,
    )
    folder = str(build_shards(plan.source, recipe, tokenizer, storage, connect))
    summary = summarise_split(SplitRef(folder))
    share = 1 - summary.counts["ok"] / summary.rows
    over = ", or over 16 MiB" if summary.counts.get("input_long") else ""
    unembedded = ", or have a token without an embedding" if summary.counts.get("no_embedding") else ""
    if share > settings.max_bad_rows or not summary.counts["ok"]:
        raise CorpusError(
            f"{plan.source.where}: {share:.1%} of {summary.rows} rows are null or empty{over}{unembedded}, "
            f"more than max_bad_rows {settings.max_bad_rows:.1%}; fix the rows or raise it"
        )
    # Counts enter a run's identity, so zeros of the newer statuses are left out: older runs keep their identity.
    counts = {key: count for key, count in summary.counts.items() if key in ("ok", "null", "empty") or count}
    return TextCorpus(folder, counts, summary.digest)


def read_text(corpus: TextCorpus, eos: int) -> Int32:
    """The tokens `[N]` of all documents, in the order of their ids, each followed by `eos`. Takes four bytes a token.

    Raises: CorpusError when the shards are missing.
    """
    documents = open_split(SplitRef(corpus.dir))
    ends = np.cumsum(documents.input_lengths.astype(np.int64) + 1)
    text = np.full(ends[-1] if len(ends) else 0, eos, np.int32)
    for row, end in enumerate(ends.tolist()):
        ids = documents.input_ids(row)
        text[end - 1 - len(ids) : end - 1] = ids
    return text
