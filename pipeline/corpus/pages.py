"""The sizes of a Parquet column's pages, read from their headers alone.

Arrow decompresses a page as a whole, so a page's size bounds the memory of reading it, and pyarrow does not tell it.
Page headers are Thrift structs in its compact protocol, of which the few lines below read the integers.
"""

from collections.abc import Iterator
from dataclasses import dataclass

import pyarrow as pa
import pyarrow.parquet as pq

# A header's length is not known beforehand. Arrow, too, reads more and more bytes until it ends, up to the second size.
_HEADER_BYTES, _MOST_HEADER_BYTES = 2**16, 2**24
# Type ids of Thrift's compact protocol; a boolean field has its value in the type, and no bytes.
_BOOLEANS, _BYTE, _INTEGERS, _DOUBLE, _BINARY, _LISTS, _STRUCT = (1, 2), 3, (4, 5, 6), 7, 8, (9, 10), 12
# Fields of a PageHeader: the page's type, and its size uncompressed and compressed.
_TYPE, _UNPACKED, _PACKED = (1,), (2,), (3,)
_DICTIONARY = 2
# `num_values` of the headers of a data page, a dictionary page and a data page of version 2.
_VALUES = (5, 1), (7, 1), (8, 1)


class PageHeaderError(ValueError):
    """A page's header cannot be read."""


@dataclass(frozen=True)
class Page:
    """What a header says of its page."""

    nbytes: int
    """Uncompressed."""
    values: int
    """Nulls included; for a dictionary, the number of its words."""
    is_dictionary: bool


def page_headers(file: pa.NativeFile, chunk: pq.ColumnChunkMetaData, rows: int) -> Iterator[Page]:
    """The pages of a column chunk, up to the one with its row `rows`. Only headers are read, some bytes of each page.

    Raises: PageHeaderError.
    """
    # A dictionary page stands before the data pages. Some writers note 0 for an offset that they do not have.
    first = chunk.dictionary_page_offset if chunk.has_dictionary_page else None
    place = min(offset for offset in (first, chunk.data_page_offset) if offset)
    end = place + chunk.total_compressed_size
    left = min(rows, chunk.num_values)
    while place < end and left > 0:
        found, header = _page_header(file, place)
        if found.get(_UNPACKED, -1) < 0 or found.get(_PACKED, -1) < 0:
            raise PageHeaderError(_damage(place))
        values = next((found[of] for of in _VALUES if of in found), 0)
        page = Page(found[_UNPACKED], values, found.get(_TYPE) == _DICTIONARY)
        yield page
        left -= 0 if page.is_dictionary else values
        place += header + found[_PACKED]


def _page_header(file: pa.NativeFile, place: int) -> tuple[dict[tuple[int, ...], int], int]:
    """-> the integers of a PageHeader by the path of their field ids, and the header's length in bytes."""
    most = _HEADER_BYTES
    while True:
        file.seek(place)
        data = file.read(most)
        found: dict[tuple[int, ...], int] = {}
        try:
            return found, _read_struct(data, 0, found, ())
        except (IndexError, RecursionError) as error:  # it goes beyond these bytes, or is no header at all
            if len(data) < most or most >= _MOST_HEADER_BYTES:
                raise PageHeaderError(_damage(place)) from error
        most *= 16


def _damage(place: int) -> str:
    return f"is damaged, since no page begins at byte {place}; write it again or leave it out"


def _read_struct(data: bytes, at: int, found: dict[tuple[int, ...], int], path: tuple[int, ...]) -> int:
    """Put the struct's integers into `found` by their path of field ids; -> the byte behind the struct."""
    field = 0
    while data[at]:  # a zero byte ends a struct
        step, kind = data[at] >> 4, data[at] & 15
        at += 1
        if step:  # field ids are stored as differences where these are small
            field += step
        else:
            value, at = _varint(data, at)
            field = _signed(value)
        if kind in _INTEGERS:
            value, at = _varint(data, at)
            found[*path, field] = _signed(value)
        elif kind == _STRUCT:
            at = _read_struct(data, at, found, (*path, field))
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
        return _read_struct(data, at, {}, ())
    if kind in _LISTS:
        # A short list has its length in the first byte, a longer one in a number behind it.
        count, inner = data[at] >> 4, data[at] & 15
        count, at = _varint(data, at + 1) if count == 15 else (count, at + 1)
        for _ in range(min(count, len(data))):
            at = _skip(data, at, inner) + (inner in _BOOLEANS)
        return at
    raise IndexError(kind)


def _varint(data: bytes, at: int) -> tuple[int, int]:
    """-> an integer of seven bits a byte, the lowest first, and the byte behind it."""
    value = shift = 0
    while data[at] & 128:
        value |= (data[at] & 127) << shift
        at, shift = at + 1, shift + 7
    return value | data[at] << shift, at + 1


def _signed(value: int) -> int:
    """Zigzag: 0, -1, 1, -2, … are stored as 0, 1, 2, 3, …"""
    return (value >> 1) ^ -(value & 1)
