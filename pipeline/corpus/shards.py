"""Parquet -> token shards with Ray Data; a shard folder exists complete or not at all.

Why not `ray.data.read_parquet`: in Ray 2.60 a worker held 1.0 GB while reading a 360 MB file of one row group, with
blocks of 16 MiB (pyarrow's scanner alone: 0.9 GB), so a file's row groups would set the memory of the task. Here the
tasks stream pages themselves (`reading`; 28 MB on that file) through the tokenizer into a shard of their own
(`writing`); Ray Data spreads them, and what comes back to the driver are counts.
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

from pipeline.corpus.builds import being_built, finished, remove_abandoned
from pipeline.corpus.encoding import TokenizerContent, TokenizerSpec, load_tokenizer, tokenizer_content
from pipeline.corpus.files import Source
from pipeline.corpus.reader import MANIFEST, is_whole
from pipeline.corpus.reading import ReadUnit, gathered, read_texts, read_units
from pipeline.corpus.rows import Recipe, tokenise_rows
from pipeline.corpus.tally import EMPTY, ShardTally, manifest_figures
from pipeline.corpus.values import changed_texts
from pipeline.corpus.writing import write_shard
from pipeline.errors import CorpusError, PromptBankError, StorageError, TuningError
from pipeline.reporting.memory_kill import memory_kill
from pipeline.sealed_files import file_digest, sealed_json

FORMAT_VERSION = 2
_MAX_BLOCKS = 2000
# What a task gives back is small, and Ray reserves memory by this bound.
_BLOCK_BYTES = 2**20
# Ray Data holds tasks back by what they may give back: for a second all but one, then each until a poll every 0.1 s saw
# another end. Ours give back counts, so all of them may wait in Ray's own queue (`docs/benchmarks.md`).
_HOLDING_BACK = "backpressure_policies.enabled"


@dataclass(frozen=True)
class _Work:
    source: Source
    tasks: tuple[tuple[ReadUnit, ...], ...]
    recipe: Recipe
    tokenizer: TokenizerContent
    folder: Path

    def packed(self) -> "_PackedWork":
        return _PackedWork(str(self.folder), ray.put(self))


@dataclass(frozen=True)
class _PackedWork:
    """For a worker, which unpacks it once and not once a task: of thousands of files that takes as long as a task."""

    folder: str
    """Of this build alone, so two of them are the same work."""
    content: ray.ObjectRef = field(compare=False, repr=False)
    """In Ray's store, as long as the driver that put it there holds this."""


@lru_cache(maxsize=1)
def _unpacked(packed: _PackedWork) -> _Work:
    work: _Work = ray.get(packed.content)
    return work


def shard_key(source: Source, recipe: Recipe, tokenizer: TokenizerSpec) -> tuple[str, dict[str, Any]]:
    """The name of a shard folder and the inputs that it is the digest of."""
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
    # Only where it tells something: the tokens of other corpora stay what they were, under the name they had.
    if recipe.embedding_rows is not None:
        inputs["embedding_rows"] = recipe.embedding_rows
    named = [[pair for pair in file.class_names if pair[0] in recipe.columns] for file in source.files]
    if any(named):
        inputs["class_names"] = named
    texts = changed_texts(source, recipe.columns, recipe.whole)
    if texts:
        inputs["texts"] = [f"{name} as integers" if name in recipe.whole else name for name in texts]
    if recipe.targets_behind_text:
        inputs["targets"] = "behind a text"
    if recipe.names_unsayable:
        inputs["unsayable"] = "counted"
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest(), inputs


def build_shards(
    source: Source, recipe: Recipe, tokenizer: TokenizerSpec, storage: Path, connect: Callable[[], None]
) -> Path:
    """The folder with the token shards of `source`, built unless it is there already.

    connect: called before anything is built, for that needs a connection to Ray.
    Raises: CorpusError for a corpus that cannot be read, StorageError when `storage` cannot be written.
    """
    key, inputs = shard_key(source, recipe, tokenizer)
    final = Path(os.path.abspath(storage)) / "token_shards" / key
    if is_whole(final):
        return final
    connect()
    fresh = final.with_name(f".{key}.{uuid.uuid4().hex}")
    try:
        remove_abandoned(final.parent)
        with being_built(fresh):
            content = tokenizer_content(load_tokenizer(tokenizer.dir))
            digests, whole = _write_shards(_Work(source, gathered(read_units(source)), recipe, content, fresh))
            if whole.rows.summary.rows != source.rows:
                raise CorpusError(
                    f"{source.where}: {whole.rows.summary.rows} rows were read where the files' footers promise "
                    f"{source.rows}; the files changed meanwhile, so run the job again"
                )
            _write_manifest(fresh, {"key": key, "made_from": inputs}, digests, manifest_figures(whole))
            finished(fresh)
            _publish(fresh, final)
    except OSError as error:
        if isinstance(error, PromptBankError):
            raise
        raise _storage_error(final.parent, error) from error
    return final


def _write_shards(work: _Work) -> tuple[dict[str, str], ShardTally]:
    """-> digests of the shards by file name, and what was counted of all together."""
    digests, whole = {}, EMPTY
    blocks = min(len(work.tasks), _MAX_BLOCKS)
    try:
        with _ray_data_settings():
            tasks = ray.data.range(len(work.tasks), override_num_blocks=blocks)
            written = tasks.map_batches(
                partial(_tokenise_units, packed=work.packed()),
                batch_size=None,
                batch_format="numpy",
                zero_copy_batch=True,
            )
            for row in written.iter_rows():
                digests[row["shard"]] = row["digest"]
                whole += ShardTally.from_dict(json.loads(row["tally"]))
    except Exception as error:
        raise _translated(error, work.source.where, work.folder.parent) from None
    return dict(sorted(digests.items())), whole


def _tokenise_units(batch: dict[str, np.ndarray], packed: _PackedWork) -> Iterator[dict[str, list[str]]]:
    """Runs in a Ray worker: stream the rows of each task's units through the tokenizer into a shard."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Ray runs one task per core already
    work = _unpacked(packed)
    for index in batch["id"]:
        # A name of its own for each attempt: Ray runs a task again whose worker died.
        shard = f"{index:06d}-{uuid.uuid4().hex}.parquet"
        tally = write_shard(work.folder / shard, _token_tables(work, work.tasks[index]))
        digest = file_digest(work.folder / shard)
        yield {"shard": [shard], "digest": [digest], "tally": [json.dumps(tally.to_dict())]}


def _token_tables(work: _Work, units: tuple[ReadUnit, ...]) -> Iterator[pa.Table]:
    for unit in units:
        source, recipe = work.source, work.recipe
        for rows, columns in read_texts(source.filesystem, unit, recipe.columns, source.where, recipe.whole):
            yield tokenise_rows(recipe, work.tokenizer, columns, rows)


def _write_manifest(folder: Path, origin: dict[str, Any], digests: dict[str, str], figures: dict[str, Any]) -> None:
    for path in folder.glob("*.parquet"):
        if path.name not in digests:  # of a task whose worker died
            path.unlink()
    files = {name: (folder / name).stat().st_size for name in digests}
    (folder / MANIFEST).write_bytes(sealed_json({**origin, "files": files, "digests": digests, **figures}))


def _publish(fresh: Path, final: Path) -> None:
    if final.exists() and not is_whole(final):  # a shard of it was deleted by hand, or has rotted
        shutil.rmtree(final)
    try:
        fresh.rename(final)
    except OSError:
        if not is_whole(final):  # else another job was faster with the same content
            raise


@contextmanager
def _ray_data_settings() -> Iterator[None]:
    """Ray Data for many small answers, without bars, plans or tracebacks on the console; its log file keeps them."""
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


def _translated(error: Exception, where: str, storage: Path) -> Exception:
    """The error to show for one that came out of Ray; an unknown one stays as it is."""
    cause: BaseException | None = error
    while cause is not None:
        inner = cause.cause if isinstance(cause, RayTaskError) else None
        if isinstance(inner, PromptBankError):
            # Ray appends advice of its own below our sentence.
            return type(inner)(str(inner).partition("\n")[0])
        if isinstance(cause, OutOfMemoryError):
            return TuningError(
                f"{where}: tokenising was given up after several tries, the last of which ended so: "
                f"{memory_kill(str(cause)) or 'its worker was killed when the memory of its node ran low'}; "
                "or write the files with shorter cells; then start the same run again"
            )
        if isinstance(inner, OSError):  # reading raises CorpusError, so this came from writing
            return _storage_error(storage, inner)
        cause = inner if isinstance(inner, RayTaskError) else cause.__cause__
    if isinstance(error, RayError) and not isinstance(error, RayTaskError):  # workers, nodes or the cluster were lost
        reason = memory_kill(str(error)) or str(error).strip().partition("\n")[0]
        return TuningError(f"tokenising was given up ({reason}); start the same run again to resume it")
    return error


def _storage_error(folder: Path, error: OSError) -> StorageError:
    reason = error.strerror or str(error).partition("\n")[0]
    return StorageError(f"cannot write token shards to {folder} ({reason}); free space or mend its access")
