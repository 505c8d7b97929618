"""Parquet -> token shards with Ray Data; a shard folder exists complete or not at all.

Why not `ray.data.read_parquet`: in Ray 2.60 a worker held 1.0 GB while reading a 360 MB file of one row group, with
blocks of 16 MiB (pyarrow's scanner alone: 0.9 GB), so a file's row groups would set the memory of the task. Here the
tasks stream pages themselves (`reading`; 28 MB on that file), and Ray Data spreads, bundles and writes.
"""

import hashlib
import json
import logging
import os
import shutil
import time
import uuid
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass
from functools import partial
from itertools import islice
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq
import ray
import ray.data
from ray.exceptions import RayTaskError

from pipeline.corpus.encoding import TokenizerSpec, load_tokenizer
from pipeline.corpus.files import Source
from pipeline.corpus.reader import MANIFEST, SplitRef, read_manifest, summarise_split, unique_targets
from pipeline.corpus.reading import ReadUnit, read_texts, read_units
from pipeline.corpus.rows import Recipe, tokenise_rows
from pipeline.errors import CorpusError, PromptBankError, StorageError

FORMAT_VERSION = 1
_BLOCK_BYTES = 16 * 2**20
_SHARD_BYTES = 64 * 2**20
_MAX_TASKS = 2000
_LISTED_TARGETS = 1000
_ABANDONED_AFTER_S = 24 * 3600


@dataclass(frozen=True)
class _Work:
    source: Source
    units: tuple[ReadUnit, ...]
    recipe: Recipe
    tokenizer_dir: str


def shard_key(source: Source, recipe: Recipe, tokenizer: TokenizerSpec) -> tuple[str, dict[str, Any]]:
    """The name of a shard folder and the inputs that it is the digest of."""
    inputs = {
        "format_version": FORMAT_VERSION,
        "filesystem": source.filesystem.type_name,
        "files": [[file.path, file.size, file.mtime_ns] for file in source.files],
        "input": recipe.input.text,
        "target": recipe.target.text,
        "separator": recipe.separator,
        "max_input_tokens": recipe.max_input_tokens,
        "max_target_tokens": recipe.max_target_tokens,
        "architecture": recipe.architecture,
        "tokenizer": tokenizer.digest,
    }
    return hashlib.sha256(json.dumps(inputs, sort_keys=True).encode()).hexdigest(), inputs


def build_shards(source: Source, recipe: Recipe, tokenizer: TokenizerSpec, storage: Path) -> Path:
    """The folder with the token shards of `source`, built unless it is there already. Needs a running Ray.

    Raises: CorpusError for a corpus that cannot be read, StorageError when `storage` cannot be written.
    """
    key, inputs = shard_key(source, recipe, tokenizer)
    final = Path(os.path.abspath(storage)) / "token_shards" / key
    if read_manifest(final) is not None:
        return final
    fresh = final.with_name(f".{key}.{uuid.uuid4().hex}")
    try:
        _remove_abandoned(final.parent)
        fresh.mkdir(parents=True)
        _write_shards(_Work(source, read_units(source), recipe, tokenizer.dir), fresh)
        _write_manifest(fresh, key, inputs, source)
        _publish(fresh, final)
    except OSError as error:
        if isinstance(error, PromptBankError):
            raise
        raise _storage_error(final.parent, error) from error
    finally:
        shutil.rmtree(fresh, ignore_errors=True)
    return final


def _write_shards(work: _Work, folder: Path) -> None:
    tasks = min(len(work.units), _MAX_TASKS)
    try:
        with _quiet_ray_data():
            units = ray.data.range(len(work.units), override_num_blocks=tasks)
            rows = units.map_batches(
                partial(_tokenise_units, work=work), batch_size=None, batch_format="numpy", zero_copy_batch=True
            )
            # A minimum of bytes keeps Ray from fusing the write into the task before it, which would collect
            # everything that the task yields before the first byte is written.
            rows.write_parquet(str(folder), min_bytes_per_file=_SHARD_BYTES)
    except Exception as error:
        raise _translated(error, work, folder.parent) from None


def _tokenise_units(batch: dict[str, np.ndarray], work: _Work) -> Iterator[pa.Table]:
    """Runs in a Ray worker: stream the units' rows through the tokenizer, one small table at a time."""
    os.environ.setdefault("TOKENIZERS_PARALLELISM", "false")  # Ray runs one task per core already
    tokenizer = load_tokenizer(work.tokenizer_dir)
    for index in batch["id"]:
        unit = work.units[index]
        for rows, texts in read_texts(work.source.filesystem, unit, work.recipe.columns, work.source.where):
            yield tokenise_rows(work.recipe, tokenizer, texts, rows)


def _write_manifest(folder: Path, key: str, inputs: dict[str, Any], source: Source) -> None:
    files = {path.name: path.stat().st_size for path in sorted(folder.glob("*.parquet"))}
    manifest: dict[str, Any] = {"key": key, "made_from": inputs, "files": files}
    # Written first without the counts: the reader takes a folder's files from its manifest alone.
    (folder / MANIFEST).write_text(json.dumps(manifest), encoding="utf-8")
    ref = SplitRef(str(folder))
    summary = summarise_split(ref)
    if summary.rows != source.rows:
        raise CorpusError(
            f"{source.where}: {summary.rows} rows were read where the files' footers promise {source.rows}; "
            "the files changed meanwhile, so run the job again"
        )
    targets = sorted(islice(unique_targets(ref), _LISTED_TARGETS + 1))
    manifest |= {
        "rows": summary.rows,
        "counts": summary.counts,
        "corpus_digest": summary.digest,
        **_token_figures([folder / name for name in files]),
        "distinct_targets": targets if len(targets) <= _LISTED_TARGETS else None,
    }
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=1, ensure_ascii=False) + "\n", encoding="utf-8")


def _token_figures(shards: list[Path]) -> dict[str, int]:
    figures = dict.fromkeys(("input_tokens", "target_tokens", "longest_input", "longest_target"), 0)
    for path in shards:
        with pq.ParquetFile(path, pre_buffer=False, buffer_size=2**20) as shard:
            for batch in shard.iter_batches(8192, columns=["input_ids", "target_ids"], use_threads=False):
                for side in ("input", "target"):
                    lengths = pc.list_value_length(batch[f"{side}_ids"])
                    figures[f"{side}_tokens"] += pc.sum(lengths).as_py()
                    figures[f"longest_{side}"] = max(figures[f"longest_{side}"], pc.max(lengths).as_py())
    return figures


def _publish(fresh: Path, final: Path) -> None:
    if final.exists() and read_manifest(final) is None:  # a shard of it was deleted by hand
        shutil.rmtree(final)
    try:
        fresh.rename(final)
    except OSError:
        if read_manifest(final) is None:  # else another job was faster with the same content
            raise


def _remove_abandoned(folder: Path) -> None:
    """Builds that were killed count for nothing, but they fill the disk."""
    for path in folder.glob(".*"):
        if time.time() - path.stat().st_mtime > _ABANDONED_AFTER_S:
            shutil.rmtree(path, ignore_errors=True)


@contextmanager
def _quiet_ray_data() -> Iterator[None]:
    """No progress bars, plans or tracebacks on the console while Ray Data runs; its log file keeps them."""
    context = ray.data.DataContext.get_current()
    settings = {
        "enable_progress_bars": False,
        "print_on_execution_start": False,
        "raise_original_map_exception": True,
        "target_max_block_size": _BLOCK_BYTES,
    }
    before = {name: getattr(context, name) for name in settings}
    consoles = [h for h in logging.getLogger("ray.data").handlers if isinstance(h, logging.StreamHandler)]
    levels = [handler.level for handler in consoles]
    for name, value in settings.items():
        setattr(context, name, value)
    for handler in consoles:
        handler.setLevel(logging.CRITICAL + 1)
    try:
        yield
    finally:
        for name, value in before.items():
            setattr(context, name, value)
        for handler, level in zip(consoles, levels, strict=True):
            handler.setLevel(level)


def _translated(error: Exception, work: _Work, storage: Path) -> Exception:
    """The error to show for one that came out of Ray; an unknown one stays as it is."""
    cause: BaseException | None = error
    while cause is not None:
        inner = cause.cause if isinstance(cause, RayTaskError) else None
        if isinstance(inner, PromptBankError):
            # Ray appends advice of its own below our sentence.
            return type(inner)(str(inner).partition("\n")[0])
        if isinstance(inner, OSError):  # reading raises CorpusError, so this came from writing
            return _storage_error(storage, inner)
        cause = inner if isinstance(inner, RayTaskError) else cause.__cause__
    return error


def _storage_error(folder: Path, error: OSError) -> StorageError:
    reason = error.strerror or str(error).partition("\n")[0]
    return StorageError(f"cannot write token shards to {folder} ({reason}); free space or mend its access")
