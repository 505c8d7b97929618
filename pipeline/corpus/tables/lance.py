"""A Lance dataset -> its fragments at one version, which the library itself reads."""

import re
from collections.abc import Iterator, Sequence
from dataclasses import dataclass
from datetime import UTC, timedelta
from functools import lru_cache
from typing import Any

import pyarrow as pa
from pyarrow import fs

from pipeline.corpus.paths import locate
from pipeline.corpus.row_view import RowFilter, RowView
from pipeline.corpus.source_files import ParquetSource, SourceFile, TableVersion, one_line, unreadable
from pipeline.corpus.tables.libraries import Lake, TableAddress, lake_library, storage_options
from pipeline.errors import CorpusError

_READ_AHEAD = 2
_NOISE = re.compile(r",? /\S+\.rs:\d+(:\d+)?")


@dataclass(frozen=True)
class FragmentReader:
    """Reads one fragment; see `BatchReader`."""

    place: str
    version: int
    options: tuple[tuple[str, str], ...]
    fragment: int
    metadata: str
    """Its files and its deleted rows: a fragment that they describe does not change."""
    where: str | None
    """Lance's own SQL."""
    advice: str = "the dataset was cleaned up or replaced since the job looked at it, so run the job again"

    def batches(
        self, filesystem: fs.FileSystem, path: str, columns: Sequence[str], rows: int
    ) -> Iterator[pa.RecordBatch]:
        fragment = _dataset(self.place, self.version, self.options).get_fragment(self.fragment)
        names = list(columns) or fragment.schema.names[:1]
        yield from fragment.to_batches(columns=names, filter=self.where, batch_size=rows, batch_readahead=_READ_AHEAD)

    def key(self) -> Any:
        return [self.metadata, self.where]


@lru_cache(maxsize=1)  # a worker reads one dataset at a time, fragment after fragment
def _dataset(place: str, version: int, options: tuple[tuple[str, str], ...]) -> Any:
    import lance

    return lance.dataset(place, version=version, storage_options=dict(options) or None)


def open_lance(address: TableAddress, lake: Lake, where: str, wanted: str | None = None) -> ParquetSource:
    """The rows of a Lance dataset at the asked version, or the newest.

    wanted: a filter in Lance's SQL.
    Raises: CorpusError when there is no such dataset or version, or the filter is none; UnreachableError.
    """
    lance = lake_library("lance", address.written, where)
    filesystem, root, _ = locate(address.place)
    options = storage_options(address.place)
    place = address.place.partition("?")[0] if "://" in address.place else root
    try:
        asked: dict[str, Any] = {"version": address.number} if address.number is not None else {}
        if address.version is not None and not asked:
            # The library compares with its versions' times, which are local ones without a zone.
            asked["asof"] = address.moment.astimezone().replace(tzinfo=None)
        dataset = lake.once(address, lambda: lance.dataset(place, storage_options=options, **asked))
    except (OSError, ValueError) as error:
        of = f"version {address.version} of " if address.version else ""
        raise unreadable(
            OSError(_NOISE.sub("", str(error))),
            f"{where}: {of}{address.written} cannot be opened",
            "fix the address, or name a version that was not cleaned up",
        ) from error
    if wanted is not None:
        try:
            dataset.scanner(columns=[], filter=wanted, with_row_id=True).explain_plan()
        except (OSError, ValueError) as error:
            told = one_line(OSError(_NOISE.sub("", str(error))))[:200]
            raise CorpusError(f"{where}: the filter {wanted!r} is none of Lance's ({told}); fix 'where'") from error
    written = next((one["timestamp"] for one in dataset.versions() if one["version"] == dataset.version), None)
    # The library tells a time without its nanoseconds, and by that finds the version before.
    time = None if written is None else (written.astimezone(UTC) + timedelta(microseconds=1)).isoformat()
    version = TableVersion(address.written, str(dataset.version), None, time)
    columns = tuple((own.name, own.type) for own in dataset.schema)
    files = []
    for fragment in dataset.get_fragments():
        metadata = str(fragment.metadata.to_json())
        stored = tuple((options or {}).items())
        reader = FragmentReader(place, dataset.version, stored, fragment.fragment_id, metadata, wanted)
        files.append(_fragment(fragment, root, reader, columns))
    return ParquetSource(where, filesystem, tuple(files), tables=(version,))


def _fragment(
    fragment: Any, root: str, reader: FragmentReader, columns: tuple[tuple[str, pa.DataType], ...]
) -> SourceFile:
    size = sum(file.file_size_bytes or 0 for file in fragment.metadata.files)
    rows = fragment.count_rows()
    view = RowView(
        rows,
        stored=tuple((name, name) for name, _ in columns),
        where=RowFilter(reader.where, ()) if reader.where else None,
        exact=reader.where is None,
    )
    path = f"{root.rstrip('/')}/data/{fragment.metadata.files[0].path}"
    return SourceFile(path, size, None, (), columns, ((rows, size),), view=view, reader=reader)
