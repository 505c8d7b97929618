"""Where each usable row of a shard folder lies, in the order of the rows' ids: one file, which every rank maps.

So opening a split reads nothing but what it looks at. The file holds N ids (uint64) and behind them N places (uint32
[N, 2]: the number of a batch, counted over the shards in the order of their names, and a row of it), little-endian.
"""

from collections.abc import Sequence
from pathlib import Path

import numpy as np
import numpy.typing as npt
import pyarrow as pa

from pipeline.corpus.rows import RowStatus

INDEX = "rows.index"
_CHUNK_ROWS = 2**20
_ID_SPACE = 2**64


def write_index(path: Path, batches: Sequence[pa.RecordBatch], usable: int) -> None:
    """Index batches whose rows are sorted by id (`write_shard`); `usable` of their rows have the status OK.

    The memory does not grow with the rows: ids are hashes, so an equal part of all ids holds about equally many.
    """
    ids = [batch["row_id"].to_numpy() for batch in batches]
    statuses = [batch["status"].to_numpy() for batch in batches]
    parts = 1 + sum(map(len, ids)) // _CHUNK_ROWS
    bounds = [_ID_SPACE * part // parts for part in range(1, parts)]
    ends = [np.searchsorted(of_batch, np.array(bounds, np.uint64)).tolist() for of_batch in ids]
    cuts = [(0, *end, len(of_batch)) for end, of_batch in zip(ends, ids, strict=True)]
    with path.open("wb") as first, path.open("r+b") as second:
        second.seek(8 * usable)
        for part in range(parts):
            found_ids, places = [np.empty(0, "<u8")], [np.empty((0, 2), "<u4")]
            for number, cut in enumerate(cuts):
                begin, end = cut[part], cut[part + 1]
                rows = begin + np.flatnonzero(statuses[number][begin:end] == RowStatus.OK)
                found_ids.append(ids[number][rows])
                places.append(np.stack([np.full(len(rows), number), rows], axis=1).astype("<u4"))
            together = np.concatenate(found_ids)
            order = np.argsort(together, kind="stable")
            first.write(together[order].astype("<u8").tobytes())
            second.write(np.concatenate(places)[order].tobytes())
        assert first.tell() == 8 * usable, "the tally counts the same rows"


def open_index(path: Path) -> tuple[npt.NDArray[np.uint64], npt.NDArray[np.uint32]]:
    """Ids `[N]` and places `[N, 2]`, mapped. Raises: OSError."""
    rows = path.stat().st_size // 16
    if not rows:  # nothing can be mapped
        return np.empty(0, np.uint64), np.empty((0, 2), np.uint32)
    with pa.memory_map(str(path)) as file:
        content = file.read_buffer()  # stays mapped without the file
    ids = np.frombuffer(content, "<u8", rows)
    return ids, np.frombuffer(content, "<u4", 2 * rows, 8 * rows).reshape(rows, 2)
