"""What a table's own library reads, and what the corpus reads of it, in one form: counted rows of texts."""

from collections import Counter
from collections.abc import Mapping, Sequence
from typing import Any

import numpy as np
import pyarrow as pa

from pipeline.corpus.reading import read_texts, read_units
from pipeline.corpus.rows import row_identities
from pipeline.corpus.source_files import ParquetSource
from pipeline.corpus.sources import open_split_source
from pipeline.corpus.tables.libraries import Lake
from pipeline.corpus.tally import tally_rows
from pipeline.corpus.values import column_texts
from pipeline.settings import CatalogSettings, SplitSettings

HERE = "task 'x', train"
Rows = Counter[tuple[str | None, ...]]


def open_rows(path: str | Mapping[str, Any], catalogs: Any = None) -> ParquetSource:
    split = path if isinstance(path, str) else SplitSettings(**path)
    named = {name: CatalogSettings(**properties) for name, properties in (catalogs or {}).items()}
    return open_split_source(split, HERE, Lake(named))


def read_rows(source: ParquetSource, columns: Sequence[str]) -> Rows:
    """The corpus' rows, read unit by unit as Ray's tasks read them."""
    rows: Rows = Counter()
    for unit in read_units(source):
        for count, texts in read_texts(source.filesystem, unit, columns, HERE):
            read = list(zip(*(texts[name] for name in columns), strict=True))
            assert len(read) == count
            rows.update(read)
    if source.exact:
        assert rows.total() == source.rows
    return rows


def library_rows(table: pa.Table, columns: Sequence[str]) -> Rows:
    """The rows of a table that its own library has read."""
    texts = [[text for chunk in table[name].chunks for text in column_texts(chunk)] for name in columns]
    return Counter(zip(*texts, strict=True))


def digest_of(rows: Rows) -> str:
    """The corpus digest of rows whose first column is the input, and whose second is the target."""
    listed = list(rows.elements())
    ids = row_identities([row[0] for row in listed], [row[1] for row in listed])
    return tally_rows(ids, np.zeros(len(ids), np.int8)).summary.digest
