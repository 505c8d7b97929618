from dataclasses import replace

import pyarrow as pa
import pyarrow.parquet as pq
import pytest

from pipeline.corpus.encoding import tokenizer_content
from pipeline.errors import CorpusError
from pipeline.lab.benchmark.bare_tokenizer import bare_ways, run_bare
from pipeline.lab.benchmark.corpus import measure_corpus
from pipeline.lab.benchmark.corpus_files import read_sentences, write_corpus
from tests.tiny import WORDS, make_model, make_tokenizer


@pytest.fixture
def data(tmp_path):
    sentences = [" ".join(WORDS[first : first + 9]) for first in range(0, len(WORDS) - 9, 3)]
    (tmp_path / "data" / "task").mkdir(parents=True)
    pq.write_table(pa.table({"text": sentences}), tmp_path / "data" / "task" / "train.parquet")
    return tmp_path / "data"


def test_a_generated_corpus_has_the_size_asked_for_and_few_texts_twice(data, tmp_path):
    rows = write_corpus(tmp_path / "a.parquet", 6, read_sentences(data), pieces=5)
    table = pq.read_table(tmp_path / "a.parquet")
    assert table.num_rows == rows
    assert 6e6 <= (tmp_path / "a.parquet").stat().st_size < 12e6
    assert len(table["text"].unique()) > 0.95 * rows


@pytest.mark.slow
@pytest.mark.processes
def test_the_bare_tokenizer_sees_every_text_once_in_each_way_to_use_the_cores(data, tmp_path):
    write_corpus(tmp_path / "a.parquet", 0.1, read_sentences(data))
    tokenizer = make_tokenizer(eos_template=False)
    texts = pq.read_table(tmp_path / "a.parquet")["text"].to_pylist()
    expected = sum(map(len, tokenizer(texts)["input_ids"]))
    ways = bare_ways(2)
    for way in (*ways, replace(ways[0], kept_words=5)):
        run = run_bare(tokenizer_content(tokenizer), tmp_path / "a.parquet", way)
        assert run.tokens == expected and run.seconds > 0 and run.cpu_seconds > 0


def test_a_folder_without_a_corpus_gets_one_sentence(tmp_path):
    with pytest.raises(CorpusError, match="there is no <task>/train"):
        read_sentences(tmp_path)


@pytest.mark.slow
def test_both_sides_have_the_same_tokens_and_nothing_is_left(data, tmp_path):
    scratch = tmp_path / "scratch"
    scratch.mkdir()
    model = str(make_model(tmp_path / "model"))
    figures = measure_corpus(data, model, [0.1], 1, [0.1], scratch)
    assert [of.texts for of in figures.speed] == ["rows", "documents"]
    assert all(min(*of.bare.rates, *of.keeping.rates, *of.ours) > 0 for of in figures.speed)
    (night,) = figures.nights
    assert night.second_seconds < night.first_seconds
    assert 0 < night.worker_mib <= night.workers_mib
    assert not list(scratch.iterdir())
