"""How large the pages of a Parquet column are, from their headers alone: Arrow unpacks a page as a whole."""

import pyarrow as pa
import pyarrow.parquet as pq

MOST_PAGE_BYTES = 256 * 2**20
"""Unpacked; DuckDB's largest are 100 MB, most writers' 1 MiB."""
_HEADER_BYTES = 2**16
_BOOLEANS, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 12


def oversized_page(file: pa.NativeFile, chunk: pq.ColumnChunkMetaData) -> int | None:
    """The bytes of a page of the chunk that is beyond the bound, unpacked; None where there is none.

    A header that cannot be read ends the search: Arrow has words of its own for damage.
    """
    if chunk.total_uncompressed_size <= MOST_PAGE_BYTES:
        return None
    first = chunk.dictionary_page_offset if chunk.has_dictionary_page else None
    place = min(offset for offset in (first, chunk.data_page_offset) if offset)
    end = place + chunk.total_compressed_size
    while place < end:
        file.seek(place)
        try:
            sizes, header = _page_header(file.read(_HEADER_BYTES))
        except (IndexError, RecursionError):
            return None
        unpacked, packed = sizes.get(2, -1), sizes.get(3, -1)
        if unpacked > MOST_PAGE_BYTES:
            return unpacked
        if packed < 0:
            return None
        place += header + packed
    return None


def _page_header(data: bytes) -> tuple[dict[int, int], int]:
    """-> the integers of a PageHeader in Thrift's compact protocol, by field, and its length in bytes."""
    integers: dict[int, int] = {}
    return integers, _skip_struct(data, 0, integers)


def _skip_struct(data: bytes, at: int, integers: dict[int, int] | None = None) -> int:
    field = 0
    while data[at]:
        step, kind = data[at] >> 4, data[at] & 15
        at += 1
        if step:
            field += step
        else:
            value, at = _varint(data, at)
            field = _signed(value)
        if integers is not None and kind in _INTEGERS:
            value, at = _varint(data, at)
            integers[field] = _signed(value)
        else:
            at = _skip(data, at, kind)
    return at + 1


def _skip(data: bytes, at: int, kind: int) -> int:
    if kind in _BOOLEANS:
        return at
    if kind == _BYTE:
        return at + 1
    if kind in _INTEGERS:
        return _varint(data, at)[1]
    if kind == _DOUBLE:
        return at + 8
    if kind == _BINARY:
        length, at = _varint(data, at)
        return at + length
    if kind == _STRUCT:
        return _skip_struct(data, at)
    if kind in _LISTS:
        count, inner = data[at] >> 4, data[at] & 15
        count, at = _varint(data, at + 1) if count == 15 else (count, at + 1)
        for _ in range(min(count, len(data))):
            at = _skip(data, at, inner) + (inner in _BOOLEANS)
        return at
    raise IndexError(kind)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    value = shift = 0
    while data[at] & 128:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


def _signed(value: int) -> int:
    return (value >> 1) ^ -(value & 1)
