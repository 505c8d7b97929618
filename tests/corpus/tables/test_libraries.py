"""The libraries of `[lake]` are asked for only where such an address is opened, and a missing one is told."""

import subprocess
import sys
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpus.files import inspect_files
from pipeline.errors import CorpusError
from tests.corpus.tables.rows import HERE, open_rows, read_rows

LAKE = ("deltalake", "pyiceberg", "lance", "huggingface_hub")


@pytest.mark.processes
def test_plain_corpora_import_no_library_of_tables(tmp_path: Path) -> None:
    pq.write_table(pa.table({"text": ["a"], "label": ["b"]}), tmp_path / "a.parquet")
    code = f"""
import sys
from pipeline.corpus.sources import open_split_source
from pipeline.settings import SplitSettings
for split in ("{tmp_path}/a.parquet", SplitSettings(path="{tmp_path}/a.parquet", columns={{"text": "label"}}, limit=1)):
    assert open_split_source(split, "x").rows == 1
print([name for name in {LAKE} if name in sys.modules])
"""
    done = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert done.stdout.strip() == "[]"


@pytest.mark.parametrize(
    ("path", "module"),
    [
        ("delta:///t@3", "deltalake"),
        ("iceberg://prod/ns.t", "pyiceberg"),
        ("lance:///t", "lance"),
        ("hf://datasets/me/films/train", "huggingface_hub"),
    ],
)
def test_a_missing_library_is_one_sentence_with_the_extra(
    monkeypatch: pytest.MonkeyPatch, path: str, module: str
) -> None:
    for name in [name for name in sys.modules if name.partition(".")[0] == module]:
        monkeypatch.delitem(sys.modules, name)
    monkeypatch.setitem(sys.modules, module, None)  # as Python has it for a module that cannot be imported
    with pytest.raises(CorpusError, match=rf"^{HERE}: .*pip install 'promptbank\[lake\]'") as refused:
        open_rows(path)
    assert path.partition("@")[0] in str(refused.value) and "\n" not in str(refused.value)


def test_the_address_that_a_refused_folder_is_told_to_take_is_read(tmp_path: Path) -> None:
    from deltalake import write_deltalake

    write_deltalake(tmp_path / "t", pa.table({"text": ["a"]}))
    with pytest.raises(CorpusError, match="give the table's own address, ") as refused:
        inspect_files(str(tmp_path / "t"), HERE)
    told = str(refused.value).rpartition("own address, ")[2]
    assert read_rows(open_rows(told), ["text"]).total() == 1
