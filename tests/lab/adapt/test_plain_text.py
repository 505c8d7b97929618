"""Plain text through Ray Data: documents in one array of tokens, tokenised once."""

import numpy as np
import pytest
import ray

from pipeline.corpus.encoding import TokenizerSpec
from pipeline.corpus.plain_text import check_text, prepare_text, read_text
from pipeline.errors import CorpusError
from pipeline.settings import TextSettings
from tests.lab.adapt.text import documents, write_text
from tests.tiny import make_tokenizer

pytestmark = pytest.mark.slow

EOS = 1


@pytest.fixture(scope="module", autouse=True)
def running_ray():
    ray.init(address="local", num_cpus=2, include_dashboard=False, object_store_memory=100 * 2**20, log_to_driver=False)
    yield
    ray.shutdown()


@pytest.fixture
def spec(tmp_path):
    make_tokenizer(eos_template=True).save_pretrained(tmp_path / "tokenizer")
    return TokenizerSpec(str(tmp_path / "tokenizer"), "digest", "encoder-decoder")


def nothing():
    return None


def prepare(tmp_path, spec, texts, name="a.parquet", **settings):
    path = write_text(tmp_path / name, texts)
    return prepare_text(TextSettings(train=str(path), **settings), spec, tmp_path / "runs", nothing)


def test_every_document_is_there_once_with_its_own_tokens_and_eos_behind_it(tmp_path, spec):
    texts = documents(30)
    corpus = prepare(tmp_path, spec, [*texts, None, "  "], max_bad_rows=0.1)
    assert corpus.counts == {"ok": 30, "null": 1, "empty": 1}
    tokens = read_text(corpus, EOS)
    ends = np.flatnonzero(tokens == EOS) + 1
    assert ends[-1] == len(tokens)
    found = [part[:-1].tolist() for part in np.split(tokens, ends[:-1])]
    tokenizer = make_tokenizer(eos_template=False)
    assert sorted(found) == sorted(tokenizer(texts).input_ids)


def test_documents_over_the_bound_are_told_as_left_out(tmp_path, spec):
    corpus = prepare(tmp_path, spec, [*documents(30), None, "x" * (16 * 2**20 + 1)], max_bad_rows=0.1)
    assert corpus.counts == {"ok": 30, "null": 1, "empty": 0, "input_long": 1}
    assert corpus.left_out == "1 null or empty ones, 1 over 16 MiB"


def test_the_order_is_that_of_the_documents_whatever_files_they_are_in(tmp_path, spec):
    texts = documents(20)
    one = prepare(tmp_path, spec, texts)
    for number, part in enumerate((texts[12:], texts[:12])):
        write_text(tmp_path / "parts" / f"{number}.parquet", part)
    several = prepare_text(TextSettings(train=str(tmp_path / "parts")), spec, tmp_path / "runs", nothing)
    assert several.digest == one.digest and several.dir != one.dir
    np.testing.assert_array_equal(read_text(one, EOS), read_text(several, EOS))


def test_an_unchanged_corpus_is_not_tokenised_again(tmp_path, spec):
    path = write_text(tmp_path / "a.parquet", documents(5))
    settings, asked = TextSettings(train=str(path)), []
    for _ in range(2):
        prepare_text(settings, spec, tmp_path / "runs", lambda: asked.append(1))
    assert asked == [1]


def test_a_corpus_without_its_column_or_with_too_many_empty_rows_is_refused(tmp_path, spec):
    path = write_text(tmp_path / "a.parquet", ["a", None, None])
    with pytest.raises(CorpusError, match=r"66\.7% of 3 rows are null or empty"):
        prepare_text(TextSettings(train=str(path)), spec, tmp_path / "runs", nothing)
    with pytest.raises(CorpusError, match="column 'body'"):
        check_text(TextSettings(train=str(path), text="{body}"))
