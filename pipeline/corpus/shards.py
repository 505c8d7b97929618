"""Parquet -> token shards with Ray Data; a shard folder exists complete or not at all.

Why not `ray.data.read_parquet`: its memory depends on the row groups of a file. In Ray 2.60 a worker held 1.0 GB while
it read a 360 MB file of one row group, with blocks of 16 MiB (pyarrow's scanner alone: 0.9 GB). Here the tasks stream
pages themselves (`reading`; 28 MB on that file) through the tokenizer into a shard of their own (`writing`). Ray Data
spreads the tasks, and only counts come back to the driver.
"""

import hashlib
import json
import logging
import os
import shutil
import uuid
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import lru_cache, partial
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from pipeline.corpus.encoding import TokenizerContent, TokenizerSpec, load_tokenizer, tokenizer_content
from pipeline.corpus.reader import MANIFEST, is_whole
from pipeline.corpus.reading import ReadUnit, group_units, read_texts, read_units
from pipeline.corpus.rows import Recipe, tokenise_rows
from pipeline.corpus.shard_folders import being_built, mark_finished, remove_abandoned
from pipeline.corpus.source_files import ParquetSource, SourceFile
from pipeline.corpus.tally import EMPTY_TALLY, ShardTally, manifest_figures
from pipeline.corpus.values import changed_texts
from pipeline.corpus.writing import write_shard
from pipeline.errors import CorpusError, PromptBankError, StorageError, TuningError
from pipeline.reporting.memory_kill import MORE_MEMORY, memory_kill
from pipeline.sealed_files import file_digest, sealed_json

FORMAT_VERSION = 2
_MAX_BLOCKS = 2000
# Ray reserves memory by this bound, and what a task returns is small.
_BLOCK_BYTES = 2**20
# Ray Data holds tasks back by what they may return: for a second all but one, then each until a poll every 0.1 s saw
# another one end. Ours return counts, so all of them may wait in Ray's own queue (`docs/benchmarks.md`).
_HOLDING_BACK = "backpressure_policies.enabled"


@dataclass(frozen=True)
class _BuildJob:
    """All that a worker needs to build shards."""

    source: ParquetSource
    tasks: tuple[tuple[ReadUnit, ...], ...]
    recipe: Recipe
    tokenizer: TokenizerContent
    folder: Path

    def put(self) -> "_BuildJobRef":
        return _BuildJobRef(str(self.folder), ray.put(self))


@dataclass(frozen=True)
class _BuildJobRef:
    """A job in Ray's object store, which a worker fetches once and not once a task.

    For a corpus of thousands of files, fetching it takes as long as a task.
    """

    folder: str
    """Of this build alone, so references with the same folder are the same job."""
    content: ray.ObjectRef = field(compare=False, repr=False)
    """Stays in Ray's store as long as the driver holds this reference."""


@lru_cache(maxsize=1)  # a worker serves one build at a time
def _fetch_job(job_ref: _BuildJobRef) -> _BuildJob:
    job: _BuildJob = ray.get(job_ref.content)
    return job


def shard_key(source: ParquetSource, recipe: Recipe, tokenizer: TokenizerSpec) -> tuple[str, dict[str, Any]]:
    """A shard folder's name, and the inputs whose digest it is.

    An unchanged corpus has the same key, and is not tokenised again. Files count by path, size and time, since reading
    their content would take as long as tokenising it.
    """
    inputs = {
        "format_version": FORMAT_VERSION,
        "filesystem": source.filesystem.type_name,
        "files": [[file.path, file.size, file.mtime_ns] for file in source.files],
        "input": recipe.input.text,
        "target": recipe.target.text if recipe.target else None,
        "separator": recipe.separator,
        "max_input_tokens": recipe.max_input_tokens,
        "max_target_tokens": recipe.max_target_tokens,
        "architecture": recipe.architecture,
        "tokenizer": tokenizer.digest,
    }
    # Inputs that came with later versions enter only where they matter: other corpora keep the name that they had.
    if any(file.view or file.reader for file in source.files):
        inputs["views"] = [
            [file.view.key() if file.view else None, file.reader.key() if file.reader else None, _kinds(file, recipe)]
            for file in source.files
        ]
    if recipe.embedding_rows is not None:
        inputs["embedding_rows"] = recipe.embedding_rows
    named = [[pair for pair in file.class_names if pair[0] in recipe.columns] for file in source.files]
    if any(named):
        inputs["class_names"] = named
    texts = changed_texts(source, recipe.columns, recipe.integer_columns)
    if texts:
        inputs["texts"] = [f"{name} as integers" if name in recipe.integer_columns else name for name in texts]
    if recipe.targets_encoded_after_text:
        inputs["targets"] = "behind a text"
    if recipe.counts_unencodable:
        inputs["unsayable"] = "counted"
    if recipe.unlabelled:
        inputs["targets"] = "none"
    if recipe.chat is not None:
        inputs["chat"] = recipe.chat.digest
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest(), inputs


def _kinds(file: SourceFile, recipe: Recipe) -> list[list[str]]:
    """The types of the columns that are read, where the table and not the file decides them."""
    return [[name, str(kind)] for name, kind in file.columns if name in recipe.columns]


def build_shards(
    source: ParquetSource, recipe: Recipe, tokenizer: TokenizerSpec, storage: Path, connect: Callable[[], None]
) -> Path:
    """The folder with the token shards of `source`, built unless it is there already.

    connect: called before anything is built, since building needs a connection to Ray.
    Raises: CorpusError for a corpus that cannot be read, StorageError when `storage` cannot be written.
    """
    key, inputs = shard_key(source, recipe, tokenizer)
    final = Path(os.path.abspath(storage)) / "token_shards" / key
    if is_whole(final):
        return final
    connect()
    # Built under a hidden name and renamed at the end: readers never see half a folder, and two builders never meet.
    fresh = final.with_name(f".{key}.{uuid.uuid4().hex}")
    try:
        remove_abandoned(final.parent)
        with being_built(fresh):
            content = tokenizer_content(load_tokenizer(tokenizer.dir))
            digests, total = _write_shards(_BuildJob(source, group_units(read_units(source)), recipe, content, fresh))
            if source.exact and total.rows.summary.rows != source.rows:
                raise CorpusError(
                    f"{source.where}: {total.rows.summary.rows} rows were read where the files' footers promise "
                    f"{source.rows}; the files changed meanwhile, so run the job again"
                )
            _write_manifest(fresh, {"key": key, "made_from": inputs}, digests, manifest_figures(total))
            mark_finished(fresh)
            _publish(fresh, final)
    except OSError as error:
        if isinstance(error, PromptBankError):  # some of ours are OSErrors, too
            raise
        raise _storage_error(final.parent, error) from error
    return final


def _write_shards(job: _BuildJob) -> tuple[dict[str, str], ShardTally]:
    """-> digests of the shards by file name, and the total of their tallies."""
    digests, total = {}, EMPTY_TALLY
    blocks = min(len(job.tasks), _MAX_BLOCKS)  # Ray's own cost grows with blocks; a block may hold several tasks
    try:
        with _ray_data_settings():
            tasks = ray.data.range(len(job.tasks), override_num_blocks=blocks)
            written = tasks.map_batches(
                partial(_tokenise_units, job_ref=job.put()),
                batch_size=None,
                batch_format="numpy",
                zero_copy_batch=True,
            )
            for row in written.iter_rows():
                digests[row["shard"]] = row["digest"]
                total += ShardTally.from_dict(json.loads(row["tally"]))
    except Exception as error:
        raise _without_ray(error, job.source.where, job.folder.parent) from None
    return dict(sorted(digests.items())), total


def _tokenise_units(batch: dict[str, np.ndarray], job_ref: _BuildJobRef) -> Iterator[dict[str, list[str]]]:
    """Runs in a Ray worker: stream the rows of each task's units through the tokenizer into a shard."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Ray runs one task per core already
    job = _fetch_job(job_ref)
    for index in batch["id"]:
        # Each attempt has a name of its own: Ray runs a task again when its worker died.
        shard = f"{index:06d}-{uuid.uuid4().hex}.parquet"
        tally = write_shard(job.folder / shard, _token_tables(job, job.tasks[index]))
        digest = file_digest(job.folder / shard)
        yield {"shard": [shard], "digest": [digest], "tally": [json.dumps(tally.to_dict())]}


def _token_tables(job: _BuildJob, units: tuple[ReadUnit, ...]) -> Iterator[pa.Table]:
    for unit in units:
        source, recipe = job.source, job.recipe
        for rows, columns in read_texts(source.filesystem, unit, recipe.columns, source.where, recipe.integer_columns):
            yield tokenise_rows(recipe, job.tokenizer, columns, rows)


def _write_manifest(folder: Path, origin: dict[str, Any], digests: dict[str, str], figures: dict[str, Any]) -> None:
    for path in folder.glob("*.parquet"):
        if path.name not in digests:  # left by a task whose worker died
            path.unlink()
    files = {name: (folder / name).stat().st_size for name in digests}
    (folder / MANIFEST).write_bytes(sealed_json({**origin, "files": files, "digests": digests, **figures}))


def _publish(fresh: Path, final: Path) -> None:
    if final.exists() and not is_whole(final):  # a shard was deleted by hand, or its bytes changed
        shutil.rmtree(final)
    try:
        fresh.rename(final)
    except OSError:
        if not is_whole(final):  # otherwise another job was faster with the same content
            raise


@contextmanager
def _ray_data_settings() -> Iterator[None]:
    """Settings of Ray Data for many small results. Bars, plans and tracebacks stay in its log file."""
    context = ray.data.DataContext.get_current()
    settings = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "raise_original_map_exception": True,
        "target_max_block_size": _BLOCK_BYTES,
    }
    before = {name: getattr(context, name) for name in settings}
    context.set_config(_HOLDING_BACK, [])
    consoles = [h for h in logging.getLogger("ray.data").handlers if isinstance(h, logging.StreamHandler)]
    levels = [handler.level for handler in consoles]
    for name, value in settings.items():
        setattr(context, name, value)
    for handler in consoles:
        handler.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        context.remove_config(_HOLDING_BACK)
        for name, value in before.items():
            setattr(context, name, value)
        for handler, level in zip(consoles, levels, strict=True):
            handler.setLevel(level)


def _without_ray(error: Exception, where: str, storage: Path) -> Exception:
    """Our own error for one that came out of Ray; an unknown error stays as it is."""
    # Ray wraps what a worker raised in RayTaskErrors, one within the other.
    cause: BaseException | None = error
    while cause is not None:
        inner = cause.cause if isinstance(cause, RayTaskError) else None
        if isinstance(inner, PromptBankError):
            # Ray appends its own advice below our sentence.
            return type(inner)(str(inner).partition("\n")[0])
        if isinstance(cause, OutOfMemoryError):
            return TuningError(
                f"{where}: tokenising stopped after several tries, and the last one ended like this: "
                f"{memory_kill(str(cause)) or 'the memory of its node ran low'}; write the files with shorter cells, "
                f"{MORE_MEMORY}; then start the same run again"
            )
        if isinstance(inner, OSError):  # it came from writing, since reading raises CorpusError
            return _storage_error(storage, inner)
        cause = inner if isinstance(inner, RayTaskError) else cause.__cause__
    if isinstance(error, RayError) and not isinstance(error, RayTaskError):  # workers, nodes or the cluster were lost
        reason = memory_kill(str(error)) or str(error).strip().partition("\n")[0]
        return TuningError(f"tokenising stopped ({reason}); start the same run again to resume it")
    return error


def _storage_error(folder: Path, error: OSError) -> StorageError:
    reason = error.strerror or str(error).partition("\n")[0]
    return StorageError(f"cannot write token shards to {folder} ({reason}); free space or fix its access")
