"""The quickstart's corpora: always the same, and dev holds nothing that train gives away."""

import os
import re
from collections import Counter
from pathlib import Path

import pyarrow.parquet as pq
import pytest

pytest.importorskip("chatterbot_corpus", reason="the extra 'quickstart' is not installed")

from jobs.make_quickstart_corpora import CORPORA, LANGUAGES, make_corpora
from pipeline.errors import StorageError
from pipeline.settings import load_settings

Row = dict[str, str]


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    folder = tmp_path_factory.mktemp("quickstart") / "corpora"
    make_corpora(folder)
    return folder


def rows(folder: Path, task: str, split: str) -> list[Row]:
    found: list[Row] = pq.read_table(folder / task / f"{split}.parquet").to_pylist()
    return found


def files(folder: Path) -> dict[str, bytes]:
    return {str(file.relative_to(folder)): file.read_bytes() for file in sorted(folder.rglob("*")) if file.is_file()}


def test_the_same_packages_give_the_same_bytes(folder: Path, tmp_path: Path) -> None:
    make_corpora(tmp_path)
    assert files(tmp_path) == files(folder)
    assert set(files(folder)) == {f"{task}/{split}.parquet" for task in CORPORA for split in ("train", "dev")}


def test_corpora_that_are_there_are_left_alone(tmp_path: Path) -> None:
    make_corpora(tmp_path)
    before = {file: os.stat(file).st_mtime_ns for file in tmp_path.rglob("*.parquet")}
    make_corpora(tmp_path)
    assert {file: os.stat(file).st_mtime_ns for file in tmp_path.rglob("*.parquet")} == before


def test_a_task_that_lost_a_file_is_made_again_whole(folder: Path, tmp_path: Path) -> None:
    make_corpora(tmp_path)
    (tmp_path / "language" / "dev.parquet").unlink()
    make_corpora(tmp_path)
    assert files(tmp_path) == files(folder)


def test_a_folder_that_cannot_be_written_is_refused_by_name(tmp_path: Path) -> None:
    (tmp_path / "quickstart").write_text("a file where the folder should be")
    with pytest.raises(StorageError, match=r"quickstart.corpora"):
        make_corpora(tmp_path / "quickstart" / "corpora")


@pytest.mark.parametrize("task", CORPORA)
def test_no_row_is_repeated_or_shared_between_train_and_dev(folder: Path, task: str) -> None:
    everything = [tuple(row.values()) for split in ("train", "dev") for row in rows(folder, task, split)]
    assert len(set(everything)) == len(everything)
    assert all(value.strip() for row in everything for value in row)


@pytest.mark.parametrize("task", ["sentiment", "language"])
def test_every_label_is_as_frequent_as_the_others(folder: Path, task: str) -> None:
    train, dev = (Counter(row["label"] for row in rows(folder, task, split)) for split in ("train", "dev"))
    assert set(train) == set(dev) and len(set(train.values())) == len(set(dev.values())) == 1
    assert sum(train.values()) > 500 and sum(dev.values()) >= 150


def test_words_of_one_stem_are_never_on_both_sides(folder: Path) -> None:
    train, dev = ({row["word"][:5] for row in rows(folder, "sentiment", split)} for split in ("train", "dev"))
    assert not train & dev


def test_the_bare_sentence_keeps_the_words_and_nothing_else(folder: Path) -> None:
    for split in ("train", "dev"):
        for row in rows(folder, "punctuation", split):
            assert row["bare"] == row["bare"].lower() and not re.search(r"[,.?!]", row["bare"])
            assert row["bare"].split() == re.sub(r"[,.?]", "", row["text"].lower()).split()
            assert row["text"][0].isupper() and row["text"][-1] in ".?"


def test_a_sentence_is_in_one_language_only(folder: Path) -> None:
    texts = [row["text"].lower() for split in ("train", "dev") for row in rows(folder, "language", split)]
    assert len(set(texts)) == len(texts)
    assert {row["label"] for row in rows(folder, "language", "dev")} == set(LANGUAGES)


def test_the_quickstarts_settings_fit_its_corpora(folder: Path) -> None:
    settings = load_settings(Path(__file__).parents[2] / "jobs" / "configs" / "quickstart.yaml")
    assert set(settings.tasks) == set(CORPORA)
    for name, task in settings.tasks.items():
        for path in (task.train, task.dev):
            assert isinstance(path, str) and path.startswith(f"./quickstart/corpora/{name}/")
            row = rows(folder, name, Path(path).stem)[0]
            assert task.input.format(**row) and task.target.format(**row)
