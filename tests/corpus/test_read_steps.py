"""An ordinary file is read in full batches; one whose rows may be huge is read in steps of bounded memory."""

import os
from pathlib import Path
from types import SimpleNamespace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpus.files import inspect_files
from pipeline.corpus.pages import PageHeaderError, page_headers
from pipeline.corpus.read_steps import STEP_BYTES
from pipeline.corpus.reading import _safe_step, read_texts, read_units
from pipeline.errors import CorpusError


def _steps(place: Path, column: str = "text") -> list[tuple[int, int]]:
    """(rows of a step, rows of a batch) of each unit of a file."""
    source = inspect_files(str(place), "x")
    footer = pq.read_metadata(place)
    return [(_safe_step(source.filesystem, u, footer, [column], "x"), u.batch_rows) for u in read_units(source)]


def _random_texts(rows: int, width: int) -> pa.Array:
    letters = pa.py_buffer(os.urandom(rows * width // 2).hex().encode())
    offsets = pa.array(range(0, rows * width + 1, width), pa.int32())
    return pa.StringArray.from_buffers(rows, offsets.buffers()[1], letters)


@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.parametrize(("rows", "width"), [(240_000, 300), (30_000, 300), (4_000, 20_000)])
def test_an_ordinary_file_of_one_large_row_group_is_read_in_full_batches(
    tmp_path: Path, rows: int, width: int, dictionary: bool
) -> None:
    place = tmp_path / "a.parquet"
    table = pa.table({"text": _random_texts(rows, width), "label": ["no", "yes"] * (rows // 2)})
    pq.write_table(table, place, use_dictionary=dictionary, row_group_size=rows)
    assert pq.read_metadata(place).num_row_groups == 1
    for column in table.column_names:
        assert all(step == batch for step, batch in _steps(place, column))
    source = inspect_files(str(place), "x")
    unit = read_units(source)[-1]
    counts = [count for count, _ in read_texts(source.filesystem, unit, ["text"], "x")]
    # The first of a slice is what is left of a batch that begins before it.
    assert set(counts[1:-1]) <= {unit.batch_rows} and len(counts) <= 2 + (unit.end - unit.first) // unit.batch_rows


SHORT, LONG = "short", "x" * 2**20
ONE_LONG_WORD = pa.DictionaryArray.from_arrays(pa.array([None, 0, *[1] * 20_000], pa.int32()), [SHORT, LONG])
HUGE: dict[str, tuple[list[str] | pa.Array, dict[str, object]]] = {
    "a dictionary of one long text": (ONE_LONG_WORD, {}),
    "long texts side by side among many short ones": (
        [SHORT] * 100_000 + [LONG] * 100 + [SHORT] * 100_000,
        {"use_dictionary": False, "write_batch_size": 1},
    ),
    "texts that repeat the beginning of those before": (
        [LONG] * 100 + [SHORT] * 20_000,
        {"use_dictionary": False, "column_encoding": {"text": "DELTA_BYTE_ARRAY"}},
    ),
}


@pytest.mark.parametrize("kind", HUGE)
def test_a_step_over_huge_neighbours_stays_within_the_bound(tmp_path: Path, kind: str) -> None:
    cells, options = HUGE[kind]
    place = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": cells}), place, compression="zstd", row_group_size=10**6, **options)
    step, batch = min(_steps(place))  # of the units whose rows lie in front of the long ones, it is a whole batch
    assert 1 < step < batch
    sizes = [len(LONG)] * 20_002 if cells is ONE_LONG_WORD else list(map(len, cells))
    assert max(sum(sizes[row : row + step]) for row in range(0, len(sizes), step)) <= STEP_BYTES


def test_the_dictionary_of_a_chunk_that_begins_with_null_is_known(tmp_path: Path) -> None:
    place = tmp_path / "a.parquet"
    cells = [None, *(str(row).zfill(300) for row in range(3_000))] * 20
    pq.write_table(pa.table({"text": cells}), place, row_group_size=10**6)
    assert all(step == batch for step, batch in _steps(place))


def _varint(value: int) -> bytes:
    return (bytes([value & 127 | 128]) + _varint(value >> 7)) if value > 127 else bytes([value])


def _page(unpacked: int, statistics: int) -> bytes:
    """A data page of 7 values and no bytes, whose header, in Thrift's compact protocol, holds so long a least value."""
    least = b"\x18" + _varint(statistics) + b"x" * statistics + b"\x00"
    data_page = b"\x15\x0e\x15\x00\x15\x06\x15\x06\x1c" + least + b"\x00"
    return b"\x15\x00\x15" + _varint(2 * unpacked) + b"\x15\x00\x2c" + data_page + b"\x00"


@pytest.mark.parametrize("statistics", [10, 70_000, 3_000_000])
def test_a_page_behind_a_long_header_is_looked_at(statistics: int) -> None:
    data = b"PAR1" + _page(5, statistics) + _page(6, 0)
    place = {"has_dictionary_page": False, "data_page_offset": 4, "total_compressed_size": len(data) - 4}
    chunk = SimpleNamespace(**place, num_values=14)
    file = pa.BufferReader(data)
    assert [(page.nbytes, page.values) for page in page_headers(file, chunk, 14)] == [(5, 7), (6, 7)]
    assert len(list(page_headers(file, chunk, 7))) == 1
    broken = pa.BufferReader(data.replace(_page(6, 0), b"\xff" * len(_page(6, 0))))
    with pytest.raises(PageHeaderError, match="no page begins at byte"):
        list(page_headers(broken, chunk, 14))


def test_a_page_without_a_header_is_refused_naming_its_place(tmp_path: Path) -> None:
    place = tmp_path / "a.parquet"
    pq.write_table(pa.table({"text": _random_texts(4_000, 300)}), place, use_dictionary=False, compression="none")
    data = bytearray(place.read_bytes())
    data[4:40] = bytes(36)
    place.write_bytes(data)
    with pytest.raises(CorpusError, match=r"a.parquet, row group 0, column 'text' is damaged, .*no page .* byte 4;"):
        _steps(place)
