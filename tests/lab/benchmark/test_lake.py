"""A Delta table and its files alone give the same rows, at rates that are measured in turn."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq

from pipeline.lab.benchmark.lake import measure_tables, rate_table


def test_every_side_reads_the_same_rows_and_a_filter_a_part_of_them(tmp_path: Path) -> None:
    (tmp_path / "data" / "one").mkdir(parents=True)
    sentences = pa.table({"text": [f"a sentence of some words, number {i}" for i in range(20)], "label": ["x"] * 20})
    pq.write_table(sentences, tmp_path / "data" / "one" / "train.parquet")
    plain, delta, *filtered = measure_tables(tmp_path / "data", 0.002, 2, tmp_path)
    assert plain.rows == delta.rows > 0 and plain.megabytes == delta.megabytes
    assert filtered[0].rows == filtered[1].rows and 0 < filtered[0].rows < plain.rows
    assert all(len(rate.by_cpu) == len(rate.by_wall) == 2 for rate in (plain, delta, *filtered))
    assert rate_table([plain, delta, *filtered]).row_count == 4
    assert [path.name for path in tmp_path.iterdir()] == ["data"]
