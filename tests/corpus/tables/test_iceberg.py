"""Iceberg tables: their rows as pyiceberg itself reads them, whatever was done to the table."""

import random
import shutil
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from pyiceberg.catalog import load_catalog
from pyiceberg.table import Table
from pyiceberg.types import DoubleType, LongType, StringType

from pipeline.errors import CorpusError, UnreachableError
from tests.corpus.tables.iceberg_deletes import delete_equal, delete_positions
from tests.corpus.tables.rows import HERE, Rows, digest_of, library_rows, open_rows, read_rows

HISTORIES = 40
COLUMNS = ("text", "label", "stars", "share", "lang")


def catalog_in(folder: Path) -> dict[str, dict[str, str]]:
    folder.mkdir(parents=True, exist_ok=True)
    return {"prod": {"type": "sql", "uri": f"sqlite:///{folder}/catalog.db", "warehouse": f"file://{folder}/a house"}}


def new_table(folder: Path, schema: pa.Schema, **properties: str) -> Table:
    catalog = load_catalog("prod", **catalog_in(folder)["prod"])
    catalog.create_namespace_if_not_exists("sales")
    return catalog.create_table("sales.reviews", schema=schema, properties=properties)


def _rows(rng: random.Random, count: int) -> pa.Table:
    numbers = rng.sample(range(60), count)
    return pa.table(
        {
            "text": [None if number == 7 else f"text {number}" for number in numbers],
            "label": [("no", "yes")[number % 2] for number in numbers],
            "stars": pa.array([number % 5 if number % 11 else None for number in numbers], pa.int32()),
            "share": pa.array([number / 10 for number in numbers], pa.float32()),
            "lang": pa.array([("en gb", "de", "a/b%c é", None)[number % 4] for number in numbers], pa.string()),
        }
    )


class History:
    """A table to which things are done; `names` are its columns in the order of COLUMNS."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng, self.catalogs = random.Random(seed), catalog_in(folder)
        self.names = {name: name for name in COLUMNS}
        self.old = seed % 8 == 7  # of the format's first version, which has no deletes of rows
        version = {"format-version": "1"} if self.old else {}
        self.table = new_table(folder, _rows(self.rng, 2).schema, **version)
        if seed % 3 == 0:
            self.partition()
        self.table.append(_rows(self.rng, 30))

    @property
    def columns(self) -> list[str]:
        return list(self.names.values())

    def _new(self, count: int) -> pa.Table:
        kinds = {field.name: field.type for field in self.table.schema().as_arrow()}
        rows = _rows(self.rng, count).rename_columns(self.columns)
        return pa.table({name: rows[name].cast(kinds[name]) for name in self.columns})

    def append(self) -> None:
        self.table.append(self._new(self.rng.randrange(1, 9)))

    def overwrite(self) -> None:
        self.table.overwrite(self._new(20))

    def delete(self) -> None:
        self.table.delete(f"{self.names['stars']} = {self.rng.randrange(5)}")

    def upsert(self) -> None:
        rows = self._new(6)
        rows = rows.filter(pa.compute.is_valid(rows[self.names["text"]]))
        try:
            self.table.upsert(rows, join_cols=[self.names["text"]])
        except ValueError:  # pyiceberg 0.12 does not where a column came later, was renamed, or is null throughout
            self.table.append(rows)

    def rewrite(self) -> None:
        self.table.overwrite(self.table.scan().to_arrow())

    def add_column(self) -> None:
        with self.table.update_schema() as change:
            change.add_column(f"more{len(self.table.schemas())}", StringType())
        self.append()

    def rename(self) -> None:
        column = self.rng.choice(COLUMNS)
        after = f"{column}.{len(self.table.schemas())}"
        with self.table.update_schema() as change:
            change.rename_column(self.names[column], after)
        self.names[column] = after

    def swap_names(self) -> None:
        """Two columns take each other's name: only field ids tell which is which."""
        one, other = self.names["text"], self.names["label"]
        with self.table.update_schema() as change:
            change.rename_column(one, "between")
        with self.table.update_schema() as change:
            change.rename_column(other, one)
        with self.table.update_schema() as change:
            change.rename_column("between", other)
        self.names |= {"text": other, "label": one}

    def widen(self) -> None:
        with self.table.update_schema() as change:
            change.update_column((self.names["stars"],), LongType())
            change.update_column((self.names["share"],), DoubleType())

    def partition(self) -> None:
        if self.table.spec().fields:
            with self.table.update_spec() as change:
                change.remove_field(self.table.spec().fields[0].name)
        else:
            with self.table.update_spec() as change:
                change.add_identity(self.names["lang"])

    def roll_back(self) -> None:
        parent = self.table.current_snapshot().parent_snapshot_id
        if parent is not None:
            self.table.manage_snapshots().rollback_to_snapshot(parent).commit()

    def delete_positions(self) -> None:
        tasks = list(self.table.scan().plan_files())
        if tasks:
            file = self.rng.choice(tasks).file
            rows = [row for row in range(file.record_count) if self.rng.random() < 0.4] or [0]
            delete_positions(self.table, file, rows, as_vector=self.rng.random() < 0.4)

    def steps(self, count: int) -> list[Callable[[], None]]:
        every = [self.append, self.overwrite, self.delete, self.upsert, self.rewrite, self.add_column, self.rename]
        every += [self.swap_names, self.widen, self.partition, self.roll_back]
        every += [] if self.old else [self.delete_positions] * 4
        return [self.rng.choice(every) for _ in range(count)]

    def expected(self) -> Rows:
        return library_rows(self.table.scan().to_arrow(), self.columns)

    def read(self) -> Rows:
        return read_rows(open_rows("iceberg://prod/sales.reviews", self.catalogs), self.columns)


@pytest.mark.filterwarnings("ignore")
@pytest.mark.parametrize("seed", range(HISTORIES))
def test_a_tables_rows_are_those_that_its_library_reads_after_every_change(tmp_path: Path, seed: int) -> None:
    history = History(tmp_path, seed)
    digests: dict[str, Rows] = {}
    for step in [lambda: None, *history.steps(6)]:
        step()
        history.table.refresh()
        read = history.read()
        assert read == history.expected(), step
        pairs = Rows()
        for row, count in read.items():
            pairs[row[:2]] += count
        assert digests.setdefault(digest_of(pairs), pairs) == pairs
    assert len({frozenset(rows.items()) for rows in digests.values()}) == len(digests)


@pytest.fixture
def reviews(tmp_path: Path) -> Table:
    table = new_table(tmp_path, pa.schema([("text", pa.string()), ("label", pa.string())]))
    for number in range(3):
        table.overwrite(pa.table({"text": [f"{number} {row}" for row in range(5)], "label": ["a"] * 5}))
    return table


def _firsts(source: Any) -> set[str]:
    return {text[0] for (text,) in read_rows(source, ["text"])}


def test_an_address_names_a_snapshot_by_its_number_a_time_a_branch_or_a_tag(reviews: Table, tmp_path: Path) -> None:
    catalogs = catalog_in(tmp_path)
    full = [one for one in reviews.snapshots() if one.summary.operation.value == "append"]
    reviews.manage_snapshots().create_tag(full[0].snapshot_id, "first").commit()
    for number, snapshot in enumerate(full):
        source = open_rows(f"iceberg://prod/sales.reviews@{snapshot.snapshot_id}", catalogs)
        assert _firsts(source) == {str(number)}
        (table,) = source.tables
        assert (table.address, table.version) == ("iceberg://prod/sales.reviews", str(snapshot.snapshot_id))
        assert table.table == str(reviews.metadata.table_uuid)
        at_that_time = open_rows(f"iceberg://prod/sales.reviews@{table.time}", catalogs)
        assert at_that_time.tables == (table,)
    tagged = open_rows("iceberg://prod/sales.reviews@first", catalogs)
    assert _firsts(tagged) == {"0"} and tagged.tables[0].address == "iceberg://prod/sales.reviews"
    for address, reason in [
        ("prod/sales.reviews@12", "has no snapshot 12, or it has expired"),
        ("prod/sales.reviews@2020-01-01", "has no snapshot 2020-01-01"),
        ("prod/sales.none", "has no table sales.none"),
        ("prod/reviews", "is not of the form iceberg://catalog/namespace.table"),
        ("other/sales.reviews", "'catalogs' of the settings has no 'other'"),
    ]:
        with pytest.raises(CorpusError, match=f"^{HERE}: .*{reason}") as refused:
            open_rows(f"iceberg://{address}", catalogs)
        assert "\n" not in str(refused.value)


def test_a_catalog_that_is_away_may_answer_later() -> None:
    away = {"prod": {"type": "rest", "uri": "http://127.0.0.1:9/"}}
    with pytest.raises(UnreachableError, match="its catalog 'prod' does not answer") as refused:
        open_rows("iceberg://prod/sales.reviews", away)
    assert "\n" not in str(refused.value) and "try again later" in str(refused.value)


def test_a_snapshot_whose_files_are_gone_is_one_sentence(reviews: Table, tmp_path: Path) -> None:
    catalogs = catalog_in(tmp_path)
    old = next(one for one in reviews.snapshots() if one.summary.operation.value == "append")
    for task in reviews.scan(snapshot_id=old.snapshot_id).plan_files():
        Path(task.file.file_path.removeprefix("file://")).unlink()
    with pytest.raises(CorpusError, match=f"version {old.snapshot_id} of iceberg://.* is not whole any more"):
        open_rows(f"iceberg://prod/sales.reviews@{old.snapshot_id}", catalogs)
    Path(old.manifest_list.removeprefix("file://")).unlink()
    with pytest.raises(CorpusError, match="a file of its metadata is gone") as refused:
        open_rows(f"iceberg://prod/sales.reviews@{old.snapshot_id}", catalogs)
    assert "\n" not in str(refused.value)
    assert open_rows("iceberg://prod/sales.reviews", catalogs).rows == 5


def test_a_table_that_is_replaced_between_plan_and_read_is_one_sentence(reviews: Table, tmp_path: Path) -> None:
    source = open_rows("iceberg://prod/sales.reviews", catalog_in(tmp_path))
    shutil.rmtree(tmp_path / "a house")
    with pytest.raises(CorpusError, match=f"^{HERE}: .* is gone, so it was removed, or its table vacuumed or replaced"):
        read_rows(source, ["text"])


def test_equality_deletes_are_refused_by_name(reviews: Table, tmp_path: Path) -> None:
    (task,) = reviews.scan().plan_files()
    delete_equal(reviews, task.file, pa.table({"text": ["2 3"]}), 1)
    with pytest.raises(CorpusError, match="has equality deletes, which pyiceberg cannot apply") as refused:
        open_rows("iceberg://prod/sales.reviews", catalog_in(tmp_path))
    assert "\n" not in str(refused.value)


def test_files_that_were_added_without_ids_are_read_by_the_tables_mapping_of_names(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    rows = pa.table({"text": ["a", "b"], "label": ["x", "y"]})
    table = new_table(tmp_path / "t", rows.schema)
    pq.write_table(rows, tmp_path / "own.parquet")
    table.add_files([str(tmp_path / "own.parquet")])
    with table.update_schema() as change:
        change.rename_column("text", "body")
    source = open_rows("iceberg://prod/sales.reviews", catalog_in(tmp_path / "t"))
    assert read_rows(source, ["body", "label"]) == library_rows(table.scan().to_arrow(), ["body", "label"])


def test_a_file_without_ids_and_without_a_mapping_of_names_is_refused_as_pyiceberg_does(
    reviews: Table, tmp_path: Path
) -> None:
    import pyarrow.parquet as pq

    file = next(iter(reviews.scan().plan_files())).file.file_path.removeprefix("file://")
    pq.write_table(pa.table({"text": ["a", "b"], "label": ["x", "y"]}), file)
    with pytest.raises(ValueError, match="does not have field-ids"):
        reviews.scan().to_arrow()
    with pytest.raises(CorpusError, match=f"^{HERE}: .*has no field ids .*schema.name-mapping.default") as refused:
        open_rows("iceberg://prod/sales.reviews", catalog_in(tmp_path))
    assert "\n" not in str(refused.value) and Path(file).name in str(refused.value)


def test_a_table_without_a_snapshot_holds_no_row(tmp_path: Path) -> None:
    new_table(tmp_path, pa.schema([("text", pa.string())]))
    assert open_rows("iceberg://prod/sales.reviews", catalog_in(tmp_path)).rows == 0
