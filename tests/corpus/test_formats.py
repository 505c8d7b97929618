"""Parquet files are found whatever their names, except those set aside; other formats get advice on converting."""

import json
import re
import subprocess
import sys
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.feather
import pyarrow.orc
import pyarrow.parquet as pq
import pytest

from pipeline.corpus import check_task
from pipeline.corpus.files import inspect_files
from pipeline.corpus.reading import read_texts, read_units
from pipeline.errors import CorpusError

HERE = "task 'x', train"
ROWS = pa.table({"text": ["a b", "c"], "label": ["no", "yes"]})
PARQUET = ["a.parquet", "b.parq", "c.parquet.gzip", "d.PARQUET", "000000_0", "part-00000", "e.pq", "f.snappy.parquet",
           "g.parquet.snappy", "h.gz", "i.gz.parq", "part-1-c000.snappy", "p.Parquet.gz", "q.pqt",
           "r.dat", "s.parquet2", "000000_0_copy_1", "t_part1", "u-part2"]  # fmt: skip


def test_a_folder_gives_every_file_that_is_parquet_by_its_first_bytes(tmp_path: Path) -> None:
    for name in PARQUET:
        pq.write_table(ROWS, tmp_path / name)
    for name in [
        "a.parquet.bak",
        "a.parquet~",
        "a.parquet.tmp",
        "a.parquet.1.old",
        "_metadata",
        ".a.parquet",
        "a.parquet_old",
        "a.parquet-bak",
        "a.parquet_tmp2",
    ]:
        pq.write_table(ROWS, tmp_path / name)
    for name in ["README", "LICENSE", "notes.txt", "x.parq.crc", "empty", "x.gz"]:
        (tmp_path / name).write_text("" if name == "empty" else "not Parquet")
    found = inspect_files(str(tmp_path), HERE).files
    assert [Path(file.path).name for file in found] == sorted(PARQUET)


def test_data_in_a_folder_that_is_not_read_is_told(tmp_path: Path, make_task: Callable[..., Any]) -> None:
    pq.write_table(ROWS, tmp_path / "a.parquet")
    pq.write_table(ROWS, tmp_path / "a.parquet.bak")
    (tmp_path / "b.csv").write_text("text,label\n")
    (tmp_path / "c.parquet").symlink_to(tmp_path / "gone")
    (tmp_path / "d.parquet_tmp").write_bytes(b"PAR1 and half of it")
    (tmp_path / "README.md").write_text("")
    assert inspect_files(f"{tmp_path}/a.*quet", HERE).left_out == ()
    source = inspect_files(str(tmp_path), HERE)
    assert [Path(path).name for path in source.left_out] == ["a.parquet.bak", "b.csv", "c.parquet", "d.parquet_tmp"]
    (remark,) = check_task("x", make_task(tmp_path, dev=tmp_path / "a.parquet")).left_out
    assert remark == f"{HERE}: 4 other data files are not read, such as {tmp_path}/a.parquet.bak"


def test_a_folder_without_the_usual_name_is_read_too(tmp_path: Path) -> None:
    pq.write_table(ROWS, tmp_path / "part-0")
    assert inspect_files(str(tmp_path), HERE).rows == 2


def test_a_link_counts_a_file_once(tmp_path: Path) -> None:
    pq.write_table(ROWS, tmp_path / "a.parquet")
    (tmp_path / "again.parquet").symlink_to(tmp_path / "a.parquet")
    (tmp_path / "loop").symlink_to(tmp_path)
    assert [file.path for file in inspect_files(str(tmp_path), HERE).files] == [f"{tmp_path}/a.parquet"]


def _in_another_format(file: Path, kind: str) -> None:
    rows = ROWS.to_pylist()
    packed = "gzip" if file.name.endswith("gz") else None
    with pa.output_stream(file, compression=packed) as out:
        if kind == "array":
            out.write(f"\n {json.dumps(rows, indent=1)}".encode())
        elif kind == "orc":
            pyarrow.orc.write_table(ROWS, out)
        elif kind.startswith("feather"):
            pyarrow.feather.write_feather(ROWS, out, version=int(kind[-1]))
        else:
            with (pa.ipc.new_file if kind == "file" else pa.ipc.new_stream)(out, ROWS.schema) as writer:
                writer.write_table(ROWS)


@pytest.mark.parametrize(
    ("name", "kind"),
    [
        ("x.json", "array"), ("x.json.gz", "array"), ("x.orc", "orc"),
        ("x.feather", "feather 2"), ("x.feather", "feather 1"), ("x.arrow", "file"), ("x.arrow", "stream"),
        ("x.ipc", "file"), ("x.ipc", "stream"),
    ],
)  # fmt: skip
@pytest.mark.filterwarnings("ignore:Feather V1")
@pytest.mark.processes
def test_another_format_is_refused_with_the_code_that_converts_it(tmp_path: Path, name: str, kind: str) -> None:
    file = tmp_path / "data" / name
    file.parent.mkdir()
    _in_another_format(file, kind)
    for path in (file, file.parent):
        with pytest.raises(CorpusError, match="convert it with Python: ") as refused:
            inspect_files(str(path), HERE)
        assert "\n" not in str(refused.value)
        code = str(refused.value).partition("convert it with Python: ")[2]
        subprocess.run([sys.executable, "-c", re.sub(r" \(.*\)$", "", code)], cwd=tmp_path, check=True)
        assert pq.read_table(tmp_path / "x.parquet").to_pylist() == ROWS.to_pylist()


def test_two_columns_of_one_name_are_refused_where_a_template_names_them(
    tmp_path: Path, make_task: Callable[..., Any]
) -> None:
    twice = pa.Table.from_arrays([pa.array(["a"]), pa.array(["b"]), pa.array(["c"])], ["text", "label", "label"])
    file = tmp_path / "a.parquet"
    pq.write_table(twice, file)
    with pytest.raises(CorpusError, match=r"a.parquet has 2 columns of the name 'label'.*rename all but one"):
        check_task("x", make_task(file, dev=file))
    plan = check_task("x", make_task(file, dev=file, target="{text}"))
    source = plan.sources["train"]
    [(rows, texts)] = read_texts(source.filesystem, read_units(source)[0], ["text"], HERE)
    assert (rows, texts) == (1, {"text": ["a"]})
