import json
import subprocess
import sys
from decimal import Decimal
from pathlib import Path
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from hypothesis import given
from hypothesis import strategies as st

from pipeline.corpus import check_task, load_tokenizer
from pipeline.corpus.files import inspect_files
from pipeline.corpus.read_steps import MOST_PAGE_BYTES
from pipeline.corpus.reading import read_texts, read_units
from pipeline.corpus.rows import RowStatus, tokenise_rows
from pipeline.corpus.values import OverLong, changed_texts, column_texts
from pipeline.errors import CorpusError
from pipeline.settings import TaskSettings

from .test_rows import recipe

MEBIBYTE = 2**20


@given(st.lists(st.floats(width=32, allow_nan=False, allow_infinity=False)))
def test_floats_have_the_shortest_text_of_their_own_width(values: list[float]) -> None:
    for kind, width in ((pa.float32(), np.float32), (pa.float64(), np.float64)):
        texts = column_texts(pa.array(values, kind))
        for text, value in zip(texts, values, strict=True):
            assert text is not None and width(text) == width(value)
            fraction = not float(value).is_integer()
            assert not fraction or text == str(width(value))


def test_a_stored_3_8_is_written_3_8_and_zero_of_a_fine_scale_without_exponent() -> None:
    for kind in (pa.float16(), pa.float32(), pa.float64()):
        assert column_texts(pa.array([np.float16(3.8) if kind == pa.float16() else 3.8], kind)) == ["3.8"]
        assert column_texts(pa.array([np.float16(1)], kind)) == ["1.0"]
    assert column_texts(pa.array([Decimal("0E-8"), Decimal("1.5")], pa.decimal128(12, 8))) == [
        "0.00000000",
        "1.50000000",
    ]


def _task(folder: Path, **files: list[pa.Array]) -> TaskSettings:
    for split, arrays in files.items():
        for number, array in enumerate(arrays):
            place = folder / split / f"{number}.parquet"
            place.parent.mkdir(parents=True, exist_ok=True)
            pq.write_table(pa.table({"text": ["good"] * len(array), "label": array}), place)
    given = {split: str(folder / split) for split in files}
    rest: dict[str, Any] = {} if "dev" in given else {"dev_fraction": 0.5}
    return TaskSettings(**given, input="{text}", target="{label}", **rest)


def _labels(task: TaskSettings) -> list[str | None]:
    plan = check_task("x", task)
    sources = plan.sources.values()
    read = (
        texts["label"]
        for s in sources
        for unit in read_units(s)
        for _, texts in read_texts(s.filesystem, unit, ["label"], s.where, plan.integer_columns)
    )
    return [text for part in read for text in part]


def test_names_of_classes_are_texts_whatever_numbers_stand_for_them(tmp_path: Path) -> None:
    told = json.dumps({"info": {"features": {"label": {"_type": "ClassLabel", "names": ["no", "yes"]}}}})
    task = _task(tmp_path, train=[pa.array([0, 1]), pa.array([0.0, None])], dev=[pa.array(["no"])])
    for place in (tmp_path / "train").iterdir():
        table = pq.read_table(place)
        pq.write_table(table.replace_schema_metadata({"huggingface": told}), place)
    assert check_task("x", task).integer_columns == {}
    assert _labels(task) == ["no", "yes", "no", None, "no"]
    pq.write_table(
        pa.table({"text": ["good"], "label": pa.array([1], pa.decimal128(3, 0))}), tmp_path / "dev/0.parquet"
    )
    with pytest.raises(CorpusError, match=r"class names in .*train/0.parquet and integer in .*dev/0.parquet"):
        check_task("x", task)


@pytest.mark.slow
@pytest.mark.processes
def test_a_memory_that_does_not_suffice_is_not_called_damage(tmp_path: Path) -> None:
    place = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": ["x" * (200 * MEBIBYTE)]}), place, compression="zstd", write_statistics=False)
    (sentence, _) = _read_apart(place, 1.2)
    assert f"the memory did not suffice to read {place}" in sentence and "damaged" not in sentence


def test_whole_floats_are_integers_where_another_file_or_split_has_integers(tmp_path: Path) -> None:
    floats, integers = pa.array([0.0, 1.0, None]), pa.array([0, 1])
    assert _labels(_task(tmp_path / "a", train=[integers, floats])) == ["0", "1", "0", "1", None]
    assert _labels(_task(tmp_path / "b", train=[floats], dev=[integers])) == ["0", "1", None, "0", "1"]
    assert _labels(_task(tmp_path / "c", train=[floats])) == ["0.0", "1.0", None]


def test_a_fraction_where_another_file_has_integers_is_refused_by_name(tmp_path: Path) -> None:
    task = _task(tmp_path, train=[pa.array([0, 1])], test=[pa.array([0.0, 0.5])])
    with pytest.raises(
        CorpusError, match=r"of .*test/0.parquet holds 0.5, while .*train/0.parquet holds int"
    ) as refused:
        _labels(task)
    assert "\n" not in str(refused.value)


SAME = {
    "int8 and uint64": (pa.array([1], pa.int8()), pa.array([1], pa.uint64())),
    "text and dictionary": (pa.array(["a"]), pa.array(["a"]).dictionary_encode()),
    "text and large text": (pa.array(["a"]), pa.array(["a"], pa.large_string())),
    "text and view": (pa.array(["a"]), pa.array(["a"], pa.string_view())),
    "text and null": (pa.array(["a"]), pa.nulls(1)),
    "text and integers": (pa.array(["1"]), pa.array([1])),
    "floats of two widths": (pa.array([3.8], pa.float32()), pa.array([3.8])),
    "integers and decimals of scale 0": (pa.array([1]), pa.array([Decimal(1)], pa.decimal128(9, 0))),
}
APART = {
    "text and floats": (pa.array(["1"]), pa.array([1.0])),
    "text and booleans": (pa.array(["true"]), pa.array([True])),
    "integers and booleans": (pa.array([1]), pa.array([True])),
    "two scales": (pa.array([Decimal("1.5")], pa.decimal128(9, 1)), pa.array([Decimal("1.5")], pa.decimal128(9, 2))),
    "integers and decimals": (pa.array([1]), pa.array([Decimal("1.0")], pa.decimal128(9, 1))),
    "floats and decimals": (pa.array([1.5]), pa.array([Decimal("1.5")], pa.decimal128(9, 1))),
}


@pytest.mark.parametrize("kind", SAME)
def test_types_that_write_a_value_alike_go_together(tmp_path: Path, kind: str) -> None:
    one, other = SAME[kind]
    texts = _labels(_task(tmp_path, train=[one], dev=[other]))
    assert len({text for text in texts if text is not None}) == 1


@pytest.mark.parametrize("kind", APART)
def test_types_that_would_write_one_value_in_two_ways_are_refused_naming_both_files(tmp_path: Path, kind: str) -> None:
    one, other = APART[kind]
    for files in ({"train": [one, other]}, {"train": [other], "test": [one]}):
        with pytest.raises(CorpusError, match=r"0.parquet and .*parquet, .* one type") as refused:
            check_task("x", _task(tmp_path / str(len(files)), **files))
        assert "\n" not in str(refused.value)


DATED = (pa.timestamp("ms"), pa.date32(), pa.time32("s"), pa.duration("s"), pa.binary(), pa.list_(pa.int8()))


@pytest.mark.parametrize("kind", DATED, ids=str)
def test_dates_bytes_and_nested_values_have_no_text(tmp_path: Path, kind: pa.DataType) -> None:
    with pytest.raises(CorpusError, match="neither text nor number"):
        check_task("x", _task(tmp_path, train=[pa.nulls(2, kind)]))


def test_only_a_corpus_whose_texts_changed_is_named_anew(tmp_path: Path) -> None:
    def changed(array: pa.Array, whole: tuple[str, ...] = ()) -> list[str]:
        pq.write_table(pa.table({"label": array}), tmp_path / "x.parquet")
        return changed_texts(inspect_files(str(tmp_path), "x"), ["label"], whole)

    for array in (pa.array(["a"]), pa.array([1]), pa.array([1.0]), pa.array([True]), pa.nulls(1)):
        assert changed(array) == []
    assert changed(pa.array([3.8], pa.float32())) == changed(pa.array([1.0]), ("label",)) == ["label"]


@pytest.mark.parametrize("dictionary", [True, False])
def test_a_cell_beyond_the_bound_is_counted_over_long_and_its_neighbours_are_used(
    tmp_path: Path, tokenizer_dir: Path, dictionary: bool
) -> None:
    cells = ["good", "x" * (17 * MEBIBYTE), None, "bad"]
    place = tmp_path / "x.parquet"
    pq.write_table(pa.table({"text": cells, "label": ["yes"] * 4}), place, use_dictionary=dictionary)
    source = inspect_files(str(place), "x")
    units = read_units(source)
    parts = [part for unit in units for part in read_texts(source.filesystem, unit, ["text", "label"], "x")]
    columns = {name: [text for _, part in parts for text in part[name]] for name in ("text", "label")}
    assert type(columns["text"][1]) is OverLong and len(columns["text"][1]) < 200
    tokenizer = load_tokenizer(str(tokenizer_dir))
    statuses = tokenise_rows(recipe("{text}"), tokenizer, columns, 4)["status"].to_pylist()
    assert statuses == [RowStatus.OK, RowStatus.INPUT_LONG, RowStatus.NULL, RowStatus.OK]
    swapped = {"text": columns["label"], "label": columns["text"]}
    assert tokenise_rows(recipe("{text}"), tokenizer, swapped, 4)["status"].to_pylist()[1] == RowStatus.TARGET_LONG


_READ = """
import resource, sys
from pipeline.corpus.files import inspect_files
from pipeline.corpus.reading import read_texts, read_units
from pipeline.errors import CorpusError
source = inspect_files(sys.argv[1], "x")
def held(): return resource.getrusage(resource.RUSAGE_SELF).ru_maxrss // 1024
before, rows = held(), 0
try:
    for unit in read_units(source):
        rows += sum(count for count, _ in read_texts(source.filesystem, unit, ["text"], "x"))
except CorpusError as error:
    print(error)
print(rows, held() - before)
"""


def _read_apart(place: Path, gibibytes: float = 6) -> list[str]:
    limited = ["prlimit", f"--as={int(gibibytes * 2**30)}", sys.executable, "-c", _READ, str(place)]
    return subprocess.run(limited, capture_output=True, text=True, check=True).stdout.splitlines()


@pytest.mark.slow
@pytest.mark.processes
def test_a_small_file_of_huge_cells_is_read_in_a_bounded_memory(tmp_path: Path) -> None:
    many = tmp_path / "many.parquet"
    pq.write_table(pa.table({"text": ["x" * (5 * MEBIBYTE)] * 400}), many, compression="zstd")
    assert many.stat().st_size < 10_000
    (found,) = _read_apart(many)
    rows, held = map(int, found.split())
    assert rows == 400 and held < 300


@pytest.mark.parametrize("dictionary", [True, False])
@pytest.mark.processes
def test_a_page_that_would_unpack_beyond_the_bound_is_refused_unread(tmp_path: Path, dictionary: bool) -> None:
    place = tmp_path / "one.parquet"
    cell = "x" * (MOST_PAGE_BYTES + MEBIBYTE)
    pq.write_table(
        pa.table({"text": [cell]}), place, compression="zstd", use_dictionary=dictionary, write_statistics=False
    )
    del cell
    sentence, found = _read_apart(place)
    assert f"{place}, row group 0, column 'text' has a page of 257 MiB" in sentence
    assert int(found.split()[1]) < 100
