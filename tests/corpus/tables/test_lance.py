"""Lance datasets: their rows as the library itself reads them, whatever was done to them."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path

import lance
import pyarrow as pa
import pytest

from pipeline.errors import CorpusError
from tests.corpus.tables.rows import HERE, Rows, digest_of, library_rows, open_rows, read_rows

COLUMNS = ["text", "label", "stars"]


def _rows(rng: random.Random, count: int) -> pa.Table:
    numbers = rng.sample(range(80), count)
    return pa.table(
        {
            "text": [None if number == 7 else f"text {number}" for number in numbers],
            "label": [("no", "yes")[number % 2] for number in numbers],
            "stars": pa.array([number / 2 if number % 11 else None for number in numbers], pa.float32()),
        }
    )


class History:
    def __init__(self, folder: Path, seed: int) -> None:
        self.rng, self.path = random.Random(seed), str(folder / "a dataset")
        self.columns = dict(zip(COLUMNS, COLUMNS, strict=True))
        lance.write_dataset(_rows(self.rng, 40), self.path, max_rows_per_file=15)

    @property
    def data(self) -> lance.LanceDataset:
        return lance.dataset(self.path)

    def _new(self, count: int) -> pa.Table:
        return _rows(self.rng, count).rename_columns(list(self.columns.values()))

    def append(self) -> None:
        lance.write_dataset(self._new(5), self.path, mode="append")

    def overwrite(self) -> None:
        lance.write_dataset(self._new(20), self.path, mode="overwrite", max_rows_per_file=6)

    def delete(self) -> None:
        self.data.delete(f"{self.columns['stars']} < {self.rng.randrange(20)}")

    def update(self) -> None:
        self.data.update({self.columns["label"]: "'changed'"}, where=f"{self.columns['stars']} > 20")

    def merge(self) -> None:
        text = self.columns["text"]
        rows = self._new(6)
        rows = rows.filter(pa.compute.is_valid(rows[text]))
        self.data.merge_insert(text).when_matched_update_all().when_not_matched_insert_all().execute(rows)

    def compact(self) -> None:
        self.data.optimize.compact_files()

    def clean_up(self) -> None:
        from datetime import timedelta

        self.data.cleanup_old_versions(older_than=timedelta(0), delete_unverified=True)

    def rename(self) -> None:
        column = self.rng.choice(COLUMNS)
        after = f"{column}_{self.data.version}"
        self.data.alter_columns({"path": self.columns[column], "name": after})
        self.columns[column] = after

    def add_column(self) -> None:
        self.data.add_columns({f"more{self.data.version}": "1"})
        self.data.drop_columns([self.data.schema.names[-1]])

    def steps(self, count: int) -> list[Callable[[], None]]:
        every = [self.append, self.overwrite, self.delete, self.update, self.merge, self.compact, self.clean_up]
        return [self.rng.choice([*every, self.rename, self.add_column]) for _ in range(count)]


@pytest.mark.parametrize("seed", range(20))
def test_a_datasets_rows_are_those_that_its_library_reads_after_every_change(tmp_path: Path, seed: int) -> None:
    history = History(tmp_path, seed)
    digests: dict[str, Rows] = {}
    for step in [lambda: None, *history.steps(6)]:
        step()
        names = list(history.columns.values())
        read = read_rows(open_rows(f"lance://{history.path}"), names)
        assert read == library_rows(history.data.to_table(), names), step
        pairs = Rows()
        for row, count in read.items():
            pairs[row[:2]] += count
        assert digests.setdefault(digest_of(pairs), pairs) == pairs
    assert len({frozenset(rows.items()) for rows in digests.values()}) == len(digests)


def test_a_version_is_named_by_its_number_or_by_a_time(tmp_path: Path) -> None:
    for number in range(3):
        rows = pa.table({"text": [f"{number} {row}" for row in range(5)]})
        lance.write_dataset(rows, str(tmp_path / "t"), mode="overwrite")
    for number in range(3):
        source = open_rows(f"lance://{tmp_path}/t@{number + 1}")
        (table,) = source.tables
        assert (table.version, table.address) == (str(number + 1), f"lance://{tmp_path}/t")
        assert {text[0] for (text,) in read_rows(source, ["text"])} == {str(number)}
        assert open_rows(f"lance://{tmp_path}/t@{table.time}").tables == (table,), "its time finds it again"
    assert open_rows(f"lance://{tmp_path}/t@2999-01-01T00:00:00Z").tables[0].version == "3"
    for address, reason in [
        ("t@9", "version 9 of lance"),
        ("nowhere", "cannot be opened"),
        ("t@2020-01-01", "version 2020"),
    ]:
        with pytest.raises(CorpusError, match=f"^{HERE}: .*{reason}") as refused:
            open_rows(f"lance://{tmp_path}/{address}")
        assert "\n" not in str(refused.value) and ".rs:" not in str(refused.value)


def test_a_dataset_that_is_replaced_between_plan_and_read_is_one_sentence(tmp_path: Path) -> None:
    lance.write_dataset(pa.table({"text": ["a"]}), str(tmp_path / "t"))
    source = open_rows(f"lance://{tmp_path}/t")
    shutil.rmtree(tmp_path / "t")
    with pytest.raises(CorpusError, match="cleaned up or replaced since the job looked at it") as refused:
        read_rows(source, ["text"])
    assert "\n" not in str(refused.value)


def test_a_filter_is_lances_own_sql_and_only_its_rows_are_read(tmp_path: Path) -> None:
    rows = pa.table({"text": [f"text {i}" for i in range(100)], "n": range(100)})
    lance.write_dataset(rows, str(tmp_path / "t"), max_rows_per_file=30)
    where = "regexp_like(text, '5$') AND n % 2 = 1"
    read = read_rows(open_rows({"path": f"lance://{tmp_path}/t", "where": where}), ["text", "n"])
    assert read == library_rows(lance.dataset(str(tmp_path / "t")).to_table(filter=where), ["text", "n"])
    assert 0 < read.total() < 100
    first = open_rows({"path": f"lance://{tmp_path}/t", "where": where, "limit": 3, "columns": {"body": "text"}})
    assert read_rows(first, ["body"]) == Rows([("text 5",), ("text 15",), ("text 25",)])
    with pytest.raises(CorpusError, match=r"the filter 'no_such > 3' is none of Lance's .*fix 'where'") as refused:
        open_rows({"path": f"lance://{tmp_path}/t", "where": "no_such > 3"})
    assert "\n" not in str(refused.value) and ".rs:" not in str(refused.value)


def test_the_files_of_a_version_that_changed_no_row_of_theirs_keep_their_key(tmp_path: Path) -> None:
    lance.write_dataset(pa.table({"text": [f"{i}" for i in range(9)]}), str(tmp_path / "t"), max_rows_per_file=3)
    before = [file.reader.key() for file in open_rows(f"lance://{tmp_path}/t").files]
    lance.write_dataset(pa.table({"text": ["more"]}), str(tmp_path / "t"), mode="append")
    lance.dataset(str(tmp_path / "t")).delete("text = '4'")
    after = [file.reader.key() for file in open_rows(f"lance://{tmp_path}/t").files]
    assert (after[0], after[2]) == (before[0], before[2]) and after[1] != before[1] and len(after) == 4
