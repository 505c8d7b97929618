"""Token rows -> token shards and the folder that holds them, in memory that does not grow with either.

A shard is an Arrow IPC file without compression, so that a rank can map it and read a row's tokens where they lie.
"""

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

import pyarrow as pa

from pipeline.corpus.row_index import INDEX, write_index
from pipeline.corpus.rows import SHARD_SCHEMA
from pipeline.corpus.tally import EMPTY_TALLY, ShardTally, manifest_figures, tally_table
from pipeline.sealed_files import file_digest, sealed_json

MANIFEST = "manifest.json"
SHARDS = "*.arrow"
_BATCH_BYTES = 8 * 2**20


def write_shard(path: Path, tables: Iterable[pa.Table]) -> ShardTally:
    """Write tables of SHARD_SCHEMA to one file as they come, and count what was written.

    The rows of each of its batches are sorted by id.
    """
    tally, waiting, size = EMPTY_TALLY, [], 0
    with pa.OSFile(str(path), "wb") as file, pa.ipc.new_file(file, SHARD_SCHEMA) as shard:
        for table in tables:
            waiting.append(table)
            size += table.nbytes
            if size >= _BATCH_BYTES:
                tally += _write_batch(shard, waiting)
                waiting, size = [], 0
        if waiting:
            tally += _write_batch(shard, waiting)
    return tally


def _write_batch(shard: pa.ipc.RecordBatchFileWriter, tables: list[pa.Table]) -> ShardTally:
    together = pa.concat_tables(tables).combine_chunks()
    for batch in together.sort_by("row_id").combine_chunks().to_batches():
        shard.write_batch(batch)
    return tally_table(together)


def read_shard(path: Path) -> list[pa.RecordBatch]:
    """The batches of a shard, mapped: nothing is read before it is looked at. Raises: OSError, pa.ArrowInvalid."""
    with pa.memory_map(str(path)) as file:
        shard = pa.ipc.open_file(file)
        return [shard.get_batch(number) for number in range(shard.num_record_batches)]


def write_rows(folder: Path, rows: pa.Table) -> None:
    """A whole folder of one shard, with rows of SHARD_SCHEMA, made without Ray. Raises: OSError."""
    folder.mkdir(parents=True, exist_ok=True)
    shard = folder / "rows.arrow"
    tally = write_shard(shard, [rows])
    complete_folder(folder, {shard.name: file_digest(shard)}, tally, {})


def complete_folder(folder: Path, digests: Mapping[str, str], total: ShardTally, origin: Mapping[str, Any]) -> None:
    """Write the index and the manifest of a folder of shards, with `digests` by name; other shards are removed.

    origin: more keys of the manifest. Raises: OSError.
    """
    for path in folder.glob(SHARDS):
        if path.name not in digests:  # left by a task whose worker died
            path.unlink()
    batches = [batch for name in sorted(digests) for batch in read_shard(folder / name)]
    figures = manifest_figures(total)
    write_index(folder / INDEX, batches, figures["counts"]["ok"])
    of_all = {**digests, INDEX: file_digest(folder / INDEX)}
    files = {name: (folder / name).stat().st_size for name in of_all}
    (folder / MANIFEST).write_bytes(sealed_json({**origin, "files": files, "digests": of_all, **figures}))
