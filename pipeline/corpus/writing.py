"""Token rows -> one token shard, in memory that does not grow with the shard."""

from collections.abc import Iterable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.corpus.rows import SHARD_SCHEMA
from pipeline.corpus.tally import EMPTY_TALLY, ShardTally, tally_table

_ROW_GROUP_BYTES = 8 * 2**20
# Ids are written as four streams of bytes, of which the upper ones are nearly all zero. That takes half the time and
# four fifths of the size of dictionary pages. Statistics are of no use to a reader that takes all rows.
_OPTIONS = {
    "compression": "zstd",
    "compression_level": 1,
    "use_dictionary": ["status", "target"],
    "column_encoding": {f"{side}_ids.list.element": "BYTE_STREAM_SPLIT" for side in ("input", "target")},
    "write_statistics": False,
}


def write_shard(path: Path, tables: Iterable[pa.Table]) -> ShardTally:
    """Write tables of SHARD_SCHEMA to one Parquet file as they come, and count what was written."""
    tally, waiting, size = EMPTY_TALLY, [], 0
    with pq.ParquetWriter(path, SHARD_SCHEMA, **_OPTIONS) as shard:
        for table in tables:
            waiting.append(table)
            size += table.nbytes
            if size >= _ROW_GROUP_BYTES:
                tally += _write_group(shard, waiting)
                waiting, size = [], 0
        if waiting:
            tally += _write_group(shard, waiting)
    return tally


def _write_group(shard: pq.ParquetWriter, tables: list[pa.Table]) -> ShardTally:
    group = pa.concat_tables(tables)
    shard.write_table(group, row_group_size=group.num_rows)
    return tally_table(group)
