"""A Hugging Face folder with several splits is refused as one split, with the globs to write for each."""

import re
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from pipeline.corpus import check_task
from pipeline.corpus.files import inspect_files
from pipeline.errors import CorpusError

ROWS = [{"text": f"text {i}", "label": i % 2} for i in range(6)]
HERE = "task 'x', train"
LAYOUTS = {
    "hub": ["data/train-00000-of-00002.parquet", "data/train-00001-of-00002.parquet",
            "data/validation-00000-of-00001.parquet", "data/test-00000-of-00001.parquet"],
    "plain": ["train.parquet", "dev.parquet", "test.parquet"],
    "configurations": [f"{config}/{split}-00000-of-00001.parquet" for config in ("main", "socratic")
                       for split in ("train", "test")],
    "folders": ["train/0000.parquet", "train/0001.parquet", "validation/0000.parquet", "test/0000.parquet"],
    "converted": [f"{config}/{split}/0000.parquet" for config in ("a", "b") for split in ("train", "test")],
    "suffixes": ["imdb_train.parquet", "imdb-test.parquet"],
    "hive": ["split=train/a.parquet", "split=test/a.parquet"],
    "capitals": ["Train.parquet", "Test.parquet"],
}  # fmt: skip


@pytest.mark.parametrize("layout", LAYOUTS)
def test_each_named_glob_gives_its_split_and_together_they_give_every_file(
    tmp_path: Path, write: Callable[..., Path], layout: str
) -> None:
    files = [write(tmp_path / "repo" / name, ROWS) for name in LAYOUTS[layout]]
    with pytest.raises(CorpusError, match=r"^task 'x', train: .* mixes the files of several splits") as refused:
        inspect_files(f"{tmp_path}/repo", HERE)
    globs = dict(re.findall(r"(train|dev|test): (/[^,;]+)", str(refused.value)))
    found = [file.path for glob in globs.values() for file in inspect_files(glob, HERE).files]
    assert sorted(found) == sorted(map(str, files)) and len(globs) > 1
    assert str(refused.value).endswith("; or list these paths to mean them together")
    assert len(inspect_files(list(globs.values()), HERE).files) == len(files)


def test_a_glob_over_several_splits_is_refused_and_a_list_of_them_is_meant(
    tmp_path: Path, write: Callable[..., Path], make_task: Callable[..., Any]
) -> None:
    for name in LAYOUTS["hub"]:
        write(tmp_path / name, ROWS)
    data = tmp_path / "data"
    for path in (f"{data}/*", f"{data}/*.parquet", f"{tmp_path}/**", f"file://{data}", f"{data}/t*"):
        with pytest.raises(CorpusError, match="mixes the files of several splits"):
            inspect_files(path, HERE)
    with pytest.raises(CorpusError, match=r"^task 'x', dev: .*mixes"):
        check_task("x", make_task(f"{data}/train-*", dev=data))
    assert len(inspect_files([f"{data}/train-*", f"{data}/validation-*"], HERE).files) == 3
    assert len(inspect_files(f"{data}/train-*", HERE).files) == 2


def test_files_of_one_split_or_of_none_are_read(tmp_path: Path, write: Callable[..., Path]) -> None:
    for name in ["lang=test/part-0.parquet", "lang=dev/part-0.parquet", "latest.parquet", "contest.parquet",
                 "strain.parquet", "train-0.parquet", "training/1.parquet", "devices.parquet"]:  # fmt: skip
        write(tmp_path / "train" / name, ROWS)
    assert len(inspect_files(str(tmp_path / "train"), HERE).files) == 8
