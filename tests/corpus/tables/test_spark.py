"""What Spark writes as plain files, read as Spark itself reads it. By hand: it takes pyspark 4.0.1, and a Java."""

import shutil
from collections import Counter
from collections.abc import Iterator
from pathlib import Path
from typing import Any

import pytest

from tests.corpus.tables.rows import open_rows, read_rows

sql = pytest.importorskip("pyspark.sql", reason="pyspark is not installed")
pytestmark = [
    pytest.mark.processes,
    pytest.mark.skipif(shutil.which("java") is None, reason="Spark takes a Java"),
]
COLUMNS = ["text", "label", "stars", "lang", "price", "day"]


@pytest.fixture(scope="module")
def spark() -> Iterator[Any]:
    options = {"spark.ui.enabled": "false", "spark.driver.memory": "1g", "spark.sql.session.timeZone": "UTC"}
    builder = sql.SparkSession.builder.master("local[1]")
    for name, value in options.items():
        builder = builder.config(name, value)
    session = builder.getOrCreate()
    yield session
    session.stop()


def _rows(spark: Any) -> Any:
    return spark.range(300).selectExpr(
        "concat('text ', id) as text",
        "if(id % 2 = 0, 'yes', null) as label",
        "cast(id % 5 as int) as stars",
        "if(id % 2 = 0, 'en', 'de fr') as lang",
        "cast(id % 11 as decimal(10, 2)) as price",
        "date_add(date'2026-01-01', cast(id as int)) as day",
    )


@pytest.mark.parametrize("way", ["plain", "hive", "zstd", "json", "csv"])
def test_what_spark_writes_is_read_as_spark_reads_it(spark: Any, tmp_path: Path, way: str) -> None:
    writer, place = _rows(spark).write, str(tmp_path / way)
    if way == "hive":
        writer.partitionBy("lang", "stars").parquet(place)
    elif way == "json":
        writer.option("compression", "gzip").json(place)
    elif way == "csv":
        writer.option("compression", "gzip").option("header", True).csv(place)
    else:
        writer.option("compression", "zstd" if way == "zstd" else "snappy").parquet(place)
    reader = spark.read.option("header", True)
    own = getattr(reader, way if way in ("json", "csv") else "parquet")(place)
    told = own.selectExpr(*(f"cast({name} as string) as {name}" for name in COLUMNS)).collect()
    nothing = "" if way == "csv" else None  # every cell of CSV is text as it stands, and Spark leaves null's empty
    want = Counter(tuple(nothing if cell is None else cell for cell in row) for row in told)
    assert want.total() == 300 and any(nothing in row for row in want)
    assert read_rows(open_rows(place), COLUMNS) == want
