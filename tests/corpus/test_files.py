import gzip
import os
from collections.abc import Callable
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpus import check_task, files
from pipeline.corpus.files import inspect_files
from pipeline.corpus.reading import group_units, read_texts, read_units
from pipeline.errors import CorpusError

ROWS = [{"text": f"text {i}", "label": i % 2} for i in range(6)]
HERE = "task 'x', train"


@pytest.fixture
def lake(tmp_path: Path, write: Callable[..., Path]) -> Path:
    """Four files of 6 rows in a partitioned folder, with what other tools leave beside them."""
    for year in ("2023", "2024"):
        write(tmp_path / "lake" / f"year={year}" / "lang=en%20gb" / "a.parquet", ROWS)
        write(tmp_path / "lake" / f"year={year}" / "b.parquet", ROWS)
    write(tmp_path / "lake" / "_temporary" / "half.parquet", ROWS)
    (tmp_path / "lake" / "_SUCCESS").touch()
    return tmp_path / "lake"


@pytest.mark.parametrize(
    ("path", "expected"),
    [
        ("{lake}", 4),
        ("{lake}/year=2024", 2),
        ("{lake}/year=2024/b.parquet", 1),
        ("{lake}/year=*/b.parquet", 2),
        ("{lake}/**/a.parquet", 2),
        ("{lake}/**/[ab].parquet", 4),
        ("{lake}/year=202[4]", 2),
        ("{lake}/year=202?/b.*", 2),
        ("file://{lake}", 4),
        ("file://{lake}/year=*/b.parquet", 2),
    ],
)
def test_a_path_is_a_file_folder_glob_or_uri(lake: Path, path: str, expected: int) -> None:
    source = inspect_files(path.format(lake=lake), HERE)
    assert len(source.files) == expected
    assert source.rows == 6 * expected


def test_a_list_counts_each_file_once(lake: Path) -> None:
    both = inspect_files([f"{lake}/year=2024", f"{lake}/year=2024/b.parquet", f"file://{lake}/year=2024"], HERE)
    assert len(both.files) == 2


def test_a_name_with_brackets_is_a_name_before_it_is_a_pattern(tmp_path: Path, write: Callable[..., Path]) -> None:
    write(tmp_path / "part[1].parquet", ROWS)
    assert inspect_files(str(tmp_path / "part[1].parquet"), HERE).rows == 6


def test_a_relative_path_starts_at_the_working_directory(lake: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(lake.parent)
    assert inspect_files("lake/../lake", HERE) == inspect_files(str(lake), HERE)


def test_hive_folders_are_columns_below_the_given_path_only(lake: Path) -> None:
    b, a = inspect_files(f"{lake}/year=*", HERE).files[:2]
    assert a.partitions == (("year", "2023"), ("lang", "en gb"))
    assert b.column_names == ("text", "label", "year")
    assert inspect_files(f"{lake}/year=2023", HERE).files[0].partitions == ()


def test_every_row_is_read_once_whatever_the_row_groups(tmp_path: Path, write: Callable[..., Path]) -> None:
    rows = [{"text": str(i), "label": i} for i in range(1000)]
    write(tmp_path / "c=7" / "a.parquet", rows, row_group_size=37)
    source = inspect_files(str(tmp_path), HERE)
    read = []
    for unit in read_units(source):
        for count, texts in read_texts(source.filesystem, unit, ["label", "c"], HERE):
            assert texts["c"] == ["7"] * count
            read += texts["label"]
        assert sum(count for count, _ in read_texts(source.filesystem, unit, ["c"], HERE)) == 1000
    assert read == [str(i) for i in range(1000)]


def test_a_large_row_group_is_shared_out_and_read_once(tmp_path: Path) -> None:
    texts = [f"{i} " + "x" * 1000 for i in range(9001)]
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", use_dictionary=False)
    source = inspect_files(str(tmp_path), HERE)
    units = read_units(source)
    assert len(source.files[0].row_groups) == 1 and len(units) == 5
    read = [[text for _, b in read_texts(source.filesystem, u, ["text"], HERE) for text in b["text"]] for u in units]
    assert [text for part in read for text in part] == texts
    assert max(map(len, read)) - min(map(len, read)) <= 1


def test_small_files_share_a_task_and_a_large_one_is_shared_out(tmp_path: Path) -> None:
    for name, rows in [("a", 3), ("b", 3), ("c", 9001), ("d", 3), ("e", 3)]:
        texts = [f"{i} " + "x" * 1000 for i in range(rows)]
        pq.write_table(pa.table({"text": texts}), tmp_path / f"{name}.parquet", use_dictionary=False)
    units = read_units(inspect_files(str(tmp_path), HERE))
    tasks = group_units(enumerate(units))
    assert [pair for task in tasks for pair in task] == list(enumerate(units))
    names = ["".join(Path(unit.file.path).stem for _, unit in task) for task in tasks]
    assert names == ["abc", "c", "c", "c", "c", "de"]
    assert group_units([]) == ()


def test_reading_holds_a_few_pages_and_not_a_row_group(tmp_path: Path) -> None:
    texts = pa.array([os.urandom(500).hex() for _ in range(48_000)])
    pq.write_table(pa.table({"text": texts}), tmp_path / "a.parquet", use_dictionary=False, row_group_size=10**6)
    size = texts.nbytes
    del texts
    source = inspect_files(str(tmp_path), HERE)
    assert len(source.files[0].row_groups) == 1 and size > 45 * 2**20
    before = pa.total_allocated_bytes()
    units = read_units(source)
    held = [pa.total_allocated_bytes() for unit in units for _ in read_texts(source.filesystem, unit, ["text"], HERE)]
    assert max(held) - before < size / 4


def test_what_cannot_be_found_is_one_sentence_with_task_and_path(lake: Path, tmp_path: Path) -> None:
    (tmp_path / "empty").mkdir()
    for path, reason in [
        (f"{tmp_path}/nowhere.parquet", "there is no file or folder"),
        (f"{tmp_path}/nowhere/*.parquet", "there is no file or folder"),
        (f"{lake}/*.csv", "no Parquet file matches"),
        (f"{tmp_path}/empty", "holds no .parquet file"),
        ("nosuchscheme://bucket/a.parquet", "cannot look up"),
    ]:
        with pytest.raises(CorpusError, match=f"^task 'x', train: .*{reason}") as refused:
            inspect_files(path, HERE)
        assert path in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("damage", [b"", b"PAR1", b"not a parquet file at all, only text"])
def test_a_file_without_a_footer_is_one_sentence_with_its_name(lake: Path, damage: bytes) -> None:
    bad = lake / "year=2024" / "b.parquet"
    bad.write_bytes(damage)
    with pytest.raises(CorpusError, match="is not a readable Parquet file") as refused:
        inspect_files(str(lake), HERE)
    assert str(bad) in str(refused.value) and "\n" not in str(refused.value)


@pytest.mark.parametrize("kind", ["parquet", "csv", "jsonl.gz"])
@pytest.mark.parametrize("when", ["described", "read"])
def test_a_file_that_vanishes_under_the_job_is_not_called_damaged(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch, kind: str, when: str
) -> None:
    place = tmp_path / f"a.{kind}"
    if kind == "parquet":
        pq.write_table(pa.table({"text": ["good"]}), place)
    elif kind == "csv":
        place.write_text("text\ngood\n")
    else:
        place.write_bytes(gzip.compress(b'{"text": "good"}\n'))
    if when == "described":
        describe = files._describe
        monkeypatch.setattr(files, "_describe", lambda *given: (place.unlink(), describe(*given))[1])
        with pytest.raises(CorpusError, match=f"^{HERE}: {place} was removed while it was looked at"):
            inspect_files(str(place), HERE)
        return
    source = inspect_files(str(place), HERE)
    (unit,) = read_units(source)
    place.unlink()
    with pytest.raises(CorpusError, match=f"^{HERE}: {place} is gone, so it was removed"):
        list(read_texts(source.filesystem, unit, ["text"], HERE))


def test_a_plan_counts_rows_per_split_from_the_footers(lake: Path, make_task: Callable[..., object]) -> None:
    plan = check_task("x", make_task(lake, dev_fraction=0.25, test=lake / "year=2024"))
    assert plan.rows == {"train": 18, "dev": 6, "test": 12}


def test_a_template_and_the_columns_of_every_file_must_agree(
    tmp_path: Path, write: Callable[..., Path], make_task: Callable[..., object]
) -> None:
    good = write(tmp_path / "a.parquet", ROWS)
    other = write(tmp_path / "b.parquet", [{"sentence": "no text here", "label": 1}])
    nested = write(tmp_path / "nested.parquet", [{"text": ["a"], "label": 1}])
    none = tmp_path / "none.parquet"
    pq.write_table(pq.read_table(good).slice(0, 0), none)
    for task, parts in [
        (
            make_task(good, dev=good, input="{txt}"),
            ["train", str(good), "'txt'", "text, label", "did you mean {text}?"],
        ),
        (make_task([str(good), str(other)], dev=good), ["train", str(other), "'text'", "sentence, label"]),
        (make_task(good, dev=other), ["dev", str(other), "'text'"]),
        (make_task(good, dev=good, test=nested), ["test", str(nested), "'text'", "list<", "write it as a string"]),
        (make_task(good, dev=good, input="no column"), ["input", "names no column"]),
        (make_task(good, dev=none), ["dev", str(none), "holds no row"]),
    ]:
        with pytest.raises(CorpusError, match=r"^task 'x', ") as refused:
            check_task("x", task)
        assert all(part in str(refused.value) for part in parts), str(refused.value)
        assert "\n" not in str(refused.value)


def test_links_that_were_two_files_are_two_and_a_link_to_a_listed_file_is_none(
    tmp_path: Path, write: Callable[..., Path]
) -> None:
    def found(root: Path) -> list[tuple[str, tuple[tuple[str, str | None], ...]]]:
        source = inspect_files(str(root), HERE)
        return [(os.path.relpath(file.path, root), file.partitions) for file in source.files]

    blob = write(tmp_path / "blobs" / "0123.parquet", ROWS)
    cache = tmp_path / "snapshot"
    cache.mkdir()
    for name in ("a", "b"):
        (cache / f"{name}.parquet").symlink_to(blob)
    assert [name for name, _ in found(cache)] == ["a.parquet", "b.parquet"]

    lake = tmp_path / "lake"
    write(lake / "lang=en" / "a.parquet", ROWS)
    (lake / "lang=de").mkdir()
    (lake / "lang=de" / "a.parquet").symlink_to(lake / "lang=en" / "a.parquet")
    (lake / "lang=fr").symlink_to(lake / "lang=en")
    three = [(f"lang={lang}/a.parquet", (("lang", lang),)) for lang in ("de", "en", "fr")]
    assert found(lake) == three
    (lake / "lang=en" / "once-more.parquet").symlink_to(lake / "lang=en" / "a.parquet")
    (lake / "lang=de" / "above").symlink_to(lake)
    assert found(lake) == three
    (tmp_path / "moved").symlink_to(lake)
    assert found(tmp_path / "moved") == three
