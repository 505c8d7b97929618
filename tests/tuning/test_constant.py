"""What answers score that never look at the row: as scikit-learn's own constant classifier, and for f1 as guesses."""

from collections import Counter
from itertools import product
from math import prod

import numpy as np
import pyarrow as pa
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st
from sklearn.dummy import DummyClassifier
from sklearn.metrics import accuracy_score, f1_score
from tokenizers import Tokenizer, models
from transformers import PreTrainedTokenizerFast

from pipeline.corpus.reader import SplitRef
from pipeline.corpus.rows import SHARD_SCHEMA, RowStatus
from pipeline.corpus.task_corpus import TaskCorpus
from pipeline.corpus.writing import write_rows
from pipeline.tuning import constant
from pipeline.tuning.constant import constant_scores, guessed_f1, most_common
from pipeline.tuning.metrics import label_metric

LABELS = st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=60)


def letters():
    vocabulary = {"</s>": 0, "a": 1, "b": 2, "c": 3}
    return PreTrainedTokenizerFast(
        tokenizer_object=Tokenizer(models.WordLevel(vocabulary, unk_token="</s>")), eos_token="</s>"
    )


LETTERS = letters()


def write_split(folder, targets, statuses=None):
    statuses = statuses or [RowStatus.OK] * len(targets)
    columns = {
        "row_id": np.arange(len(targets), dtype=np.uint64) * 1000,
        "status": [int(status) for status in statuses],
        "input_ids": [[1]] * len(targets),
        "target_ids": [[LETTERS.convert_tokens_to_ids(target), LETTERS.eos_token_id] for target in targets],
        "target": targets,
    }
    table = pa.table({field.name: pa.array(columns[field.name], field.type) for field in SHARD_SCHEMA})
    write_rows(folder, table)
    return SplitRef(str(folder))


def corpus_of(folder, **splits):
    refs = {name: write_split(folder / name, targets) for name, targets in splits.items()}
    return TaskCorpus("t", refs, None, None, {}, "d")


@settings(max_examples=60, deadline=None)
@given(LABELS, LABELS, LABELS)
def test_it_is_what_scikit_learns_most_frequent_classifier_scores(tmp_path_factory, train, dev, test):
    corpus = corpus_of(tmp_path_factory.mktemp("t"), train=train, dev=dev, test=test)
    dummy = DummyClassifier(strategy="most_frequent").fit(np.zeros((len(train), 1)), train)
    for split, wanted in (("dev", dev), ("test", test)):
        said = dummy.predict(np.zeros((len(wanted), 1)))
        accuracy = accuracy_score(wanted, said)
        macro = f1_score(wanted, said, average="macro", zero_division=0.0)
        for metric, expected in (
            ("accuracy", accuracy),
            ("exact_match", accuracy),
            ("rouge_l", accuracy),
        ):
            assert constant_scores(corpus, metric, 500, LETTERS)[split] == pytest.approx(expected), metric
        # For f1 guesses count, too: none is worse.
        guesses = guessed_f1(Counter(train), wanted), guessed_f1(dict.fromkeys(train, 1), wanted)
        assert constant_scores(corpus, "f1", 500, LETTERS)[split] == pytest.approx(max(macro, *guesses))


@settings(max_examples=20, deadline=None)
@given(LABELS, st.lists(st.sampled_from(["a", "b", "c"]), min_size=1, max_size=3))
def test_a_guess_is_expected_to_score_the_mean_over_all_answers_that_it_may_give(train, wanted):
    for shares in (Counter(train), dict.fromkeys(train, 1)):
        likely = {label: count / sum(shares.values()) for label, count in shares.items()}
        expected = sum(
            prod(likely[label] for label in said) * label_metric("f1", said, wanted)
            for said in product(likely, repeat=len(wanted))
        )
        assert guessed_f1(shares, wanted) == pytest.approx(expected, abs=0.07), "within four standard errors"


def test_of_two_labels_a_guess_is_above_the_constant_answer_and_of_one_alone_both_are_perfect(tmp_path):
    corpus = corpus_of(tmp_path, train=["a"] * 95 + ["b"] * 5, dev=(["a"] * 95 + ["b"] * 5) * 3, test=["a"] * 50)
    scores = constant_scores(corpus, "f1", 500, LETTERS)
    assert scores["dev"] == pytest.approx(0.5, abs=0.01) and label_metric("f1", ["a"] * 20, ["a"] * 19 + ["b"]) < 0.49
    assert scores["test"] == 1.0
    assert guessed_f1({"a": 1}, ["a"] * 50) == 1.0


def test_it_is_scored_on_the_rows_that_an_evaluation_uses_and_for_loss_there_is_none(tmp_path):
    corpus = corpus_of(tmp_path, train=["a", "a", "b"], dev=["a", "b", "b", "b"])
    assert constant_scores(corpus, "accuracy", 2, LETTERS) == {"dev": 0.5}
    assert constant_scores(corpus, "loss", 2, LETTERS) == {}


def test_rows_that_are_not_used_are_not_counted_and_lost_shards_stop_nothing(tmp_path, caplog):
    corpus = corpus_of(tmp_path, train=["a"], dev=["a"])
    write_split(tmp_path / "train", ["b", "b", "a"], [RowStatus.EMPTY, RowStatus.EMPTY, RowStatus.OK])
    assert constant_scores(corpus, "accuracy", 9, LETTERS) == {"dev": 1.0}
    (tmp_path / "train" / "rows.arrow").unlink()
    assert constant_scores(corpus, "accuracy", 9, LETTERS) == {}
    assert "task 't': nobody can tell whether its prompt has learned: the token shards in" in caplog.text


def test_damaged_shards_stop_nothing_either_and_a_defect_of_ours_is_no_missing_answer(tmp_path, monkeypatch, caplog):
    corpus = corpus_of(tmp_path, train=["a"] * 900, dev=["a"])
    shard = tmp_path / "train" / "rows.arrow"
    whole = shard.read_bytes()
    shard.write_bytes(b"\x00" * len(whole))
    assert constant_scores(corpus, "accuracy", 9, LETTERS) == {} and "rows.arrow is damaged" in caplog.text
    shard.write_bytes(whole)

    def defect(*rest):
        raise ValueError("a defect")

    monkeypatch.setattr(constant, "score_texts", defect)
    with pytest.raises(ValueError, match="a defect"):
        constant_scores(corpus, "accuracy", 9, LETTERS)


def test_memory_stays_bounded_over_free_texts_and_a_frequent_one_is_still_found(monkeypatch):
    monkeypatch.setattr(constant, "_MOST_COUNTED", 10)
    texts = [text for i in range(500) for text in (f"free {i}", "often")]
    assert most_common(Counter([text]).popitem() for text in texts) == "often"
