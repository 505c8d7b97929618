"""JSON lines and CSV: what stands in them is what a task reads, whatever they are packed with and however long."""

import csv
import io
import json
from pathlib import Path
from typing import Any

import duckdb
import pandas as pd
import polars as pl
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from pipeline.corpus import check_task
from pipeline.errors import CorpusError
from pipeline.settings import TaskSettings
from tests.corpus.tables.rows import HERE, Rows, open_rows, read_rows

PACKINGS = {"": None, ".gz": "gzip", ".bz2": "bz2", ".zst": "zstd", ".lz4": "lz4"}
WORDS = st.text(st.characters(exclude_categories=["Cs"], exclude_characters="\0"), max_size=30)
CELLS = st.lists(st.tuples(WORDS.map(lambda text: f"x{text}"), st.integers(-(2**53), 2**53)), min_size=1, max_size=8)


def _packed(path: Path, data: bytes, packing: str | None) -> Path:
    with pa.output_stream(str(path), compression=packing) as out:
        out.write(data)
    return path


@pytest.mark.parametrize("packing", PACKINGS)
@pytest.mark.parametrize("ending", ["jsonl", "ndjson", "json", "csv", "tsv"])
@settings(max_examples=20)
@given(rows=CELLS)
def test_every_cell_is_read_as_it_was_written(tmp_path_factory: Any, ending: str, packing: str, rows: Any) -> None:
    folder = tmp_path_factory.mktemp("rows")
    if ending in ("csv", "tsv"):
        rows = [(text.replace("\r", ""), number) for text, number in rows]  # a text file's line ends are its own
        out = io.StringIO(newline="")
        writer = csv.writer(out, delimiter="\t" if ending == "tsv" else ",", quoting=csv.QUOTE_ALL, lineterminator="\n")
        writer.writerows([("text", "n"), *rows])
        data = out.getvalue()
    else:
        data = "".join(json.dumps({"text": text, "n": number}) + "\n" for text, number in rows)
    path = _packed(folder / f"a.{ending}{packing}", data.encode(), PACKINGS[packing])
    source = open_rows(str(path))
    assert source.exact and source.rows == len(rows)
    assert read_rows(source, ["text", "n"]) == Rows((text, str(number)) for text, number in rows)


def test_what_other_tools_write_is_read(tmp_path: Path) -> None:
    rows = {"text": ['a "quoted", cell', "two\nlines", "é"], "n": [1, 2, 3], "share": [0.5, 1.0, 2.25]}
    pd.DataFrame(rows).to_csv(tmp_path / "pandas.csv", index=False)
    pd.DataFrame(rows).to_json(tmp_path / "pandas.jsonl", orient="records", lines=True)
    pl.DataFrame(rows).write_csv(tmp_path / "polars.csv")
    pl.DataFrame(rows).write_ndjson(tmp_path / "polars.ndjson")
    frame = pa.table(rows)
    duckdb.sql(f"copy frame to '{tmp_path}/duckdb.csv'")
    duckdb.sql(f"copy frame to '{tmp_path}/duckdb.json.gz' (format json, compression gzip)")
    assert frame.num_rows == 3
    expected = Rows(zip(rows["text"], ["1", "2", "3"], ["0.5", "1.0", "2.25"], strict=True))
    for name in ("pandas.csv", "pandas.jsonl", "polars.csv", "polars.ndjson", "duckdb.csv", "duckdb.json.gz"):
        assert read_rows(open_rows(str(tmp_path / name)), ["text", "n", "share"]) == expected, name


def test_dates_stay_text_and_csv_has_no_types_but_those_that_are_declared(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"day": "2024-01-01", "time": "2024-01-01 00:00:00", "ok": true, "n": null}\n')
    (tmp_path / "a.csv").write_text("code,score,ok\n007,1,true\n1e3,2.50,false\n")
    read = read_rows(open_rows(f"{tmp_path}/a.jsonl"), ["day", "time", "ok", "n"])
    assert read == Rows([("2024-01-01", "2024-01-01 00:00:00", "True", None)])
    assert read_rows(open_rows(f"{tmp_path}/a.csv"), ["code", "score"]) == Rows([("007", "1"), ("1e3", "2.50")])
    typed = open_rows({"path": f"{tmp_path}/a.csv", "types": {"score": "float", "ok": "boolean"}})
    assert read_rows(typed, ["code", "score", "ok"]) == Rows([("007", "1.0", "True"), ("1e3", "2.5", "False")])


def test_a_long_file_is_read_in_blocks_and_its_rows_are_guessed(tmp_path: Path) -> None:
    line = json.dumps({"text": "x" * 990}) + "\n"
    (tmp_path / "a.jsonl").write_text(line * 40_000)
    source = open_rows(f"{tmp_path}/a.jsonl")
    assert not source.exact and abs(source.rows - 40_000) < 400
    assert any("number of its rows is a guess" in remark for remark in _plan(tmp_path / "a.jsonl", "{text}").remarks)
    before, held, rows = pa.total_allocated_bytes(), [], 0
    from pipeline.corpus.reading import read_texts, read_units

    for unit in read_units(source):
        for count, _ in read_texts(source.filesystem, unit, ["text"], HERE):
            held.append(pa.total_allocated_bytes() - before)
            rows += count
    assert rows == 40_000
    # A few blocks of 16 MiB are held at a time, and not the whole file's 38 MiB in any form that grows with it.
    assert max(held) < 100 * 2**20


def _plan(path: Path, target: str = "{label}") -> Any:
    task = TaskSettings(train=str(path), dev_fraction=0.5, metric="exact_match", target=target)
    return check_task("x", task)


def test_types_that_were_inferred_are_told_in_the_plan(tmp_path: Path) -> None:
    (tmp_path / "a.jsonl").write_text('{"text": "a", "label": 1}\n{"text": "b", "label": 2}\n')
    assert _plan(tmp_path / "a.jsonl").remarks == [
        f"{HERE}: types inferred from the first rows: label int64, text string"
    ]


def test_a_row_that_does_not_fit_its_type_is_one_sentence_that_names_the_way_out(tmp_path: Path) -> None:
    with (tmp_path / "a.jsonl").open("w") as out:
        out.writelines(json.dumps({"text": "x" * 1000, "label": 1}) + "\n" for _ in range(17_000))
        out.write('{"text": "y", "label": 2.5}\n')
    source = open_rows(f"{tmp_path}/a.jsonl")
    with pytest.raises(CorpusError, match=f"^{HERE}: .*a.jsonl is damaged .*declare the column's type") as refused:
        read_rows(source, ["text", "label"])
    assert "\n" not in str(refused.value)
    declared = open_rows({"path": f"{tmp_path}/a.jsonl", "types": {"label": "float"}})
    assert read_rows(declared, ["label"]) == Rows({("1.0",): 17_000, ("2.5",): 1})


def test_a_folder_of_text_files_is_read_and_one_of_parquet_leaves_them_out(tmp_path: Path) -> None:
    import pyarrow.parquet as pq

    for name in ("part-0.jsonl", "lang=en/part-1.jsonl"):
        (tmp_path / "a" / name).parent.mkdir(parents=True, exist_ok=True)
        (tmp_path / "a" / name).write_text(json.dumps({"text": name}) + "\n")
    read = read_rows(open_rows(f"{tmp_path}/a/lang=*/*.jsonl"), ["text"])
    assert read == Rows([("lang=en/part-1.jsonl",)])
    assert read_rows(open_rows(f"{tmp_path}/a"), ["text"]).total() == 2
    pq.write_table(pa.table({"text": ["parquet"]}), tmp_path / "a" / "b.parquet")
    source = open_rows(f"{tmp_path}/a")
    assert read_rows(source, ["text"]) == Rows([("parquet",)]) and len(source.left_out) == 2


@pytest.mark.parametrize(
    ("name", "data", "reason"),
    [
        ("a.jsonl", b"", "holds no row"),
        ("a.jsonl", b"\n\n", "holds no row"),
        ("a.csv", b"", "holds no row"),
        ("a.jsonl", b"not json\n", "cannot be read as JSON lines"),
        ("a.json", b'[{"text": "a"}]', "convert it with Python"),
        ("a.jsonl.gz", b"not packed", "cannot be read as JSON lines|not a readable"),
        ("a.csv", b'text,label\n"a,b\n', "cannot be read as CSV"),
    ],
)
def test_a_file_that_is_none_is_one_sentence(tmp_path: Path, name: str, data: bytes, reason: str) -> None:
    (tmp_path / name).write_bytes(data)
    with pytest.raises(CorpusError, match=f"^{HERE}: .*({reason})") as refused:
        open_rows(str(tmp_path / name))
    assert "\n" not in str(refused.value) and name in str(refused.value)


def test_a_plain_json_file_beside_rows_of_another_kind_is_no_corpus(tmp_path: Path) -> None:
    (tmp_path / "rows.jsonl").write_text('{"text": "a"}\n')
    (tmp_path / "stats.json").write_text('{\n "rows": 1\n}\n')
    assert read_rows(open_rows(str(tmp_path)), ["text"]) == Rows([("a",)])
    saved = tmp_path / "saved"
    saved.mkdir()
    with pa.ipc.new_stream(saved / "data-00000-of-00001.arrow", pa.schema([("text", pa.string())])) as stream:
        stream.write_table(pa.table({"text": ["a"]}))
    (saved / "dataset_info.json").write_text('{\n "features": {}\n}\n')
    with pytest.raises(CorpusError, match=r"data-00000-of-00001\.arrow; it is Arrow IPC by its name, so convert it"):
        open_rows(str(saved))


def test_a_cell_of_several_lines_may_stand_where_the_first_block_ends(tmp_path: Path) -> None:
    line = '"one\ntwo",a\n'
    (tmp_path / "long.csv").write_text("text,label\n" + line * (17 * 2**20 // len(line)))
    source = open_rows(str(tmp_path / "long.csv"))
    assert dict(source.files[0].columns) == {"text": pa.string(), "label": pa.string()}
    rows = read_rows(source, ["text", "label"])
    assert rows == Rows({("one\ntwo", "a"): 17 * 2**20 // len(line)})
