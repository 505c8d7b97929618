"""Lake tables hold rows that are no longer valid. A path that touches one is refused; similar folders are not."""

import json
import os
from pathlib import Path
from typing import TYPE_CHECKING, Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from pyarrow import fs

from pipeline.corpus.files import inspect_files
from pipeline.corpus.lakes import table_above
from pipeline.errors import CorpusError

if TYPE_CHECKING:
    from tests.bank.s3_server import S3Server

pytest_plugins = ["tests.bank.s3_server"]

HERE = "task 'x', train"
ROWS = pa.table({"text": [f"text {i}" for i in range(4)], "label": ["no", "yes"] * 2})


def _put(root: Path, *files: str) -> Path:
    for file in files:
        path = root / file
        path.parent.mkdir(parents=True, exist_ok=True)
        if path.suffix == ".parquet":
            pq.write_table(ROWS, path)
        else:
            path.write_text("{}")
    return root


def _delta(root: Path) -> Path:
    """A table overwritten once, as deltalake 1.6 writes its log: four rows hold and eight are in the files."""
    _put(root, "day=1/part-00000-a-c000.snappy.parquet", "day=2/part-00000-b-c000.snappy.parquet")
    schema = {"type": "struct", "fields": [{"name": "text", "type": "string", "nullable": True, "metadata": {}}]}
    about = {"id": "1", "format": {"provider": "parquet", "options": {}}, "schemaString": json.dumps(schema)}
    add = {"partitionValues": {"day": "1"}, "size": 1, "modificationTime": 1, "dataChange": True}
    gone = {"path": "day=1/part-00000-a-c000.snappy.parquet", "dataChange": True, "deletionTimestamp": 2}
    commits: list[list[dict[str, Any]]] = [
        [
            {"protocol": {"minReaderVersion": 1, "minWriterVersion": 2}},
            {"metaData": {**about, "partitionColumns": ["day"], "configuration": {}}},
            {"add": {"path": gone["path"], **add}},
        ],
        [{"remove": gone}, {"add": {"path": "day=2/part-00000-b-c000.snappy.parquet", **add}}],
    ]
    (root / "_delta_log").mkdir()
    for version, actions in enumerate(commits):
        lines = "".join(json.dumps(action) + "\n" for action in actions)
        (root / "_delta_log" / f"{version:020}.json").write_text(lines)
    return root


def _iceberg(root: Path) -> Path:
    return _put(root, "data/day=1/00000-0-a.parquet", "metadata/00000-a.metadata.json", "metadata/snap-1-0-a.avro")


def _hudi(root: Path) -> Path:
    return _put(root, "2024/01/a_0-1-2_3.parquet", ".hoodie/hoodie.properties", "2024/01/.hoodie_partition_metadata")


def _lance(root: Path) -> Path:
    return _put(root, "data/a.lance", "_versions/18446744073709551614.manifest")


def _paimon(root: Path) -> Path:
    return _put(root, "bucket-0/data-a-0.parquet", "schema/schema-0", "snapshot/snapshot-1", "manifest/manifest-a-0")


TABLES = {
    "a Delta Lake table": _delta,
    "an Apache Iceberg table": _iceberg,
    "an Apache Hudi table": _hudi,
    "a Lance dataset": _lance,
    "an Apache Paimon table": _paimon,
}

PLAIN = "write its present rows as plain Parquet"
FIXES = {
    "a Delta Lake table": "give the table's own address, delta",
    "an Apache Iceberg table": "give its address in a catalog, iceberg://catalog/namespace.table",
    "an Apache Hudi table": PLAIN,
    "a Lance dataset": "give the table's own address, lance",
    "an Apache Paimon table": PLAIN,
}


def _refused(path: str, kind: str) -> str:
    with pytest.raises(CorpusError, match=f"^task 'x', train: .*{kind}") as refused:
        inspect_files(path, HERE)
    sentence = str(refused.value)
    assert path in sentence and FIXES[kind] in sentence and "\n" not in sentence
    return sentence


@pytest.mark.parametrize("kind", TABLES)
def test_a_path_at_above_or_below_a_table_is_refused_by_the_kind_of_table(tmp_path: Path, kind: str) -> None:
    lake = _put(tmp_path / "lake", "plain/a.parquet")
    table = TABLES[kind](lake / "warehouse" / "reviews")
    data = next((path for path in table.rglob("*.parquet")), table / "data")
    for path in [
        table, f"file://{table}", f"{table}/**", f"{table}/*", f"{table}/**/*.parquet", f"{data.parent}/*.parquet",
        data, data.parent, next(path for path in table.iterdir() if path.is_dir()), table.parent, lake,
        f"{lake}/warehouse/*", f"{lake}/*/reviews", f"{lake}/**",
    ]:  # fmt: skip
        assert str(table) in _refused(str(path), kind)
    assert len(inspect_files(f"{lake}/plain", HERE).files) == 1
    assert len(inspect_files(f"{lake}/pl*/*.parquet", HERE).files) == 1


def test_a_link_into_a_table_is_a_path_below_it(tmp_path: Path) -> None:
    table = _delta(tmp_path / "table")
    (tmp_path / "day").symlink_to(table / "day=2")
    (tmp_path / "links").mkdir()
    (tmp_path / "links" / "a.parquet").symlink_to(next(table.glob("day=2/*.parquet")))
    for path in (tmp_path / "day", tmp_path / "day" / "part-00000-b-c000.snappy.parquet", tmp_path / "links"):
        _refused(str(path), "a Delta Lake table")


def test_what_only_resembles_a_table_is_read(tmp_path: Path) -> None:
    _put(
        tmp_path / "a",
        "day=1/a.parquet", "_SUCCESS", "_metadata", "_common_metadata", ".a.parquet.crc", "_temporary/0/b.parquet",
        "metadata/notes.json", "schema/schema.json", "versions/1.manifest", "delta_log/0.json", "hoodie/x",
        "_versions/notes.txt",
    )  # fmt: skip
    assert inspect_files(str(tmp_path / "a"), HERE).rows == 4
    _put(tmp_path / "a" / "metadata", "b.parquet")
    assert inspect_files(str(tmp_path / "a"), HERE).rows == 8


def test_a_star_passes_over_hidden_names_as_folders_do(tmp_path: Path) -> None:
    lake = _put(tmp_path, "a.parquet", "_temporary/0/b.parquet", ".c.parquet", "day=1/d.parquet", "_SUCCESS")
    for path, files in [("*", 2), ("**", 2), ("*.parquet", 1), ("**/*.parquet", 2), ("_temporary/*/*.parquet", 1)]:
        assert len(inspect_files(f"{lake}/{path}", HERE).files) == files, path
    _put(lake, "_e.parquet")
    for path, names in [("[_a]*.parquet", {"a", "_e"}), ("?e.parquet", {"_e"}), ("_*.parquet", {"_e"})]:
        assert {Path(file.path).stem for file in inspect_files(f"{lake}/{path}", HERE).files} == names, path


@pytest.mark.processes
def test_a_table_in_an_object_store_is_found_by_few_questions(s3: "S3Server", tmp_path: Path) -> None:
    for kind, make in TABLES.items():
        uri, table = s3.new_uri(), make(tmp_path / kind)
        for file in table.rglob("*"):
            if file.is_file():
                s3.put(f"{uri}/table/{file.relative_to(table)}", file.read_bytes())
        where = f"?endpoint_override={s3.endpoint.removeprefix('http://')}&scheme=http&region=us-east-1"
        data = next((path for path in table.rglob("*.parquet")), table / "data" / "a.lance").relative_to(table)
        for path in ("table", "table/*", f"table/{data}", f"table/{data.parent}", "", "**/*.parquet"):
            _refused(f"{uri}/{path}".rstrip("/") + where, kind)
    s3.put(f"{(uri := s3.new_uri())}/deep/day=1/a.parquet", next(tmp_path.rglob("*.parquet")).read_bytes())
    assert inspect_files(f"{uri}/deep{where}", HERE).rows == 4


def test_looking_upward_lists_no_folder_but_those_that_a_table_would_have(tmp_path: Path) -> None:
    asked: list[str] = []

    class Counting(fs.FileSystemHandler):
        def get_type_name(self) -> str:
            return "counting"

        def get_file_info(self, paths: list[str]) -> list[fs.FileInfo]:
            asked.extend(paths)
            return [fs.FileInfo(path, fs.FileType.NotFound) for path in paths]

        def get_file_info_selector(self, selector: fs.FileSelector) -> list[fs.FileInfo]:
            asked.append(selector.base_dir)
            assert selector.allow_not_found and not selector.recursive
            return []

    for name in fs.FileSystemHandler.__abstractmethods__:
        if name not in vars(Counting):
            setattr(Counting, name, lambda *_: pytest.fail("asked for more than names"))
    Counting.__abstractmethods__ = frozenset()
    assert table_above(fs.PyFileSystem(Counting()), "bucket/lake/day=1") is None
    marks = ("_delta_log", "metadata", ".hoodie", "_versions", "schema")
    folders = ("bucket", "bucket/lake", "bucket/lake/day=1")
    assert sorted(asked) == sorted(os.path.join(folder, mark) for folder in folders for mark in marks)
