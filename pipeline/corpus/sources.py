"""A split as the settings name it -> its files: paths, tables and text files, with the columns, filter and limit."""

from collections.abc import Iterator, Mapping
from dataclasses import replace

import pyarrow as pa

from pipeline.corpus.files import inspect_files
from pipeline.corpus.reading import count_rows
from pipeline.corpus.row_view import RowView
from pipeline.corpus.source_files import ParquetSource, SourceFile
from pipeline.corpus.tables.delta import open_delta
from pipeline.corpus.tables.hub import hub_split, open_hub_split
from pipeline.corpus.tables.iceberg import open_iceberg
from pipeline.corpus.tables.lance import open_lance
from pipeline.corpus.tables.libraries import Lake, TableAddress, reading, table_address
from pipeline.corpus.where import parse_where, without_hopeless_groups
from pipeline.errors import CorpusError
from pipeline.settings import SplitSettings


def open_split_source(split: str | list[str] | SplitSettings, where: str, lake: Lake | None = None) -> ParquetSource:
    """The files behind a split, and how their rows become its rows; nothing but footers and logs is read.

    lake: catalogs, and tables that are open already.
    Raises: CorpusError naming the place and the fix; UnreachableError.
    """
    asked = split if isinstance(split, SplitSettings) else SplitSettings(path=split)
    source = _joined(_each(asked, where, lake or Lake()), where)
    if asked.columns:
        source = replace(source, files=tuple(_renamed(file, asked.columns, where) for file in source.files))
    return source if asked.limit is None else _limited(source, asked.limit)


def _each(asked: SplitSettings, where: str, lake: Lake) -> Iterator[ParquetSource]:
    plain: list[str] = []
    for path in [asked.path] if isinstance(asked.path, str) else asked.path:
        address = table_address(path)
        split = hub_split(path)
        found = open_hub_split(split, lake, where, asked.types) if split is not None else None
        if found is not None:
            yield _filtered(found, asked.where)
        elif address is None:
            plain.append(path)
        else:
            yield _table(address, asked.where, where, lake)
    if plain or not asked.path:
        yield _filtered(inspect_files(plain, where, asked.types), asked.where)


def _table(address: TableAddress, wanted: str | None, where: str, lake: Lake) -> ParquetSource:
    with reading(address, where):
        if address.kind == "lance":
            return open_lance(address, lake, where, wanted)
        if address.kind == "iceberg":
            return _filtered(open_iceberg(address, lake, where, wanted), wanted, of_iceberg=True)
        return _filtered(open_delta(address, lake, where, wanted), wanted)


def _joined(sources: Iterator[ParquetSource], where: str) -> ParquetSource:
    """One source of several. Raises: CorpusError when they lie in different stores."""
    first, *others = sources
    for other in others:
        if other.filesystem != first.filesystem:
            raise CorpusError(f"{where}: its tables and files lie on different file systems; copy them to one")
    every = (first, *others)
    return ParquetSource(
        where,
        first.filesystem,
        tuple(file for source in every for file in source.files),
        tuple(path for source in every for path in source.left_out),
        tuple(table for source in every for table in source.tables),
        tuple(remark for source in every for remark in source.remarks),
    )


def _filtered(source: ParquetSource, text: str | None, of_iceberg: bool = False) -> ParquetSource:
    if text is None:
        return source
    files = []
    for file in map(_with_view, source.files):
        wanted = parse_where(text, dict(file.columns), source.where, of_iceberg)
        files.append(without_hopeless_groups(source.filesystem, file, wanted))
    return replace(source, files=tuple(files))


def _with_view(file: SourceFile) -> SourceFile:
    """A plain file's rows as they stand, with its Hive columns as texts."""
    if file.view is not None:
        return file
    own = [name for name, _ in file.columns]
    added = [(name, value) for name, value in file.partitions if name not in own]
    view = RowView(
        rows=file.rows,
        stored=tuple((name, name) for name in own),
        constants=tuple((name, pa.scalar(value, pa.string())) for name, value in added),
    )
    columns = (*file.columns, *((name, pa.string()) for name, _ in added))
    return replace(file, columns=columns, partitions=(), view=view)


def _renamed(file: SourceFile, columns: Mapping[str, str], where: str) -> SourceFile:
    """The file with columns under the names that templates call them by."""
    file = _with_view(file)
    assert file.view is not None
    kinds, classes = dict(file.columns), dict(file.class_names)
    for name, column in columns.items():
        if column not in kinds:
            raise CorpusError(
                f"{where}: 'columns' takes {name!r} from the column {column!r}, which {file.path} does not have "
                f"(it has {', '.join(kinds)}); fix 'columns'"
            )
    kept = [(name, kind) for name, kind in file.columns if name not in columns]
    return replace(
        file,
        columns=(*kept, *((name, kinds[column]) for name, column in columns.items())),
        class_names=(
            *((name, names) for name, names in file.class_names if name not in columns),
            *((name, classes[column]) for name, column in columns.items() if column in classes),
        ),
        view=replace(file.view, renamed=tuple(columns.items()), types=file.columns),
    )


def _limited(source: ParquetSource, limit: int) -> ParquetSource:
    """The first `limit` rows, file by file. Files whose rows are not known are read for it, until they suffice."""
    files, left = [], limit
    for file in map(_with_view, source.files):
        assert file.view is not None
        rows = file.view.rows if file.view.exact else count_rows(source.filesystem, file, source.where, left)
        taken = min(rows, left)
        if taken:
            take = taken if taken < rows or not file.view.exact else None
            files.append(replace(file, view=replace(file.view, rows=taken, take=take, exact=True)))
        left -= taken
        if not left:
            break
    return replace(source, files=tuple(files))
