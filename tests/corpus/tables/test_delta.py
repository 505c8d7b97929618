"""Delta tables: their rows as deltalake itself reads them, whatever was done to the table."""

import os
import random
import shutil
import time
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from pyarrow import fs

from pipeline.errors import CorpusError
from tests.corpus.tables.delta_log import delete_by_vector, rename_column
from tests.corpus.tables.rows import HERE, Rows, digest_of, library_rows, open_rows, read_rows

COLUMNS = ("text", "label", "stars", "lang")
HISTORIES = 48


def _rows(rng: random.Random, count: int) -> pa.Table:
    numbers = [rng.randrange(40) for _ in range(count)]
    return pa.table(
        {
            "text": [None if number == 7 else f"text {number}" for number in numbers],
            "label": [("no", "yes")[number % 2] for number in numbers],
            "stars": pa.array([float(number % 5) if number % 11 else None for number in numbers], pa.float64()),
            "lang": [("en gb", "de", "a/b%c é", None)[number % 4] for number in numbers],
        }
    )


class History:
    """A Delta table to which things are done; `names` are its columns in the order of COLUMNS."""

    def __init__(self, folder: Path, seed: int) -> None:
        self.rng, self.path = random.Random(seed), folder / "a table"
        self.names = {name: name for name in COLUMNS}
        self.mapping = ("none", "name", "id")[seed % 3]
        mode = {"delta.columnMapping.mode": self.mapping} if self.mapping != "none" else {}
        # Vectors need a protocol, and the library writes none into a table with column mapping that it makes.
        self.vectors = self.mapping == "none"
        vectors = {"delta.enableDeletionVectors": "true"} if self.vectors else {}
        self.partitions = [None, ["lang"], ["lang", "stars"]][seed % 4 % 3]
        write_deltalake(self.path, _rows(self.rng, 30), partition_by=self.partitions, configuration={**mode, **vectors})

    @property
    def table(self) -> DeltaTable:
        return DeltaTable(self.path)

    def _new(self, count: int) -> pa.Table:
        return _rows(self.rng, count).rename_columns(list(self.names.values()))

    def append(self) -> None:
        more = {"schema_mode": "merge"} if self.mapping == "none" else {}
        write_deltalake(self.path, self._new(self.rng.randrange(1, 9)), mode="append", **more)

    def overwrite(self) -> None:
        more = {"schema_mode": "overwrite"} if self.mapping == "none" else {}
        write_deltalake(self.path, self._new(20), mode="overwrite", **more)

    def delete(self) -> None:
        self.table.delete(f"{self.names['text']} = 'text {self.rng.randrange(40)}'")

    def update(self) -> None:
        where = f"{self.names['stars']} = {self.rng.randrange(5)}.0"
        self.table.update({self.names["label"]: "'changed'"}, predicate=where)

    def merge(self) -> None:
        text, label = self.names["text"], self.names["label"]
        (
            self.table.merge(
                self._new(6).group_by(text).aggregate([(n, "min") for n in self.names.values() if n != text])
                .rename_columns([text, *(n for n in self.names.values() if n != text)]),
                predicate=f"s.{text} = t.{text}", source_alias="s", target_alias="t",
            )
            .when_matched_update({label: f"s.{label}"})
            .when_not_matched_insert({name: f"s.{name}" for name in self.columns}).execute()
        )  # fmt: skip

    def compact(self) -> None:
        self.table.optimize.compact()

    def z_order(self) -> None:
        self.table.optimize.z_order([self.names["text"]])

    def vacuum(self) -> None:
        self.table.vacuum(retention_hours=0, dry_run=False, enforce_retention_duration=False)

    def checkpoint(self) -> None:
        self.table.create_checkpoint()

    def restore(self) -> None:
        if self.table.version():
            self.table.restore(self.table.version() - 1, ignore_missing_files=True)
            self.names = dict(zip(COLUMNS, (own.name for own in self.table.schema().fields), strict=False))

    def add_column(self) -> None:
        more = self._new(3).append_column(f"more{self.table.version()}", pa.array(["a", "b", "c"]))
        write_deltalake(self.path, more, mode="append", schema_mode="merge")

    def repartition(self) -> None:
        self.partitions = self.rng.choice([None, ["label"]])
        write_deltalake(
            self.path, self._new(15), mode="overwrite", schema_mode="overwrite",
            partition_by=self.partitions and [self.names[name] for name in self.partitions],
        )  # fmt: skip

    def rename(self) -> None:
        before = self.names[column := self.rng.choice(COLUMNS)]
        after = f"{column}_{self.table.version()}"
        rename_column(self.path, before, after)
        self.names[column] = after

    def delete_by_vector(self) -> None:
        adds = pa.table(self.table.get_add_actions())
        row = self.rng.randrange(len(adds))
        count = adds["num_records"][row].as_py() or 1
        gone = [place for place in range(count) if self.rng.random() < 0.4]
        delete_by_vector(self.path, adds["path"][row].as_py(), gone, inline=self.rng.random() < 0.5)

    def steps(self, count: int) -> list[Callable[[], None]]:
        every = [self.append, self.overwrite, self.delete, self.update, self.merge, self.vacuum, self.checkpoint]
        every += [self.restore]
        # With column mapping, the library neither optimises a table nor adds a column.
        plain = [self.compact, self.z_order, self.repartition, self.add_column, *[self.delete_by_vector] * 3]
        mapped = [self.rename] * 3
        every += plain if self.mapping == "none" else mapped
        return [self.rng.choice(every) for _ in range(count)]

    def expected(self) -> Rows:
        return library_rows(pa.table(self.table.scan(columns=list(self.names.values())).read_all()), self.columns)

    @property
    def columns(self) -> list[str]:
        return list(self.names.values())

    def read(self) -> Rows:
        return read_rows(open_rows(f"delta://{self.path}"), self.columns)


@pytest.mark.parametrize("seed", range(HISTORIES))
def test_a_tables_rows_are_those_that_its_library_reads_after_every_change(tmp_path: Path, seed: int) -> None:
    history = History(tmp_path, seed)
    digests: dict[str, Rows] = {}
    for step in [lambda: None, *history.steps(7)]:
        step()
        try:
            expected = history.expected()
        except Exception as error:  # a table that its own library cannot read
            with pytest.raises(CorpusError):
                history.read()
            assert "file" in str(error).lower() or "not found" in str(error).lower()
            return
        read = history.read()
        assert read == expected, step
        # Equal digests exactly where the rows are equal.
        pairs = digests.setdefault(digest_of(_pairs(read)), _pairs(read))
        assert pairs == _pairs(read)
    assert len({frozenset(rows.items()) for rows in digests.values()}) == len(digests)


def _pairs(rows: Rows) -> Rows:
    out = Rows()
    for row, count in rows.items():
        out[row[:2]] += count
    return out


def test_every_kind_of_change_is_among_the_histories(tmp_path: Path) -> None:
    done = {step.__name__ for seed in range(HISTORIES) for step in _named_steps(tmp_path / str(seed), seed)}
    assert done == {
        "append", "overwrite", "delete", "update", "merge", "compact", "z_order", "vacuum", "add_column",
        "checkpoint", "restore", "delete_by_vector", "rename", "repartition",
    }  # fmt: skip


def _named_steps(folder: Path, seed: int) -> list[Any]:
    return History(folder, seed).steps(7)


def _four_versions(path: Path) -> None:
    for number in range(4):
        rows = pa.table({"text": [f"{number} {row}" for row in range(5)], "label": ["a"] * 5})
        write_deltalake(path, rows, mode="overwrite")
        time.sleep(0.02)  # a log's times are whole milliseconds


def test_an_address_names_a_version_by_its_number_or_by_a_time(tmp_path: Path) -> None:
    _four_versions(tmp_path / "t")
    times = [open_rows(f"delta://{tmp_path}/t@{number}").tables[0].time for number in range(4)]
    assert times == sorted(set(times)), "each version has its own time"
    for number in range(4):
        source = open_rows(f"delta://{tmp_path}/t@{number}")
        assert {text[0] for (text,) in read_rows(source, ["text"])} == {str(number)}
        (table,) = source.tables
        assert (table.version, table.address) == (str(number), f"delta://{tmp_path}/t")
        assert table.time is not None
        at_that_time = open_rows(f"delta://{tmp_path}/t@{table.time}")
        assert at_that_time.tables[0] == table
    with pytest.raises(CorpusError, match=f"^{HERE}: .*no version as old as 2020-01-01"):
        open_rows(f"delta://{tmp_path}/t@2020-01-01T00:00:00Z")
    for version, reason in [("9", "version 9 of"), ("newest", "a version is a number or a time")]:
        with pytest.raises(CorpusError, match=f"^{HERE}: .*{reason}") as refused:
            open_rows(f"delta://{tmp_path}/t@{version}")
        assert "\n" not in str(refused.value)
    shutil.copytree(tmp_path / "t", tmp_path / "a@b")
    assert open_rows(f"delta://{tmp_path}/a@b").rows == open_rows(f"delta://{tmp_path}/a@b@2").rows == 5
    with pytest.raises(CorpusError, match="there is no Delta table at"):
        open_rows(f"delta://{tmp_path}/nowhere")


def test_the_time_of_a_version_finds_it_also_where_its_log_was_written_later(tmp_path: Path) -> None:
    _four_versions(tmp_path / "t")
    for number in range(4):
        log = tmp_path / "t" / "_delta_log" / f"{number:020d}.json"
        late = log.stat().st_mtime_ns + 10**9 * (number + 1) + 700_000
        os.utime(log, ns=(late, late))
    for number in range(4):
        (table,) = open_rows(f"delta://{tmp_path}/t@{number}").tables
        assert open_rows(f"delta://{tmp_path}/t@{table.time}").tables == (table,)


def test_a_copy_that_lost_the_times_of_its_log_gives_no_other_version_than_asked_for(tmp_path: Path) -> None:
    _four_versions(tmp_path / "t")
    written = open_rows(f"delta://{tmp_path}/t@2").tables[0].time
    shutil.copytree(tmp_path / "t", tmp_path / "copy", copy_function=shutil.copyfile)
    with pytest.raises(CorpusError, match=f"^{HERE}: .*no version as old as"):
        open_rows(f"delta://{tmp_path}/copy@{written}")


def test_a_version_that_was_vacuumed_is_one_sentence(tmp_path: Path) -> None:
    _four_versions(tmp_path / "t")
    DeltaTable(tmp_path / "t").vacuum(retention_hours=0, dry_run=False, enforce_retention_duration=False)
    with pytest.raises(CorpusError, match=r"version 1 of delta://.* is not whole any more") as refused:
        open_rows(f"delta://{tmp_path}/t@1")
    assert "vacuum" in str(refused.value) and "\n" not in str(refused.value)
    assert open_rows(f"delta://{tmp_path}/t").rows == 5


def test_a_table_that_is_replaced_between_plan_and_read_is_one_sentence(tmp_path: Path) -> None:
    _four_versions(tmp_path / "t")
    source = open_rows(f"delta://{tmp_path}/t")
    shutil.rmtree(tmp_path / "t")
    _four_versions(tmp_path / "t")
    with pytest.raises(
        CorpusError, match=f"^{HERE}: .* is gone, so it was removed, or its table vacuumed or replaced"
    ) as refused:
        read_rows(source, ["text"])
    assert "run the job again" in str(refused.value) and "\n" not in str(refused.value)


def test_a_table_that_did_not_change_keeps_its_files_key(tmp_path: Path) -> None:
    write_deltalake(tmp_path / "t", pa.table({"text": [f"{i}" for i in range(9)]}))
    before = open_rows(f"delta://{tmp_path}/t")
    assert open_rows(f"delta://{tmp_path}/t").files == before.files
    DeltaTable(tmp_path / "t").alter.set_table_description("new")
    after = open_rows(f"delta://{tmp_path}/t")
    assert after.tables != before.tables and after.files == before.files


def test_a_table_of_no_files_holds_no_row(tmp_path: Path) -> None:
    write_deltalake(tmp_path / "t", pa.table({"text": ["a"]}))
    DeltaTable(tmp_path / "t").delete()
    assert open_rows(f"delta://{tmp_path}/t").rows == 0


def test_types_are_the_tables_and_not_the_files(tmp_path: Path) -> None:
    """A float32 of a file that its table calls a double is written as the double that the library reads."""
    write_deltalake(
        tmp_path / "t", pa.table({"n": pa.array([0.1, 2.5], pa.float32()), "k": pa.array([1, 2], pa.int8())})
    )
    source = open_rows(f"delta://{tmp_path}/t")
    assert dict(source.files[0].columns) == {"n": pa.float32(), "k": pa.int8()}
    expected = library_rows(pa.table(DeltaTable(tmp_path / "t").scan().read_all()), ["n", "k"])
    assert read_rows(source, ["n", "k"]) == expected


def test_deletion_vectors_of_many_row_groups_take_the_right_rows(tmp_path: Path) -> None:
    from deltalake import WriterProperties

    rows = pa.table({"text": [f"{i} " + "x" * 200 for i in range(60_000)]})
    write_deltalake(
        tmp_path / "t", rows, configuration={"delta.enableDeletionVectors": "true"},
        writer_properties=WriterProperties(max_row_group_size=7_000),
    )  # fmt: skip
    table = DeltaTable(tmp_path / "t")
    (path,) = pa.table(table.get_add_actions())["path"].to_pylist()
    gone = set(random.Random(0).sample(range(60_000), 20_000)) | set(range(7_000, 14_000))
    delete_by_vector(tmp_path / "t", path, gone, inline=False)
    source = open_rows(f"delta://{tmp_path}/t")
    assert len(source.files[0].row_groups) > 5 and source.rows == 60_000 - len(gone)
    kept = {int(text.split()[0]) for (text,) in read_rows(source, ["text"]) if text}
    assert kept == set(range(60_000)) - gone


def test_a_shallow_clone_is_refused_by_name(tmp_path: Path) -> None:
    import json

    write_deltalake(tmp_path / "t", pa.table({"text": ["a"]}))
    log = tmp_path / "t" / "_delta_log" / "00000000000000000000.json"
    actions = [json.loads(line) for line in log.read_text().splitlines()]
    clone = tmp_path / "clone" / "_delta_log"
    clone.mkdir(parents=True)
    for action in actions:
        if "add" in action:
            action["add"]["path"] = f"file://{tmp_path}/t/{action['add']['path']}"
    (clone / log.name).write_text("".join(json.dumps(action) + "\n" for action in actions))
    with pytest.raises(CorpusError, match="outside its folder, as a shallow clone does"):
        open_rows(f"delta://{tmp_path}/clone")


def test_the_file_system_is_the_one_that_paths_have(tmp_path: Path) -> None:
    _four_versions(tmp_path / "t")
    assert open_rows(f"delta+file://{tmp_path}/t").filesystem == fs.LocalFileSystem()
