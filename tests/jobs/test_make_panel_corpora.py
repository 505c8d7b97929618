"""The panels' corpora: nothing of a test split is trained on, and the tokenizer gives its text back."""

from collections import Counter
from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from transformers import AutoTokenizer

from jobs.make_panel_corpora import ORIGINS, main

WORDS = ["river", "stone", "cloud", "paper", "window", "garden", "yellow", "silent", "running", "letter", "winter"]


def write(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts, "label": ["a"] * len(texts)}), path)


PAIRS = [f"{one} {two}" for one in WORDS for two in WORDS]
SHARED = "stands in another's test"


@pytest.fixture
def data(tmp_path: Path) -> Path:
    """Four corpora: each has its own texts, one more of another's test split, and one that all of them hold."""
    folder = tmp_path / "data"
    for place, task in enumerate(ORIGINS):
        own = PAIRS[place::4]
        write(folder / task / "train.parquet", [*own[2:], own[2], own[0], SHARED, "everywhere"])
        write(folder / task / "test.parquet", [*own[:2], SHARED] if task == "cr" else own[:2])
    return folder


def held(data: Path, split: str) -> set[str]:
    files = data.glob(f"*/{split}.parquet")
    return {text for file in files for text in pq.read_table(file).column("text").to_pylist()}


def made(data: Path, out: Path) -> list[str]:
    main(data, out, vocabulary=300, column="text")
    texts: list[str] = pq.read_table(out / "text.parquet").column("text").to_pylist()
    return texts


def test_no_test_splits_input_is_trained_on_and_every_other_once(data: Path, tmp_path: Path) -> None:
    texts = made(data, tmp_path / "out")
    assert len(texts) == len(set(texts)) and set(texts) == held(data, "train") - held(data, "test")


def test_each_origin_has_equally_many_rows_and_none_that_others_or_the_test_hold(data: Path, tmp_path: Path) -> None:
    made(data, tmp_path / "out")
    split = {
        name: pq.read_table(tmp_path / "out" / "origin" / f"{name}.parquet").to_pylist() for name in ("train", "test")
    }
    for rows in split.values():
        counts = Counter(row["label"] for row in rows)
        assert set(counts) == set(ORIGINS.values()) and len(set(counts.values())) == 1
        assert not {row["text"] for row in rows} & {"everywhere"}
    assert not {row["text"] for row in split["train"]} & held(data, "test")
    truth = {text: label for place, label in enumerate(ORIGINS.values()) for text in PAIRS[place::4]}
    assert all(truth.get(row["text"], "product") == row["label"] for rows in split.values() for row in rows)


def test_the_tokenizer_gives_the_text_back_with_eos_behind_it(data: Path, tmp_path: Path) -> None:
    texts = made(data, tmp_path / "out")
    tokenizer = AutoTokenizer.from_pretrained(tmp_path / "out" / "tokenizer")
    for text in texts:
        ids = tokenizer(text)["input_ids"]
        assert ids[-1] == tokenizer.eos_token_id and tokenizer.unk_token_id not in ids
        assert tokenizer.decode(ids, skip_special_tokens=True) == text


def test_what_is_there_already_is_left_alone(data: Path, tmp_path: Path) -> None:
    made(data, tmp_path / "out")
    before = (tmp_path / "out" / "text.parquet").stat().st_mtime_ns
    write(data / "trec" / "train.parquet", ["something else"])
    made(data, tmp_path / "out")
    assert (tmp_path / "out" / "text.parquet").stat().st_mtime_ns == before


def test_a_folder_without_corpora_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match=r"nothing/\*/train.parquet: there is no such file"):
        made(tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()
