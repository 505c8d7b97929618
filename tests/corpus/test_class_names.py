"""ClassLabel columns, as `datasets` writes them: their names are the texts."""

import json
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Any

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpus import TokenizerSpec, check_task
from pipeline.corpus.files import inspect_files
from pipeline.corpus.plain_text import check_text
from pipeline.corpus.reading import read_texts, read_units
from pipeline.corpus.rows import row_identities
from pipeline.corpus.shards import shard_key
from pipeline.corpus.task_corpus import task_recipe
from pipeline.errors import CorpusError
from pipeline.settings import TextSettings

NAMES = ("negative", "positive")


def _write(path: Path, labels: Sequence[int | None], names: Any = NAMES, kind: pa.DataType | None = None) -> Path:
    """As `Dataset.to_parquet` of datasets 5.2 writes a table; no metadata where `names` is None."""
    table = pa.table({"text": [f"text {i}" for i in range(len(labels))], "label": pa.array(labels, kind or pa.int64())})
    if names is not None:
        label = {"names": list(names), "_type": "ClassLabel"}
        features = {"text": {"dtype": "string", "_type": "Value"}, "label": label}
        table = table.replace_schema_metadata({"huggingface": json.dumps({"info": {"features": features}})})
    pq.write_table(table, path)
    return path


def _labels(path: Path) -> list[str | None]:
    source = inspect_files(str(path), "task 'x', train")
    read = [t for unit in read_units(source) for _, t in read_texts(source.filesystem, unit, ["label"], source.where)]
    return [label for texts in read for label in texts["label"]]


@pytest.mark.parametrize("kind", [pa.int64(), pa.int8(), pa.uint16()])
def test_a_class_is_read_as_its_name_and_no_label_as_null(tmp_path: Path, kind: pa.DataType) -> None:
    none = None if kind == pa.uint16() else -1
    assert _labels(_write(tmp_path / "a.parquet", [0, 1, none, None, 1], kind=kind)) == [*NAMES, None, None, "positive"]


def test_classes_that_became_floats_are_their_names_too(tmp_path: Path) -> None:
    assert _labels(_write(tmp_path / "a.parquet", [0, 1, None], kind=pa.float64())) == [*NAMES, None]


def test_numbers_and_texts_without_names_stay_as_they_are(tmp_path: Path) -> None:
    assert _labels(_write(tmp_path / "a.parquet", [0, 1], names=None)) == ["0", "1"]
    assert _labels(_write(tmp_path / "b.parquet", ["no", "yes"], kind=pa.string())) == ["no", "yes"]  # type: ignore[list-item]
    for place, damaged in enumerate([b"{", b"[]", b'{"info": 1}', b"\xff", b"[" * 100_000]):
        table = pa.table({"label": [0, 1]}).replace_schema_metadata({b"huggingface": damaged})
        pq.write_table(table, tmp_path / f"{place}.parquet")
        assert _labels(tmp_path / f"{place}.parquet") == ["0", "1"]


@pytest.mark.parametrize("number", [2, -2, 2**62])
def test_a_class_without_a_name_is_one_sentence_with_the_file(tmp_path: Path, number: int) -> None:
    with pytest.raises(CorpusError, match=f"a.parquet holds the class {number}, while its ClassLabel has 2 names"):
        _labels(_write(tmp_path / "a.parquet", [0, number]))


@pytest.mark.parametrize("others", [("positive", "negative"), ("negative", "positive", "neutral"), None])
def test_files_and_splits_that_name_classes_differently_are_refused_by_both_names(
    tmp_path: Path, make_task: Callable[..., Any], others: Sequence[str] | None
) -> None:
    (tmp_path / "both").mkdir()
    one, other = (
        _write(tmp_path / "both" / "a.parquet", [0, 1]),
        _write(tmp_path / "both" / "b.parquet", [0, 1], others),
    )
    for task in (make_task(tmp_path / "both", dev=one), make_task(one, dev=other), make_task(one, dev=one, test=other)):
        with pytest.raises(CorpusError, match=r"^task 'x', .*'label'") as refused:
            check_task("x", task)
        assert str(one) in str(refused.value) and str(other) in str(refused.value)
    with pytest.raises(CorpusError, match=r"^corpus, train: .*'label'"):
        check_text(TextSettings(train=str(tmp_path / "both"), text="{text} {label}"))
    check_task("x", make_task(one, dev=other, target="{text}"))


def test_labels_that_are_the_numbers_get_the_names_to_write(tmp_path: Path, make_task: Callable[..., Any]) -> None:
    train = _write(tmp_path / "a.parquet", [0, 1])
    with pytest.raises(CorpusError, match=r"'labels' is \[0, 1\].* write labels: \[\"negative\", \"positive\"\]"):
        check_task("x", make_task(train, dev=train, labels=("0", "1")))
    check_task("x", make_task(train, dev=train, labels=NAMES))
    check_task("x", make_task(train, dev=train, labels=("it is negative", "it is positive"), target="it is {label}"))


def test_shards_and_digest_are_of_the_names_too(
    tmp_path: Path, tokenizer_dir: Path, make_task: Callable[..., Any]
) -> None:
    keys, ids = set(), set()
    tokenizer = TokenizerSpec(str(tokenizer_dir), "digest of the tokenizer", "decoder-only")
    for names in (NAMES, ("bad", "good"), None):
        file = _write(tmp_path / "a.parquet", [0, 1], names)
        task = make_task(file, dev=file)
        plan = check_task("x", task)
        keys.add(shard_key(plan.sources["train"], task_recipe(plan, task, tokenizer), tokenizer)[0])
        ids.add(tuple(row_identities(["a", "b"], _labels(file)).tolist()))
    assert len(keys) == len(ids) == 3


def test_names_of_a_column_that_no_template_uses_do_not_name_the_shards(
    tmp_path: Path, tokenizer_dir: Path, make_task: Callable[..., Any]
) -> None:
    tokenizer = TokenizerSpec(str(tokenizer_dir), "digest of the tokenizer", "decoder-only")
    file = _write(tmp_path / "a.parquet", [0, 1])
    for target, same in (("{text}", True), ("{label}", False)):
        task = make_task(file, dev=file, target=target)
        plan = check_task("x", task)
        source = plan.sources["train"]
        unnamed = replace(source, files=tuple(replace(file, class_names=()) for file in source.files))
        recipe = task_recipe(plan, task, tokenizer)
        assert (shard_key(source, recipe, tokenizer) == shard_key(unnamed, recipe, tokenizer)) is same
