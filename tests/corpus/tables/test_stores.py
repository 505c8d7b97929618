"""Tables in an object store: the same rows as on the disk, by the same environment as plain Parquet."""

from pathlib import Path
from typing import TYPE_CHECKING

import lance
import pyarrow as pa
import pytest
from deltalake import DeltaTable, write_deltalake
from pyiceberg.catalog import load_catalog

from pipeline.corpus.tables.libraries import table_address
from tests.corpus.tables.rows import Rows, library_rows, open_rows, read_rows

if TYPE_CHECKING:
    from tests.bank.s3_server import S3Server

pytest_plugins = ["tests.bank.s3_server"]


@pytest.mark.processes
def test_delta_and_lance_are_read_from_an_object_store(
    s3: "S3Server", tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    rows = pa.table({"text": [f"text {i}" for i in range(20)], "lang": ["en gb", "de"] * 10})
    write_deltalake(tmp_path / "delta", rows, partition_by=["lang"])
    DeltaTable(tmp_path / "delta").delete("text = 'text 3'")
    lance.write_dataset(rows, str(tmp_path / "lance"), max_rows_per_file=7)
    uri = s3.new_uri()
    for file in [*(tmp_path / "delta").rglob("*"), *(tmp_path / "lance").rglob("*")]:
        if file.is_file():
            s3.put(f"{uri}/{file.relative_to(tmp_path).as_posix().replace('%', '%25')}", file.read_bytes())
    where = f"?endpoint_override={s3.endpoint.removeprefix('http://')}&scheme=http&region=us-east-1"
    for name, value in s3.environment.items():
        if name not in ("AWS_ENDPOINT_URL", "AWS_ALLOW_HTTP"):
            monkeypatch.setenv(name, value)
    place = uri.removeprefix("s3://")
    expected = Rows((f"text {i}", ("en gb", "de")[i % 2]) for i in range(20))
    now = open_rows(f"delta+s3://{place}/delta{where}")
    assert read_rows(now, ["text", "lang"]) == expected - Rows([("text 3", "de")])
    assert now.tables[0].address == f"delta+s3://{place}/delta{where}"
    assert read_rows(open_rows(f"delta+s3://{place}/delta@0{where}"), ["text", "lang"]) == expected
    assert read_rows(open_rows(f"lance+s3://{place}/lance@1{where}"), ["text", "lang"]) == expected


@pytest.mark.processes
@pytest.mark.parametrize("kind", ["glue", "sql"])
def test_an_iceberg_table_in_an_object_store_is_read_by_glue_and_by_a_sql_catalog(
    s3: "S3Server", tmp_path: Path, kind: str
) -> None:
    of_kind = {
        "glue": {"glue.endpoint": s3.endpoint, "glue.region": "us-east-1"},
        "sql": {"uri": f"sqlite:///{tmp_path}/catalog.db"},
    }
    store = {"s3.endpoint": s3.endpoint, "s3.region": "us-east-1", "warehouse": s3.new_uri()}
    properties = {"type": kind, **of_kind[kind], **store}
    catalog = load_catalog("prod", **properties)
    catalog.create_namespace("sales")
    rows = pa.table({"text": [f"text {i}" for i in range(20)], "lang": ["en gb", "de"] * 10})
    table = catalog.create_table("sales.reviews", schema=rows.schema)
    table.append(rows)
    table.delete("text = 'text 3'")
    found = read_rows(open_rows("iceberg://prod/sales.reviews", {"prod": properties}), ["text", "lang"])
    assert found == library_rows(table.scan().to_arrow(), ["text", "lang"])
    assert found.total() == 19


@pytest.mark.parametrize(
    ("address", "kind", "place", "version"),
    [
        ("delta:///a/b", "delta", "/a/b", None),
        ("delta://a/b@12", "delta", "a/b", "12"),
        ("delta:///a@b/c", "delta", "/a@b/c", None),
        ("delta+file:///a@7", "delta", "/a", "7"),
        ("delta+s3://bucket/t@2026-11-01T00:00:00Z", "delta", "s3://bucket/t", "2026-11-01T00:00:00Z"),
        ("delta+abfs://c@account/t@3", "delta", "abfs://c@account/t", "3"),
        ("delta+s3://bucket/t@3?region=x", "delta", "s3://bucket/t?region=x", "3"),
        ("iceberg://prod/ns.t@123", "iceberg", "prod/ns.t", "123"),
        ("lance+gs://bucket/t", "lance", "gs://bucket/t", None),
        ("lance://t@2026-11-01 10:00", "lance", "t", "2026-11-01 10:00"),
    ],
)
def test_an_address_is_a_kind_a_place_and_a_version(address: str, kind: str, place: str, version: str | None) -> None:
    found = table_address(address)
    assert found is not None
    assert (found.kind, found.place, found.version) == (kind, place, version)
    assert found.written == address.replace(f"@{version}", "")


@pytest.mark.parametrize("path", ["/a/delta", "s3://bucket/delta", "delta/a.parquet", "a@3", "hf://datasets/a/b"])
def test_other_paths_are_no_tables(path: str) -> None:
    assert table_address(path) is None
