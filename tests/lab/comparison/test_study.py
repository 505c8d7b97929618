"""What answers to a task's rows depend on."""

from types import SimpleNamespace

import pytest

from pipeline.lab.comparison.study import Study
from pipeline.settings import parse_settings
from tests.corpora import make_corpus
from tests.tiny import make_tokenizer


def deciding(folder, **task):
    corpus = make_corpus(folder, make_tokenizer(eos_template=False), "decoder-only", "film")
    settings = parse_settings({"model": {"path": "m"}, "tasks": {"film": {"train": "t", "dev": "d", **task}}})
    checked = SimpleNamespace(settings=settings)
    return Study(checked, folder, {"film": corpus}, None, None).deciding("film")


@pytest.mark.parametrize("changed", [{"label_score": "mean"}, {"calibrate": True}, {"metric": "f1"}], ids=str)
def test_an_answer_is_not_taken_for_that_to_labels_scored_in_another_way(tmp_path, changed):
    assert deciding(tmp_path / "a") == deciding(tmp_path / "b", label_score="sum", calibrate=False)
    assert deciding(tmp_path / "c", **changed) != deciding(tmp_path / "d")


def test_answers_kept_before_labels_could_be_scored_otherwise_are_still_found(tmp_path):
    digest, rest = deciding(tmp_path)
    assert digest == "digest of film"
    assert rest == "{'train': {'ok': 40}, 'dev': {'ok': 40}, 'test': {'ok': 40}} 256 64 ' ' " + (
        "('negative', 'positive') accuracy auto"
    )
