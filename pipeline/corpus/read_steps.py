"""How many rows Arrow may read of a column chunk at a time, so that no file makes it use unbounded memory."""

from collections.abc import Sequence
from itertools import chain

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
import pyarrow.parquet as pq

from pipeline.corpus.pages import Page, page_headers

MOST_PAGE_BYTES = 256 * 2**20
"""Uncompressed. DuckDB's largest pages are 100 MB, those of most writers 1 MiB."""
STEP_BYTES = 64 * 2**20
"""Bytes of a column's texts in a step; a step may take twice the largest page where that is more."""
STREAM_BUFFER = 2**20
# In this encoding a cell stores only how it differs from the one before it, so a small page can hold long texts.
_PREFIXED = "DELTA_BYTE_ARRAY"


class OversizedPageError(ValueError):
    """A page is larger, uncompressed, than the largest that is read."""


def rows_per_step(
    file: pa.NativeFile, footer: pq.FileMetaData, chunk: pq.ColumnChunkMetaData, group: int, rows: int, end: int
) -> int:
    """Rows to read at a time: `rows`, or fewer where so many neighbours before row `end` may exceed `STEP_BYTES`.

    Nothing is read of a chunk that is small or has few rows, and only the dictionary of one up to `STEP_BYTES`.
    Raises: OversizedPageError; PageHeaderError.
    """
    # Even if every row were as large as the whole chunk, a step would be small enough.
    size = chunk.total_uncompressed_size
    if size <= MOST_PAGE_BYTES and size * rows <= STEP_BYTES:
        return rows
    found = page_headers(file, chunk, end)
    first = next(found, None)
    if first is None:
        return rows
    step = rows
    # Pages bound the rows in them: a step's texts are no larger than the pages that it touches.
    if size > STEP_BYTES or _PREFIXED in chunk.encodings:
        looked_at = list(map(_bounded, chain([first], found)))
        step = _neighbours_within([page for page in looked_at if not page.is_dictionary], rows)
        if _PREFIXED in chunk.encodings:  # each cell may be as long as its page
            step = min(step, STEP_BYTES // max(page.nbytes for page in looked_at))
    # A dictionary's longest text may stand in every row, whatever the size of the data pages.
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
    """The number of rows, halved until their pages stay within the bound wherever a step begins."""
    if not looked_at:
        return rows
    sizes = np.array([page.nbytes for page in looked_at], np.int64)
    bound = max(STEP_BYTES, 2 * int(sizes.max()))
    ends = np.cumsum([page.values for page in looked_at], dtype=np.int64)
    upto = np.concatenate([np.zeros(1, np.int64), np.cumsum(sizes)])
    while rows > 1:
        # The worst step begins in the last row of a page: it touches that page and reaches farthest beyond it.
        last = np.minimum(np.searchsorted(ends, ends + (rows - 2), "right"), len(ends) - 1)
        if (upto[last + 1] - upto[:-1]).max() <= bound:
            break
        rows //= 2
    return rows


def _longest_word(
    file: pa.NativeFile, footer: pq.FileMetaData, chunk: pq.ColumnChunkMetaData, group: int, dictionary: Page
) -> int:
    """Bytes of the longest text in a chunk's dictionary."""
    # Arrow gives no dictionary without rows, so one row is read as an index into it.
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
