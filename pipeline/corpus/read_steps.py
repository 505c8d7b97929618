"""How many rows Arrow may make of a column chunk at a time, so that no file can raise the memory."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.pages import Page, page_headers

MOST_PAGE_BYTES = 256 * 2**20
"""Unpacked; DuckDB's largest are 100 MB, most writers' 1 MiB."""
STEP_BYTES = 64 * 2**20
"""Of a column's texts in a step, which may take twice the largest page where that is more."""
STREAM_BUFFER = 2**20
# Its cells repeat the beginnings of those before them, in the same page.
_PREFIXED = "DELTA_BYTE_ARRAY"


class OversizedPageError(ValueError):
    """A page is larger, unpacked, than any that is read."""


def rows_per_step(
    file: pa.NativeFile, footer: pq.FileMetaData, chunk: pq.ColumnChunkMetaData, group: int, rows: int, end: int
) -> int:
    """At most `rows`, and fewer where so many neighbours before row `end` of the chunk may exceed `STEP_BYTES`.

    Of a chunk that is small, or has few rows, nothing is read; of one up to `STEP_BYTES`, its dictionary.
    Raises: OversizedPageError; PageHeaderError.
    """
    size = chunk.total_uncompressed_size
    if size <= MOST_PAGE_BYTES and size * rows <= STEP_BYTES:
        return rows
    found = page_headers(file, chunk, end)
    first = next(found, None)
    if first is None:
        return rows
    step = rows
    if size > STEP_BYTES or _PREFIXED in chunk.encodings:
        looked_at = list(map(_bounded, chain([first], found)))
        step = _neighbours_within([page for page in looked_at if not page.is_dictionary], rows)
        if _PREFIXED in chunk.encodings:
            step = min(step, STEP_BYTES // max(page.nbytes for page in looked_at))
    if _bounded(first).is_dictionary and first.nbytes * step > STEP_BYTES:
        step = min(step, STEP_BYTES // _longest_word(file, footer, chunk, group, first))
    return max(step, 1)


def _bounded(page: Page) -> Page:
    if page.nbytes > MOST_PAGE_BYTES:
        raise OversizedPageError(
            f"has a page of {page.nbytes / 2**20:,.0f} MiB unpacked, where at most {MOST_PAGE_BYTES // 2**20} MiB are "
            "read; leave such long cells out, or write smaller pages"
        )
    return page


def _neighbours_within(looked_at: Sequence[Page], rows: int) -> int:
    """The rows, halved until wherever they begin their pages come to no more than the bound."""
    if not looked_at:
        return rows
    sizes = np.array([page.nbytes for page in looked_at], np.int64)
    bound = max(STEP_BYTES, 2 * int(sizes.max()))
    ends = np.cumsum([page.values for page in looked_at], dtype=np.int64)
    upto = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    while rows > 1:
        # The farthest that a step reaches which begins in the last row of a page.
        last = np.minimum(np.searchsorted(ends, ends + (rows - 2), "right"), len(ends) - 1)
        if (upto[last + 1] - upto[:-1]).max() <= bound:
            break
        rows //= 2
    return rows


def _longest_word(
    file: pa.NativeFile, footer: pq.FileMetaData, chunk: pq.ColumnChunkMetaData, group: int, dictionary: Page
) -> int:
    """The bytes of the longest text in a chunk's dictionary, which may stand for every row."""
    name = chunk.path_in_schema
    with pq.ParquetFile(
        file,
        metadata=footer,
        read_dictionary=[name],
        pre_buffer=False,
        buffer_size=STREAM_BUFFER,
        page_checksum_verification=True,
    ) as opened:
        column = next(opened.iter_batches(1, [group], [name], use_threads=False))[0]
    if not pa.types.is_dictionary(column.type) or len(column.dictionary) < dictionary.values:
        return dictionary.nbytes
    words = column.dictionary
    longest = pc.max(pc.binary_length(words.cast(pa.large_string()) if pa.types.is_string_view(words.type) else words))
    return max(longest.as_py() or 0, 1)
