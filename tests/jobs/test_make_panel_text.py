"""The panels' text: nothing that a test split holds, everything else once, and a tokenizer that gives it back."""

from pathlib import Path

import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import typer
from transformers import AutoTokenizer

from jobs.make_panel_text import main

WORDS = ["river", "stone", "cloud", "paper", "window", "garden", "yellow", "silent", "running", "letter", "winter"]


def write(path: Path, texts: list[str]) -> None:
    path.parent.mkdir(parents=True, exist_ok=True)
    pq.write_table(pa.table({"text": texts, "label": ["a"] * len(texts)}), path)


@pytest.fixture
def data(tmp_path: Path) -> Path:
    folder = tmp_path / "data"
    pairs = [f"{one} {two}" for one in WORDS for two in WORDS]
    write(folder / "first" / "train.parquet", [*pairs, pairs[0], "stands in the other's test"])
    write(folder / "first" / "test.parquet", [pairs[1]])
    write(folder / "second" / "train.parquet", [pairs[2], "only here"])
    write(folder / "second" / "test.parquet", ["stands in the other's test"])
    return folder


def made(data: Path, out: Path) -> list[str]:
    main(data, out, vocabulary=300, column="text")
    texts: list[str] = pq.read_table(out / "text.parquet").column("text").to_pylist()
    return texts


def test_no_test_splits_input_is_trained_on_and_every_other_once(data: Path, tmp_path: Path) -> None:
    texts = made(data, tmp_path / "out")
    left_out = {f"{WORDS[0]} {WORDS[1]}", "stands in the other's test"}
    everything = {f"{one} {two}" for one in WORDS for two in WORDS} | {"only here"}
    assert len(texts) == len(set(texts)) and set(texts) == everything - left_out


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
    write(data / "first" / "train.parquet", ["something else"])
    made(data, tmp_path / "out")
    assert (tmp_path / "out" / "text.parquet").stat().st_mtime_ns == before


def test_a_folder_without_corpora_is_refused_by_name(tmp_path: Path) -> None:
    with pytest.raises(typer.BadParameter, match=r"nothing/\*/train.parquet: there is no such file"):
        made(tmp_path / "nothing", tmp_path / "out")
    assert not (tmp_path / "out").exists()
