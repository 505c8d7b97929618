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
from collections.abc import Callable, Iterable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, field, replace
from functools import lru_cache, partial
from itertools import groupby
from operator import itemgetter
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import ray
import ray.data
from ray.exceptions import OutOfMemoryError, RayError, RayTaskError

from pipeline.corpus.encoding import TokenizerContent, TokenizerSpec, load_tokenizer, tokenizer_content
from pipeline.corpus.kept_shards import NO_SHARDS, FileShards, KeptShards
from pipeline.corpus.reader import is_whole
from pipeline.corpus.reading import ReadUnit, group_units, read_texts, read_units
from pipeline.corpus.rows import Recipe, tokenise_rows
from pipeline.corpus.shard_folders import being_built, remove_abandoned
from pipeline.corpus.source_files import ParquetSource, SourceFile
from pipeline.corpus.tally import EMPTY_TALLY, ShardTally
from pipeline.corpus.values import changed_texts, plain_type
from pipeline.corpus.writing import complete_folder, write_shard
from pipeline.errors import CorpusError, PromptBankError, StorageError, TuningError, UnreachableError
from pipeline.reporting.memory_kill import MORE_MEMORY, memory_kill
from pipeline.sealed_files import file_digest

FORMAT_VERSION = 2
"""Part of the corpora's keys, which stay as they are."""
_LAYOUT = 3
"""Of shard folders. Those of an earlier layout are not read, and made anew."""
_JOB_BYTES = 256 * 2**20
_OF_A_CORPUS: Mapping[str, type[PromptBankError]] = {"corpus": CorpusError, "away": UnreachableError}
"""Errors of one corpus among those that are tokenised together, as a worker writes them down."""
_MAX_BLOCKS = 2000
# Ray reserves memory by this bound, and what a task returns is small.
_BLOCK_BYTES = 2**20
# Ray Data holds tasks back by what they may return: for a second all but one, then each until a poll every 0.1 s saw
# another one end. Ours return counts, so all of them may wait in Ray's own queue (`docs/benchmarks.md`).
_HOLDING_BACK = "backpressure_policies.enabled"


@dataclass(frozen=True, eq=False)
class ShardRequest:
    """A corpus that is to become token shards."""

    source: ParquetSource
    recipe: Recipe


@dataclass(frozen=True, eq=False)
class _Piece:
    """One source file of a corpus, whose shards a later night may use again."""

    request: ShardRequest
    file: SourceFile
    key: str
    folder: Path
    """Where its shards are to be written."""


@dataclass(frozen=True)
class _BuildJob:
    """All that a worker needs to build shards."""

    pieces: tuple[_Piece, ...]
    tasks: tuple[tuple[tuple[int, ReadUnit], ...], ...]
    """Each unit with the number of its piece."""
    tokenizer: TokenizerContent
    name: str
    """Of this job alone."""

    def put(self) -> "_BuildJobRef":
        return _BuildJobRef(self.name, ray.put(self))


@dataclass(frozen=True)
class _BuildJobRef:
    """A job in Ray's object store, which a worker fetches once and not once a task.

    For a corpus of thousands of files, fetching it takes as long as a task.
    """

    name: str
    """References with the same name are the same job."""
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
    """The types of the columns that are read, by templates or a filter, where the table and not the file has them."""
    kinds = dict(file.columns) if file.view is None else dict(file.view.types_of(file.columns))
    read = recipe.columns if file.view is None else file.view.needed(recipe.columns)
    return [[name, str(kinds[name])] for name in read if name in kinds]


def build_shards(
    source: ParquetSource, recipe: Recipe, tokenizer: TokenizerSpec, storage: Path, connect: Callable[[], None]
) -> Path:
    """The folder with the token shards of `source`, built unless it is there already; see `build_side_by_side`.

    Raises: CorpusError for a corpus that cannot be read, StorageError when `storage` cannot be written.
    """
    (built,) = build_side_by_side([ShardRequest(source, recipe)], tokenizer, storage, connect)
    if isinstance(built, PromptBankError):
        raise built
    return built


def build_side_by_side(
    requests: Sequence[ShardRequest], tokenizer: TokenizerSpec, storage: Path, connect: Callable[[], None]
) -> list[Path | PromptBankError]:
    """For each request the folder with its token shards, or why its corpus cannot be read.

    What is there is not built again: neither a whole folder, nor the shards of a source file that did not change. The
    rest of many small corpora is one Ray job, and large ones have one each, so that a job that is killed loses little.
    connect: called before anything is tokenised, since that needs a connection to Ray.
    Raises: StorageError when `storage` cannot be written, TuningError when workers or nodes were lost.
    """
    parent = Path(os.path.abspath(storage)) / "token_shards"
    keys = [shard_key(request.source, request.recipe, tokenizer)[0] for request in requests]
    finals = [parent / f"{key}-{_LAYOUT}" for key in keys]
    # Tasks may share a corpus, which is built once, for the first of them.
    first = dict(zip(reversed(finals), reversed(requests), strict=True))
    missing = {final: first[final] for final in dict.fromkeys(finals) if not is_whole(final)}
    refused: dict[Path, PromptBankError] = {}
    try:
        for together in _jobs_of(missing):
            refused |= _build(together, tokenizer, parent, connect)
    except OSError as error:
        if isinstance(error, PromptBankError):  # some of ours are OSErrors, too
            raise
        raise _storage_error(parent, error) from error
    return [
        _renamed(refused[final], first[final], request) if final in refused else final
        for final, request in zip(finals, requests, strict=True)
    ]


def _renamed(error: PromptBankError, built: ShardRequest, asked: ShardRequest) -> PromptBankError:
    """The error of a corpus in the words of another task that has it, too."""
    return type(error)(str(error).replace(built.source.where, asked.source.where, 1))


def _jobs_of(missing: Mapping[Path, ShardRequest]) -> Iterator[dict[Path, ShardRequest]]:
    """Corpora that are tokenised together: so many that a job's own cost is little beside theirs."""
    together: dict[Path, ShardRequest] = {}
    size = 0
    for final, request in missing.items():
        together[final] = request
        size += sum(nbytes for file in request.source.files for _, nbytes in file.row_groups)
        if size >= _JOB_BYTES:
            yield together
            together, size = {}, 0
    if together:
        yield together


def _build(
    requests: Mapping[Path, ShardRequest], tokenizer: TokenizerSpec, parent: Path, connect: Callable[[], None]
) -> dict[Path, PromptBankError]:
    """Build these folders; the errors of those whose corpus cannot be read."""
    kept = KeptShards(parent / "by_file")
    remove_abandoned(parent)
    kept.remove_unused()
    # Built in a hidden folder and renamed at the end: readers never see half a folder, and two builders never meet.
    with being_built(parent / f".{uuid.uuid4().hex}") as fresh:
        pieces = {final: _pieces(request, fresh / final.name, tokenizer) for final, request in requests.items()}
        every = [piece for of_corpus in pieces.values() for piece in of_corpus]
        for final in requests:
            (fresh / final.name).mkdir()
        made = {piece: shards for piece in every if (shards := kept.link(piece.key, piece.folder)) is not None}
        left = [piece for piece in every if piece not in made]
        errors: dict[ShardRequest, PromptBankError] = {}
        if left:
            connect()
            written, errors = _tokenise(left, tokenizer, parent)
            made |= written
        for final, request in requests.items():
            if request in errors:
                continue
            total = sum((made[piece].tally for piece in pieces[final]), EMPTY_TALLY)
            if request.source.exact and total.rows.summary.rows != request.source.rows:
                errors[request] = CorpusError(
                    f"{request.source.where}: {total.rows.summary.rows} rows were read where the files' footers "
                    f"promise {request.source.rows}; the files changed meanwhile, so run the job again"
                )
                continue
            key, inputs = shard_key(request.source, request.recipe, tokenizer)
            digests = {name: digest for piece in pieces[final] for name, digest in made[piece].digests.items()}
            complete_folder(fresh / final.name, digests, total, {"key": key, "made_from": inputs})
            for piece in set(pieces[final]).intersection(left):
                kept.keep(piece.key, piece.folder, made[piece])
            _publish(fresh / final.name, final)
    return {final: errors[request] for final, request in requests.items() if request in errors}


def _pieces(request: ShardRequest, folder: Path, tokenizer: TokenizerSpec) -> list[_Piece]:
    files = (file for file in request.source.files if file.rows)
    return [_Piece(request, file, _file_key(request, file, tokenizer), folder) for file in files]


def _file_key(request: ShardRequest, file: SourceFile, tokenizer: TokenizerSpec) -> str:
    """What decides the rows of one file: its own part of the corpus' key, and what of the others' types reaches it."""
    alone = replace(request.source, files=(file,))
    floats = [name for name, kind in file.columns if pa.types.is_floating(plain_type(kind))]
    recipe = replace(
        request.recipe,
        integer_columns={name: other for name, other in request.recipe.integer_columns.items() if name in floats},
    )
    _, inputs = shard_key(alone, recipe, tokenizer)
    whole = {**inputs, "layout": _LAYOUT, "partitions": file.partitions}
    return hashlib.sha256(json.dumps(whole, sort_keys=True).encode()).hexdigest()


def _tokenise(
    pieces: Sequence[_Piece], tokenizer: TokenizerSpec, parent: Path
) -> tuple[dict[_Piece, FileShards], dict[ShardRequest, PromptBankError]]:
    """Tokenise source files in one Ray job; the shards of each, and by corpus why a file could not be read."""
    content = tokenizer_content(load_tokenizer(tokenizer.dir))
    job = _BuildJob(tuple(pieces), group_units(_units(pieces)), content, uuid.uuid4().hex)
    written: dict[_Piece, FileShards] = dict.fromkeys(pieces, NO_SHARDS)
    errors: dict[ShardRequest, PromptBankError] = {}
    blocks = min(len(job.tasks), _MAX_BLOCKS)  # Ray's own cost grows with blocks; a block may hold several tasks
    try:
        with _ray_data_settings():
            tasks = ray.data.range(len(job.tasks), override_num_blocks=blocks)
            rows = tasks.map_batches(
                partial(_tokenise_units, job_ref=job.put()),
                batch_size=None,
                batch_format="numpy",
                zero_copy_batch=True,
            )
            for row in rows.iter_rows():
                piece = pieces[row["piece"]]
                if row["error"]:
                    kind, sentence = json.loads(row["error"])
                    errors.setdefault(piece.request, _OF_A_CORPUS[kind](sentence))
                else:
                    tally = ShardTally.from_dict(json.loads(row["tally"]))
                    written[piece] += FileShards({row["shard"]: row["digest"]}, tally)
    except Exception as error:
        places = list(dict.fromkeys(piece.request.source.where for piece in pieces))
        where = places[0] if len(places) == 1 else f"{places[0]}, and {len(places) - 1} others beside it"
        raise _without_ray(error, where, parent) from None
    return written, errors


def _units(pieces: Sequence[_Piece]) -> Iterator[tuple[int, ReadUnit]]:
    """The read units of source files, each with the number of its piece."""
    numbered = enumerate(pieces)
    for request, of_corpus in groupby(numbered, key=lambda pair: pair[1].request):
        # Not by path: a corpus of two versions of a table may have one file twice, with other rows left of it.
        number_of = {id(piece.file): number for number, piece in of_corpus}
        files = tuple(pieces[number].file for number in number_of.values())
        yield from ((number_of[id(unit.file)], unit) for unit in read_units(replace(request.source, files=files)))


def _tokenise_units(batch: dict[str, np.ndarray], job_ref: _BuildJobRef) -> Iterator[dict[str, list[Any]]]:
    """Runs in a Ray worker: stream the rows of each task's units through the tokenizer, into a shard for each file."""
    os.environ["TOKENIZERS_PARALLELISM"] = "false"  # Ray runs one task per core already
    job = _fetch_job(job_ref)
    for index in batch["id"]:
        for number, of_file in groupby(job.tasks[index], key=itemgetter(0)):
            piece = job.pieces[number]
            # Each attempt has a name of its own: Ray runs a task again when its worker died.
            path = piece.folder / f"{piece.key}-{index:06d}-{uuid.uuid4().hex}.arrow"
            shard = {"piece": [number], "shard": [path.name], "digest": [""], "tally": [""], "error": [""]}
            try:
                tally = write_shard(path, _token_tables(piece.request, job.tokenizer, [unit for _, unit in of_file]))
            except (CorpusError, UnreachableError) as error:  # of one corpus: others have nothing to do with it
                kind = next(name for name, of in _OF_A_CORPUS.items() if isinstance(error, of))
                yield shard | {"error": [json.dumps([kind, str(error)])]}
            else:
                yield shard | {"digest": [file_digest(path)], "tally": [json.dumps(tally.to_dict())]}


def _token_tables(request: ShardRequest, tokenizer: TokenizerContent, units: Iterable[ReadUnit]) -> Iterator[pa.Table]:
    source, recipe = request.source, request.recipe
    for unit in units:
        for rows, columns in read_texts(source.filesystem, unit, recipe.columns, source.where, recipe.integer_columns):
            yield tokenise_rows(recipe, tokenizer, columns, rows)


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
