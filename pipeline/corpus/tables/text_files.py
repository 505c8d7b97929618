"""JSON lines and CSV, also compressed: read by pyarrow block by block.

CSV has no types: every cell is text as it stands, unless `types` declares its column. Types of JSON lines are those of
the file's first block, and what stands behind it must fit them; dates stay text, which pyarrow would take for times.
"""

import re
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass
from typing import Any, Literal

import pyarrow as pa
import pyarrow.csv
import pyarrow.json
from pyarrow import fs

from pipeline.corpus.row_view import RowView
from pipeline.corpus.source_files import SourceFile, of_its_store, unreadable

_NAME = re.compile(r"\.(jsonl|ndjson|json|csv|tsv)(\.(gz|bz2|zst|lz4))?$", re.IGNORECASE)
_PACKINGS = {"gz": "gzip", "bz2": "bz2", "zst": "zstd", "lz4": "lz4"}
# A row may be no longer than a block; longer cells than this count as too long in Parquet, too.
_BLOCK_BYTES = 16 * 2**20
_USUAL_PACKING = 4
_TYPES = {"string": pa.string(), "integer": pa.int64(), "float": pa.float64(), "boolean": pa.bool_()}


@dataclass(frozen=True)
class TextReader:
    """Reads one file; see `BatchReader`."""

    kind: Literal["json", "csv", "tsv"]
    packing: str | None
    columns: tuple[tuple[str, pa.DataType], ...]
    advice: str = (
        "fix the row, or declare the column's type: a mapping in place of the path, with 'types', such as "
        "{path: rows.jsonl, types: {score: float}}"
    )

    def batches(
        self, filesystem: fs.FileSystem, path: str, columns: Sequence[str], rows: int
    ) -> Iterator[pa.RecordBatch]:
        kinds = dict(self.columns)
        wanted = {name: kinds[name] for name in columns or [self.columns[0][0]]}
        with filesystem.open_input_stream(path, compression=self.packing) as file:
            for batch in _opened(file, self.kind, wanted):
                for first in range(0, batch.num_rows, rows):
                    yield batch.slice(first, rows)

    def key(self) -> Any:
        return [self.kind, self.packing]


def has_text_name(path: str) -> bool:
    """Whether the name is that of JSON lines or CSV."""
    return _NAME.search(path) is not None


def is_text_file(filesystem: fs.FileSystem, path: str) -> bool:
    """Whether the file is JSON lines or CSV by its name, and no Parquet and no JSON array by its beginning."""
    named = _NAME.search(path)
    if named is None:
        return False
    try:
        with filesystem.open_input_stream(path, compression=_packing(path)) as file:
            begins = file.read(64).removeprefix(b"\xef\xbb\xbf").lstrip()
    except (pa.ArrowException, OSError):
        return True  # reading it will say what is wrong
    return not begins.startswith((b"PAR1", b"[") if named[1].lower() == "json" else b"PAR1")


def describe_text_file(
    filesystem: fs.FileSystem,
    path: str,
    size: int,
    mtime_ns: int | None,
    partitions: tuple[tuple[str, str | None], ...],
    types: Mapping[str, str],
    where: str,
) -> SourceFile:
    """A text file as its first block describes it; one without a row has no columns.

    Raises: CorpusError; UnreachableError; FileNotFoundError.
    """
    named = _NAME.search(path)
    assert named is not None
    ending = named[1].lower()
    kind: Literal["json", "csv", "tsv"] = "csv" if ending == "csv" else "tsv" if ending == "tsv" else "json"
    declared = {name: _TYPES[type_] for name, type_ in types.items()}
    try:
        with filesystem.open_input_stream(path, compression=_packing(path)) as file:
            block = file.read(_BLOCK_BYTES)
            whole = len(block) < _BLOCK_BYTES
        if not block.strip():
            return SourceFile(path, size, mtime_ns, partitions, (), ())
        # Of a longer file the library's own first block: where that ends, a quoted cell of several lines may not.
        if whole:
            columns = _inferred(pa.BufferReader(block), kind) | declared
        else:
            with filesystem.open_input_stream(path, compression=_packing(path)) as file:
                columns = _inferred(file, kind) | declared
        rows = sum(batch.num_rows for batch in _opened(pa.BufferReader(block), kind, {})) if whole else 0
    except FileNotFoundError:
        raise
    except Exception as error:
        if not of_its_store(error, filesystem):
            raise
        raise unreadable(
            error,
            f"{where}: {path} cannot be read as {'JSON lines' if kind == 'json' else kind.upper()}",
            "fix it or leave it out",
        ) from error
    packed = _packing(path)
    if not whole:
        rows = max(1, block.count(b"\n") * size * (_USUAL_PACKING if packed else 1) // len(block))
    added = [(name, value) for name, value in partitions if name not in columns]
    view = RowView(
        rows,
        stored=tuple((name, name) for name in columns),
        constants=tuple((name, pa.scalar(value, pa.string())) for name, value in added),
        exact=whole,
    )
    listed = tuple(columns.items())
    return SourceFile(
        path, size, mtime_ns, (), (*listed, *((name, pa.string()) for name, _ in added)),
        ((rows, size * (_USUAL_PACKING if packed else 1)),), view=view, reader=TextReader(kind, packed, listed),
    )  # fmt: skip


def told_types(files: Sequence[SourceFile], types: Mapping[str, str]) -> list[str]:
    """What the plan tells of the types of JSON lines that nobody declared."""
    inferred = {
        name: str(kind)
        for file in files
        if isinstance(file.reader, TextReader) and file.reader.kind == "json"
        for name, kind in file.reader.columns
        if name not in types
    }
    told = ", ".join(f"{name} {kind}" for name, kind in sorted(inferred.items()))
    return [f"types inferred from the first rows: {told}"] if told else []


def _packing(path: str) -> str | None:
    return _PACKINGS.get(path.rpartition(".")[2].lower())


def _inferred(file: pa.NativeFile, kind: str) -> dict[str, pa.DataType]:
    """Column -> type in the first rows of a file; every column of CSV is text."""
    if kind == "json":
        with _opened(file, kind, None) as reader:
            schema = reader.schema
        return {own.name: _plain(own.type) for own in schema}
    with _opened(file, kind, {}) as reader:
        return {name: pa.string() for name in reader.schema.names}


def _plain(kind: pa.DataType) -> pa.DataType:
    return pa.string() if pa.types.is_temporal(kind) else kind


def _opened(file: pa.NativeFile, kind: str, columns: Mapping[str, pa.DataType] | None) -> Any:
    """A reader of batches with these columns; of all, without any; with inferred types for None."""
    if kind == "json":
        options = {} if columns is None else {"unexpected_field_behavior": "ignore" if columns else "infer"}
        schema = pa.schema(list(columns.items())) if columns else None
        return pyarrow.json.open_json(
            file,
            pyarrow.json.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
            pyarrow.json.ParseOptions(explicit_schema=schema, **options),
        )
    types = dict(columns or {})
    return pyarrow.csv.open_csv(
        file,
        pyarrow.csv.ReadOptions(use_threads=False, block_size=_BLOCK_BYTES),
        pyarrow.csv.ParseOptions(delimiter="\t" if kind == "tsv" else ",", newlines_in_values=True),
        pyarrow.csv.ConvertOptions(column_types=types, include_columns=list(types), strings_can_be_null=False),
    )
